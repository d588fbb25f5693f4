"""Noise floors from the files that `kvpo calibrate` writes."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kvpo.config_checks import ConfigurationError
from kvpo.files import local_path, read_json

NOISE_FLOORS = "rewards.noise_floors"


def measured_floors(floors: Any) -> Any:
    """Floors by component, with files of `kvpo calibrate` replaced by the values that they hold.

    A run's saved settings thus keep the measured values, even if a file changes. Raises ConfigurationError
    for a file that cannot be used or has no such component.
    """
    if not isinstance(floors, Mapping):
        return floors
    return {
        name: read_floor(local_path(value, NOISE_FLOORS), str(name)) if _is_path(value) else value
        for name, value in floors.items()
    }


def _is_path(value: Any) -> bool:
    try:
        float(value)
    except (TypeError, ValueError):
        return isinstance(value, str)
    return False


def read_floor(path: Path, component: str) -> float:
    """The floor of a component in a file of `kvpo calibrate`. Raises ConfigurationError."""
    field = f"{NOISE_FLOORS}.{component}"
    try:
        record = read_json(path)
    except ValueError as error:
        raise ConfigurationError(f"{field}: cannot read {error}") from error
    components = record.get("components") if isinstance(record, dict) else None
    if not isinstance(components, dict) or not components:
        raise ConfigurationError(f"{field}: {path} was not written by `kvpo calibrate`")
    if component not in components:
        raise ConfigurationError(f"{field}: {path} holds no such component; it has {', '.join(components)}")
    measured = components[component]
    floor = measured.get("noise_floor") if isinstance(measured, dict) else None
    if isinstance(floor, bool) or not isinstance(floor, int | float) or not 0 <= floor < math.inf:
        raise ConfigurationError(f"{field}: {path} has no noise floor of 0 or more, but {floor!r}")
    return float(floor)
