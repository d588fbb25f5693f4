"""The phases of a run, with the memory and seconds of each, computed from its settings alone."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from kvpo.config import Config
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.pages import PlannedRollout, cache_pages, groups_together
from kvpo.models.causal_wan import CausalWan
from kvpo.plan.cost import Costs, Work, blocks_work, members_work, replay_work
from kvpo.plan.memory import (
    Activations,
    Parameters,
    answer_bytes,
    clean_bytes,
    evaluation_pages,
    evidence_bytes,
    parameters_of,
    trajectory_bytes,
)
from kvpo.plan.replays import Replays, replays_of
from kvpo.plan.splits import Sharing
from kvpo.training.checkpoint import KEPT_CHECKPOINTS
from kvpo.training.evaluation import ROWS

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
    """Peak of decoding one latent frame of one video."""
    decode_flops: float = 0.0
    """FLOPs of decoding one latent frame."""
    rewards: Mapping[str, float] = field(default_factory=dict)
    """Reward models that run in the run's process, by name."""
    scoring: float = 0.0
    """Peak of a reward model's forward pass."""
    frozen_size: int = 4
    """Bytes per frozen parameter of the transformer."""
    frame: float = 0.0
    """Bytes of the pixels of one latent frame, float32."""


@dataclass(frozen=True)
class Rates:
    """Rates of a device: FLOPs and bytes per second."""

    flops: float
    bandwidth: float
    link: float = 400e9
    """Bytes per second from a device to others of its node (NVLink of an H200: at best 450e9)."""
    network: float = 45e9
    """Bytes per second from a device to other nodes (400 Gbit/s)."""

    def seconds(self, work: Work) -> float:
        """The larger of the times for arithmetic and for traffic."""
        return max(work.flops / self.flops, work.bytes / self.bandwidth)


@dataclass(frozen=True)
class Phase:
    """A phase of a run, and the bytes it holds on the device in addition to those always there."""

    name: str
    parts: Mapping[str, float]
    seconds: float | None = None
    """Per update; None if not estimated."""

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
    """Bytes on the device from the first update on."""
    phases: tuple[Phase, ...]
    host: Mapping[str, float]
    checkpoint: float
    disk: float
    split: Sharing

    def total(self, phase: Phase) -> float:
        """All bytes on the device in a phase; prompts are embedded before anything else is loaded."""
        if phase.name == "embed prompts":
            return CONTEXT * (not self.config.on_cpu) + phase.bytes
        return sum(self.standing.values()) + phase.bytes

    @property
    def peak(self) -> Phase:
        """The phase that needs the most memory."""
        return max(self.phases, key=self.total)

    @property
    def seconds(self) -> float:
        """Estimated seconds per update."""
        return sum(phase.seconds or 0.0 for phase in self.phases)


ONE_PROCESS = Sharing()


def plan_run(
    config: Config,
    model: CausalWan,
    generator: StreamingGenerator,
    rollout: PlannedRollout,
    surroundings: Surroundings,
    rates: Rates,
    split: Sharing = ONE_PROCESS,
) -> Plan:
    """Plan a run for the busiest of its ranks; ``split`` says how they share it.

    ``model`` is on the meta device. ``rollout`` is that rank's, a typical one: its groups fork alike.
    """
    parameters = parameters_of(config, model, surroundings.frozen_size)
    standing: dict[str, float] = {
        "weights": parameters.weights / split.parts,
        "adapter": parameters.adapter / split.parts,
        "adapter in the weights": 0 if split.shard else parameters.summed,
        "adapter beside the weights": 0 if split.shard else parameters.narrowed,
        "gathered layers": split.gathered(parameters, model.shape.num_layers),
        "starting policy": parameters.reference / split.parts,
        "optimiser": parameters.moments / split.parts,
        "moving average": parameters.average / split.parts,
    }
    if not config.backbone.offload:
        standing |= {"codec": surroundings.codec, "rewards": sum(surroundings.rewards.values())}
    if not config.on_cpu:
        standing["context"] = CONTEXT
    fork = rollout.forks[0]
    fitted = replace(config, exploration=replace(fork.exploration, branches=config.exploration.branches))
    own, replays = split.share(fitted), replays_of(fitted)
    weights = parameters.weights + parameters.adapter
    run = _Run(
        config=own,
        groups=replace(own, exploration=fitted.exploration),
        split=split,
        generator=generator,
        rollout=rollout,
        around=surroundings,
        rates=rates,
        parameters=parameters,
        costs=Costs(own, model.shape, weights, generator.page_bytes, fork.frame),
        replays=replays,
        own_replays=split.replayed(replays),
        pages=cache_pages(generator, [rollout] * config.optim.rollouts_per_refresh),
    )
    keep = KEPT_CHECKPOINTS + 2  # the best one, and the one being written
    return Plan(
        config=config,
        parameters=parameters,
        fork=fork.frame,
        pages=run.pages,
        page=generator.page_bytes,
        standing={name: float(size) for name, size in standing.items() if size},
        phases=_phases(run),
        host=_host(run),
        checkpoint=parameters.checkpoint,
        disk=keep * parameters.checkpoint,
        split=split,
    )


