"""`kvpo align`: one run from the base generator to the report."""

import logging
import resource
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from kvpo.app.build import build_world
from kvpo.app.exhibits import measure_diversity, write_branches, write_gallery
from kvpo.config import Config
from kvpo.training.checks import anchor_energy_at_old, default_route_max_difference, first_ratio_max_deviation
from kvpo.training.evaluation import comparison
from kvpo.training.interrupt import stop_on_signal
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.run import Run, evaluate_base, resume_point
from kvpo.training.run_directory import RunDirectory
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer

logger = logging.getLogger(__name__)


def align(config: Config, out: Path, *, resume: bool) -> None:
    """Align the generator that ``config`` names and leave everything about the run in ``out``."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    started = time.perf_counter()
    torch.use_deterministic_algorithms(True, warn_only=True)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with RunDirectory(out, config, resume=resume) as directory, stop_on_signal() as interrupted:
        point = resume_point(directory.checkpoints) if resume else None
        with Progress(*columns, console=Console(stderr=True)) as bars:
            show = _Bars(bars)
            setup = build_world(config)
            trainer = Trainer(setup)
            show("base on validation prompts", 0, 1, {})
            base = evaluate_base(setup, trainer, setup.validation)
            show("base on validation prompts", 1, 1, {})
            resumed_at = None if point is None else int(point.name.removeprefix("update-"))
            with MetricsLog(directory.metrics, directory.tensorboard, resumed_at=resumed_at) as metrics:
                run = Run(setup, trainer, directory.checkpoints, metrics, show, base)
                if point is not None:
                    run.restore(point)
                checks = {} if point is not None else exactness(setup, trainer)
                finished = run.train(interrupted)
            if finished:
                _finish(run, directory, checks, show, started)
        if finished:
            from kvpo.report import write_report

            write_report(out)
            logger.warning("report: %s", directory.report)
        else:
            logger.warning("stopped after update %d; continue with --resume --out %s", trainer.update, out)


class _Bars:
    """One progress bar per stage."""

    def __init__(self, bars: Any) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.bars.add_task(stage, total=total, note="")
        note = f"reward {numbers['reward_mean']:.3f}" if "reward_mean" in numbers else ""
        self.bars.update(self.tasks[stage], completed=done, note=note)


def exactness(setup: Setup, trainer: Trainer) -> dict[str, float]:
    """The identities that must hold before anything is trained, measured on this run's own generator."""
    prompts = setup.training_prompts(0)
    return {
        "first_ratio_max_deviation": first_ratio_max_deviation(trainer),
        "anchor_energy_at_old": anchor_energy_at_old(setup, prompts),
        "default_route_max_difference": default_route_max_difference(setup, prompts),
    }


def _finish(
    run: Run, directory: RunDirectory, checks: Mapping[str, float], show: Any, started: float
) -> None:
    """Test the best checkpoint once, measure diversity, and write the summary and the exhibits."""
    setup = run.setup
    run.restore_best()
    held_out: dict[str, Any] = {}
    results = {}
    stages = len(setup.test)
    for n, (name, prompts) in enumerate(setup.test.items()):
        show("base and aligned on test prompts", n, stages, {})
        base = evaluate_base(setup, run.trainer, {name: prompts})[name]
        aligned = run.evaluate_average(prompts)
        held_out[name] = comparison(base, aligned, setup.judges)
        results[name] = (base, aligned)
    show("base and aligned on test prompts", stages, stages, {})
    if not checks:
        with run.trainer.policy.reference():
            checks = exactness(setup, run.trainer)
    show("diversity and exhibits", 0, 3, {})
    with run.trainer.policy.reference():
        diversity = measure_diversity(setup)
    show("diversity and exhibits", 1, 3, {})
    write_gallery(run, results, directory.path / "gallery")
    show("diversity and exhibits", 2, 3, {})
    write_branches(run, directory.path / "branches")
    show("diversity and exhibits", 3, 3, {})
    usage = resource.getrusage(resource.RUSAGE_SELF)
    directory.write_summary(
        {
            "seed": setup.config.seed,
            "updates": run.trainer.setup.config.optim.updates,
            "wall_s": time.perf_counter() - started,
            "cpu_s": usage.ru_utime + usage.ru_stime,
            "peak_rss_mb": usage.ru_maxrss / 1024,
            "held_out": held_out,
            "diversity": diversity,
            "checks": dict(checks),
        }
    )
