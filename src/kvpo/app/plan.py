"""`kvpo plan`: what a run will need, before anything is loaded, and which settings fit a device."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from kvpo.app.build import streaming_generator
from kvpo.app.configuration import assign, flat
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.engine.forks import plan_forks
from kvpo.engine.pages import PlannedRollout
from kvpo.files import write_atomic
from kvpo.models.causal_wan import CausalWan
from kvpo.prompt_files import read_prompts
from kvpo.prompts import VideoPrompt
from kvpo.training.gradients import trajectories_together
from kvpo.training.plan import Plan, Rates, Surroundings, plan_run

GB = 1e9
UMT5_PARAMETERS = 5_680_910_336
VAE_PARAMETERS = 126_892_531
VAE_DECODE, VAE_FLOPS = 27_400, 33.8e6
"""Bytes and operations per pixel of decoding one latent frame with the Wan VAE in float32: two sets of
carried features and the largest layer's tensors."""
SCORING = 2e9
"""Allowance for a reward model's forward pass."""
REWARD_BYTES = {
    "hpsv3": 16.5e9, "videoalign": 5.0e9, "hpsv2": 3.9e9, "pickscore": 3.9e9, "clip_score": 1.7e9,
    "aesthetic": 1.7e9, "image_reward": 1.8e9, "subject_consistency": 0.35e9,
}  # fmt: skip
"""Reward models as they are loaded; the three scores of VideoAlign come out of one model."""
ALIKE = ("backbone.offload", "optim.checkpointing", "optim.replay_rows", "exploration.rows")
"""Settings that change results by rounding alone."""
SPARE = 0.04
"""Share of the device that the allocator cannot use for want of a large enough gap."""


@dataclass(frozen=True)
class Advice:
    """Settings to add so that a run fits."""

    flags: tuple[str, ...]
    changes_the_run: bool
    """Whether results differ beyond rounding."""
    plan: Plan


class Planner:
    """Plans of configurations that share a transformer."""

    def __init__(self, config: Config, rates: Rates) -> None:
        self.rates = rates
        with torch.device("meta"):
            self.model = CausalWan(config.model)

    def plan(self, config: Config) -> Plan:
        """The plan of a configuration of the same geometry. Raises ValueError where no video can fork."""
        generator = streaming_generator(config, self.model)
        prompt = typical_prompt(config)
        optim = config.optim
        fork = plan_forks([prompt], config.exploration, generator.deployment).roomiest[-1]
        replayed = trajectories_together(
            optim.replay_rows, fork.exploration.blocks, config.objective.grad_steps
        )
        groups = optim.prompts_per_update
        rollout = PlannedRollout([prompt] * groups, [fork] * groups, replayed)
        return plan_run(config, self.model, generator, rollout, surroundings(config), self.rates)


def typical_prompt(config: Config) -> VideoPrompt:
    """A video of the run: the longest of the prompt file, or one of the configured length and switches."""
    if config.backbone.kind == "world":
        from kvpo.app.build import LONG_FRAMES

        third = LONG_FRAMES // 3 // config.stream.block * config.stream.block
        return VideoPrompt(0, ("", "", ""), (third, 2 * third), LONG_FRAMES)
    settings = config.prompts
    if settings.file:
        every = read_prompts(
            settings.file,
            num_frames=settings.frames,
            switches=settings.switches,
            block=config.stream.block,
        )
        return max(every, key=lambda prompt: (len(prompt.switches), prompt.num_frames))
    return VideoPrompt(0, ("",) * (len(settings.switches) + 1), settings.switches, settings.frames)


def surroundings(config: Config) -> Surroundings:
    """Text encoder, VAE and reward models; those of the embedded world are nearly nothing."""
    if config.backbone.kind == "world":
        return Surroundings()
    low = config.optim.autocast == "bfloat16"
    local = [name for name in config.rewards.scorers + config.evaluation.held_out if "@" not in name]
    families = {"videoalign" if name.startswith("videoalign") else name for name in local}
    size = 2 if config.backbone.vae_precision == "bfloat16" else 4
    pixels = 64 * config.model.latent_height * config.model.latent_width
    return Surroundings(
        text_encoder=UMT5_PARAMETERS * (2 if low else 4),
        codec=size * VAE_PARAMETERS,
        decode=VAE_DECODE * pixels * size / 4,
        decode_flops=VAE_FLOPS * pixels,
        rewards={name: REWARD_BYTES[name] for name in sorted(families) if name in REWARD_BYTES},
        scoring=SCORING,
        frame=4 * 3 * 4 * pixels,
    )


def fits(plan: Plan, memory: float) -> bool:
    """Whether the largest phase fits so many bytes."""
    return plan.total(plan.peak) <= (1 - SPARE) * memory


