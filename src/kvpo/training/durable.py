"""Writing that survives a kill or a full disk: what is on disk is the old version or the new one, whole."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

TEMPORARY_PREFIX = ".incomplete-"


class StorageError(OSError):
    """Something could not be saved; the message is one line for the user."""


def storage_error(path: Path, error: Exception) -> StorageError:
    """Describe ``error`` met while saving ``path``; some libraries hide a full disk in their message text."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or os.strerror(errno.ENOSPC) in str(error):
        reason = "the disk is full"
    else:
        reason = (isinstance(error, OSError) and error.strerror) or str(error)
    return StorageError(f"cannot save {path}: {reason}; what was saved before is untouched")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the file ``path`` by ``content`` in one step.

    Raises StorageError when it cannot be written (disk full, no permission); the old file then stays as it
    was and no temporary file is left.
    """
    temporary = _temporary_beside(path)
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
    except OSError as error:
        raise storage_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def new_directory(path: Path, *, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` in one step when the block ends without an error.

    What the block writes there is flushed before the rename; an existing ``path`` is replaced. ``failures``
    are further exception types that mean "could not be written". Raises StorageError as ``write_atomic``.
    """
    could_not_write: tuple[type[Exception], ...] = (OSError, *failures)
    temporary, replaced = _temporary_beside(path), path.with_name(f"{TEMPORARY_PREFIX}old-{path.name}")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        for file in temporary.iterdir():
            sync(file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(path, replaced)
        os.replace(temporary, path)
        sync(path.parent)
    except could_not_write as error:
        raise storage_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that, killed at any moment, ``path`` is either whole or gone."""
    doomed = _temporary_beside(path)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left half-written in ``directory``; its lock must be held."""
    for path in directory.glob(f"{TEMPORARY_PREFIX}*"):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def sync(path: Path) -> None:
    """Flush a file's content, or a directory's entries, to the device."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _temporary_beside(path: Path) -> Path:
    return path.with_name(f"{TEMPORARY_PREFIX}{os.getpid()}-{path.name}")
