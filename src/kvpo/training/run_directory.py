"""One run's directory: who may write to it, and what lies where."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from types import TracebackType
from typing import Any

import yaml
from filelock import FileLock, Timeout

from kvpo.config import Config
from kvpo.files import StorageError, remove_leftovers, storage_error, write_atomic


class RunDirectory:
    """The output directory of one run, held by at most one live process.

    Entering creates the directory, takes its lock and saves the resolved ``config`` as ``config.yaml``;
    leaving gives the lock back. The lock is the kernel's (flock), so a killed process
    cannot leave it behind. Leaving by an error before the first metrics (a checkpoint that does not load)
    removes a directory that entering created. A directory that already holds a run (see ``holds_run``) is
    entered only with ``resume``, and its saved configuration is then replaced: whoever resumes checks that
    the two agree.

    Raises StorageError when another live process holds it, when it holds a run and ``resume`` is false, or
    when it cannot be written.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool = False) -> None:
        self.path = path
        self.config_file = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self._config = config
        self._resume = resume
        self._created = False
        self._owner = path / ".owner"
        self._lock = FileLock(path / ".lock", timeout=0)

    def __enter__(self) -> "RunDirectory":
        try:
            self._created = not self.path.exists()
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise StorageError(
                f"output directory {self.path} is in use by process {self._owner_id()}; "
                "wait for it to finish or choose another --out"
            ) from error
        except OSError as error:
            raise storage_error(self.path, error) from error
        try:
            self._prepare()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._owner.unlink(missing_ok=True)
        if error is not None and self._created and not (holds_run(self.path) or self.metrics.exists()):
            shutil.rmtree(self.path)
        self._lock.release()

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write ``summary.json`` in one step; numbers must be finite (ValueError otherwise)."""
        write_atomic(self.summary, json.dumps(summary, indent=2, allow_nan=False) + "\n")

    def _prepare(self) -> None:
        if holds_run(self.path) and not self._resume:
            raise StorageError(
                f"output directory {self.path} already holds a run; add --resume to continue it, "
                "or choose another --out"
            )
        write_atomic(self._owner, str(os.getpid()))
        remove_leftovers(self.path)
        self.checkpoints.mkdir(exist_ok=True)
        remove_leftovers(self.checkpoints)
        write_atomic(self.config_file, yaml.safe_dump(_lists(asdict(self._config)), sort_keys=False))

    def _owner_id(self) -> str:
        try:
            return self._owner.read_text()
        except OSError:
            return "unknown"  # it took the lock a moment ago and has not written its id yet


def holds_run(path: Path) -> bool:
    """Whether ``path`` holds work worth keeping: a checkpoint or a summary.

    A run that stopped before its first checkpoint left nothing to continue from, so the same command may
    simply be given again.
    """
    return (path / "summary.json").exists() or any((path / "checkpoints").glob("update-*"))


def way_on(path: Path) -> str:
    """How to continue the stopped run in ``path``, in one line."""
    saved = sorted((path / "checkpoints").glob("update-*"))
    if not saved:
        return "no update had been saved; the same command starts again"
    update = int(saved[-1].name.removeprefix("update-"))
    return f"saved up to update {update}; continue with: kvpo align --resume --out {quote(str(path))}"


def _lists(value: Any) -> Any:
    """Tuples as lists, so that the YAML file needs no Python tags."""
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_lists(item) for item in value]
    return value
