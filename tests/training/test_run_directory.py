import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from kvpo.app.configuration import resolve
from kvpo.config import Config
from kvpo.files import StorageError
from kvpo.training.run_directory import RunDirectory, holds_run

HOLD = (
    "import sys, time\nfrom pathlib import Path\nfrom kvpo.config import Config\n"
    "from kvpo.training.run_directory import RunDirectory\n"
    "with RunDirectory(Path(sys.argv[1]), Config()):\n    print('held', flush=True)\n    time.sleep(60)\n"
)


def test_the_saved_configuration_loads_equal(tmp_path: Path) -> None:
    config = replace(Config(), seed=3)
    with RunDirectory(tmp_path / "a" / "run", config) as run:
        assert resolve(None, run.config_file, {}) == config


def test_what_a_run_found_is_written_as_json(tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run", Config()) as run:
        run.write_meanings({"Method": {"loss": "The loss."}})
        run.write_summary({"gain": 0.25})
        for path, content in (
            (run.meanings, {"Method": {"loss": "The loss."}}),
            (run.summary, {"gain": 0.25}),
        ):
            assert json.loads(path.read_text()) == content and path.read_text().endswith("}\n")
        with pytest.raises(ValueError, match="not JSON compliant"):
            run.write_summary({"gain": float("nan")})
        assert json.loads(run.summary.read_text()) == {"gain": 0.25}


def test_a_live_run_is_not_disturbed_and_a_killed_one_does_not_block(tmp_path: Path) -> None:
    out = tmp_path / "run"
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(out)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        for resume in (False, True):
            with pytest.raises(StorageError, match=f"in use by process {holder.pid};"):
                RunDirectory(out, replace(Config(), seed=9), resume=resume).__enter__()
        assert resolve(None, out / "config.yaml", {}) == Config()
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunDirectory(out, Config()) as run:
        assert (out / ".owner").read_text() == str(os.getpid())
        assert run.checkpoints.is_dir()


def test_two_runs_in_one_process_exclude_each_other_until_the_first_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("a run that is refused does not wait"))
    with (
        RunDirectory(tmp_path, Config()),
        pytest.raises(StorageError, match=f"in use by process {os.getpid()}"),
        RunDirectory(tmp_path, Config()),
    ):
        pass
    with RunDirectory(tmp_path, Config()):
        pass


def test_a_finished_or_begun_run_is_entered_only_to_resume(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, Config()) as run:
        assert not holds_run(tmp_path)
        (run.checkpoints / "update-000001").mkdir()
    assert holds_run(tmp_path)
    with pytest.raises(StorageError, match="--resume"):
        RunDirectory(tmp_path, replace(Config(), seed=9)).__enter__()
    assert resolve(None, tmp_path / "config.yaml", {}).seed == 0
    with RunDirectory(tmp_path, Config(), resume=True):
        pass


def test_a_directory_with_a_configuration_is_that_run_s_with_or_without_checkpoints(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, Config()):
        pass
    with (
        pytest.raises(StorageError, match="already holds a run; add --resume"),
        RunDirectory(tmp_path, replace(Config(), seed=1)),
    ):
        pass
    assert resolve(None, tmp_path / "config.yaml", {}).seed == 0
    with RunDirectory(tmp_path, Config()) as run:
        assert run.continued


def test_a_run_that_never_began_leaves_a_directory_as_it_was(tmp_path: Path) -> None:
    mine = [tmp_path / "notes.txt", tmp_path / "checkpoints" / "base.pt"]
    mine[1].parent.mkdir()
    for file in mine:
        file.write_text("mine")
    for path, left in ((tmp_path, [*mine, mine[1].parent]), (tmp_path / "new" / "run", [])):
        with pytest.raises(ValueError, match="not to be found"), RunDirectory(path, Config()) as run:
            run.provenance.write_text("{}")
            (run.checkpoints / "update-000000").mkdir()
            raise ValueError("not to be found")
        assert sorted(path.rglob("[!.]*")) == sorted(left)
        assert path.exists() == bool(left)
    with pytest.raises(ValueError, match="update 1"), RunDirectory(tmp_path / "begun", Config()) as run:
        run.begun = True
        raise ValueError("update 1")
    assert run.config_file.exists()


def test_what_others_put_into_a_new_directory_stays(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no weights"), RunDirectory(tmp_path / "runs", Config()) as run:
        (run.path / "another").mkdir()
        raise ValueError("no weights")
    assert (tmp_path / "runs" / "another").is_dir() and not run.config_file.exists()


def test_entering_clears_what_a_kill_left_half_written(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, Config()) as run:
        (run.checkpoints / ".incomplete-7-update-000001").mkdir()
    with RunDirectory(tmp_path, Config()) as run:
        assert list(run.checkpoints.iterdir()) == []


def test_an_output_that_cannot_be_a_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(StorageError, match="--out: .*file is a file; name a directory"):
        RunDirectory(tmp_path / "file", Config()).__enter__()
    assert (tmp_path / "file").read_text() == "mine"


def test_summary_is_whole_json(tmp_path: Path) -> None:
    with RunDirectory(tmp_path, Config()) as run:
        run.write_summary({"seed": 0, "held_out": {"short": {"paired_gain": 0.1}}})
        assert json.loads(run.summary.read_text())["held_out"]["short"]["paired_gain"] == 0.1
        with pytest.raises(ValueError):
            run.write_summary({"seed": float("nan")})
        assert json.loads(run.summary.read_text())["seed"] == 0
