"""A run from its first update to its last: metrics, validation, checkpoints, clean stops, resumes."""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from kvpo.files import read_json
from kvpo.progress import counter
from kvpo.rewards.cache import Counts
from kvpo.training import radar
from kvpo.training.backbone import Weights
from kvpo.training.background_saving import BackgroundSaving
from kvpo.training.checkpoint import (
    STATE,
    checked_file,
    load_checkpoint,
    mark_best,
    prune,
    require_finite_tensors,
    require_tensors,
    save_checkpoint,
)
from kvpo.training.clock import Clock, phases_of
from kvpo.training.device import forget_peak, peak
from kvpo.training.evaluation import Evaluation, comparison, mean_gain
from kvpo.training.held_out import evaluate_prompts
from kvpo.training.interrupt import StopAtOnce
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.policy import Policy, Sides, policy_of
from kvpo.training.ranks import LostRank, RanksDiffer, added_up
from kvpo.training.setup import Setup
from kvpo.training.sharding import READING, SAVING, local, read_parts
from kvpo.training.state import expected_moments
from kvpo.training.trainer import Trainer, architecture

logger = logging.getLogger(__name__)

VALUE_PREFIXES = {"average": "average.", "raw": "parameters."}
"""Kinds of trained values in a checkpoint, and the prefix of their tensors' names."""
Progress = Callable[..., None]
"""(stage, done, total, optional numbers worth showing)."""


