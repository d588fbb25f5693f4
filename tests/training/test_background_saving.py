"""Checkpoints of spread weights are written while the training goes on, and are whole or not there."""

import errno
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from kvpo.files import StorageError
from kvpo.training import background_saving
from kvpo.training.checkpoint import (
    best_checkpoint,
    checkpoints,
    load_checkpoint,
    resume_point,
    save_checkpoint,
)
from kvpo.training.ranks import LostRank, RankError, Ranks
from kvpo.training.run import Run, restore
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer, architecture
from tests.ranks import on_ranks
from tests.tiny_world import tiny_config, toy_setup

UPDATES = 3
Disturbance = Callable[[Run], None]


def undisturbed(run: Run) -> None:
    """Everything is well."""


def setup_of(ranks: Ranks, base: Path) -> Setup:
    config = tiny_config(
        base, optim__prompts_per_update=1, distributed__branch_ranks=2, distributed__shard=True,
        optim__updates=UPDATES,
    )  # fmt: skip
    return replace(toy_setup(config), ranks=ranks, validation={})


def trained(ranks: Ranks, base: Path, directory: Path, disturbance: Disturbance) -> int:
    """The run of spread weights in a directory, begun or resumed; its last checkpoint's update."""
    trainer = Trainer(setup_of(ranks, base))
    run = Run(trainer.setup, trainer, directory, None, lambda *given: None)
    point = ranks.once("looking", lambda: resume_point(directory))
    if point is not None:
        run.resume(restore(trainer, point))
    disturbance(run)
    assert run.train(lambda: False) and run.saved == UPDATES
    return run.saved


def ended(directory: Path) -> dict[str, Tensor]:
    *_, latest = checkpoints(directory)
    assert latest.name == f"update-{UPDATES:06d}"
    assert not list(directory.glob(".*"))
    return load_checkpoint(latest)[0]


@pytest.fixture(scope="module")
def expected(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    directory = tmp_path_factory.mktemp("expected")
    assert on_ranks(2, directory / "ranks", trained, tiny_base, directory / "run", undisturbed) == [3, 3]
    return ended(directory / "run")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def slowly(run: Run) -> None:
    """The first update's parts are written only when the second update has been made."""
    write_parts, directory = background_saving.write_parts, run.checkpoints

    def slow(tensors: Any, file: Path, team: Ranks) -> None:
        begun = any(name.startswith("optimizer.") for name in tensors)
        deadline = time.monotonic() + 60
        while begun and run.trainer.update == 1:
            assert time.monotonic() < deadline, "the training waits for the disk"
            assert run.saved == 0 and not (directory / "update-000001").exists()
            time.sleep(0.01)
        write_parts(tensors, file, team)

    background_saving.write_parts = slow


def test_training_goes_on_while_a_checkpoint_is_written(
    expected: dict[str, Tensor], tiny_base: Path, tmp_path: Path
) -> None:
    found = on_ranks(2, tmp_path / "ranks", trained, tiny_base, tmp_path / "run", slowly)
    assert found == [UPDATES, UPDATES]
    assert_same(ended(tmp_path / "run"), expected)


class Begun:
    """Saves nothing, and keeps what is to be done once it had."""

    def begin(self, directory: Path, state: Any, then: Callable[[], None]) -> None:
        self.then = then

    def settle(self, *, wait: bool) -> None:
        """Nothing is written."""


def test_the_best_checkpoint_is_that_of_the_time_when_its_save_began(tiny_base: Path, tmp_path: Path) -> None:
    """Noted while a save is under way, a better one is marked by its own: it is not there yet."""
    trainer, saving = Trainer(setup_of(Ranks(), tiny_base)), Begun()
    run = Run(trainer.setup, trainer, tmp_path, None, lambda *given: None, best=(0, 0.0))
    run.saving_parts = saving  # type: ignore[assignment]
    for update in range(4):
        save_checkpoint(tmp_path, update, {"a": torch.zeros(1)}, {}, architecture={})
    trainer.update = 3
    run.save()
    run.best = (4, 1.0)
    saving.then()
    assert best_checkpoint(tmp_path) == (tmp_path / "update-000000", 0.0)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "update-000000",
        "update-000002",
        "update-000003",
    ]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("full")])
