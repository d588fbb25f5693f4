"""Record of the values that exported weights were made with: stored in their files, compared on loading."""

import json
import logging
import zipfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpo import __version__
from kvpo.config import Config
from kvpo.files import parse_json
from kvpo.models.geometry import GEOMETRIES, GEOMETRY_SETTING
from kvpo.models.tensor_files import RECORD, fingerprint, read_tensor_file, safetensors_header

logger = logging.getLogger(__name__)


def settings_of(config: Config) -> dict[str, Any]:
    """The settings by dotted path that affect what weights generate, in JSON types.

    The geometry is among them if it has a name: the place of a file says nothing elsewhere.
    """
    name = config.backbone.geometry
    geometry = {GEOMETRY_SETTING: name} if name in GEOMETRIES else {}
    stream = {f"stream.{name}": value for name, value in asdict(config.stream).items()}
    values = {"preset": config.preset, **geometry, **stream, "optim.autocast": config.optim.autocast}
    return dict(json.loads(json.dumps(values)))


def identity_of(checkpoint: Path, weights: str) -> str:
    """Identify a checkpoint by its content, wherever it is, and by the choice of its weights."""
    return f"{fingerprint([checkpoint])}, {weights}"


def record_of(config: Config, backbone: str, checkpoint: Path, weights: str) -> dict[str, Any]:
    """Record of the values that a checkpoint was made with; ``backbone`` is the digest of its base."""
    return {
        "kvpo": __version__,
        "run": fingerprint([checkpoint]),
        "checkpoint": checkpoint.name,
        "weights": weights,
        "method": config.method,
        "rewards": list(config.rewards.scorers),
        "base": config.backbone.checkpoint,
        "lora": config.backbone.lora,
        "backbone": backbone,
        "settings": settings_of(config),
    }


def recorded(path: Path) -> dict[str, Any]:
    """The record in a file that `kvpo export` wrote; empty in any other.

    Raises ValueError if it is damaged.
    """
    text: object = safetensors_header(path).get(RECORD)
    if text is None and zipfile.is_zipfile(path):
        text = read_tensor_file(path).get(RECORD)
    if text is None:
        return {}
    found = parse_json(text) if isinstance(text, str) else None
    if not isinstance(found, dict) or not isinstance(found.get("settings"), dict):
        raise ValueError(f"{path}: its record of what it was made with ({RECORD}) is damaged")
    return found


def warn_of_other_values(
    path: Path, config: Config, backbone: str | None = None, *, alone: bool = True
) -> None:
    """Warn if exported weights are loaded under other values than they were made with, naming each.

    ``backbone`` is the digest of the weights that an adapter is loaded onto. ``alone`` is False if other
    adapters are loaded with it.
    """
    record = recorded(path)
    here = settings_of(config)
    there: Mapping[str, Any] = record.get("settings", {})
    other = [f"{name} {there[name]} (here {here[name]})" for name in here
             if name in there and there[name] != here[name]]  # fmt: skip
    if record and backbone not in (None, record.get("backbone")):
        other.append(f"other base weights (digest {str(record.get('backbone'))[:12]}, here {backbone[:12]})")
    if other:
        logger.warning("%s was made with %s: it may not do here what it did there", path, ", ".join(other))
    if alone and (given := record.get("added_to")):
        logger.warning("%s is to be added to the adapter %s, and is half of a model without it", path, given)
