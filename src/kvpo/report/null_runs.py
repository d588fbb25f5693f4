"""Null runs: the gains of runs that learned nothing, which a run's own gain has to exceed.

A file of null runs is {commit, settings: as in config.yaml, runs: [{seed, and a gain per prompt set}]}.
"""

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from kvpo.config import Config
from kvpo.files import counted, read_json
from kvpo.report.formatting import fixed, mapping, numbers, signed
from kvpo.report.record import Entry

logger = logging.getLogger(__name__)

FREE = {"seed", "preset", "device", "threads", "objective.advantages", "checkpoint.every", "rewards.cache",
        "rewards.ranks", "distributed.branch_ranks", "distributed.shard", "exploration.rows",
        "optim.replay_rows", "optim.checkpointing"}  # fmt: skip
"""Settings in which a run and its null runs may differ; rows and checkpointing change only rounding."""


def read_null(
    path: Path, config: Entry, *, field: str = "--null", free: Collection[str] = ()
) -> dict[str, list[float]]:
    """Read the gains of a file's null runs, by prompt set.

    Raises ValueError if the file cannot be read or, beginning with ``field``, if its runs have other settings
    than ``config``. Settings in ``FREE`` and ``free`` may differ.
    """
    record = read_json(path)
    runs = record.get("runs") if isinstance(record, dict) else None
    gains = [numbers(run) for run in runs] if isinstance(runs, list) else []
    names = [name for name in (gains[0] if gains else {}) if name != "seed"]
    settings = record.get("settings") if isinstance(record, dict) else None
    if not names or not isinstance(settings, dict) or not all(set(names) <= run.keys() for run in gains):
        raise ValueError(
            f"{field}: {path} holds no gains of null runs; benchmarks/seeds.py --null writes such a file"
        )
    if not is_null_control(settings):
        raise ValueError(
            f"{field}: the advantages of the runs of {path} were not dealt at random: they may have learned"
        )
    # A setting that did not exist yet had the effect of today's default.
    theirs, ours = (comparable(asdict(Config()), free) | comparable(own, free) for own in (settings, config))
    if different := [name for name in theirs.keys() | ours.keys() if theirs.get(name) != ours.get(name)]:
        name = min(different)
        raise ValueError(
            f"{field}: the runs of {path} have {name} {theirs.get(name)}, this one {ours.get(name)}: gains "
            "of other settings say nothing about it; leave it out, or make null runs with these"
        )
    return {name: [run[name] for run in gains] for name in names}


def kept_null(path: Path, config: Entry, places: Collection[str]) -> dict[str, dict[str, list[float]]]:
    """``{"null": gains}`` from a run's own copy of the null runs' file; empty if it has none.

    ``places`` are settings with the present locations of the run's files, which may differ. If any other
    setting differs from the null runs', logs a warning and returns an empty mapping.
    """
    if not path.exists():
        return {}
    try:
        return {"null": read_null(path, config, field=path.name, free=places)}
    except ValueError as error:
        logger.warning("%s", error)
        return {}


def comparable(config: Mapping[str, Any], free: Collection[str] = ()) -> dict[str, Any]:
    """The settings, by dotted path, that a run must share with its null runs: all but ``free`` ones."""
    flat: dict[str, Any] = {}
    for name, value in config.items():
        flat |= {f"{name}.{key}": v for key, v in value.items()} if isinstance(value, dict) else {name: value}
    return {
        path: list(value) if isinstance(value, tuple) else value
        for path, value in flat.items()
        if path not in FREE and path not in free
    }


def is_null_control(config: Entry) -> bool:
    """True if the settings assign advantages to the branches at random."""
    return mapping(config, "objective").get("advantages") == "random"


def over_seeds(gains: Sequence[float]) -> float | None:
    """Standard deviation (ddof 1) over seeds; None for a single seed."""
    return stdev(gains) if len(gains) > 1 else None


def said_of(gains: Sequence[float]) -> str:
    """The gains of null runs in words."""
    about = f"{signed(mean(gains))} \u00b1 {fixed(over_seeds(gains))} over seeds"
    return f"{counted(len(gains), 'null run')}: {about}, the best {signed(max(gains))}"
