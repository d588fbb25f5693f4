"""Metrics of a run: one JSON object per line, also sent to TensorBoard and other trackers."""

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from kvpo.files import finite, json_lines, whole_lines, write_atomic
from kvpo.training.trackers import Tracker


class MetricsLog:
    """Appends metrics to ``metrics.jsonl``, to TensorBoard event files and to ``trackers``.

    ``resumed_at`` is the update of the checkpoint the run continues from, or None for a new run. Lines of
    later updates and a half-written last line, left by a run that was killed after that checkpoint, are
    removed first.
    """

    def __init__(
        self,
        path: Path,
        tensorboard: Path,
        *,
        resumed_at: int | None = None,
        trackers: Sequence[Tracker] = (),
    ) -> None:
        self._path, self._trackers = path, trackers
        last_kept = -1 if resumed_at is None else resumed_at
        truncate_metrics(path, last_kept)
        path.touch()
        self._writer = SummaryWriter(str(tensorboard), purge_step=last_kept + 1)

    def write(self, update: int, metrics: Mapping[str, Any]) -> None:
        """Append one line ``{"update", "time", **metrics}``; numbers also go to TensorBoard and the trackers.

        Groups of metrics may nest; TensorBoard names them ``group/name``. ``time`` is in seconds since the
        epoch. Non-finite numbers are stored as null, since JSON cannot represent them. Raises StorageError
        when the disk is full.
        """
        record = {"update": update, "time": round(time.time(), 3), **finite(metrics)}
        found = dict(_numbers(metrics))
        with whole_lines(self._path):  # the line stays only if all of this succeeds
            with self._path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record, allow_nan=False) + "\n")
            for name, value in found.items():
                self._writer.add_scalar(name, value, update)
            for tracker in self._trackers:
                tracker.write(update, found)

    def drop_validation(self, update: int) -> None:
        """Drop the validation of ``update``, the last one written, which no checkpoint includes."""
        truncate_metrics(self._path, update, validated=False)

    def close(self) -> None:
        """Flush and close the trackers."""
        self._writer.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def truncate_metrics(path: Path, update: int, *, validated: bool = True) -> None:
    """Drop the lines of updates after ``update``, and a half-written last line, from a metrics file.

    Unless ``validated``, drop the validation of ``update`` too.
    """
    if not path.exists():
        return
    before = path.read_text(encoding="utf-8", errors="replace")
    kept = [
        line
        for line, record in json_lines(path)
        if record and "update" in record and record["update"] <= update
        if validated or record["update"] < update or record.get("kind") != "validation"
    ]
    after = "".join(line + "\n" for line in kept)
    if after != before:
        write_atomic(path, after)


def _numbers(metrics: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    for name, value in metrics.items():
        if isinstance(value, Mapping):
            yield from _numbers(value, f"{prefix}{name}/")
        elif isinstance(value, float | int):
            yield f"{prefix}{name}", float(value)