@dataclass
class Run:
    """One training run in its directory."""

    setup: Setup
    trainer: Trainer
    checkpoints: Path
    metrics: MetricsLog | None
    """None on ranks that write no files."""
    progress: Progress
    base: dict[str, Evaluation] = field(default_factory=dict)
    """Held-out results of the starting policy on the validation prompts; needed from the first update on."""
    best: tuple[int, float] | None = None
    """Update and validation of the best checkpoint so far."""
    saved: int = 0
    """Update of the last checkpoint."""
    resumed_at: int = 0
    """Update from which this process continues; 0 if it started the run."""
    written: int = 0
    """The last update whose metrics are written."""
    unvalidated: bool = False
    """True while the metrics of an update are written but the validation due after it is not."""
    readings: list[radar.Reading] = field(default_factory=list)
    """Readings of the hacking radar, one per validation so far."""
    verdict: radar.Verdict = field(default_factory=radar.Verdict)
    """The radar's verdict on the readings."""
    budget_cpu_s: float | None = None
    """CPU-seconds that this process may spend on updates; None for no limit."""
    cpu_s: float = 0.0
    """CPU-seconds spent on the updates so far, excluding validations and all other work."""
    reported: Clock = field(init=False)
    """This rank's clock at the last update's report, or at the start of the run, when it may not be zero."""
    saving_parts: BackgroundSaving | None = field(init=False)
    """Saves sharded weights; None if weights are not sharded."""

    def __post_init__(self) -> None:
        self.reported = self.setup.ranks.clock.read()
        self.saving_parts = BackgroundSaving(self.trainer) if self.trainer.sharded else None

    @property
    def updates(self) -> int:
        """Number of updates in the whole run."""
        return self.setup.config.optim.updates

    def train(self, interrupted: Callable[[], bool]) -> bool:
        """Train to the last update, or until the radar detects hacking; return False if interrupted.

        The state is saved either way. Raises ValueError if a reward fails or a number is not finite. After
        any exception except StopAtOnce and RanksDiffer, the updates before it are saved, unless they could
        not be resumed exactly: within a refresh, or with an update whose metrics are not written. Lost
        updates are logged.
        """
        try:
            return self._train(interrupted)
        except BaseException as error:
            if self.saving_parts and not isinstance(error, StopAtOnce | LostRank):
                self.saved = self.saving_parts.settle_alone() or self.saved
            # Without other ranks: the error may have left them at different points.
            lost = isinstance(error, StopAtOnce | RanksDiffer)
            lost |= self.trainer.sharded  # rank 0 has only its part
            lost |= self.written < self.trainer.update or not self.trainer.at_boundary()
            if self.setup.ranks.main and not lost and self.trainer.update > self.saved:
                self._save(self.trainer.update)
            raise
        finally:
            if self.trainer.update > self.saved:
                logger.warning(
                    "lost: updates %d to %d, made since the last checkpoint",
                    self.saved + 1,
                    self.trainer.update,
                )

    def _train(self, interrupted: Callable[[], bool]) -> bool:
        config, trainer, ranks = self.setup.config, self.trainer, self.setup.ranks
        if trainer.update == 0 and self.best is None:
            self.best = (0, 0.0)  # the base, until a validation beats it
            self.save()
        while trainer.update < self.updates and not (self.stopped or self.spent):
            if trainer.at_boundary() and ranks.any(interrupted(), "asking for signals"):
                self._save_if_new()
                return False
            self._update()
            self.settle(wait=False)
            if trainer.at_boundary():
                if self.unvalidated:
                    self._validate_and_save()
                elif self._due(config.checkpoint.every) or self._due(config.evaluation.every):
                    self.save()
        self.settle(wait=True)
        if ranks.any(interrupted(), "asking for signals"):
            return False  # everything is saved; a resumed run continues here
        if self.stopped:
            best = 0 if self.best is None else self.best[0]
            logger.warning(
                "stopped after update %d, reward hacking: the best checkpoint is update %d",
                trainer.update,
                best,
            )
        elif self.setup.validation and not self.improved:
            logger.warning("no improvement: no validation beat the base, so the best checkpoint is the base")
        return True

    def _update(self) -> None:
        """Make one update and write its metrics."""
        trainer, device = self.trainer, self.setup.generator.device
        ranks, config = self.setup.ranks, self.setup.config
        started, scored, shown = time.perf_counter(), replace(self.setup.scored), ranks.clock.read()
        shown.seconds["save"] = self.reported.seconds["save"]  # saving happened between updates
        shown.bytes["save"] = self.reported.bytes["save"]
        forget_peak(device)
        cpu_before = time.process_time()
        numbers = trainer.step()
        numbers["cpu_s"] = time.process_time() - cpu_before
        self.cpu_s += numbers["cpu_s"]
        trainer.demand_equal_ranks()
        numbers |= self._scored_since(scored)
        numbers["seconds"] = time.perf_counter() - started
        spent = ranks.gather(ranks.clock.since(shown), "adding up time")
        self.reported = ranks.clock.read()
        samples = sum(numbers["forks"].values()) * (config.exploration.branches + 1)
        numbers["phases"] = phases_of(spent, numbers["seconds"], samples)
        numbers |= peak(device)
        self._write({"kind": "update", **numbers}, self._note_update)
        if self.budget_cpu_s is None:
            self.progress("aligning", trainer.update, self.updates, numbers)
        else:  # the number of updates is not known
            total = math.ceil(self.budget_cpu_s)
            self.progress("aligning (CPU-seconds)", min(int(self.cpu_s), total), total, numbers)

    def _write(self, numbers: Mapping[str, Any], note: Callable[[], None]) -> None:
        """Append a line to the metrics and call ``note`` at once, so that checkpoints agree with them."""
        ranks = self.setup.ranks

        def write() -> None:
            if self.metrics:
                self.metrics.write(self.trainer.update, numbers)
            note()

        ranks.once("writing metrics", write)
        if not ranks.main:
            note()

    def _note_update(self) -> None:
        due = self.trainer.at_boundary() and self._due(self.setup.config.evaluation.every)
        self.written, self.unvalidated = self.trainer.update, due and bool(self.setup.validation)

    def _scored_since(self, before: Counts) -> dict[str, float]:
        """Counts of the clips that all ranks have scored since ``before``."""
        return added_up(self.setup.ranks.gather(self.setup.scored.since(before), "counting clips"))

    @property
    def improved(self) -> bool:
        """True if a validation has beaten the base; otherwise the base, update 0, is the best checkpoint."""
        return self.best is not None and self.best[0] > 0

    @property
    def guarded(self) -> bool:
        """True if the radar may stop the run and rule out checkpoints."""
        return bool(self.setup.judges.watchers) and self.setup.config.evaluation.stop_on_hacking

    @property
    def stopped(self) -> bool:
        """True once the radar has ended the run."""
        return self.guarded and self.verdict.hacked

    @property
    def spent(self) -> bool:
        """True once another update would take the run farther from its budget than it is now."""
        made = self.trainer.update
        if self.budget_cpu_s is None or not made or not self.trainer.at_boundary():
            return False
        return self.cpu_s * (1 + 0.5 / made) >= self.budget_cpu_s

    def _due(self, every: int) -> bool:
        """True if an every-N-updates action is due now; always at the last update."""
        update = self.trainer.update
        since_boundary = self.setup.config.optim.rollouts_per_refresh
        return update == self.updates or self.spent or bool(every) and update % every < since_boundary

    def save(self) -> None:
        """Write a checkpoint, mark the best one, and delete those that are no longer kept.

        With sharded weights this only starts the save; see ``settle``.
        """
        update, ranks = self.trainer.update, self.setup.ranks
        with ranks.clock("save"):
            self.settle(wait=True)
            if self.saving_parts:
                tidy = partial(self._tidy, update, self.best)  # the best may change before it is written
                self.saving_parts.begin(self.checkpoints, self._state(), tidy)
            else:
                ranks.once(SAVING, partial(self._save, update))
                self.saved = update

    def settle(self, *, wait: bool) -> None:
        """Record that the checkpoint under way is saved once it is written; ``wait`` blocks until it is.

        If a rank failed to write it, all ranks raise ValueError or OSError.
        """
        if self.saving_parts and (update := self.saving_parts.settle(wait=wait)) is not None:
            self.saved = update

    def _state(self) -> dict[str, Any]:
        """The run's own part of a checkpoint's state."""
        own = {"best": self.best, "radar": radar.saved(self.readings), "unvalidated": self.unvalidated}
        # Only with a budget, so that otherwise equal runs have equal checkpoints.
        return own if self.budget_cpu_s is None else own | {"cpu_s": self.cpu_s}

    def _save(self, update: int) -> None:
        tensors, state = self.trainer.tensors_and_state()
        kind = architecture(self.setup.backbone.weights)
        save_checkpoint(self.checkpoints, update, tensors, state | self._state(), architecture=kind)
        self._tidy(update, self.best)
        self.saved = update

    def _tidy(self, update: int, best: tuple[int, float] | None) -> None:
        """After a save, mark ``best``, the best one when the save began, and delete old checkpoints."""
        written = self.checkpoints / f"update-{update:06d}"
        self.setup.ranks.clock.bytes["save"] += sum(file.stat().st_size for file in written.iterdir())
        self._mark_best(best)
        prune(self.checkpoints, up_to=update)

    def _save_if_new(self) -> None:
        self.settle(wait=True)
        if self.trainer.update > self.saved:
            logger.warning("saving updates %d to %d", self.saved + 1, self.trainer.update)
            self.save()
            self.settle(wait=True)

    def _validate_and_save(self) -> None:
        """Validate before saving, so that a run killed in between repeats both.

        If the validation fails, ``train`` saves what was trained, and a resumed run begins with the
        validation.
        """
        self.validate()
        self.save()

    def _mark_best(self, best: tuple[int, float] | None) -> None:
        if best is not None:
            mark_best(self.checkpoints, self.checkpoints / f"update-{best[0]:06d}", best[1])

    def validate(self) -> None:
        """Compare the aligned weights with the starting policy on the validation prompts.

        The best checkpoint is the one with the largest mean gain among those at which no watcher has fallen.
        """
        update, scored = self.trainer.update, replace(self.setup.scored)
        sets, judges = self.setup.validation, self.setup.judges
        report = counter(self.progress, "validation videos", sum(map(len, sets.values())))
        aligned = {name: self.evaluate_aligned(prompts, report=report) for name, prompts in sets.items()}
        results = {name: comparison(self.base[name], found, judges) for name, found in aligned.items()}
        gain = mean_gain(results)
        base, now = radar.pooled_sets(list(self.base.values())), radar.pooled_sets(list(aligned.values()))
        readings = [*self.readings, radar.reading(update, now, judges)]
        numbers = self.update_verdict(readings) | radar.measured(base, now, judges)
        drifted = radar.drifted(numbers, radar.STANDARD_ERRORS)

        def note() -> None:
            fallen, best = self.guarded and self.verdict.fallen, self.best
            if not fallen and (best is None or gain > best[1]):
                best = (update, gain)
            self.readings, self.unvalidated, self.best = readings, False, best  # no signal can separate them

        self._write(
            {"kind": "validation", "mean_gain": gain, **results, "radar": numbers | {"drifted": drifted}}
            | self._scored_since(scored),
            note,
        )
        logger.info("hacking radar, update %d: %s", update, numbers["verdict"])
        if drifted:
            logger.warning("update %d: the look of the videos drifts: %s", update, ", ".join(drifted))

    def update_verdict(self, readings: Sequence[radar.Reading] | None = None) -> dict[str, Any]:
        """Update the verdict from ``readings`` (default: those so far); return it for the metrics log."""
        base = radar.reading(0, radar.pooled_sets(list(self.base.values())), self.setup.judges)
        history = [base, *(self.readings if readings is None else readings)]
        self.verdict = radar.judge(history, radar.STANDARD_ERRORS, radar.FALLS_IN_A_ROW)
        return radar.verdict_numbers(history, self.verdict)

    def evaluate_aligned(self, prompts: Any, **how: Any) -> Evaluation:
        """Held-out results of the trained parameters' moving average (``how``: see `evaluate_prompts`)."""
        with self.trainer.sides.aligned():
            return evaluate_prompts(self.setup, prompts, self.trainer.sharing, **how)

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from the state of the checkpoint from which the trainer was restored."""
        self.saved = self.written = self.resumed_at = self.trainer.update
        self.best = None if state["best"] is None else (int(state["best"][0]), float(state["best"][1]))
        self.readings = radar.loaded(state["radar"])
        self.unvalidated = bool(state.get("unvalidated", False))
        self.cpu_s = float(state.get("cpu_s", 0.0))
        if self.setup.validation:
            self.update_verdict()
        update = self.trainer.update
        validated = not update or any(reading.update == update for reading in self.readings)

        def tidy() -> None:  # a run may be killed before marking the best, or saving a validation
            self._mark_best(self.best)
            if self.metrics and not validated:
                self.metrics.drop_validation(update)

        self.setup.ranks.once("tidying up after the last stop", tidy)
        if update == self.updates and not validated:  # the run was shortened to end here
            self.unvalidated = bool(self.setup.validation)
        if self.unvalidated:
            self._validate_and_save()


def restore(trainer: Trainer, path: Path) -> dict[str, Any]:
    """Load a checkpoint into the trainers of all ranks and return its state.

    Raises CheckpointError, and RankError if the ranks have read different checkpoints.
    """
    ranks, kind = trainer.setup.ranks, architecture(trainer.setup.backbone.weights)
    with ranks.together(READING):
        expected, _ = trainer.tensors_and_state()
        if trainer.sharded:
            file, state = ranks.once(READING, partial(checked_file, path, architecture=kind))
            ranks.demand_equal(lambda: {"checkpoint": read_json(path / STATE).get("sha256")}, READING)
            tensors = read_parts(file, trainer.spread_tensors(file), trainer.teams.team)
            require_finite_tensors(path, {name: local(value) for name, value in tensors.items()})
        else:
            tensors, state = load_checkpoint(path, architecture=kind)
        parameters = {name: value for name, value in expected.items() if not name.startswith("optimizer.")}
        own = {f"optimizer.{name}": value for name, value in trainer.policy.parameters.items()}
        require_tensors(path, tensors, parameters | expected_moments(own, tensors))
        trainer.restore(tensors, state)
    trainer.demand_equal_ranks()
    return state


def load_aligned(weights: Weights, policy: Policy, path: Path, kind: str = "average") -> dict[str, Tensor]:
    """The trained values in a checkpoint: the moving "average", or the "raw" ones of the last update.

    Raises ValueError for a ``kind`` other than "average" and "raw", and CheckpointError.
    """
    if kind not in VALUE_PREFIXES:
        raise ValueError(f"weights: must be {' or '.join(VALUE_PREFIXES)}, got {kind!r}")
    tensors, _ = load_checkpoint(path, architecture=architecture(weights))
    prefix = VALUE_PREFIXES[kind]
    values = {name.removeprefix(prefix): v for name, v in tensors.items() if name.startswith(prefix)}
    require_tensors(path, values, policy.parameters)
    return {name: value.to(policy.parameters[name].device) for name, value in values.items()}


def open_checkpoint(weights: Weights, path: Path, kind: str = "average") -> Sides:
    """Base and aligned policy of a run's checkpoint (see `load_aligned`)."""
    policy = policy_of(weights.model)
    return Sides(policy, load_aligned(weights, policy, path, kind))
