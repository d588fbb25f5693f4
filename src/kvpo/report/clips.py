"""Videos inside the page: encoded as sprite sheets or h264, and played with the current prompt."""

import base64
import io
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from kvpo.report.formatting import attribute_json, escape, number
from kvpo.report.record import Entry
from kvpo.report.video import video_bytes

SPRITE_AREA = 96 * 96
"""Frames of at most this many pixels become lossless sprite sheets; larger ones become h264."""
SHEET_HEIGHT = 4096
"""Pixel rows of a sprite sheet before the next column starts; every browser can decode this size."""
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
        """Encode ``videos`` as clips named ``folder/key``, each aiming at ``share`` characters of the budget.

        Clips that do not fit are counted in ``left_out``.
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


def whole(value: Any) -> int | None:
    """A JSON number as an int, or None."""
    found = number(value)
    return None if found is None else int(found)


def segments_of(entry: Entry) -> tuple[list[str], list[int]]:
    """The prompt segments of a gallery entry or group and the latent frames at which they change."""
    texts, switches = entry.get("prompt_segments"), entry.get("switches")
    texts = [str(text) for text in texts] if isinstance(texts, list) else []
    switches = (
        [frame for s in switches if (frame := whole(s)) is not None] if isinstance(switches, list) else []
    )
    return texts, switches[: max(0, len(texts) - 1)]


def screen(store: ClipStore, folder: str, key: Any, label: str) -> str:
    """The player of one clip, or a note if the clip is not available."""
    clip = store.get(folder, key)
    if clip is None:
        return '<div class="screen absent">not available</div>'
    width, height = clip["width"], clip["height"]
    attributes = (
        f'class="screen" aria-label="{escape(label)}" data-clip="{escape(f"{folder}/{key}")}" '
        f'width="{width}" height="{height}" style="aspect-ratio:{width}/{height}"'
    )
    if clip["kind"] == "sprite":
        return f'<canvas role="img" {attributes}></canvas>'
    return f'<video muted playsinline preload="none" {attributes}></video>'


def film_data(entry: Entry, frames: int | None) -> str:
    """Attributes that synchronise an element's content with playback: latent frames and switches."""
    _, switches = segments_of(entry)
    return f'data-frames="{frames or 0}" data-switches="{attribute_json(switches)}"'


def captions(entry: Entry, frames: int | None) -> str:
    """A track of the segments with a playhead, and all captions; the script shows the current one."""
    texts, switches = segments_of(entry)
    if not texts or not frames:
        return "".join(f'<p class="caption-line" dir="auto">{escape(text)}</p>' for text in texts)
    edges = [0, *switches, frames]
    parts = "".join(
        f'<span class="part" style="flex:{max(0, end - start)}" title="frames {start} to {end - 1}">{i + 1}'
        "</span>"
        for i, (start, end) in enumerate(zip(edges, edges[1:], strict=False))
    )
    lines = "".join(
        f'<p class="{"now" if i == 0 else ""}" dir="auto"><span class="ordinal">{i + 1}</span>'
        f"{escape(text)}</p>"
        for i, text in enumerate(texts)
    )
    return f'<div class="track">{parts}<i class="playhead"></i></div><div class="captions">{lines}</div>'
