"""Resuming bit for bit, whatever interrupted the run and wherever it was."""

import importlib
import itertools
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.torch import load_file
from torch.utils.tensorboard import SummaryWriter

import kvpo.training.run as run_module
from kvpo.method.methods import METHODS
from kvpo.training.checkpoint import (
    CheckpointError,
    best_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    resume_point,
    save_checkpoint,
)
from kvpo.training.held_out import evaluate_base
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.ranks import LostRank, Ranks
from kvpo.training.run import Run, restore
from kvpo.training.trainer import Trainer, architecture
from tests import processes
from tests.metrics import read_metrics
from tests.tiny_world import SETTINGS, tiny_config, toy_setup, with_weights

UPDATES = 5


class ToyRun:
    """A run of the toy setup in a directory, driven without the command line."""

    def __init__(self, base: Path, directory: Path, **settings: Any) -> None:
        self.base, self.directory = base, directory
        self.settings = {
            "optim__updates": UPDATES, "checkpoint__every": 1, "evaluation__every": 2, **settings
        }  # fmt: skip

    def go(self, stop_after: int | None = None) -> bool:
        """Start or continue; stop as a signal would after so many more updates."""
        setup = toy_setup(tiny_config(self.base, **self.settings))
        trainer = Trainer(setup)
        point = resume_point(self.directory / "checkpoints")
        at = None if point is None else int(point.name.removeprefix("update-"))
        begun = at or 0
        with MetricsLog(
            self.directory / "metrics.jsonl", self.directory / "tensorboard", resumed_at=at
        ) as log:
            base = evaluate_base(setup, trainer, setup.validation)
            run = Run(setup, trainer, self.directory / "checkpoints", log, lambda *numbers: None, base)
            if point is not None:
                run.resume(restore(trainer, point))
            return run.train(lambda: stop_after is not None and trainer.update >= begun + stop_after)

    def result(self) -> tuple[Any, ...]:
        return outcome(self.directory)


def outcome(directory: Path) -> tuple[Any, ...]:
    """Everything that must not depend on interruptions: last checkpoint, best mark, metrics without times."""
    latest = latest_checkpoint(directory / "checkpoints")
    assert latest is not None
    tensors = {name: value.tolist() for name, value in load_file(latest / "state.safetensors").items()}
    assert any(name.startswith("optimizer.") for name in tensors)
    state = json.loads((latest / "state.json").read_text())
    metrics = [
        {key: value for key, value in record.items() if key not in ("time", "seconds", "phases", "cpu_s")}
        for record in read_metrics(directory / "metrics.jsonl")
    ]
    best = best_checkpoint(directory / "checkpoints")
    return tensors, state, best and (best[0].name, best[1]), metrics


VARIANTS: dict[str, dict[str, Any]] = {
    "lora": {},
    "full": {"optim__lora_rank": 0},
    "epochs and refresh": {"optim__inner_epochs": 2, "optim__rollouts_per_refresh": 2},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_stopped_after_any_update_a_run_ends_the_same(tiny_base: Path, tmp_path: Path, variant: str) -> None:
    whole = ToyRun(tiny_base, tmp_path / "whole", **VARIANTS[variant])
    whole.directory.mkdir()
    assert whole.go()
    parts = ToyRun(tiny_base, tmp_path / "parts", **VARIANTS[variant])
    parts.directory.mkdir()
    stops = 0
    while not parts.go(stop_after=1):
        stops += 1
    refresh = whole.settings.get("optim__rollouts_per_refresh", 1)
    assert stops == len(range(0, UPDATES, refresh)), "a stop in the last update is heard, too"
    assert parts.result() == whole.result()
    updates = [r["update"] for r in read_metrics(parts.directory / "metrics.jsonl") if r["kind"] == "update"]
    assert updates == [1, 2, 3, 4, 5]


def test_validation_and_the_best_checkpoint(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = ToyRun(tiny_base, tmp_path)
    before = time.process_time()
    assert run.go()
    assert "lost" not in caplog.text
    records = read_metrics(tmp_path / "metrics.jsonl")
    spent = sum(record["cpu_s"] for record in records if record["kind"] == "update")
    assert 0 < spent < time.process_time() - before
    validations = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] == "validation"]
    assert [record["update"] for record in validations] == [2, 4, 5]
    gains = {0: 0.0, **{record["update"]: record["mean_gain"] for record in validations}}
    winner = max(gains, key=lambda update: gains[update])  # the base, unless one is better
    best = best_checkpoint(tmp_path / "checkpoints")
    assert best is not None and best[1] == gains[winner]
    assert best[0].name == f"update-{winner:06d}" and best[0].is_dir()
    kept = {path.name for path in (tmp_path / "checkpoints").glob("update-*")}
    assert kept == {best[0].name, "update-000004", "update-000005"}  # the newest two and the best


