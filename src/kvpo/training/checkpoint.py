"""Checkpoints of a run: tensors in safetensors, everything else in JSON, written whole or not at all.

``checkpoints/update-000020/`` holds ``state.safetensors`` and ``state.json`` (the run's state, the update,
the architecture, SHA-256 sums); ``checkpoints/best.json`` names the best one. Pickles are never read.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvpo import __version__
from kvpo.files import (
    named_list,
    new_directory,
    parse_json,
    read_json,
    read_text,
    refuse_pointers,
    remove_directory,
    write_atomic,
)
from kvpo.models.finite import first_non_finite
from kvpo.models.tensor_files import storable

logger = logging.getLogger(__name__)

KEPT_CHECKPOINTS = 2
"""Recent checkpoints kept besides the best one: one to resume from, and one in case it is damaged."""
TENSORS, STATE, BEST = "state.safetensors", "state.json", "best.json"
PICKLES = (".pt", ".pth", ".ckpt", ".bin", ".pkl")


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message is one line for the user."""


def write_tensors(tensors: Mapping[str, Tensor], file: Path) -> None:
    """Write tensors to a safetensors file."""
    save_file(storable(tensors), file)


def save_checkpoint(
    directory: Path,
    update: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    *,
    architecture: Mapping[str, Any],
    write: Callable[[Mapping[str, Tensor], Path], None] = write_tensors,
) -> Path:
    """Write ``directory/update-NNNNNN`` in one step and return it, replacing one of the same update.

    ``state`` and ``architecture`` (the model settings that must match for the tensors to fit) must be JSON
    serialisable; ``write`` writes the tensors to a file. Raises StorageError when the disk is full; earlier
    checkpoints are untouched.
    """
    path = directory / f"update-{update:06d}"
    with new_directory(path, failures=(SafetensorError,)) as temporary:
        write(tensors, temporary / TENSORS)
        record = {
            "kvpo": __version__,
            "update": update,
            "architecture": _json(architecture),
            "bytes": (temporary / TENSORS).stat().st_size,
            "sha256": _sha256(temporary / TENSORS),
            "state": state,
        }
        record["record_sha256"] = _record_sha256(record)
        (temporary / STATE).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return path


