"""Read the metrics of a run."""

from pathlib import Path
from typing import Any

from kvpo.files import json_lines


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Every line of a metrics file, in order; fails on a truncated line, which is a bug in the writer."""
    lines = json_lines(path)
    assert all(record is not None and "update" in record for _, record in lines), path
    return [record for _, record in lines if record]
