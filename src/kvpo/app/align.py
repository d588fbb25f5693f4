"""`kvpo align`: one run from the base generator to the report."""

import logging
import resource
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch

from kvpo.app.build import build_setup
from kvpo.app.configuration import CHANGEABLE_ON_RESUME, PLACES_OF_A_RUN, demand_same_run, flat, read_saved
from kvpo.app.plan import say_what_is_needed
from kvpo.app.provenance import keep_provenance
from kvpo.app.report_data import measure_diversity, write_branches, write_gallery
from kvpo.app.taken import refuse_other
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.files import local_path, read_json, write_atomic
from kvpo.method.diagnostics import meanings
from kvpo.method.methods import METHODS
from kvpo.models.quantised import check_rollouts
from kvpo.models.tensor_files import fingerprint
from kvpo.progress import counter, progress_bars
from kvpo.report.headline import final_headline
from kvpo.report.null_runs import kept_null, read_null
from kvpo.training import radar
from kvpo.training.checkpoint import checkpoint_update, find_checkpoint, latest_checkpoint, resume_point
from kvpo.training.checks import (
    anchor_energy_at_old,
    default_route_max_difference,
    first_ratio_max_deviation,
    ratio_tolerance,
)
from kvpo.training.device import computing
from kvpo.training.evaluation import Evaluation, comparison
from kvpo.training.held_out import evaluate_base
from kvpo.training.interrupt import stop_on_signal
from kvpo.training.kept_results import KeptResults
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.ranks import Ranks, added_up, joined_ranks
from kvpo.training.run import Run, restore
from kvpo.training.run_directory import RunDirectory, belongs_to_run
from kvpo.training.setup import Setup
from kvpo.training.trackers import TRACKERS, Tracker
from kvpo.training.trainer import Trainer

logger = logging.getLogger(__name__)


def align(
    config: Config,
    out: Path | str,
    *,
    resume: bool = False,
    track: Sequence[str] | str = (),
    anyway: bool = False,
    null: Path | str | None = None,
) -> dict[str, Any] | None:
    """Align the generator that ``config`` names and leave everything about the run in ``out``.

    Returns the contents of ``summary.json``, or None if SIGINT or SIGTERM arrives during the updates: the
    current update is then finished and saved, and ``resume`` continues from it. At any other time stopping at
    once loses nothing, so SIGINT raises KeyboardInterrupt as usual.

    Under torchrun the ranks share the run, which is the same for any number of them (docs/scale.md).

    Args:
        track: packages that also receive the metrics (``wandb``, ``trackio``): a sequence, or a single name.
        anyway: start even if the plan says that the run does not fit the device.
        null: file with the gains of null runs under the same settings. The verdict compares the run with
            them, and the run keeps a copy.

    Raises ValueError for settings, prompts, rewards and checkpoints that cannot be used, StorageError if
    ``out`` cannot be written or holds something already, and LostRank if another rank is gone.
    """
    from kvpo.report.page import write_report

    out, started = local_path(out, "out"), time.perf_counter()
    check(config)
    track = (track,) if isinstance(track, str) else track
    if unknown := [name for name in track if name not in TRACKERS]:
        raise ConfigurationError(f"track: unknown {unknown[0]!r}; there are {', '.join(TRACKERS)}")
    null = None if null is None else local_path(null, "null")
    if null is not None:
        read_null(null, asdict(config))
    _demand_own(out, config, resume)
    with (
        joined_ranks(config.device, sharded=config.distributed.shard, traces=out) as ranks,
        RunDirectory(out, config, resume=resume, ranks=ranks) as directory,
        computing(config),
    ):
        summary = ranks.once("looking for a summary", partial(finished_summary, directory, config))
        reported = ranks.once("looking for a report", directory.report.exists)
        if summary is not None and null is not None:
            logger.warning("--null: kvpo report %s --null %s compares a finished run", out, null)
        if summary is not None and reported:
            logger.warning("%s is a finished run; its report: %s", out, directory.report)
            return summary
        if summary is None:
            ranks.once("planning", partial(say_what_is_needed, config, ranks.count, anyway=anyway))
            if null is not None:
                ranks.once("keeping null runs", partial(write_atomic, directory.null, null.read_bytes()))
            finish = partial(_finish, directory=directory, started=started)
            summary = train(config, directory, resume=resume, finish=finish, track=track)
        if summary is not None:
            ranks.once("writing the report", lambda: write_report(out))
            logger.warning("report: %s", directory.report)
        return summary