def test_a_signal_while_a_checkpoint_is_waited_for_leaves_it_under_way(
    error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And a failure does not: it is said once."""
    saving, writing = object.__new__(background_saving.BackgroundSaving), Future[None]()

    def result() -> None:
        raise error

    monkeypatch.setattr(writing, "result", result)
    saving.ranks, saving.under_way = Ranks(), (7, writing)
    with pytest.raises(type(error)):
        saving.settle(wait=True)
    writing.set_result(None)
    assert saving.settle_alone() == (7 if isinstance(error, KeyboardInterrupt) else None)


def at_the_second(run: Run, rank: int, action: Callable[[], None]) -> None:
    """``action`` in the thread in which a rank writes its part of the second update's state."""
    write_data = HuggingFaceStorageWriter.write_data

    def disturbed(writer: Any, plan: Any, planner: Any) -> Any:
        if run.setup.ranks.rank == rank and run.saved == 1:
            action()
        return write_data(writer, plan, planner)

    HuggingFaceStorageWriter.write_data = disturbed  # type: ignore[method-assign]


def full(run: Run) -> None:
    def action() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    at_the_second(run, 1, action)


def test_a_full_disk_on_one_rank_stops_all_and_is_said(tiny_base: Path, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    other, own = on_ranks(2, tmp_path / "ranks", trained, tiny_base, directory, full)
    assert isinstance(own, StorageError) and "the disk is full" in str(own)
    assert isinstance(other, RankError)
    assert str(other).startswith("stopped with rank 1, which failed while saving a checkpoint: ")
    assert "No space left on device" in str(other) and "\n" not in str(other)
    assert [path.name for path in checkpoints(directory)] == ["update-000000", "update-000001"]
    assert sorted(path.name for path in directory.iterdir()) == [
        "best.json",
        "update-000000",
        "update-000001",
    ]


def killed(run: Run) -> None:
    at_the_second(run, 1, lambda: os.kill(os.getpid(), signal.SIGKILL))


def first_killed(run: Run) -> None:
    """Rank 0 dies after it has joined the parts, before the checkpoint is marked whole."""
    save = background_saving.write_parts

    def write(tensors: Any, file: Path, team: Ranks) -> None:
        save(tensors, file, team)
        if run.setup.ranks.main and run.saved == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    background_saving.write_parts = write


@pytest.mark.parametrize(("disturbance", "victim"), [(killed, 1), (first_killed, 0)])
def test_a_kill_while_parts_are_written_leaves_the_checkpoint_before(
    disturbance: Disturbance, victim: int, expected: dict[str, Tensor], tiny_base: Path, tmp_path: Path
) -> None:
    directory = tmp_path / "run"
    found = on_ranks(2, tmp_path / "ranks", trained, tiny_base, directory, disturbance)
    assert found[victim] is None and isinstance(found[1 - victim], LostRank)
    assert [path.name for path in checkpoints(directory)] == ["update-000000", "update-000001"]
    for path in checkpoints(directory):
        load_checkpoint(path)
    assert on_ranks(2, tmp_path / "again", trained, tiny_base, directory, undisturbed) == [3, 3]
    *_, latest = checkpoints(directory)
    assert_same(load_checkpoint(latest)[0], expected)


def differing(ranks: Ranks, base: Path, directory: Path, what: str) -> None:
    """Parts of two adapters, or of two checkpoints, which differ on every rank as parts always do."""
    setup = setup_of(ranks, base)
    if what == "weights" and ranks.rank == 1:
        with torch.no_grad():
            next(value for name, value in setup.model.named_parameters() if "lora_A" in name).mul_(-1)
    restore(Trainer(setup), directory / f"update-{UPDATES - ranks.rank:06d}")


@pytest.mark.parametrize("what", ["weights", "checkpoint"])
def test_parts_that_do_not_belong_together_are_refused(what: str, tiny_base: Path, tmp_path: Path) -> None:
    kind = architecture(setup_of(Ranks(), tiny_base).backbone.weights)
    for update in (UPDATES, UPDATES - 1):
        tensors = {"a": torch.tensor([float(update)])}
        save_checkpoint(tmp_path, update, tensors, {}, architecture=kind)
    for error in on_ranks(2, tmp_path / "ranks", differing, tiny_base, tmp_path, what):
        assert isinstance(error, RankError) and f"rank 1 differs from rank 0 in its {what} " in str(error)
