import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvpo.training.durable import (
    StorageError,
    new_directory,
    remove_directory,
    remove_leftovers,
    write_atomic,
)


def full_disk(descriptor: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_full_disk_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_atomic(path, "old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match=r"cannot save .*summary.json: the disk is full") as caught:
        write_atomic(path, "new")
    assert str(caught.value).count("\n") == 0
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_full_disk_keeps_the_old_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "update-000001"
    with new_directory(path) as directory:
        (directory / "a").write_text("old")
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(StorageError, match="the disk is full"), new_directory(path) as directory:
        (directory / "a").write_text("new")
    assert (path / "a").read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_real_write_limit_is_reported(tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys\nfrom pathlib import Path\n"
        "from kvpo.training.durable import StorageError, write_atomic\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        "path = Path(sys.argv[1])\nwrite_atomic(path, 'old')\n"
        "try:\n    write_atomic(path, 'x' * 5000)\nexcept StorageError as error:\n    print(error)\n"
    )
    path = tmp_path / "f"
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert f"cannot save {path}: File too large" in done.stdout
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_new_directory_replaces_the_old_one_whole(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "update-000001"
    for content in ("first", "second"):
        with new_directory(path) as directory:
            (directory / content).write_text(content)
    assert [file.name for file in path.iterdir()] == ["second"]
    assert list(path.parent.iterdir()) == [path]


def test_an_error_inside_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), new_directory(tmp_path / "x") as directory:
        (directory / "a").write_text("half")
        raise RuntimeError("stopped")
    assert list(tmp_path.iterdir()) == []


def test_leftovers_of_killed_processes_go(tmp_path: Path) -> None:
    (tmp_path / ".incomplete-1-update-000001").mkdir()
    (tmp_path / ".incomplete-1-update-000001" / "a").write_text("half")
    (tmp_path / ".incomplete-1-config.yaml").write_text("half")
    (tmp_path / "kept").write_text("whole")
    remove_leftovers(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
    (tmp_path / "gone").mkdir()
    remove_directory(tmp_path / "gone")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    write_atomic(tmp_path / "a", b"x")
    (tmp_path / "b").write_bytes(b"x")
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode
