"""Phases of updates as ranks count them, and trackers that get the same numbers."""

import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from kvpo.extras import MissingPackageError
from kvpo.report.phases import phases
from kvpo.report.record import RunRecord
from kvpo.training.clock import PHASES, Clock, phases_of
from kvpo.training.held_out import evaluate_base
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.ranks import Ranks
from kvpo.training.run import Run
from kvpo.training.trackers import TRACKERS, Tracker
from kvpo.training.trainer import Trainer
from tests.metrics import read_metrics
from tests.ranks import on_ranks
from tests.tiny_world import tiny_config, toy_setup


def logged(ranks: Ranks, base: Path, directory: Path) -> None:
    """Three updates, of which the second has one group only, after a run that saved a lot."""
    config = tiny_config(base, exploration__rows=4, evaluation__every=0)
    setup = replace(toy_setup(config), ranks=ranks)
    prompts = setup.training_prompts
    setup = replace(setup, training_prompts=lambda update: prompts(update)[: 1 if update == 1 else 2])
    ranks.clock.seconds["save"] += 1000
    ranks.clock.bytes["save"] += 10**12
    trainer = Trainer(setup)
    metrics = MetricsLog(directory / "metrics.jsonl", directory / "events") if ranks.main else None
    held_out = evaluate_base(setup, trainer, setup.validation)
    run = Run(setup, trainer, directory / "checkpoints", metrics, lambda *given: None, held_out)
    assert run.train(lambda: False)


@pytest.mark.parametrize("count", [1, 2])
def test_every_rank_says_where_its_time_went(count: int, tiny_base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    directory.mkdir()
    assert on_ranks(count, tmp_path / "ranks", logged, tiny_base, directory) == [None] * count
    updates = [one for one in read_metrics(directory / "metrics.jsonl") if one["kind"] == "update"]
    found = [one["phases"] for one in updates]
    samples = [one["phases"]["samples_per_second_and_rank"] * count * one["seconds"] for one in updates]
    members = tiny_config(tiny_base).exploration.branches + 1
    assert samples == pytest.approx([2 * members, members, 2 * members])
    for one in found:
        assert set(one["seconds"]) == set(PHASES) and all(
            len(own) == count for own in one["seconds"].values()
        )
        for name in ("rollout", "decode", "score", "replay", "save"):
            assert one["seconds"][name][0] > 0, name
        assert 0 <= one["idle"] < 1 and one["samples_per_second_and_rank"] > 0
        assert 1000 < one["bytes"]["save"][0] < 10**12 and one["seconds"]["save"][0] < 1000
    assert ("reduce" in found[-1]["bytes"]) == (count > 1)
    assert (found[-1]["seconds"]["wait"][0] > 0) == (count > 1)


def test_samples_and_waiting_are_of_all_ranks() -> None:
    clock = Clock()
    before = clock.read()
    with clock("rollout"):
        pass
    clock.seconds["wait"] += 2
    clock.bytes["reduce"] += 10
    own = clock.since(before)
    assert own["bytes"] == {"reduce": 10} and own["seconds"]["wait"] == 2
    idle = {"seconds": {name: 0.0 for name in PHASES}, "bytes": {}}
    found = phases_of([own, idle], 4.0, 16)
    assert found["idle"] == 0.25 and found["samples_per_second_and_rank"] == 2.0
    assert found["seconds"]["wait"] == [2, 0] and found["bytes"]["reduce"] == [10, 0]


def record_of(updates: list[Any]) -> RunRecord:
    return RunRecord(Path(), {}, None, updates, {}, [], [], [], [])


def test_the_report_has_a_line_for_every_phase() -> None:
    seconds = {"rollout": [1.0, 3.0], "wait": [0.5, 0.0]}
    entry = {"phases": {"seconds": seconds, "bytes": {"rollout": [2e6, 4e6]}, "idle": 0.125,
                        "samples_per_second_and_rank": 7.0}}  # fmt: skip
    page = phases(record_of(updates=[entry, entry, {}]))
    assert "Rollout" in page and "<td>2</td><td>3</td><td>3</td>" in page
    assert "2 ranks, 0.125 of their time" in page and "7 samples" in page
    assert "No update has recorded" in phases(record_of(updates=[{}]))


class Package(ModuleType):
    """Stands in for either package."""

    def __init__(self) -> None:
        super().__init__("tracker")
        self.calls: list[Any] = []

    def init(self, **given: Any) -> None:
        self.calls.append(given)

    def log(self, numbers: Any, step: int) -> None:
        self.calls.append((step, numbers))

    def finish(self) -> None:
        self.calls.append("finished")


@pytest.mark.parametrize("name", TRACKERS)
def test_trackers_get_what_tensorboard_gets(name: str, tmp_path: Path, monkeypatch: Any) -> None:
    package = Package()
    monkeypatch.setitem(sys.modules, name, package)
    tracker = Tracker(name, "run-1", {"optim.lr": 1.0})
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "events", trackers=[tracker]) as log:
        log.write(1, {"kind": "update", "loss": 0.5, "phases": {"idle": 0.25, "seconds": {"rollout": [1.0]}}})
    begun, written, ended = package.calls
    assert begun == {"project": "kvpo", "name": "run-1", "config": {"optim.lr": 1.0}}
    assert written == (1, {"loss": 0.5, "phases/idle": 0.25}) and ended == "finished"


def test_a_tracker_that_is_not_installed_is_one_line(monkeypatch: Any) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingPackageError, match=r"pip install 'kvpo\[trackers\]'"):
        Tracker("wandb", "run", {})


@pytest.mark.parametrize("name", TRACKERS)
def test_the_packages_themselves_keep_the_numbers_offline(
    name: str, tmp_path: Path, monkeypatch: Any
) -> None:
    for variable, value in {"WANDB_MODE": "offline", "WANDB_DIR": tmp_path, "TRACKIO_DIR": tmp_path}.items():
        monkeypatch.setenv(variable, str(value))  # trackio reads its own when it is imported
    pytest.importorskip(name)
    tracker = Tracker(name, "run", {"optim.lr": 1.0, "objective.keep": (1, 1)})
    for update in (1, 2):
        tracker.write(update, {"loss": 0.5, "phases/idle": 0.25})
    tracker.close()
    kept = [*tmp_path.rglob("*.wandb"), *tmp_path.rglob("*.db")]
    assert any(b"phases/idle" in file.read_bytes() for file in kept)