def _changes(config: Config) -> Iterator[dict[str, object]]:
    """Ways to need less memory, those that change the run least first."""
    optim, exploration = config.optim, config.exploration
    members = exploration.branches + 1
    rows = [
        r for r in (0, 2 * members, members, 4, 2, 1) if not exploration.rows or 0 < r <= exploration.rows
    ]
    states = exploration.blocks * config.objective.grad_steps
    replays = [r for r in (0, 4 * states, states, 1) if not optim.replay_rows or 0 < r <= optim.replay_rows]
    alike: list[dict[str, object]] = [
        {
            "backbone.offload": offload,
            "optim.checkpointing": kept,
            "optim.replay_rows": replay,
            "exploration.rows": row,
        }
        for offload, kept, replay, row in product(
            sorted({config.backbone.offload, config.backbone.kind == "wan"}),
            sorted({optim.checkpointing, True}),
            replays,
            rows,
        )
    ]
    yield from alike
    smaller: dict[str, object] = {}
    for name, values in (
        ("backbone.vae_precision", ["bfloat16"] if config.backbone.kind == "wan" else []),
        ("optim.rollouts_per_refresh", [1]),
        ("optim.prompts_per_update", [4, 2, 1]),
        ("optim.lora_rank", [128, 64, 32] if optim.train == "lora" else []),
        ("exploration.resident_frames", [24, 21, 18, 15]),
    ):
        own = flat(asdict(config))[name]
        for value in values:
            if isinstance(value, str) or not own or value < own:
                smaller[name] = value
                yield from ({**smaller, **one} for one in alike)


def advise(planner: Planner, config: Config, memory: float) -> Advice | None:
    """The first way in which a run fits ``memory`` bytes; None if there is none."""
    before = flat(asdict(config))
    for changes in _changes(config):
        different = {name: value for name, value in changes.items() if before[name] != value}
        try:
            changed = assign(config, different)
            check(changed)
            plan = planner.plan(changed)
        except ValueError:
            continue
        if fits(plan, memory):
            flags = tuple(f"--{name} {str(value).lower()}" for name, value in sorted(different.items()))
            return Advice(flags, not set(different) <= set(ALIKE), plan)
    return None


def plan_command(config: Config, *, memory: float | None, rates: Rates, out: Path | None) -> None:
    """Print the plan of a configuration, and what to add where it does not fit ``memory`` bytes."""
    if memory is not None and memory <= 0:
        raise ConfigurationError(f"--gpu-memory: must be positive, got {memory / GB:g}")
    planner = Planner(config, rates)
    plan = planner.plan(config)
    advice = None if memory is None or fits(plan, memory) else advise(planner, config, memory)
    _print(plan, memory, advice)
    if out is not None:
        write_atomic(out, json.dumps(numbers(plan, memory, advice), indent=1) + "\n")


def numbers(plan: Plan, memory: float | None, advice: Advice | None) -> dict[str, object]:
    """Everything in the plan, in bytes and seconds."""
    found: dict[str, object] = {
        "preset": plan.config.preset,
        "parameters": plan.parameters.all,
        "trained": plan.parameters.trained,
        "fork": plan.fork,
        "page_bytes": plan.page,
        "pages": plan.pages,
        "standing": dict(plan.standing),
        "phases": [
            {"name": p.name, "parts": dict(p.parts), "total": plan.total(p), "seconds": p.seconds}
            for p in plan.phases
        ],
        "peak": {"phase": plan.peak.name, "bytes": plan.total(plan.peak)},
        "host": dict(plan.host),
        "checkpoint_bytes": plan.checkpoint,
        "disk_bytes": plan.disk,
        "seconds_per_update": plan.seconds,
    }
    if memory is not None:
        found |= {"gpu_memory": memory, "fits": fits(plan, memory)}
        found["add"] = None if advice is None else list(advice.flags)
    return found


def _print(plan: Plan, memory: float | None, advice: Advice | None) -> None:
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)  # full text in files and pipes
    console.print(
        f"{plan.config.preset}: {plan.parameters.all:,} parameters, {plan.parameters.trained:,} trained; "
        f"a page {plan.page / 1e6:.4g} MB, {plan.pages} pages; GB = 1e9 bytes",
        highlight=False,
    )
    table = Table("phase", "GB", "s / update", "of which, beside what is always there")
    table.add_row("always", _gb(sum(plan.standing.values())), "", _listed(plan.standing))
    for phase in plan.phases:
        seconds = "" if phase.seconds is None else f"{phase.seconds:.3g}"
        table.add_row(phase.name, _gb(plan.total(phase)), seconds, _listed(phase.parts))
    console.print(table, highlight=False)
    lines = [
        f"peak: {_gb(plan.total(plan.peak))} GB in {plan.peak.name!r}; at least {plan.seconds:.3g} s "
        "per update, rewards not counted",
        f"host memory: {_gb(sum(plan.host.values()))} GB ({_listed(plan.host)})",
        f"disk: {_gb(plan.checkpoint)} GB per checkpoint, {_gb(plan.disk)} GB for checkpoint.keep = "
        f"{plan.config.checkpoint.keep}, the best and the one being written",
    ]
    if memory is not None:
        lines.append(_verdict(plan, memory, advice))
    console.print("\n".join(lines), highlight=False, markup=False)


def _verdict(plan: Plan, memory: float, advice: Advice | None) -> str:
    if fits(plan, memory):
        return f"fits {_gb(memory)} GB"
    if advice is None:
        return (
            f"does not fit {_gb(memory)} GB; move rewards to a reward server (NAME@http://HOST:PORT) "
            "or shrink the run"
        )
    kind = "changes the run" if advice.changes_the_run else "changes results by rounding alone"
    fitted = advice.plan
    return (
        f"does not fit {_gb(memory)} GB; add: {' '.join(advice.flags)}\n"
        f"({kind}; peak {_gb(fitted.total(fitted.peak))} GB in {fitted.peak.name!r}, "
        f"at least {fitted.seconds:.3g} s per update)"
    )


def _gb(size: float) -> str:
    return f"{size / GB:.2f}" if size < 100 * GB else f"{size / GB:.0f}"


def _listed(parts: object) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in dict(parts).items())  # type: ignore[call-overload]