def test_a_reward_that_fails_in_validation_costs_no_update(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"optim__updates": 3, "checkpoint__every": 4}
    whole, failed = (ToyRun(tiny_base, tmp_path / name, **settings) for name in ("whole", "failed"))
    for run in (whole, failed):
        run.directory.mkdir()
    assert whole.go()

    def fails(*arguments: Any, **how: Any) -> Any:
        raise ValueError("reward server http://a: gave up")

    for update in (2, 3):
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="gave up"):
            patch.setattr(Run, "evaluate_aligned", fails)
            failed.go()
        with monkeypatch.context() as patch, pytest.raises(ValueError, match="gave up"):
            patch.setattr(Run, "save", fails)  # validated, and not yet saved
            failed.go()
        latest = latest_checkpoint(failed.directory / "checkpoints")
        assert latest is not None and latest.name == f"update-{update:06d}"
        failed.go(stop_after=0)
    assert failed.result() == whole.result()


FAILURES: dict[str, tuple[Any, str, bool, Sequence[int]]] = {
    "made and not compared over ranks": (Trainer, "demand_equal_ranks", False, (1, 2)),
    "in the metrics and not on TensorBoard": (SummaryWriter, "add_scalar", True, (200,)),
    "not learned": (Trainer, "_learn", False, (2, 3)),
    "learned and not counted": (Trainer, "_learn", True, (1, 2)),
    "saved and not marked": (run_module, "save_checkpoint", True, (2, 3)),
    "done by rank 0 and not known to the others": (Ranks, "once", True, range(1, 6)),
}
"""What was lost: the owner and the name of a function, whether it had returned, and in which of its calls."""


