"""Encodes frames as images that every browser shows."""

import io

import numpy as np
from PIL import Image
from torch import Tensor

from kvpo.engine.generator import as_bytes

QUALITY = 92
LOSSLESS_SIDE = 96
"""Frames with no side longer than this are stored losslessly: enlarged, they would show JPEG's blocks."""


def pictures(pixels_TCHW: Tensor) -> list[bytes]:
    """Encode every frame (RGB in [0, 1]) as an image: lossless WebP if frames are tiny, JPEG otherwise."""
    return [_picture(frame) for frame in as_bytes(pixels_TCHW).numpy()]


def _picture(frame_HWC: np.ndarray) -> bytes:
    file = io.BytesIO()
    image = Image.fromarray(frame_HWC)
    if max(frame_HWC.shape[:2]) <= LOSSLESS_SIDE:
        image.save(file, "WEBP", lossless=True, quality=0, method=0)
    else:
        image.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return file.getvalue()
