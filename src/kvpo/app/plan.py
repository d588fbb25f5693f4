"""`kvpo plan`: estimates what a run needs before anything is loaded, and finds settings that fit a device."""

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from kvpo.app.build import source_of
from kvpo.app.configuration import SHARING, assign, flat
from kvpo.app.sources.common import streaming_generator
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.engine.forks import plan_forks
from kvpo.engine.pages import PlannedRollout
from kvpo.files import write_json
from kvpo.method.methods import METHODS
from kvpo.models.causal_wan import CausalWan
from kvpo.plan.phases import ONE_PROCESS, Plan, Rates, plan_run
from kvpo.plan.splits import Sharing, splits
from kvpo.training.checkpoint import KEPT_CHECKPOINTS
from kvpo.training.device import GB
from kvpo.training.gradients import trajectories_together
from kvpo.training.ranks import teams_within

logger = logging.getLogger(__name__)

ALIKE = ("backbone.offload", "optim.checkpointing", "optim.replay_rows", "exploration.rows", *SHARING)
"""Settings that change results by rounding only."""
DEFAULT_RATES = {False: Rates(0.1e12, 10e9), True: Rates(150e12, 1000e9)}
"""Operations and bytes per second of a CPU, and of a GPU."""
SPARE = 0.04
"""Share of the device that the allocator loses to fragmentation."""


@dataclass(frozen=True)
class Advice:
    """Settings to add so that a run fits."""

    flags: tuple[str, ...]
    changes_the_run: int
    """Number of flags that change results beyond rounding."""
    plan: Plan


class Planner:
    """Plans configurations that share a transformer."""

    def __init__(self, config: Config, rates: Rates) -> None:
        self.rates = rates
        with torch.device("meta"):
            self.model = CausalWan(config.model)

    def plan(self, config: Config, split: Sharing = ONE_PROCESS) -> Plan:
        """The plan of a configuration of the same geometry, for the busiest rank of ``split``.

        Raises ValueError if no video can fork.
        """
        generator = streaming_generator(config, self.model)
        source = source_of(config)
        prompt = source.longest_prompt(config)
        optim = config.optim
        fork = plan_forks([prompt], config.exploration, generator.deployment).roomiest[-1]
        replayed = trajectories_together(
            optim.replay_rows, fork.exploration.blocks, config.objective.grad_steps
        )
        own = split.share(config)
        groups, branches = own.optim.prompts_per_update, own.exploration.branches
        fork = replace(fork, exploration=replace(fork.exploration, branches=branches))
        keep_pool = METHODS[config.method].keep_pool
        rollout = PlannedRollout([prompt] * groups, [fork] * groups, replayed, keep_pool)
        around = source.surroundings(config)
        return plan_run(config, self.model, generator, rollout, around, self.rates, split)

    def best_split(self, config: Config, gpus: int, nodes: int, memory: float | None) -> list[Plan]:
        """Plans of all ways to share a run: those that fit come first, and among them the fastest."""
        plans = [self.plan(config, split) for split in splits(gpus, nodes)]
        return sorted(
            plans,
            key=lambda plan: (
                memory is not None and not fits(plan, memory),
                plan.seconds,
                plan.total(plan.peak),
            ),
        )


def fits(plan: Plan, memory: float) -> bool:
    """True if the largest phase fits into ``memory`` bytes."""
    return plan.total(plan.peak) <= (1 - SPARE) * memory


def _changes(config: Config) -> Iterator[dict[str, object]]:
    """Yield settings that need less memory, starting with those that change the run least."""
    optim, exploration = config.optim, config.exploration
    members = exploration.branches + 1
    rows = [
        r for r in (0, 2 * members, members, 4, 2, 1) if not exploration.rows or 0 < r <= exploration.rows
    ]
    yield {}  # another split may be enough
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
            sorted({config.backbone.offload, True}),
            sorted({optim.checkpointing, True}),
            replays,
            rows,
        )
    ]
    yield from alike
    smaller: dict[str, object] = {}
    # A continued adapter keeps its rank.
    fresh = optim.lora_rank and not (config.backbone.lora and config.backbone.lora_start == "continue")
    for name, values in (
        ("backbone.vae_precision", ["bfloat16"]),
        ("optim.rollouts_per_refresh", [1]),
        ("optim.prompts_per_update", [4, 2, 1]),
        ("optim.lora_rank", [128, 64, 32] if fresh else []),
        ("exploration.resident_frames", [24, 21, 18, 15]),
    ):
        own = flat(asdict(config))[name]
        for value in values:
            if isinstance(value, str) or not own or value < own:
                smaller[name] = value
                yield from ({**smaller, **one} for one in alike)


