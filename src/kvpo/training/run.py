"""A run from its first update to its last: metrics, validation, checkpoints, clean stops, exact resumes."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvpo.training.checkpoint import (
    best_checkpoint,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    mark_best,
    prune,
    require_tensors,
    save_checkpoint,
)
from kvpo.training.evaluation import HeldOut, comparison, evaluate, mean_gain
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.policy import exchanged
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer, architecture

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""(stage, done, of how many, numbers worth showing)."""


@dataclass
class Run:
    """One training run in its directory."""

    setup: Setup
    trainer: Trainer
    checkpoints: Path
    metrics: MetricsLog
    progress: Progress
    base: dict[str, HeldOut]
    """Held-out results of the starting policy on the validation prompts."""

    @property
    def updates(self) -> int:
        """Updates of the whole run."""
        return self.setup.config.optim.updates

    def train(self, interrupted: Callable[[], bool]) -> bool:
        """Train to the last update; False if stopped early (the state is saved either way)."""
        config, trainer = self.setup.config, self.trainer
        while trainer.update < self.updates:
            started = time.perf_counter()
            numbers = trainer.step()
            numbers["seconds"] = time.perf_counter() - started
            self.metrics.write(trainer.update, {"kind": "update", **numbers})
            self.progress("aligning", trainer.update, self.updates, numbers)
            last = trainer.update == self.updates
            due = config.evaluation.every and trainer.update % config.evaluation.every == 0
            path = None
            if last or (due and trainer.at_boundary()):
                path = self.save()
                self.validate(path)
            elif trainer.at_boundary() and trainer.update % config.checkpoint.every == 0:
                path = self.save()
            if interrupted() and trainer.at_boundary() and not last:
                if path is None:
                    self.save()
                return False
        return True

    def save(self) -> Path:
        """Write a checkpoint and drop the ones that are no longer kept."""
        tensors, state = self.trainer.tensors_and_state()
        path = save_checkpoint(
            self.checkpoints,
            self.trainer.update,
            tensors,
            state,
            architecture=architecture(self.setup.config),
        )
        prune(self.checkpoints, self.setup.config.checkpoint.keep)
        return path

    def validate(self, path: Path) -> None:
        """Compare the moving average with the starting policy on held-out prompts; mark the best checkpoint."""
        results = {}
        for name, prompts in self.setup.validation.items():
            aligned = self.evaluate_average(prompts)
            results[name] = comparison(self.base[name], aligned, self.setup.judges)
        value = mean_gain(results)
        self.metrics.write(self.trainer.update, {"kind": "validation", "mean_gain": value, **results})
        best = best_checkpoint(self.checkpoints)
        if best is None or value > best[1]:
            mark_best(self.checkpoints, path, value)

    def evaluate_average(self, prompts: Any) -> HeldOut:
        """Held-out results of the moving average of the trained parameters."""
        with exchanged(self.trainer.policy.parameters, self.trainer.average.values):
            return evaluate_prompts(self.setup, prompts)

    def restore(self, path: Path) -> None:
        """Load a checkpoint of this run."""
        tensors, state = load_checkpoint(path, architecture=architecture(self.setup.config))
        expected, _ = self.trainer.tensors_and_state()
        moments = {name: value for name, value in tensors.items() if name.startswith("optimizer.")}
        require_tensors(path, tensors, {**expected, **moments})
        self.trainer.restore(tensors, state)

    def restore_best(self) -> Path:
        """Load the checkpoint with the best validation, or the latest where none is marked."""
        path = find_checkpoint(self.checkpoints, None)
        self.restore(path)
        return path


def evaluate_prompts(setup: Setup, prompts: Any) -> HeldOut:
    """Held-out results of the model as it is."""
    return evaluate(setup.generator, prompts, setup.texts(prompts), setup.evaluation_tape(), setup.judges)


def evaluate_base(setup: Setup, trainer: Trainer, sets: Mapping[str, Any]) -> dict[str, HeldOut]:
    """Held-out results of the starting policy."""
    with trainer.policy.reference():
        return {name: evaluate_prompts(setup, prompts) for name, prompts in sets.items()}


def resume_point(checkpoints: Path) -> Path | None:
    """The checkpoint a resumed run continues from; None starts at update 0."""
    return latest_checkpoint(checkpoints)