@pytest.mark.parametrize("moment", FAILURES)
def test_a_failure_at_any_moment_is_resumed_to_the_same_end(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    settings = {"optim__updates": 4, "optim__rollouts_per_refresh": 2}
    whole, failed = (ToyRun(tiny_base, tmp_path / name, **settings) for name in ("whole", "failed"))
    whole.directory.mkdir()
    assert whole.go()
    owner, name, returned, calls = FAILURES[moment]
    original = vars(owner)[name]
    for nth in calls:
        failed.directory.mkdir()
        count = itertools.count(1)

        def fails(*arguments: Any, **named: Any) -> Any:
            here = next(count) == nth  # noqa: B023
            value = original(*arguments, **named) if returned or not here else None
            if here:
                raise LostRank("rank 1 is gone")
            return value

        with monkeypatch.context() as patch, pytest.raises(OSError, match="rank 1 is gone"):
            patch.setattr(owner, name, fails)
            failed.go()
        assert failed.go()
        assert failed.result() == whole.result(), nth
        shutil.rmtree(failed.directory)


def test_an_adapter_of_another_strength_or_with_a_tensor_missing_is_refused(
    tiny_base: Path, tmp_path: Path
) -> None:
    assert ToyRun(tiny_base, tmp_path, optim__updates=1).go()
    point = resume_point(tmp_path / "checkpoints")
    assert point is not None
    stronger = Trainer(toy_setup(tiny_config(tiny_base, optim__lora_rank=4)))
    with pytest.raises(CheckpointError, match="another architecture: adapter is .*2.* there, .*4.* here"):
        restore(stronger, point)
    trainer = Trainer(toy_setup(tiny_config(tiny_base)))
    tensors, state = trainer.tensors_and_state()
    gone = next(name for name in tensors if name.startswith("average."))
    del tensors[gone]
    weights = trainer.setup.backbone.weights
    cut = save_checkpoint(tmp_path / "cut", 1, tensors, state, architecture=architecture(weights))
    with pytest.raises(CheckpointError, match=f"does not fit: {gone} missing"):
        restore(trainer, cut)


def test_a_checkpoint_of_an_earlier_version_is_resumed(tiny_base: Path, tmp_path: Path) -> None:
    """It lacks what has been added to the state since."""
    whole, run = (ToyRun(tiny_base, tmp_path / name, optim__updates=2) for name in ("whole", "run"))
    for one in (whole, run):
        one.directory.mkdir()
    assert whole.go() and not run.go(stop_after=1)
    saved = run.directory / "checkpoints"
    point = resume_point(saved)
    assert point is not None
    tensors, state = load_checkpoint(point)
    for later in ("idle", "unvalidated"):
        del state[later]
    kind = json.loads((point / "state.json").read_text())["architecture"]
    save_checkpoint(saved, 1, tensors, state, architecture=kind)
    assert run.go() and run.result() == whole.result()


def test_a_resumed_adapter_needs_its_own_base(tiny_base: Path, tmp_path: Path) -> None:
    run = ToyRun(tiny_base, tmp_path, optim__updates=1)
    assert run.go()
    trainer = Trainer(toy_setup(tiny_config(tiny_base, optim__updates=2)))
    trainer.setup = with_weights(trainer.setup, base_sha256="0" * 64)
    point = resume_point(tmp_path / "checkpoints")
    assert point is not None
    with pytest.raises(CheckpointError, match="another architecture: base is"):
        restore(trainer, point)


# From here on through the command line, in processes that are really killed.


@pytest.fixture(scope="module")
def arguments(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str | Path]:
    """`kvpo align` with settings that leave several updates between checkpoints."""
    file = tmp_path_factory.mktemp("config") / "run.yaml"
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
    changes = {
        "backbone.checkpoint": str(tiny_base),
        "exploration.rows": 4,
        "optim.updates": 6,
        "checkpoint.every": 2,
        "evaluation.every": 3,
        "stream.schedule": [1.0, 0.5],
    }
    file.write_text(yaml.safe_dump({**lists, **changes}))
    return ["align", "--config", file]


@pytest.fixture(scope="module")
def uninterrupted(arguments: list[str | Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("runs") / "uninterrupted"
    code, printed = processes.run([*arguments, "--out", directory], directory.with_suffix(".log"))
    assert code == 0, printed
    return directory


def signal_at(place: str, nth: int, *numbers: signal.Signals) -> None:
    """In a child: send it signals at the nth call of a function, named as ``module:function``."""
    module, _, name = place.partition(":")
    owner, calls = importlib.import_module(module), []
    original = vars(owner)[name]

    def disturbed(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == nth:
            for number in numbers:
                os.kill(os.getpid(), number)
        return original(*arguments, **named)

    setattr(owner, name, disturbed)


def killed_at(name: str) -> Callable[[], None]:
    """Die without a word at the first call of a function that ``kvpo.training.run`` uses."""
    return partial(signal_at, f"kvpo.training.run:{name}", 1, signal.SIGKILL)


def limit_files(size: int) -> None:
    """In a child: no file may grow beyond this many bytes, as on a disk that is almost full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_killed_again_and_again_a_run_ends_the_same(
    arguments: list[str | Path], uninterrupted: Path, tmp_path: Path
) -> None:
    directory, log = tmp_path / "killed", tmp_path / "log"
    command = [*arguments, "--out", directory, "--resume"]
    metrics = directory / "metrics.jsonl"
    for moment in (
        1,  # before the first checkpoint: nothing is left to continue from
        killed_at("save_checkpoint"),
        3,
        killed_at("comparison"),  # in the middle of a validation
        killed_at("save_checkpoint"),  # validated, and not yet saved
        # The second architecture to be described after the one that resuming checks: tensors are written, and
        # the rest of the checkpoint is not.
        partial(signal_at, "kvpo.training.checkpoint:_json", 2, signal.SIGKILL),
        killed_at("mark_best"),  # saved, and not yet marked as the best
        killed_at("prune"),
        8,
        partial(signal_at, "kvpo.app.align:comparison", 1, signal.SIGKILL),  # tested, and no summary yet
    ):
        lines = moment if isinstance(moment, int) else None
        process = processes.start(command, log, moment if callable(moment) else processes.nothing)
        if lines is not None:
            processes.wait_for(lambda wanted=lines: processes.lines_in(metrics) >= wanted, process)
            process.kill()
        process.join(processes.TIME_LIMIT)
        assert process.exitcode == -signal.SIGKILL, log.read_text()
    assert list((directory / "held-out").iterdir())
    # No held-out video is made a second time.
    code, printed = processes.run(
        command, log, partial(signal_at, "kvpo.training.evaluation:_evaluated", 1, signal.SIGKILL)
    )
    assert code == 0, printed
    assert outcome(directory) == outcome(uninterrupted) and not (directory / "held-out").exists()
    ours, theirs = (json.loads((d / "summary.json").read_text()) for d in (directory, uninterrupted))
    assert ours["held_out"] == theirs["held_out"] and ours["checks"] == theirs["checks"]


@pytest.mark.slow
def test_killed_within_shared_rollouts_a_run_of_all_parameters_ends_the_same(
    arguments: list[str | Path], tmp_path: Path
) -> None:
    """Two rollouts per refresh, two epochs each; killed in the second epoch of the second rollout."""
    command = [*arguments, "--optim.lora_rank", "0", "--optim.inner_epochs", "2"]
    command += ["--optim.rollouts_per_refresh", "2", "--resume", "--out"]
    before_tests = partial(signal_at, "kvpo.app.align:evaluate_base", 2, signal.SIGTERM)
    log = tmp_path / "log"
    gradients = "kvpo.training.trainer:accumulate_gradients"
    for name, moments in {
        "whole": (),
        "killed": ((gradients, 8), ("kvpo.training.checkpoint:_json", 2), (gradients, 3)),
    }.items():
        for place, nth in moments:
            code, printed = processes.run(
                [*command, tmp_path / name], log, partial(signal_at, place, nth, signal.SIGKILL)
            )
            assert code == -signal.SIGKILL, printed
        code, printed = processes.run([*command, tmp_path / name], log, before_tests)
        assert code == 130 and "saved up to update 6;" in printed
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_within_two_updates_a_run_of_any_method_ends_the_same(
    method: str, arguments: list[str | Path], tmp_path: Path
) -> None:
    command = [*arguments, "--method", method, "--evaluation.every", "0", "--optim.updates", "4"]
    command += ["--optim.inner_epochs", "2", "--optim.rollouts_per_refresh", "2", "--resume", "--out"]
    log = tmp_path / "log"
    for nth in (6, 3):
        kill = partial(signal_at, "kvpo.training.trainer:accumulate_gradients", nth, signal.SIGKILL)
        code, printed = processes.run([*command, tmp_path / "killed"], log, kill)
        assert code == -signal.SIGKILL, printed
    for name in ("killed", "whole"):
        code, printed = processes.run([*command, tmp_path / name], log)
        assert code == 0, printed
    assert outcome(tmp_path / "killed") == outcome(tmp_path / "whole")


STOPS = {
    "start-up": ("kvpo.app.align:build_setup", 1, signal.SIGTERM),
    "base validation": ("kvpo.app.align:evaluate_base", 1, signal.SIGINT),
    "first update": ("kvpo.training.trainer:accumulate_gradients", 1, signal.SIGTERM),
    "validation": ("kvpo.training.run:comparison", 1, signal.SIGINT),
    "twice in an update": ("kvpo.training.trainer:accumulate_gradients", 1, signal.SIGINT, signal.SIGINT),
    "while saving": ("kvpo.training.run:save_checkpoint", 1, signal.SIGTERM),
    "final tests": ("kvpo.app.align:evaluate_base", 2, signal.SIGTERM),
    "report": ("kvpo.report.page:write_report", 1, signal.SIGTERM),
}
SAVED = {"first update": 1, "validation": 3, "twice in an update": 3, "while saving": 4, "final tests": 6,
         "report": 6}  # fmt: skip


def test_a_signal_at_any_moment_saves_and_says_how_to_go_on(
    arguments: list[str | Path], uninterrupted: Path, tmp_path: Path
) -> None:
    directory, log = tmp_path / "stopped", tmp_path / "log"
    command = [*arguments, "--out", directory, "--resume"]
    for moment, disturbance in STOPS.items():
        code, printed = processes.run(command, log, partial(signal_at, *disturbance))
        assert code == 130, (moment, printed)
        assert "Traceback" not in printed
        last = printed.splitlines()[-1]
        if moment in SAVED:
            go_on = f"continue with: kvpo align --resume --out {directory}"
            assert last == f"kvpo: interrupted: saved up to update {SAVED[moment]}; {go_on}", moment
        else:
            assert last == "kvpo: interrupted: no update had been saved; the same command starts again"
        assert (directory / "summary.json").exists() == (moment == "report")
        assert not (directory / "report.html").exists()
    summary = (directory / "summary.json").read_bytes()
    code, printed = processes.run(["align", "--resume", "--out", directory], log)
    assert code == 0, printed
    assert (directory / "summary.json").read_bytes() == summary, "only the report was missing"
    assert (directory / "report.html").exists()
    assert outcome(directory) == outcome(uninterrupted)

    code, printed = processes.run([*arguments, "--out", directory], log)
    assert code == 1 and "already holds a run; add --resume" in printed


def test_a_disk_that_fills_up_loses_nothing(
    arguments: list[str | Path], uninterrupted: Path, tmp_path: Path
) -> None:
    directory, log = tmp_path / "full", tmp_path / "log"
    command = [*arguments, "--out", directory, "--resume"]
    stop = partial(signal_at, "kvpo.training.trainer:accumulate_gradients", 1, signal.SIGTERM)
    assert processes.run(command, log, stop)[0] == 130
    saved = latest_checkpoint(directory / "checkpoints")
    assert saved is not None
    almost_full = partial(limit_files, (saved / "state.safetensors").stat().st_size // 2)
    code, printed = processes.run(command, log, almost_full)
    assert code == 1 and "cannot save" in printed and "Traceback" not in printed
    assert latest_checkpoint(directory / "checkpoints") == saved
    before_tests = partial(signal_at, "kvpo.app.align:evaluate_base", 2, signal.SIGTERM)
    code, printed = processes.run(command, log, before_tests)
    assert code == 130 and "saved up to update 6;" in printed
    assert outcome(directory) == outcome(uninterrupted)