def train(
    config: Config,
    directory: RunDirectory,
    *,
    resume: bool,
    finish: Callable[[Run], dict[str, Any]],
    build: Callable[[Config, Ranks], Trainer] = lambda config, ranks: Trainer(build_setup(config, ranks)),
    budget_cpu_s: float | None = None,
    track: Sequence[str] = (),
) -> dict[str, Any] | None:
    """Train a run in an entered directory; with ``resume``, continue from its last checkpoint.

    Returns the result of ``finish``, which gets the run with its trainer as of the last update, or None if a
    signal stopped the updates. With ``budget_cpu_s``, training ends at the update whose CPU-seconds come
    closest to it. ``track`` is as for `align`.
    """
    ranks = directory.ranks
    looked_up = partial(resume_point, directory.checkpoints)
    point = ranks.once("looking for a checkpoint", looked_up) if resume else None
    if resume and point is None:
        saved = "checkpoint: it starts from its saved configuration"
        logger.warning("%s holds no %s", directory.path, saved if directory.continued else "run: one starts")
    ranks.once("writing provenance", partial(keep_provenance, directory.provenance, config))
    with ExitStack() as stack:
        show = stack.enter_context(progress_bars(shown=ranks.main))
        with ranks.together("loading the generator and the rewards"):
            check_rollouts(config.optim.rollout_precision, config.device, config.model)
            trainer = build(config, ranks)
        setup = trainer.setup
        # Comes first because the checkpoint may be refused.
        state = None if point is None else restore(trainer, point)
        ranks.once("writing the configuration", partial(_write_settings, directory, config))
        resumed_at = None if point is None else checkpoint_update(point)
        metrics = None
        with ranks.together("opening the metrics"):
            if ranks.main:
                settings = flat(asdict(config))
                trackers = [Tracker(package, directory.path.name, settings) for package in track]
                log = MetricsLog(
                    directory.metrics, directory.tensorboard, resumed_at=resumed_at, trackers=trackers
                )
                metrics = stack.enter_context(log)
        run = Run(setup, trainer, directory.checkpoints, metrics, show, budget_cpu_s=budget_cpu_s)
        if state is None:
            run.save()
            run.settle(wait=True)  # a run begins only once this checkpoint exists
        report = counter(show, "the base's validation videos", sum(map(len, setup.validation.values())))
        kept = KeptResults(directory.held_out, "base", ranks)
        run.base = evaluate_base(setup, trainer, setup.validation, report=report, kept=kept)
        directory.begun = True
        if state is not None:
            run.resume(state)
        with stop_on_signal() as interrupted:
            done = run.train(interrupted)
        return finish(run) if done else None


def _write_settings(directory: RunDirectory, config: Config) -> None:
    directory.save_config()
    directory.write_meanings(meanings(METHODS[config.method].metrics))


def _demand_own(out: Path, config: Config, resume: bool) -> None:
    """Refuse what is not a run, and to resume one with another ``config`` or fewer updates than it has."""
    refuse_other(out, "run")
    if not (resume and belongs_to_run(out)):
        return
    saved = out / "config.yaml"
    demand_same_run(saved, read_saved(saved), config, CHANGEABLE_ON_RESUME)
    point, summary = latest_checkpoint(out / "checkpoints"), out / "summary.json"
    done = 0 if point is None else checkpoint_update(point)
    if summary.exists():
        done = max(done, _summary(summary)["updates"])
    if config.optim.updates < done:
        raise ConfigurationError(
            f"optim.updates: {config.optim.updates}, but {out} has already made {done}; give {done} or more, "
            "or start another run"
        )


def _summary(path: Path) -> dict[str, Any]:
    """The summary of a finished run. Raises ValueError if it is damaged."""
    summary: dict[str, Any] = read_json(path)
    if not isinstance(summary, dict) or not isinstance(summary.get("updates"), int):
        raise ValueError(f"{path} is not the summary of a run; remove it, and --resume writes it again")
    return summary


def finished_summary(directory: RunDirectory, config: Config) -> dict[str, Any] | None:
    """The summary of a run if its updates and tests are done, else None."""
    if not directory.summary.exists():
        return None
    summary = _summary(directory.summary)
    return summary if summary["updates"] == config.optim.updates else None


def exactness(setup: Setup, trainer: Trainer) -> dict[str, float]:
    """Measure the identities that hold for the run's method on its generator as it is now."""
    prompts = setup.training_prompts(0)
    found = {
        "first_ratio_max_deviation": first_ratio_max_deviation(trainer),
        "anchor_energy_at_old": anchor_energy_at_old(setup, prompts),
        "default_route_max_difference": default_route_max_difference(setup, prompts),
    }
    return {name: value for name, value in found.items() if value is not None}


