"""`kvpo compare`: methods trained on one base under one budget, tested on prompts that nothing else uses.

The work is a list of pieces: base and floor lines, trials that tune the methods, and runs of every arm and
seed. Each piece writes one file atomically, and is claimed with a lock that a killed process releases. So a
stopped comparison continues where it was, and several processes can share the work.
"""

import json
import logging
import math
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

from filelock import FileLock, Timeout

from kvpo import __version__
from kvpo.app.align import train
from kvpo.app.build import build_setup, source_of
from kvpo.app.comparison.arms import PRETRAINING, TRIAL_SEED, TrainingArm, configured
from kvpo.app.comparison.measuring import (
    MEASURED,
    floor_line,
    on_validation_prompts,
    trained,
    trainer_of,
)
from kvpo.app.comparison.plan import MethodComparison, changed_settings
from kvpo.app.comparison.results import summarise
from kvpo.app.taken import refuse_other
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.files import StorageError, finite, local_path, make_directory, read_json, write_atomic
from kvpo.models.finite import NonFiniteError
from kvpo.report.comparison import write_comparison
from kvpo.training.device import computing
from kvpo.training.policy import policy_of
from kvpo.training.run_directory import RunDirectory

logger = logging.getLogger(__name__)

TRIAL_SHARE = 0.5
"""A trial trains for this share of the budget."""
FLOORS = (("best-of", 8), ("steps", 8), ("steps", 16))
"""The ceiling (the best of that many videos at test time), and the base with that many solver steps."""


@dataclass(frozen=True)
class Piece:
    """A part of the work, with one file as its result."""

    name: str
    make: Callable[[], dict[str, Any] | None]
    """Returns the result; None if a signal stopped it."""
    needs: tuple[str, ...] = ()
    """Pieces that must be done before."""


def pieces(comparison: MethodComparison) -> list[Piece]:
    """All pieces in the order in which they are best done: seed by seed, with all arms side by side."""
    found: dict[str, Piece] = {}
    measure = MEASURED[comparison.split]
    finals: list[Piece] = []

    def base(config: Config, purpose: str, measure: Callable[..., Any]) -> str:
        name = f"{comparison.base_of(config)}-{purpose}"
        found[name] = Piece(name, partial(_base, config, measure))
        return name

    for arm in comparison.arms:
        for n, settings in enumerate(comparison.trials_of(arm.method) if arm.tuned else []):
            config = configured(comparison.start, arm, settings, TRIAL_SEED)
            needs = (base(config, "validation", on_validation_prompts),)
            name = f"trial-{arm.method}-{n}"
            found[name] = Piece(name, partial(_trial, comparison, name, arm, config, needs[0]), needs)
    for seed in range(comparison.seeds):
        for arm in comparison.arms:
            untuned = configured(comparison.start, arm, {}, seed)
            base(untuned, comparison.split, measure)
            name, tried = f"run-{arm.name}-{seed}", range(len(comparison.trials_of(arm.method)))
            needs = tuple(f"trial-{arm.method}-{n}" for n in tried)
            finals.append(
                Piece(name, partial(_run, comparison, name, arm, comparison.start.seed + seed), needs)
            )
    floors = [
        Piece(f"{kind}-{n}", partial(_floor, comparison.start, kind, n)) for kind, n in _floors(comparison)
    ]
    base(comparison.start, comparison.split, measure)
    return [*found.values(), *finals, *floors]


def _trial(
    comparison: MethodComparison, name: str, arm: TrainingArm, config: Config, base: str
) -> dict[str, Any] | None:
    """The result of one trial on validation prompts; its gain is None if numbers were not finite."""
    budget = TRIAL_SHARE * comparison.budget_cpu_s
    settings = {"settings": changed_settings(comparison.start, config)}
    try:
        result = _trained(comparison, name, arm, config, budget, on_validation_prompts)
    except NonFiniteError as error:
        logger.warning("%s: %s", name, error)
        return {**settings, "gain": None, "updates": None, "cpu_s": None, "failed": str(error)}
    if result is None:
        return None
    before = comparison.result(base)["results"]
    gains = [
        mean(after["totals"]) - mean(before[name]["totals"]) for name, after in result["results"].items()
    ]
    return {**result, **settings, "gain": mean(gains)}


def _run(comparison: MethodComparison, name: str, arm: TrainingArm, seed: int) -> dict[str, Any] | None:
    """Train and measure a run of an arm; it has no results if numbers were not finite."""
    config = configured(comparison.start, arm, comparison.tuned(arm.method), seed)
    of_run = {
        "base": comparison.base_of(config),
        "settings": changed_settings(comparison.start, config),
    }
    try:
        result = _trained(comparison, name, arm, config, comparison.budget_cpu_s, MEASURED[comparison.split])
    except NonFiniteError as error:
        logger.warning("%s: %s", name, error)
        return {**of_run, "failed": str(error)}
    return result and result | of_run


def _trained(
    comparison: MethodComparison,
    name: str,
    arm: TrainingArm,
    config: Config,
    budget: float,
    measure: Callable[..., Any],
) -> dict[str, Any] | None:
    """Train a run of the comparison, or continue it, and measure the result."""
    path = comparison.out / "runs" / name
    with RunDirectory(path, config, resume=True) as directory, computing(config):
        result = train(
            config,
            directory,
            resume=directory.continued,
            build=partial(trainer_of, arm),
            finish=partial(trained, measure=measure),
            budget_cpu_s=budget,
        )
        if result is not None:  # with the updates saved, repeating the run needs no budget
            made = replace(config, optim=replace(config.optim, updates=result["updates"]))
            directory.save_config(made)
        return result