@dataclass(frozen=True)
class _Run:
    """The quantities from which a run's phases are computed."""

    config: Config
    """A rank's groups and branches, with the exploration that fits at the typical fork."""
    groups: Config
    """The same groups with all of their branches."""
    split: Sharing
    generator: StreamingGenerator
    rollout: PlannedRollout
    around: Surroundings
    rates: Rates
    parameters: Parameters
    costs: Costs
    replays: Replays
    """Replays of whole groups."""
    own_replays: Replays
    pages: int
    """Pages of the cache that a refresh's rollouts share."""

    @property
    def fork(self) -> int:
        """Frame of the fork."""
        return self.rollout.forks[0].frame

    @property
    def switches(self) -> bool:
        """True if any prompt switches."""
        return any(prompt.switches for prompt in self.rollout.prompts)

    @property
    def turn(self) -> int:
        """Groups that are explored together; their gradients are added up together, too."""
        return groups_together(self.groups.exploration, self.groups.optim.prompts_per_update)

    @property
    def kept(self) -> dict[str, float]:
        """Bytes of pages and clean latents, held from a collection to the last update on it."""
        clean = self.config.optim.rollouts_per_refresh * clean_bytes(self.groups, self.fork)
        return {"pages": self.pages * self.generator.page_bytes, "clean latents": clean}

    def forward(self, rows: int, streams: int, context: int) -> float:
        """Bytes of denoising a block and its clean pass, or of re-encoding at a switch, including pages."""
        activations, generator = Activations(self.config, self.costs.context), self.generator
        again = generator.deployment.reencoded(self.fork) if self.switches else 0
        one = activations.inference(rows, generator.block, context)
        one += rows * (generator.block + context * generator.keeps_contexts) * generator.page_bytes
        switched = activations.inference(streams, again, generator.deployment.sink)
        return max(one, switched + streams * again * generator.page_bytes)


def _phases(run: _Run) -> tuple[Phase, ...]:
    """Every phase that needs memory, in order."""
    streams = run.config.exploration.rows or ROWS
    frames = max(prompt.num_frames for prompt in run.rollout.prompts)
    held_out = evaluation_pages(run.config, run.generator, frames, switches=run.switches)
    streaming = {
        "pages": held_out * run.generator.page_bytes,
        "activations": run.forward(streams, streams, run.costs.context),
    }
    phases = [
        Phase("embed prompts", {"text encoder": run.around.text_encoder}),
        Phase("stream held-out videos", streaming),
        *_collecting(run),
        *_learning(run),
        *_exchanging(run),
    ]
    return tuple(
        Phase(one.name, {name: size for name, size in one.parts.items() if size}, one.seconds)
        for one in phases
        if any(one.parts.values())
    )


def _collecting(run: _Run) -> list[Phase]:
    """Exploring, decoding and scoring; trajectories are held until they have become lessons."""
    config, costs, around, rates = run.config, run.costs, run.around, run.rates
    optim, exploration, block = config.optim, config.exploration, run.generator.block
    groups, members = optim.prompts_per_update, exploration.branches + 1
    rows = min(exploration.rows or groups * members, groups * members)
    exploring = run.forward(rows, rows, max(costs.context, costs.routed))
    meanwhile = exploring if groups * optim.rollouts_per_refresh > 1 else 0.0
    visited = trajectory_bytes(run.groups, run.replays)
    stored = run.kept | {"trajectories": optim.rollouts_per_refresh * visited}
    stored |= {"quantised weights": run.parameters.quantised}
    tail = exploration.blocks + exploration.tail_blocks
    decoded = groups * (members * tail * block + run.fork)
    seconds = sum(rates.seconds(work) for work in _explored(run, costs))
    decoder = {"codec": around.codec * config.backbone.offload, "decoder": around.decode}
    rewards = {
        "rewards": max(around.rewards.values(), default=0.0) * config.backbone.offload,
        "reward activations": around.scoring * bool(around.rewards),
    }
    at_once = {"exploring at the same time": meanwhile}
    return [
        Phase("explore", stored | {"activations": exploring}, seconds),
        Phase("decode", stored | at_once | decoder, rates.seconds(Work(decoded * around.decode_flops, 0.0))),
        Phase("score", stored | at_once | rewards),
    ]


