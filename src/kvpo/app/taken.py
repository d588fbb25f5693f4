"""Output directories that hold something already or are in use, over which no other command may write."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from kvpo.arena.database import DATABASE
from kvpo.files import StorageError, storage_error
from kvpo.training.run_directory import belongs_to_run

PLAN = "comparison.json"
"""File of a comparison's directory that describes it."""


def refuse_other(out: Path, own: str) -> None:
    """Refuse a directory whose files a ``run`` or a ``comparison``, as ``own`` says, would replace.

    Raises:
        StorageError: it holds a run, a comparison or a study, and not what it is used for.
    """
    if (out / PLAN).is_file():  # a finished one has a summary, as runs have
        there = "comparison"
    elif (out / DATABASE).is_file():
        there = "study"
    else:
        there = "run" if belongs_to_run(out) else own
    if there != own:
        raise StorageError(f"{out} holds a {there}; choose another --out for the {own}")


@contextmanager
def claimed(directory: Path) -> Iterator[None]:
    """Keep other processes that claim a directory out of it; a killed process cannot leave it claimed.

    Raises StorageError if another process has claimed the directory, or it cannot be written to.
    """
    lock = directory / ".lock"
    held = FileLock(lock, timeout=0)
    try:
        held.acquire()
    except Timeout as error:
        raise StorageError(
            f"another process is writing to {directory}; wait for it to finish or choose another --out"
        ) from error
    except OSError as error:
        raise storage_error(directory, error) from error
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)
        held.release()
