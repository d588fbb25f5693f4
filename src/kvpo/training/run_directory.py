"""A run's output directory: its lock and its files."""

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from shlex import quote
from types import TracebackType

import yaml
from filelock import FileLock, Timeout

from kvpo.config import Config
from kvpo.files import (
    StorageError,
    demand_utf8,
    make_directory,
    remove_leftovers,
    storage_error,
    write_atomic,
    write_json,
)
from kvpo.training.checkpoint import checkpoint_update, saved_updates
from kvpo.training.ranks import ALONE, Ranks

CONFIG, NULL_RUNS, LOCK = "config.yaml", "null.json", ".lock"


class RunDirectory:
    """The output directory of one run, held by at most one live process.

    Entering creates the directory, takes its lock and saves the resolved ``config`` as ``config.yaml``, which
    claims the directory for that run; leaving releases the lock. It is a kernel lock (flock), so a killed
    process cannot leave it behind. An error before the run has ``begun`` (such as weights that do not load)
    removes what was written. A directory that belongs to a run (see ``belongs_to_run``) is entered only with
    ``resume``; the caller then checks that the configurations agree, and saves its own once the run
    continues. Before its first checkpoint, a run can also be started again with the same configuration. With
    several ranks, rank 0 does all of this.

    Raises StorageError when another live process holds it, when it holds a run and ``resume`` is false, or
    when it cannot be written.
    """

    def __init__(self, path: Path, config: Config, *, resume: bool = False, ranks: Ranks = ALONE) -> None:
        self.path = path
        self.ranks = ranks
        self.config_file = path / CONFIG
        self.provenance = path / "provenance.json"
        self.metrics = path / "metrics.jsonl"
        self.meanings = path / "meanings.json"
        self.summary = path / "summary.json"
        self.report = path / "report.html"
        self.null = path / NULL_RUNS
        self.checkpoints = path / "checkpoints"
        self.tensorboard = path / "tensorboard"
        self.held_out = path / "held-out"
        """Held-out results until the run ends (see `kvpo.training.kept_results`)."""
        self._config = config
        self._resume = resume
        self.continued = False
        """True if the directory already belonged to a run."""
        self.begun = False
        """True from the run's first update on; an error then leaves the directory there to be resumed."""
        self._found: set[Path] = set()
        self._owner = path / ".owner"
        self._lock = FileLock(path / LOCK, timeout=0)

    def __enter__(self) -> "RunDirectory":
        self.continued = self.ranks.once("opening the output directory", self._open)
        return self

    def _open(self) -> bool:
        demand_utf8(self.path)
        new = not self.path.is_dir()
        make_directory(self.path)
        try:
            self._found = set() if new else {self.path, *self.path.iterdir()}
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
        return self.continued

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self.ranks.main:
            return
        self._owner.unlink(missing_ok=True)
        if error is not None and not (self.continued or self.begun):
            self._take_back()
        self._lock.release()

    def save_config(self, config: Config | None = None) -> None:
        """Write ``config.yaml`` in one step: the run's settings, or ``config`` if they have changed."""
        self._config = config or self._config
        write_atomic(self.config_file, self._text())

    def write_meanings(self, meanings: Mapping[str, Mapping[str, str]]) -> None:
        """Write ``meanings.json`` in one step: heading -> metric -> the sentence that explains it."""
        write_json(self.meanings, meanings)

    def write_summary(self, summary: Mapping[str, object]) -> None:
        """Write ``summary.json`` in one step; numbers must be finite (ValueError otherwise)."""
        write_json(self.summary, summary, indent=2, allow_nan=False)

    def _prepare(self) -> None:
        self.continued = belongs_to_run(self.path)
        if self.continued and not self._resume and (holds_run(self.path) or not self._is_ours()):
            raise StorageError(
                f"output directory {self.path} already holds a run; add --resume to continue it, "
                "or choose another --out"
            )
        write_atomic(self._owner, str(os.getpid()))
        remove_leftovers(self.path)
        self.checkpoints.mkdir(exist_ok=True)
        remove_leftovers(self.checkpoints)
        if not self.continued:
            self.save_config()

    def _text(self) -> str:
        plain = json.loads(json.dumps(asdict(self._config)))  # tuples as lists: YAML would tag them
        return yaml.safe_dump(plain, sort_keys=False)

    def _is_ours(self) -> bool:
        """True if the saved configuration is the same, so that the same command may be given again."""
        return self.config_file.exists() and self.config_file.read_text(encoding="utf-8") == self._text()

    def _take_back(self) -> None:
        """Restore the directory to its state before a run that never began."""
        for path in saved_updates(self.checkpoints):
            shutil.rmtree(path)
        files = (self.metrics, self.meanings, self.provenance, self.null, self.config_file)
        written = (self.checkpoints, self.tensorboard, self.held_out, *files)
        for path in (path for path in written if path.exists() and path not in self._found):
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
        left = {path.name for path in self.path.iterdir()} - {LOCK}
        if self.path not in self._found and not left:
            shutil.rmtree(self.path)

    def _owner_id(self) -> str:
        try:
            return self._owner.read_text(encoding="utf-8")
        except OSError:
            return "unknown"  # it took the lock a moment ago and has not written its id yet


def holds_run(path: Path) -> bool:
    """True if ``path`` holds work worth keeping: a checkpoint or a summary."""
    return (path / "summary.json").exists() or bool(saved_updates(path / "checkpoints"))


def belongs_to_run(path: Path) -> bool:
    """True if ``path`` is a run's directory, with or without checkpoints; no other run may use it."""
    return (path / CONFIG).exists() or holds_run(path)


def resume_hint(path: Path) -> str:
    """One line that says how to continue the stopped run in ``path``."""
    if not belongs_to_run(path):
        return "no update had been saved; the same command starts again"
    saved = saved_updates(path / "checkpoints")
    so_far = f"saved up to update {checkpoint_update(saved[-1])}" if saved else "nothing saved"
    return f"{so_far}; continue with: kvpo align --resume --out {quote(str(path))}"