def _base(config: Config, measure: Callable[..., Any]) -> dict[str, Any]:
    with computing(config):
        setup = build_setup(config)
        with policy_of(setup.model).reference():
            return {"results": measure(setup), "base_sha256": setup.backbone.weights.base_sha256}


def _floor(config: Config, kind: str, count: int) -> dict[str, Any]:
    with computing(config):
        return {"results": floor_line(config, kind, count)}


def _floors(comparison: MethodComparison) -> Sequence[tuple[str, int]]:
    """Floor lines to measure: the final test has them, choosing among arms does not."""
    return FLOORS if comparison.split == "final" else ()


def compare_methods(
    config: Config,
    out: Path | str,
    arms: Sequence[TrainingArm],
    *,
    seeds: int,
    budget_cpu_s: float,
    trials: int,
    split: str = "final",
) -> dict[str, Any]:
    """Compare arms and return the contents of ``summary.json``; continues a comparison begun in ``out``.

    Raises ConfigurationError for arms or settings that cannot be compared, and StorageError if ``out`` holds
    another comparison, a run or a study.
    """
    _check(config, arms, seeds, budget_cpu_s, trials)
    out = local_path(out, "--out")
    config = replace(config, threads=1)
    comparison = MethodComparison(config, arms, seeds, budget_cpu_s, trials, out, split)
    plan = pieces(comparison)  # every setting is checked before anything is trained
    commit = source_commit()
    _claim(comparison, commit)
    while left := [piece for piece in plan if not comparison.result_file(piece.name).exists()]:
        done = f"{len(plan) - len(left)} of {len(plan)}"
        if not any(_done(comparison, piece, commit, done) for piece in left):
            time.sleep(1)  # another process works on the rest
    summary = summarise(comparison, [f"{kind}-{n}" for kind, n in _floors(comparison)])
    text = json.dumps(finite(summary), indent=1, allow_nan=False) + "\n"
    write_atomic(out / "summary.json", text)
    page = write_comparison(out, json.loads(text))
    logger.warning("report: %s", page)
    return summary


def _check(config: Config, arms: Sequence[TrainingArm], seeds: int, budget_cpu_s: float, trials: int) -> None:
    check(config)
    if seeds < 1:
        raise ConfigurationError(f"--seeds: must be at least 1, got {seeds}")
    if not 0 < budget_cpu_s < math.inf:
        raise ConfigurationError(f"--budget: must be more than 0 CPU-seconds, got {budget_cpu_s:g}")
    if trials < 0:
        raise ConfigurationError(f"--trials: must be 0 or more, got {trials}")
    if not config.on_cpu:
        raise ConfigurationError(
            f"device: the budget is counted in CPU-seconds, got {config.device!r}; give --device cpu"
        )
    if any(arm.method == PRETRAINING for arm in arms) and source_of(config).pretraining is None:
        raise ConfigurationError(
            f"--methods: {PRETRAINING} needs the data that the base was pretrained on, which a backbone.kind "
            f"{config.backbone.kind} does not bring; leave it out"
        )


def _claim(comparison: MethodComparison, commit: str) -> None:
    """Claim the directory for this comparison. Raises StorageError if it holds something else."""
    out, file = comparison.out, comparison.plan_file
    refuse_other(out, "comparison")
    plan = {name: value for name, value in asdict(comparison).items() if name != "out"}
    text = json.dumps({"kvpo": __version__, **plan, "commit": commit}, indent=1) + "\n"
    for directory in (out, out / "pieces", out / "runs"):
        make_directory(directory)
    if not file.exists():
        write_atomic(file, text)
    before, here = read_json(file), json.loads(text)
    if different := [name for name in plan if before.get(name) != here[name]]:
        raise StorageError(
            f"{out} holds another comparison ({', '.join(different)} differ, see {file.name}); give the same "
            "options to go on with it, or choose another --out"
        )
    if before["commit"] != commit:
        logger.warning(
            "%s was begun at commit %s; what is still to do is done at %s, and the page names both",
            out, before["commit"], commit,
        )  # fmt: skip


def _done(comparison: MethodComparison, piece: Piece, commit: str, before: str) -> bool:
    """Make a piece; False if it has to wait for others, or another process is at it.

    Raises KeyboardInterrupt if a signal stopped it.
    """
    target = comparison.result_file(piece.name)
    if not all(comparison.result_file(name).exists() for name in piece.needs):
        return False
    try:
        with FileLock(target.with_suffix(".lock"), timeout=0):
            if not target.exists():
                logger.info("%s (%s pieces are done)", piece.name, before)
                result = piece.make()
                if result is None:
                    raise KeyboardInterrupt(f"the same command goes on with {comparison.out}")
                write_atomic(target, json.dumps(result | {"commit": commit}, allow_nan=False) + "\n")
            return True
    except Timeout:
        return False


def source_commit() -> str:
    """The commit of the running source, "unknown" outside a checkout; "+" marks uncommitted changes."""
    git = ["git", "-C", str(Path(__file__).parent)]
    try:
        commit = subprocess.run(
            [*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout
        # An installed package may lie inside somebody else's repository, which does not track it.
        subprocess.run([*git, "ls-files", "--error-unmatch", __file__], capture_output=True, check=True)
        changed = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return commit.strip() + ("+" if changed.stdout.strip() else "")
