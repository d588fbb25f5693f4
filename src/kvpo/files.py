"""File access: atomic writes under the user's umask, and reads with one-line errors.

After a kill or on a full disk, the old or the new version is there, whole. Nothing here handles tensors.
"""

import errno
import json
import math
import os
import re
import secrets
import shutil
import unicodedata
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TEMPORARY_PREFIX = ".incomplete-"
REPLACED_PREFIX = f"{TEMPORARY_PREFIX}old-"
NAMES_SHOWN = 12
POINTER = re.compile(rb"(?:\xef\xbb\xbf)?(?:version https?://(?:git-lfs|hawser|git-media)|(/annex/objects/))")
"""First bytes of pointer files of Git LFS (also under its former names) and git-annex."""
POINTER_BYTES = 1024
"""Pointer files are smaller than this."""
MOST_NESTED = 100
"""Deepest nesting of JSON that is read; everything that is written has fewer than ten levels."""


class StorageError(OSError):
    """Something could not be saved; the message is one line for the user."""


def storage_error(path: Path, error: Exception) -> StorageError:
    """Describe an ``error`` met while saving ``path``."""
    return StorageError(f"cannot save {path}: {_reason(error)}; what was saved before is untouched")


def _reason(error: Exception) -> str:
    """The reason of an error in saving; some libraries hide a full disk in its message."""
    full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
    if full or os.strerror(errno.ENOSPC) in str(error):
        return "the disk is full"
    return (isinstance(error, OSError) and error.strerror) or str(error)