def radar_summary(run: Run, results: Mapping[str, tuple[Evaluation, Evaluation]]) -> dict[str, Any]:
    """The hacking radar's verdict on the validations, and its readings on the test prompts."""
    base, aligned = (radar.pooled_sets(side) for side in zip(*results.values(), strict=True))
    judges = run.setup.judges
    return run.update_verdict() | {
        "watchers": list(judges.watcher_names),
        "guarded": run.guarded,
        "stopped_at": run.readings[-1].update if run.stopped else None,
        "best": None if run.best is None else run.best[0],
        "test": radar.measured(base, aligned, judges),
    }


def _finish(run: Run, directory: RunDirectory, started: float) -> dict[str, Any]:
    """Test the best checkpoint once, measure diversity, write the report's data and the summary."""
    setup, ranks, solo, show = run.setup, run.setup.ranks, run.trainer.solo, run.progress
    best = ranks.once("looking for the best checkpoint", lambda: find_checkpoint(run.checkpoints, None))
    restore(run.trainer, best)
    results: dict[str, tuple[Evaluation, Evaluation]] = {}
    diversity: dict[str, dict[str, float]] = {}
    checks: dict[str, float] = {}

    def on_test_prompts() -> None:
        report = counter(show, "test videos of base and aligned", 2 * sum(map(len, setup.test.values())))
        how = {"mismatched": True, "report": report}
        kept = [KeptResults(directory.held_out, one, ranks) for one in ("base", fingerprint([best]))]
        for name, base in evaluate_base(setup, run.trainer, setup.test, **how, kept=kept[0]).items():
            results[name] = (base, run.evaluate_aligned(setup.test[name], **how, kept=kept[1]))

    def identities() -> dict[str, float]:
        with run.trainer.sides.aligned():
            return exactness(setup, run.trainer)

    def branch_diversity() -> None:
        with run.trainer.sides.base():
            diversity.update(measure_diversity(setup, run.trainer.sharing))

    gallery, branches = directory.path / "gallery", directory.path / "branches"
    stages: list[Callable[[], None]] = [
        on_test_prompts,
        lambda: checks.update(solo("checking identities", identities)),
        branch_diversity,
        lambda: solo("writing the gallery", lambda: write_gallery(run, results, gallery)),
        lambda: solo("writing branches", lambda: write_branches(run, branches)),
    ]
    for done, stage in enumerate(stages):
        show("held-out tests, diversity, report data", done, len(stages))
        stage()
    show("held-out tests, diversity, report data", len(stages), len(stages))
    summary = {
        "method": setup.config.method,
        "seed": setup.config.seed,
        "updates": run.updates,
        **_cost(run, started),
        "held_out": {name: comparison(*pair, setup.judges) for name, pair in results.items()},
        "diversity": diversity,
        "improved": run.improved,
        "checks": checks,
        "checked": {
            "update": run.trainer.update,
            "weights": "average",
            "ratio_tolerance": ratio_tolerance(setup.config),
        },
        "radar": radar_summary(run, results),
        **ranks.once(
            "reading null runs", partial(kept_null, directory.null, asdict(setup.config), PLACES_OF_A_RUN)
        ),
    }
    verdict = final_headline(summary, asdict(setup.config))
    summary["verdict"] = verdict.text
    logger.warning("%s", verdict.text)
    ranks.once("writing the summary", partial(_write_summary, directory, summary))
    return summary


def _cost(run: Run, started: float) -> dict[str, Any]:
    """Seconds, memory and scored clips of all ranks together, since the run was last resumed."""
    ranks, usage = run.setup.ranks, resource.getrusage(resource.RUSAGE_SELF)
    return {
        "ranks": ranks.count,
        "resumed_at": run.resumed_at,
        "wall_s": time.perf_counter() - started,
        "cpu_s": sum(ranks.gather(usage.ru_utime + usage.ru_stime, "adding up time")),
        "peak_rss_mb": max(ranks.gather(usage.ru_maxrss / 1024, "comparing memory")),
        "threads": torch.get_num_threads(),
        "scored": added_up(ranks.gather(asdict(run.setup.scored), "counting clips")),
    }


def _write_summary(directory: RunDirectory, summary: Mapping[str, Any]) -> None:
    directory.report.unlink(missing_ok=True)  # outdated if the run was extended
    directory.write_summary(summary)
    shutil.rmtree(directory.held_out, ignore_errors=True)
