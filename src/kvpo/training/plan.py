"""The phases of a run with the memory and the seconds of each, from its settings alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvpo.config import Config
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.pages import PlannedRollout
from kvpo.models.causal_wan import CausalWan
from kvpo.training.memory import (
    Activations,
    Parameters,
    evaluation_pages,
    parameters_of,
    pool_pages,
    replayed_members,
    replayed_states,
    trajectory_bytes,
)
from kvpo.training.work import (
    Costs,
    Work,
    backward_work,
    blocks_work,
    forward_work,
    members_work,
    reencoding_work,
)

CONTEXT = 0.8e9
"""Bytes of a CUDA context with its libraries' workspaces."""
PROCESS = 3e9
"""Bytes of host memory of a Python process with torch and its CUDA libraries."""


@dataclass(frozen=True)
class Surroundings:
    """Memory used by everything but the transformer, in bytes; 0 where there is none."""

    text_encoder: float = 0.0
    codec: float = 0.0
    decode: float = 0.0
    """Most of decoding one latent frame of one video."""
    decode_flops: float = 0.0
    """Operations of decoding one latent frame."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Models that score in the process of the run, by name."""
    scoring: float = 0.0
    """Most of a forward pass of a reward model."""
    frozen_size: int = 4
    """Of a frozen parameter of the transformer."""
    frame: float = 0.0
    """Bytes of the pixels of one latent frame, float32."""


