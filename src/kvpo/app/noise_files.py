"""Noise floors from the files that `kvpo calibrate` writes."""

import math
from dataclasses import replace
from pathlib import Path

from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.files import local_path, read_json

TOTAL = "total"
"""Name that `kvpo calibrate` gives the weighted sum of several components."""


def with_measured_floors(config: Config) -> Config:
    """``config`` with the floors of ``rewards.noise_files`` in ``rewards.noise_floors``, and no files left.

    So a run's saved settings hold what was measured, even if the files change. Raises ConfigurationError
    for files that cannot be used or say something else than ``rewards.noise_floors``.
    """
    rewards = config.rewards
    floors = dict(rewards.noise_floors)
    for name in rewards.noise_files:
        for component, floor in read_floors(local_path(name, "rewards.noise_files")).items():
            if floors.setdefault(component, floor) != floor:
                raise ConfigurationError(
                    f"rewards.noise_files: {name} has {floor:g} for {component!r}, and "
                    f"{floors[component]:g} is given already; leave one of them out"
                )
    return replace(config, rewards=replace(rewards, noise_floors=floors, noise_files=()))


def read_floors(path: Path) -> dict[str, float]:
    """The floor of every component in a file of `kvpo calibrate`. Raises ConfigurationError."""
    try:
        record = read_json(path)
    except ValueError as error:
        raise ConfigurationError(f"rewards.noise_files: cannot read {error}") from error
    components = record.get("components") if isinstance(record, dict) else None
    if not isinstance(components, dict) or not components:
        raise ConfigurationError(f"rewards.noise_files: {path} was not written by `kvpo calibrate`")
    floors = {}
    for name, measured in components.items():
        floor = measured.get("noise_floor") if isinstance(measured, dict) else None
        if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < math.inf:
            raise ConfigurationError(
                f"rewards.noise_files: {path} has no noise floor of 0 or more for {name!r}, but {floor!r}"
            )
        floors[name] = float(floor)
    return {name: floor for name, floor in floors.items() if name != TOTAL or len(floors) == 1}
