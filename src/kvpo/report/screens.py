"""Playing videos with the caption and the prompt segment that hold at the moment shown."""

from typing import Any

from kvpo.report.clips import ClipStore
from kvpo.report.formatting import attribute_json, escape, number
from kvpo.report.record import Entry


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
    """The playing element of one clip, or a note in its place."""
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
    """Attributes that tie what lies inside an element to the clock: latent frames and switches."""
    _, switches = segments_of(entry)
    return f'data-frames="{frames or 0}" data-switches="{attribute_json(switches)}"'


def captions(entry: Entry, frames: int | None) -> str:
    """A track of the segments with a playhead, and all captions; the script shows the current one."""
    texts, switches = segments_of(entry)
    if not texts or not frames:
        return "".join(f'<p class="caption-line">{escape(text)}</p>' for text in texts)
    edges = [0, *switches, frames]
    parts = "".join(
        f'<span class="part" style="flex:{max(0, end - start)}" title="frames {start} to {end - 1}">{i + 1}'
        "</span>"
        for i, (start, end) in enumerate(zip(edges, edges[1:], strict=False))
    )
    lines = "".join(
        f'<p class="{"now" if i == 0 else ""}"><span class="ordinal">{i + 1}</span>{escape(text)}</p>'
        for i, text in enumerate(texts)
    )
    return f'<div class="track">{parts}<i class="playhead"></i></div><div class="captions">{lines}</div>'