@dataclass(frozen=True)
class Rates:
    """Operations and bytes that a device manages per second."""

    flops: float
    bandwidth: float

    def seconds(self, work: Work) -> float:
        """The larger of the times for arithmetic and for traffic."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


@dataclass(frozen=True)
class Phase:
    """A phase of a run, with what it holds on the device in addition to what is always there."""

    name: str
    parts: Mapping[str, float]
    seconds: float | None = None
    """Per update; None where it is not estimated."""

    @property
    def bytes(self) -> float:
        return sum(self.parts.values())


@dataclass(frozen=True)
class Plan:
    """Memory, disk and time of a run; bytes and seconds."""

    config: Config
    parameters: Parameters
    fork: int
    pages: int
    page: float
    standing: Mapping[str, float]
    """Held on the device from the first update on."""
    phases: tuple[Phase, ...]
    host: Mapping[str, float]
    checkpoint: float
    disk: float

    def total(self, phase: Phase) -> float:
        """All that is on the device during a phase; prompts are embedded before anything else is loaded."""
        if phase.name == "embed prompts":
            return CONTEXT * (self.config.device != "cpu") + phase.bytes
        return sum(self.standing.values()) + phase.bytes

    @property
    def peak(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=self.total)

    @property
    def seconds(self) -> float:
        """Estimated seconds per update."""
        return sum(phase.seconds or 0.0 for phase in self.phases)


def plan_run(
    config: Config,
    model: CausalWan,
    generator: StreamingGenerator,
    rollout: PlannedRollout,
    surroundings: Surroundings,
    rates: Rates,
) -> Plan:
    """The plan of a run; ``model`` is on the meta device, ``rollout`` typical: its groups fork alike."""
    parameters = parameters_of(config, model, surroundings.frozen_size)
    standing = {
        "weights": parameters.weights,
        "adapter": parameters.adapter,
        "starting policy": parameters.reference,
        "optimiser": parameters.moments,
        "moving average": parameters.average,
    }
    if not config.backbone.offload:
        standing |= {"codec": surroundings.codec, "rewards": sum(surroundings.rewards.values())}
    if config.device != "cpu":
        standing["context"] = CONTEXT
    pool = pool_pages(config, generator, rollout)
    fork, exploration = rollout.forks[0].frame, rollout.forks[0].exploration
    fitted = replace(config, exploration=exploration)
    weights = parameters.weights + parameters.adapter
    costs = Costs(fitted, model.shape, weights, generator.page_bytes, fork)
    keep = config.checkpoint.keep + 2  # the best one, and the one being written
    return Plan(
        config=config,
        parameters=parameters,
        fork=fork,
        pages=pool,
        page=generator.page_bytes,
        standing={name: float(size) for name, size in standing.items() if size},
        phases=_phases(config, generator, rollout, surroundings, rates, parameters, costs, pool),
        host=_host(config, rollout, surroundings, parameters),
        checkpoint=parameters.checkpoint,
        disk=keep * parameters.checkpoint,
    )


def _phases(
    config: Config,
    generator: StreamingGenerator,
    rollout: PlannedRollout,
    around: Surroundings,
    rates: Rates,
    parameters: Parameters,
    costs: Costs,
    pool: int,
) -> tuple[Phase, ...]:
    fork, exploration = rollout.forks[0].frame, rollout.forks[0].exploration
    optim, block = config.optim, generator.block
    page = generator.page_bytes
    activations = Activations(config, costs.context)
    switches = any(prompt.switches for prompt in rollout.prompts)
    members = exploration.branches + 1
    groups = optim.prompts_per_update
    rows = min(exploration.rows or groups * members, groups * members)
    again = generator.deployment.reencoded(fork) if switches else 0

    def forward(rows: int, streams: int, context: int) -> float:
        """Denoising and the clean pass of a block, or re-encoding at a switch, keys and values included."""
        one = activations.inference(rows, block, context) + rows * block * page
        return max(one, activations.inference(streams, again, generator.deployment.sink)
                   + streams * again * page)  # fmt: skip

    streams = config.exploration.rows or 32
    frames = max(prompt.num_frames for prompt in rollout.prompts)
    held_out = evaluation_pages(config, generator, frames, switches=switches)
    stored = {
        "pages": pool * page,
        "trajectories": optim.rollouts_per_refresh * trajectory_bytes(config, fork),
    }
    exploring = forward(rows, min(rows, groups * members), max(costs.context, costs.routed))
    streaming = forward(streams, streams, costs.context)
    beside = exploring if groups * optim.rollouts_per_refresh > 1 else 0.0
    visiting = config.backbone.offload
    tail = exploration.blocks + exploration.tail_blocks
    decoded = groups * (members * tail * block + fork)
    states = replayed_states(config)
    root = blocks_work(costs, fork // block, min(rows, groups)).times(groups / min(rows, groups))
    branches = members_work(costs, groups, rows)
    gradients = {"gradients": 4.0 * parameters.trained}
    phases = [
        Phase("embed prompts", {"text encoder": around.text_encoder}),
        Phase("stream held-out videos", {"pages": held_out * page, "activations": streaming}),
        Phase("explore", stored | {"activations": exploring}, rates.seconds(root) + rates.seconds(branches)),
        Phase(
            "decode",
            stored | {"exploring beside": beside, "codec": around.codec * visiting, "decoder": around.decode},
            rates.seconds(Work(decoded * around.decode_flops, 0.0)),
        ),
        Phase(
            "score",
            stored
            | {
                "exploring beside": beside,
                "rewards": max(around.rewards.values(), default=0.0) * visiting,
                "reward activations": around.scoring * bool(around.rewards),
            },
        ),
        Phase(
            "replay and backward",
            stored | gradients | {"activations": activations.training(states)},
            rates.seconds(_replay_work(config, costs)),
        ),
        Phase("optimiser step", stored | gradients | {"its temporaries": 4.0 * parameters.trained}),
    ]
    return tuple(
        Phase(one.name, {name: size for name, size in one.parts.items() if size}, one.seconds)
        for one in phases
        if any(one.parts.values())
    )


def _replay_work(config: Config, costs: Costs) -> Work:
    """All replays of an update: of the rollout policy, the starting policy, the current one, and backward."""
    optim, objective, exploration = config.optim, config.objective, config.exploration
    trained = optim.prompts_per_update * (
        (objective.keep_best + objective.keep_worst or exploration.branches) + 1
    )
    together = replayed_members(config)
    states = replayed_states(config)
    passes_of_window = together * exploration.blocks * objective.grad_steps / states
    forward = forward_work(costs, states).times(passes_of_window)
    once = reencoding_work(costs, together) + forward
    stored = 1 - 1 / optim.rollouts_per_refresh if optim.inner_epochs == 1 else 1.0
    # The starting policy's, the energies' before any backward where they come apart, and the current one's.
    passes = 2 + (together < trained)
    every = once.times(passes) + backward_work(costs, states).times(passes_of_window)
    return (every.times(optim.inner_epochs) + once.times(stored)).times(trained / together)


def _host(
    config: Config, rollout: PlannedRollout, around: Surroundings, parameters: Parameters
) -> dict[str, float]:
    """Host memory: pixels of a group's members, the clips cut from them, what is kept off the device."""
    exploration, block = rollout.forks[0].exploration, config.stream.block
    frames = (exploration.branches + 1) * (exploration.blocks + exploration.tail_blocks) * block
    parts = {
        "process": PROCESS,
        "pixels and clips": 2 * frames * around.frame,
        "checkpoint being written": parameters.checkpoint if config.device != "cpu" else 0.0,
        "state before the update": 0.0
        if config.device != "cpu"
        else 4 * parameters.trained + parameters.moments,
    }
    if config.backbone.offload:
        parts |= {"codec": around.codec, "rewards": sum(around.rewards.values())}
    return {name: float(size) for name, size in parts.items() if size}
