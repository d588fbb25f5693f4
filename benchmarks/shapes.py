"""Configurations with another geometry, written to a file as a user would."""

import json
import os
import tempfile
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

from kvpo.config import Config
from kvpo.models.geometry import fields_of
from kvpo.models.settings import WanShape

FOLDER = "KVPO_GEOMETRIES"
if FOLDER not in os.environ:  # children use their parent's folder: a killed child would leave its own behind
    _OWN = tempfile.TemporaryDirectory(prefix="kvpo-geometries-")
    os.environ[FOLDER] = _OWN.name


def geometry_file(shape: WanShape) -> str:
    """Path of a geometry's file, which is deleted when the process that first imported this module ends."""
    text = json.dumps(fields_of(shape))
    path = Path(os.environ[FOLDER]) / f"{sha256(text.encode()).hexdigest()[:16]}.json"
    path.write_text(text)
    return str(path)


def with_shape(config: Config, **changes: Any) -> Config:
    """``config`` with another geometry and latent size; ``changes`` are fields of ``WanShape``."""
    shape = replace(config.model, **changes)
    size = (shape.latent_height, shape.latent_width)
    backbone = replace(config.backbone, geometry=geometry_file(shape))
    return replace(config, backbone=backbone, stream=replace(config.stream, size=size))
