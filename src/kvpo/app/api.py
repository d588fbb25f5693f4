"""The calls a notebook makes."""

import json
from pathlib import Path
from typing import Any

from kvpo.app.align import align as run_align
from kvpo.app.presets import PRESETS
from kvpo.config import Config


def preset(name: str = "demo") -> Config:
    """A named configuration; change it with ``dataclasses.replace``.

    Raises:
        ValueError: no preset has that name.
    """
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]()


def align(config: Config, out: Path | str, *, resume: bool = False) -> dict[str, Any]:
    """Align the generator that ``config`` names and return the run's summary (see ``summary.json``).

    The run directory ``out`` gets checkpoints, metrics and ``report.html``. A run stopped by a signal has no
    summary yet and returns an empty one.
    """
    directory = Path(out)
    run_align(config, directory, resume=resume)
    summary = directory / "summary.json"
    return json.loads(summary.read_text()) if summary.exists() else {}