def load_checkpoint(
    path: Path, *, architecture: Mapping[str, Any] | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint: its tensors (on the CPU) and its state.

    Raises CheckpointError if it is missing, truncated, modified since it was written, a pickle, or of an
    architecture other than ``architecture`` (None accepts any), or if a tensor is not finite.
    """
    file, state = checked_file(path, architecture=architecture)
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise CheckpointError(f"checkpoint {path}: {TENSORS} is not a safetensors file ({error})") from error
    require_finite_tensors(path, tensors)
    return tensors, state


def require_finite_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Raise CheckpointError if any tensor of the checkpoint ``path`` is not finite."""
    if (bad := first_non_finite(tensors)) is not None:
        raise CheckpointError(f"checkpoint {path}: {bad[0]} holds {bad[1]}; choose an earlier one")


def checked_file(path: Path, *, architecture: Mapping[str, Any] | None = None) -> tuple[Path, dict[str, Any]]:
    """Check that a checkpoint is intact; return the path of its tensor file, and its state.

    Raises CheckpointError as ``load_checkpoint`` does, but does not check that tensors are finite.
    """
    record = _read_record(path)
    if architecture is not None:
        _require_architecture(path, record["architecture"], _json(architecture))
    file = path / TENSORS
    try:
        refuse_pointers(file)
    except ValueError as error:
        raise CheckpointError(str(error)) from error
    size = file.stat().st_size if file.exists() else 0
    if size != record["bytes"]:
        raise CheckpointError(
            f"checkpoint {path} is truncated: {size} of {record['bytes']} bytes in {TENSORS}"
        )
    if _sha256(file) != record["sha256"]:
        raise CheckpointError(
            f"checkpoint {path} was changed after it was saved: {TENSORS} fails its SHA-256"
        )
    return file, record["state"]


def require_tensors(path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Check that ``tensors``, read from ``path``, have exactly the names and shapes of ``expected``.

    Raises CheckpointError naming missing, unexpected and misshapen tensors.
    """
    misshapen = [
        f"{name} is {list(tensors[name].shape)}, expected {list(expected[name].shape)}"
        for name in expected.keys() & tensors.keys()
        if tensors[name].shape != expected[name].shape
    ]
    problems = {
        "missing": expected.keys() - tensors.keys(),
        "unexpected": tensors.keys() - expected.keys(),
        "of the wrong shape": misshapen,
    }
    found = [f"{named_list(sorted(names))} {kind}" for kind, names in problems.items() if names]
    if found:
        raise CheckpointError(f"checkpoint {path} does not fit: {'; '.join(found)}")


def saved_updates(directory: Path) -> list[Path]:
    """The checkpoint directories in ``directory``, oldest first; renamed copies are ignored."""
    found = (path for path in directory.glob("update-*") if path.name.removeprefix("update-").isdecimal())
    return sorted(found, key=checkpoint_update)


def checkpoints(directory: Path) -> list[Path]:
    """The complete checkpoints in ``directory``, oldest first; incomplete ones are skipped with a warning."""
    found = []
    for path in saved_updates(directory):
        try:
            record = _read_record(path)
            if (path / TENSORS).stat().st_size != record["bytes"]:
                raise CheckpointError(f"checkpoint {path} is truncated")
            found.append(path)
        except (CheckpointError, OSError) as error:
            logger.warning("skipped: %s", error)
    return found


def latest_checkpoint(directory: Path) -> Path | None:
    """The newest complete checkpoint in ``directory``, or None."""
    return next(reversed(checkpoints(directory)), None)


def mark_best(directory: Path, path: Path, value: float) -> None:
    """Record checkpoint ``path`` in ``directory`` as the best so far, with score ``value``.

    Raises CheckpointError if it no longer exists, because the final test would then have nothing to load.
    """
    if not path.is_dir():
        raise CheckpointError(
            f"the best checkpoint so far, {path}, is gone; put it back, or start another run (kvpo evaluate "
            "--checkpoint takes the others)"
        )
    write_atomic(directory / BEST, json.dumps({"checkpoint": path.name, "value": value}) + "\n")


def best_checkpoint(directory: Path) -> tuple[Path, float] | None:
    """The checkpoint marked best, which may no longer exist, and its score; None if none is marked.

    Raises CheckpointError if the marker is damaged.
    """
    try:
        if not (directory / BEST).exists():
            return None
        marker = read_json(directory / BEST)
        path, value = directory / marker["checkpoint"], float(marker["value"])
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{directory / BEST} is damaged ({error}); delete it to go on") from error
    return path, value


def find_checkpoint(directory: Path, name: str | int | Path | None) -> Path:
    """The checkpoint a user asked for: "best", "latest", an update number, a directory name, or a path.

    None means the best one, or the latest if none is marked. Raises CheckpointError, listing the available
    checkpoints, if none matches or the one marked best no longer exists.
    """
    best, given = best_checkpoint(directory), "" if name is None else str(name)
    if name in (None, "best") and best is not None:
        if not best[0].is_dir():
            raise CheckpointError(
                f"the best checkpoint of {directory}, {best[0].name}, is gone; put it back, or name another "
                f"one: there is {_present(directory)}"
            )
        return best[0]
    if name in (None, "latest"):
        latest = latest_checkpoint(directory)
        if latest is not None:
            return latest
    elif name is not None:
        numbered = [directory / f"update-{int(given):06d}"] if given.isdecimal() else []
        for path in (*numbered, directory / given, Path(given)):
            if path.exists():
                return path
    raise CheckpointError(f"no checkpoint {given!r} in {directory}, which holds {_present(directory)}")


def _present(directory: Path) -> str:
    return named_list(path.name for path in checkpoints(directory)) or "no checkpoint"


def resume_point(directory: Path) -> Path | None:
    """The newest intact checkpoint, from which a resumed run continues; None means starting at update 0.

    Damaged checkpoints are skipped with a warning. Raises CheckpointError if there are only damaged ones.
    """
    for path in reversed(checkpoints(directory)):
        try:
            load_checkpoint(path)
        except CheckpointError as error:
            logger.warning("skipped: %s", error)
        else:
            return path
    if saved_updates(directory):
        raise CheckpointError(
            f"every checkpoint in {directory} is damaged or incomplete; remove that directory to start the "
            "run again from its saved configuration"
        )
    return None


def checkpoint_update(path: Path) -> int:
    """The update a checkpoint directory was saved at."""
    return int(path.name.removeprefix("update-"))


def no_improvement(path: Path, name: str | int | Path | None) -> str | None:
    """A one-line note if ``path``, found under ``name``, is the best checkpoint but only the base."""
    if name not in (None, "best") or path.name != "update-000000":
        return None
    return (
        f"no improvement: no validation of {path.parent.parent} has beaten its base, so its best checkpoint "
        "is update 0, the base itself"
    )


def prune(directory: Path, *, up_to: int | None = None) -> None:
    """Remove all but the newest KEPT_CHECKPOINTS, the best one, and the best recorded in each of these.

    A run resumed from an older checkpoint continues with the best one recorded there. Checkpoints of updates
    after ``up_to`` are damaged ones that a resumed run skipped: they do not count as newest, and stay until
    their update is saved again.
    """
    best = best_checkpoint(directory)
    found = saved_updates(directory)
    if up_to is not None:
        found = [path for path in found if checkpoint_update(path) <= up_to]
    kept = {_best_known_to(path) for path in found[-KEPT_CHECKPOINTS:]} | {best and best[0]}
    for path in found[:-KEPT_CHECKPOINTS]:
        if path not in kept:
            remove_directory(path)


def _best_known_to(path: Path) -> Path | None:
    """The run's best checkpoint when it saved ``path``; None if there was none or ``path`` is damaged."""
    try:
        best = _read_record(path)["state"].get("best")
    except CheckpointError:
        return None
    return best and path.with_name(f"update-{best[0]:06d}")


def _read_record(path: Path) -> dict[str, Any]:
    if path.is_file():
        reason = "a pickle can run code when it is read" if path.suffix in PICKLES else "it is a file"
        raise CheckpointError(f"{path} is not a kvpo checkpoint directory and was not opened: {reason}")
    if not path.is_dir():
        raise CheckpointError(f"checkpoint {path} does not exist")
    if not (path / STATE).exists():
        raise CheckpointError(f"checkpoint {path} is incomplete: it has no {STATE}")
    try:
        record = parse_json(read_text(path / STATE))
    except ValueError as error:
        raise CheckpointError(f"checkpoint {path} is damaged: {STATE} is {error}") from error
    expected = ("update", "architecture", "bytes", "sha256", "state", "record_sha256")
    missing = [key for key in expected if not isinstance(record, dict) or key not in record]
    if missing:
        raise CheckpointError(f"checkpoint {path} is damaged: {STATE} lacks {', '.join(missing)}")
    if not isinstance(record["architecture"], dict) or not isinstance(record["state"], dict):
        raise CheckpointError(f"checkpoint {path} is damaged: architecture and state must be JSON objects")
    if record.pop("record_sha256") != _record_sha256(record):
        raise CheckpointError(f"checkpoint {path} was changed after it was saved: {STATE} fails its SHA-256")
    return record


def _require_architecture(path: Path, saved: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    different = [
        f"{name} is {saved.get(name)} there, {expected.get(name)} here"
        for name in sorted(saved.keys() | expected.keys())
        if saved.get(name) != expected.get(name)
    ]
    if different:
        raise CheckpointError(f"checkpoint {path} is of another architecture: {named_list(different)}")


def _json(value: Mapping[str, Any]) -> Any:
    return json.loads(json.dumps(value))  # turn tuples into lists, as reading does


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _record_sha256(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
