"""Configurations of another geometry, which is written to a file as a user would."""

import json
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvpo.config import Config
from kvpo.models.geometry import fields_of
from kvpo.models.settings import WanShape

_FILES = tempfile.TemporaryDirectory(prefix="kvpo-geometries-")


def geometry_file(shape: WanShape) -> str:
    """Path of a geometry's file, which lasts as long as this process."""
    text = json.dumps(fields_of(shape))
    path = Path(_FILES.name) / f"{sha256(text.encode()).hexdigest()[:16]}.json"
    path.write_text(text)
    return str(path)


def with_shape(config: Config, **changes: Any) -> Config:
    """``config`` with another geometry and size of latents, named as fields of ``WanShape``."""
    shape = replace(config.model, **changes)
    size = (shape.latent_height, shape.latent_width)
    backbone = replace(config.backbone, geometry=geometry_file(shape))
    return replace(config, backbone=backbone, stream=replace(config.stream, size=size))