def advise(
    planner: Planner, config: Config, memory: float, ways: Iterable[Sharing] = (ONE_PROCESS,)
) -> Advice | None:
    """The settings that make a run fit ``memory`` bytes, shared in one of these ways; None if there are none.

    Ways that need fewer changes of the run come first, and among them the fastest.
    """
    found = [advice for split in ways if (advice := _advise(planner, config, memory, split))]
    # An update of fewer prompts takes less time, but also does less.
    return min(
        found,
        key=lambda one: (one.changes_the_run, one.plan.seconds / one.plan.config.optim.prompts_per_update),
        default=None,
    )


def _advise(planner: Planner, config: Config, memory: float, split: Sharing) -> Advice | None:
    """The first settings with which a run that is shared like this fits."""
    before = flat(asdict(config))
    shared = {"distributed.branch_ranks": split.branch_ranks, "distributed.shard": split.shard}
    for changes in _changes(config):
        wanted = changes | (shared if split.ranks > 1 else {})
        different = {name: value for name, value in wanted.items() if before[name] != value}
        try:
            changed = assign(config, different)
            check(changed)
            plan = planner.plan(changed, split)
        except ValueError:
            continue
        if fits(plan, memory):
            flags = tuple(f"--{name} {str(value).lower()}" for name, value in sorted(different.items()))
            return Advice(flags, len(different.keys() - set(ALIKE)), plan)
    return None


def plan_command(
    config: Config,
    *,
    memory: float | None,
    rates: Rates,
    out: Path | None,
    gpus: int = 1,
    nodes: int = 1,
) -> None:
    """Print the plan of a configuration, and settings to add if it does not fit ``memory`` bytes.

    With several GPUs, or several nodes with ``gpus`` each, the plan is for the best way to share the run.
    Raises ConfigurationError if a number or the device cannot be planned for.
    """
    if config.device.partition(":")[0] in ("", "meta"):
        raise ConfigurationError(f"device: {config.device!r} holds no data; give cpu, or cuda for a GPU")
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigurationError(f"--gpu-memory: must be positive and finite, got {memory / GB:g}")
    for name, count in (("gpus", gpus), ("nodes", nodes)):
        if count < 1:
            raise ConfigurationError(f"--{name}: must be at least 1, got {count}")
    planner = Planner(config, rates)
    plans = planner.best_split(config, gpus, nodes, memory)
    plan = plans[0]
    advice = None
    if memory is not None and not fits(plan, memory):
        advice = advise(planner, config, memory, [one.split for one in plans])
    _print(plan)
    if len(plans) > 1:
        _print_splits(plans, memory)
    if memory is not None:
        _console().print(_verdict(plan, memory, advice), highlight=False, markup=False, soft_wrap=True)
    if out is not None:
        numbers = plan_numbers(plan, memory, advice)
        if len(plans) > 1:
            numbers |= {"splits": [split_numbers(one, memory) for one in plans]}
        write_json(out, numbers, allow_nan=False)


