"""Videos as data inside the page: sprite sheets for pixel-sized frames, h264 for larger ones."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from kvpo.report.video import video_bytes

SPRITE_AREA = 96 * 96
"""Frames of at most this many pixels become lossless sprite sheets; larger ones become h264."""
SHEET_HEIGHT = 4096
"""Rows of a sprite sheet before the next column starts; every browser decodes this size."""
SPRITE_RATE = 8.0
"""Playback frames per second of the embedded world's videos."""
VIDEO_RATE = 16.0
"""Playback frames per second of decoded Wan videos."""


@dataclass
class ClipStore:
    """Encoded clips by name, up to ``budget`` base64 characters in all; the page embeds ``clips`` as JSON."""

    budget: int
    clips: dict[str, dict[str, Any]] = field(default_factory=dict)
    left_out: int = 0

    def add_all(self, folder: str, videos: Iterable[tuple[str, np.ndarray]], share: int) -> None:
        """Encode ``videos`` as clips named ``folder/key``; ``share`` is what one clip may take of the budget.

        Clips that no longer fit are counted in ``left_out``.
        """
        for key, frames_THWC in videos:
            clip = encode_clip(frames_THWC, max_bytes=share * 3 // 4)
            if len(clip["source"]) > self.budget:
                self.left_out += 1
                continue
            self.budget -= len(clip["source"])
            self.clips[f"{folder}/{key}"] = clip

    def get(self, folder: str, key: Any) -> dict[str, Any] | None:
        """The clip of ``key`` in ``folder``, or None if it could not be embedded."""
        return self.clips.get(f"{folder}/{key}")


def png_bytes(image_HWC: np.ndarray) -> bytes:
    """A uint8 RGB image as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "PNG", optimize=True)
    return buffer.getvalue()


def sprite_sheet(frames_THWC: np.ndarray) -> tuple[np.ndarray, int]:
    """Stack frames downwards, column after column; returns uint8 [rows, columns, 3] and frames per column."""
    frames, height, width, colours = frames_THWC.shape
    per_column = min(frames, max(1, SHEET_HEIGHT // height))
    columns = -(-frames // per_column)
    padded = np.zeros((columns * per_column, height, width, colours), np.uint8)
    padded[:frames] = frames_THWC
    sheet = padded.reshape(columns, per_column * height, width, colours).transpose(1, 0, 2, 3)
    return np.ascontiguousarray(sheet).reshape(per_column * height, columns * width, colours), per_column


def encode_clip(frames_THWC: np.ndarray, max_bytes: int) -> dict[str, Any]:
    """One clip as the page's JSON: kind, base64 source, frame count, size, frames per second."""
    frames, height, width = frames_THWC.shape[:3]
    clip = {"frames": frames, "height": height, "width": width}
    if height * width <= SPRITE_AREA:
        sheet, per_column = sprite_sheet(frames_THWC)
        content = png_bytes(sheet)
        clip |= {"kind": "sprite", "rate": SPRITE_RATE, "perColumn": per_column}
    else:
        content = video_bytes(frames_THWC, VIDEO_RATE, max_bytes)
        clip |= {"kind": "video", "rate": VIDEO_RATE}
    return clip | {"source": base64.b64encode(content).decode("ascii")}