@contextmanager
def new_file(path: Path, *, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield a file next to ``path`` that replaces it in one step when the block ends without an error.

    It gets the permissions of any new file, whatever a library gives its files. ``failures`` are further
    exception types that mean "could not be written". Raises StorageError if the file cannot be written (disk
    full, no permission); the old file then stays as it was and no temporary file is left.
    """
    temporary = _temporary_next_to(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, *failures) as error:
        raise storage_error(path, error) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Replace the file ``path`` with ``content`` in one step. Raises StorageError like `new_file`."""
    with new_file(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def write_json(path: Path, value: Any, *, indent: int = 1, **options: Any) -> None:
    """Replace the file ``path`` with ``value`` as JSON; ``options`` are those of `json.dumps`.

    Raises StorageError like `new_file`.
    """
    write_atomic(path, json.dumps(value, indent=indent, **options) + "\n")


@contextmanager
def whole_lines(path: Path) -> Iterator[None]:
    """Keep what the block appends to the file ``path`` only if the block ends without an error.

    Raises StorageError if the file cannot be written.
    """
    size = path.stat().st_size if path.exists() else 0
    try:
        yield
    except BaseException as error:
        if path.exists():  # half a line would be joined to the next one
            os.truncate(path, size)
        if isinstance(error, OSError):
            raise storage_error(path, error) from error
        raise


@contextmanager
def new_directory(path: Path, *, failures: tuple[type[Exception], ...] = ()) -> Iterator[Path]:
    """Yield an empty directory that becomes ``path`` in one step when the block ends without an error.

    Before the rename, the files in it are flushed and given the permissions of new files. An existing
    ``path`` is replaced. ``failures`` and errors are those of `new_file`.
    """
    temporary, replaced = _temporary_next_to(path), path.with_name(f"{REPLACED_PREFIX}{path.name}")
    try:
        temporary.mkdir(parents=True)
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        for file in temporary.iterdir():
            file.chmod(mode)
            sync(file)
        sync(temporary)
        if path.exists():
            shutil.rmtree(replaced, ignore_errors=True)
            os.replace(path, replaced)
        os.replace(temporary, path)
        sync(path.parent)
    except (OSError, *failures) as error:
        raise storage_error(path, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        if replaced.exists() and not path.exists():
            os.replace(replaced, path)
        shutil.rmtree(replaced, ignore_errors=True)


def remove_directory(path: Path) -> None:
    """Remove a directory so that ``path`` is either whole or gone, even if the process is killed."""
    doomed = _temporary_next_to(path)
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left half-written in ``directory``; the caller must hold its lock.

    A directory that was about to be replaced is restored if nothing has taken its place.
    """
    for path in directory.glob(f"{REPLACED_PREFIX}*"):
        if not (replaced := directory / path.name.removeprefix(REPLACED_PREFIX)).exists():
            os.replace(path, replaced)
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


def temporary_name() -> str:
    """A file name that no other process uses on any machine; process ids would repeat between containers."""
    return f"{TEMPORARY_PREFIX}{secrets.token_hex(4)}"


def _temporary_next_to(path: Path) -> Path:
    return path.with_name(f"{temporary_name()}-{path.name}")


def local_path(given: str | Path, what: str) -> Path:
    """Expand ``~`` in a path that a user gave, and refuse an empty one.

    Args:
        what: name of the argument, for messages.

    Raises:
        ValueError: the path is empty, or names the home of an unknown user.
    """
    if not str(given):
        raise ValueError(f"{what}: empty; name a file or directory")
    try:
        return Path(given).expanduser()
    except RuntimeError as error:
        raise ValueError(f"{what}: {given}: {error}") from error


def cache_directory(name: str) -> Path:
    """Directory for recomputable files: $KVPO_CACHE, else kvpo in $XDG_CACHE_HOME or ~/.cache.

    Raises ValueError, naming the variable, for the home of an unknown user.
    """
    if own := os.environ.get("KVPO_CACHE"):
        return local_path(own, "KVPO_CACHE") / name
    return local_path(os.environ.get("XDG_CACHE_HOME") or "~/.cache", "XDG_CACHE_HOME") / "kvpo" / name


def make_directory(path: Path, what: str = "--out") -> None:
    """Make a directory for output, with its parents, unless it is there.

    Args:
        what: name of the argument that gave it, for messages.

    Raises:
        StorageError: it is a file, or cannot be made.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise StorageError(f"{what}: {path} is a file; name a directory") from error
    except OSError as error:
        raise StorageError(f"cannot create {path}: {_reason(error)}; choose another {what}") from error


def output_file(given: str | Path, what: str) -> Path:
    """Check the path of an output file and create its directory, before any work is done for it.

    Raises:
        ValueError: see `local_path`; also if the path is a directory.
        StorageError: the directory cannot be created.
    """
    path = local_path(given, what)
    if path.is_dir():
        raise ValueError(f"{what}: {path} is a directory; name a file in it")
    make_directory(path.parent, what)
    return path


def refuse_pointers(*paths: Path) -> None:
    """Refuse pointer files of Git LFS and git-annex, which stand for content that was not fetched.

    Args:
        paths: files, and directories whose own files are checked; missing paths are skipped.

    Raises:
        ValueError: naming the first pointer.
    """
    for path in paths:
        for file in sorted(path.iterdir()) if path.is_dir() else [path]:
            if file.is_file() and file.stat().st_size < POINTER_BYTES:
                if found := POINTER.match(file.read_bytes()):
                    kind, fetch = ("git-annex", "git annex get") if found[1] else ("Git LFS", "git lfs pull")
                    raise ValueError(
                        f"{file}: a {kind} pointer, not the file itself; run `{fetch}` where it was cloned"
                    )


def read_bytes(path: Path) -> bytes:
    """The content of a file. Raises ValueError: missing, not permitted, a pointer of Git LFS or git-annex."""
    if not path.is_file():
        raise ValueError(f"{path}: {'a directory' if path.is_dir() else 'no such file'}")
    try:
        refuse_pointers(path)
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}") from error


def read_text(path: Path) -> str:
    """The content of a UTF-8 file, without its byte order mark.

    Raises:
        ValueError: see `read_bytes`; also for bytes that are not UTF-8, naming their line.
    """
    content = read_bytes(path)
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        column = error.start - content.rfind(b"\n", 0, error.start)
        raise ValueError(
            f"{path}, line {line}: not UTF-8 text (byte {content[error.start]:#04x} at position {column}); "
            "save the file as UTF-8"
        ) from error


def parse_json(text: str) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, is nested too deeply, repeats a field, or has a lone surrogate.
    """
    try:
        value = json.loads(text, object_pairs_hook=_fields)
        if _depth(value) > MOST_NESTED:
            raise RecursionError
        refuse_halves(value)
        return value
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at position {error.pos + 1})") from error
    except RecursionError as error:
        raise ValueError("not JSON that can be read (nested too deeply)") from error


def refuse_halves(value: Any) -> None:
    """Refuse lone surrogates, which no file can hold, anywhere in a JSON value.

    Raises:
        ValueError: naming the first.
    """
    try:
        json.dumps(value, ensure_ascii=False, default=str).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ValueError(f"not text that can be read ({half} is half of a character)") from error


def _fields(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:  # may be very many, from a stranger
        if name in fields:
            raise ValueError(f"not JSON that can be read ({name!r} is given twice)")
        fields[name] = value
    return fields


def _depth(value: Any) -> int:
    """Levels of lists and objects in a JSON value."""
    level, depth = [value], -1
    while level:
        nested = (item.values() if isinstance(item, dict) else item for item in level
                  if isinstance(item, dict | list))  # fmt: skip
        level, depth = [part for parts in nested for part in parts], depth + 1
    return depth


def read_json(path: Path) -> Any:
    """The value in a JSON file. Raises ValueError: see `read_text` and `parse_json`."""
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def json_lines(path: Path) -> list[tuple[str, dict[str, Any] | None]]:
    """The lines of a JSON Lines file, each with its object, or None if the line holds none.

    The last line may be cut off, if its process is still writing or was killed. Empty lines are skipped.
    """
    found: list[tuple[str, dict[str, Any] | None]] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        if not line.strip():
            continue
        try:
            value = parse_json(line)
        except ValueError:
            value = None
        found.append((line, value if isinstance(value, dict) else None))
    return found


def finite(value: Any) -> Any:
    """A JSON value with every non-finite number replaced by None, since JSON cannot hold those."""
    if isinstance(value, Mapping):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def printable(text: str) -> str:
    """``text`` with escapes for control characters, line ends, and bytes that are not UTF-8."""
    breaks = ("Cc", "Cs", "Zl", "Zp")
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in breaks else c for c in text
    )


def demand_utf8(path: Path) -> None:
    """Raise ValueError for a path that is not UTF-8, which safetensors cannot open."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{printable(str(path))}: weights cannot be read or written where a name is not UTF-8; rename it"
        ) from error


def counted(number: int, thing: str) -> str:
    """A number of things, as in "1 file" and "2 files"."""
    return f"{number} {thing}{'' if number == 1 else 's'}"


def named_list(names: Iterable[str], shown: int = NAMES_SHOWN) -> str:
    """The first ``shown`` names, and how many more there are."""
    every = list(names)
    listed = ", ".join(every[:shown])
    return listed if len(every) <= shown else f"{listed} and {len(every) - shown} more"