def say_what_is_needed(config: Config, ranks: int, *, anyway: bool) -> None:
    """Log a summary of a run's plan for this number of ``ranks``.

    Raises ConfigurationError if the run does not fit the device, unless ``anyway`` is set.
    """
    on_cuda = config.device.startswith("cuda")
    gpus = torch.cuda.device_count() if on_cuda else ranks
    chosen = teams_within(ranks, config.distributed.branch_ranks)
    per_node = ranks if ranks <= gpus else math.gcd(ranks, gpus)
    split = Sharing(ranks, chosen, config.distributed.shard and chosen > 1, per_node)
    planner = Planner(config, DEFAULT_RATES[on_cuda])
    try:
        plan = planner.plan(config, split)
    except ValueError:  # the run itself will report the problem
        return
    shared = "" if ranks == 1 else f" on each of {ranks} ranks ({split.name})"
    logger.warning(
        "plan: at most %s GB%s, in %r; %s GB of disk (`kvpo plan` has the details)",
        _gb(plan.total(plan.peak)), shared, plan.peak.name, _gb(plan.disk),
    )  # fmt: skip
    if not on_cuda:
        return
    try:
        memory = float(torch.cuda.get_device_properties(torch.device(config.device)).total_memory)
    except (RuntimeError, AssertionError):  # there is no such device
        return
    if not anyway and not fits(plan, memory):
        advice = advise(planner, config, memory, splits(per_node, ranks // per_node))
        remedy = f"add {' '.join(advice.flags)}" if advice else _shrinking(plan)
        raise ConfigurationError(
            f"device: the run needs {_gb(plan.total(plan.peak))} GB{shared} while it does "
            f"{plan.peak.name!r}, and {config.device} has {_gb(memory)} GB; {remedy}, or --anyway to try"
        )


def split_numbers(plan: Plan, memory: float | None) -> dict[str, Any]:
    """A way to share a run: its settings, and what the busiest rank needs."""
    split = plan.split
    numbers: dict[str, Any] = {
        "ranks": split.ranks,
        "branch_ranks": split.branch_ranks,
        "shard": split.shard,
        "peak": {"phase": plan.peak.name, "bytes": plan.total(plan.peak)},
        "seconds_per_update": plan.seconds,
        "exchange_seconds": sum(one.seconds or 0.0 for one in plan.phases if one.name == "exchange"),
    }
    return numbers if memory is None else numbers | {"fits": fits(plan, memory)}


def _print_splits(plans: Sequence[Plan], memory: float | None) -> None:
    """All ways to share a run, and which one to take if it fits."""
    table = Table("shared by", "GB per rank", "s / update", "of which exchange", "settings")
    for plan in plans:
        numbers = split_numbers(plan, memory)
        table.add_row(
            plan.split.name + ("" if numbers.get("fits", True) else " (does not fit)"),
            _gb(plan.total(plan.peak)),
            _seconds(plan.seconds),
            _seconds(numbers["exchange_seconds"]),
            plan.split.flags,
        )
    console = _console()
    console.print(table, highlight=False)
    best = plans[0]
    if memory is None or fits(best, memory):
        console.print(f"{best.split.ranks} ranks; take: {best.split.flags}", highlight=False, markup=False)


def plan_numbers(plan: Plan, memory: float | None, advice: Advice | None) -> dict[str, object]:
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


def _print(plan: Plan) -> None:
    console = _console()
    console.print(
        f"{plan.config.preset}: {plan.parameters.all:,} parameters, {plan.parameters.trained:,} trained; "
        f"a page {plan.page / 1e6:.4g} MB, {plan.pages} pages; GB = 1e9 bytes",
        highlight=False,
    )
    table = Table("phase", "GB", "s / update", "of which, in addition to the constant part")
    table.add_row("always", _gb(sum(plan.standing.values())), "", _listed(plan.standing))
    for phase in plan.phases:
        seconds = "" if phase.seconds is None else _seconds(phase.seconds)
        table.add_row(phase.name, _gb(plan.total(phase)), seconds, _listed(phase.parts))
    console.print(table, highlight=False)
    lines = [
        f"peak: {_gb(plan.total(plan.peak))} GB in {plan.peak.name!r}; at least {_seconds(plan.seconds)} s "
        "per update, rewards not counted",
        f"host memory: {_gb(sum(plan.host.values()))} GB ({_listed(plan.host)})",
        f"disk: {_gb(plan.checkpoint)} GB per checkpoint, {_gb(plan.disk)} GB for the last "
        f"{KEPT_CHECKPOINTS}, the best and the one being written",
    ]
    console.print("\n".join(lines), highlight=False, markup=False)


def _console() -> Console:
    """A console that is wide enough for full text in files and pipes."""
    console = Console()
    return console if console.is_terminal else Console(width=160)


def _verdict(plan: Plan, memory: float, advice: Advice | None) -> str:
    if fits(plan, memory):
        return f"fits {_gb(memory)} GB"
    if advice is None:
        return f"does not fit {_gb(memory)} GB; {_shrinking(plan)}"
    kind = "changes the run" if advice.changes_the_run else "changes results by rounding alone"
    fitted = advice.plan
    return (
        f"does not fit {_gb(memory)} GB; add: {' '.join(advice.flags)}\n"
        f"({kind}; peak {_gb(fitted.total(fitted.peak))} GB in {fitted.peak.name!r}, "
        f"at least {_seconds(fitted.seconds)} s per update)"
    )


def _shrinking(plan: Plan) -> str:
    """Ways to make a run fit that no settings do."""
    own_rewards = any("rewards" in parts for parts in (plan.standing, *(one.parts for one in plan.phases)))
    move = "move rewards to a reward server (NAME@http://HOST:PORT), " if own_rewards else ""
    return (
        f"{move}shrink the run (exploration.branches, exploration.blocks, prompts.frames, stream.size) "
        "or share it among more GPUs (`kvpo plan --gpus N`)"
    )


def _gb(size: float) -> str:
    return f"{size / GB:.2f}" if size < 100 * GB else f"{size / GB:.0f}"


def _seconds(seconds: float) -> str:
    return f"{seconds:,.0f}" if seconds >= 100 else f"{seconds:.3g}"


def _listed(parts: object) -> str:
    return ", ".join(f"{name} {_gb(size)}" for name, size in dict(parts).items())  # type: ignore[call-overload]