def _explored(run: _Run, costs: Costs) -> tuple[Work, Work]:
    """Work of growing the roots of a rank's groups, and of running their members."""
    config, exploration = run.config, run.config.exploration
    groups, blocks = config.optim.prompts_per_update, run.fork // run.generator.block
    members = groups * (exploration.branches + 1)
    rows = min(exploration.rows or members, members)
    together = min(rows, groups)
    root = blocks_work(costs, blocks, together, first=True).times(groups / together)
    return root, members_work(costs, groups, rows)


def _learning(run: _Run) -> list[Phase]:
    """Replays with their backward passes, and the optimiser's step."""
    config, replays, split = run.config, run.own_replays, run.split
    evidence = config.optim.rollouts_per_refresh * evidence_bytes(config, run.replays)
    gradients = 4.0 * run.parameters.trained / split.parts
    stored = run.kept | {"evidence": evidence, "gradients": gradients}
    replaying = {
        "answers": answer_bytes(config, run.replays),
        "gradients to be added": (run.turn * split.kept(replays) - 1) * gradients,
        "sum of gradients": gradients / split.adding,
        "activations": Activations(config, run.costs.context).training(replays.states),
    }
    seconds = run.rates.seconds(_replay_work(config, replays, run.costs))
    return [
        Phase("replay and backward", stored | replaying, seconds),
        Phase("optimiser step", stored | {"its temporaries": gradients}),
    ]


def _exchanging(run: _Run) -> list[Phase]:
    """Traffic between ranks: gradients, and sharded weights before each layer of each pass."""
    split, config, rates = run.split, run.config, run.rates
    if split.ranks == 1:
        return []
    replays = run.own_replays

    def read(costs: Costs) -> float:
        works = (*_explored(run, costs), _replay_work(config, replays, costs))
        return sum(work.bytes for work in works)

    weights = read(run.costs) - read(replace(run.costs, weight_bytes=0.0)) if split.shard else 0.0
    sent = split.exchanged(config, run.parameters, replays)
    across = split.ranks > split.per_node
    seconds = sent / (rates.network if across else rates.link)
    seconds += weights * (split.parts - 1) / split.parts / rates.link
    buckets = split.buckets(run.parameters, replays, run.turn)
    one = 4.0 * run.parameters.trained / split.parts
    gradients = {"gradients": one * run.turn * split.kept(replays), "sum of gradients": one / split.adding}
    return [Phase("exchange", run.kept | gradients | {"buckets": buckets}, seconds)]


def _replay_work(config: Config, replays: Replays, costs: Costs) -> Work:
    """All replays of an update, by the rollout, starting and current policies, and the backward passes."""
    optim = config.optim

    def replayed(trajectories: float, *, backward: bool = False) -> Work:
        together, states, steps = replays.together, replays.states, replays.steps
        return replay_work(costs, 1, together, states, steps, backward=backward).times(trajectories)

    trained = optim.prompts_per_update * replays.trajectories
    stored = 1 - 1 / optim.rollouts_per_refresh if optim.inner_epochs == 1 else 1.0
    # By the starting policy, for the table ahead of any backward pass if it comes apart, and by the teacher.
    before = trained * (1 + replays.apart) + optim.prompts_per_update * replays.routed
    every = replayed(before) + replayed(trained, backward=True)
    return every.times(optim.inner_epochs) + replayed(trained * (stored + replays.old))


def _host(run: _Run) -> dict[str, float]:
    """Bytes of host memory: a group's pixels, the clips cut from them, and everything kept off the device."""
    config, around, parameters = run.config, run.around, run.parameters
    exploration, block = config.exploration, config.stream.block
    frames = (exploration.branches + 1) * (exploration.blocks + exploration.tail_blocks) * block
    parts = {
        "process": PROCESS,
        "pixels and clips": 2 * frames * around.frame,
        "checkpoint being written": 0.0 if config.on_cpu else parameters.checkpoint,
        "state before the update": 4 * parameters.trained + parameters.moments if config.on_cpu else 0.0,
    }
    if config.backbone.offload:
        parts |= {"codec": around.codec, "rewards": sum(around.rewards.values())}
    return {name: float(size) for name, size in parts.items() if size}
