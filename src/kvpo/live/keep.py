"""Files that a session leaves behind: exports, and choices at forks."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvpo.arena.intake import record_ranking
from kvpo.engine.generator import Codec, as_bytes
from kvpo.files import new_file, sync, whole_lines, write_atomic
from kvpo.live.session import Branches
from kvpo.prompt_files import written
from kvpo.prompts import VideoPrompt
from kvpo.report.video import enlargement, mp4_bytes, side_by_side, write_frames

FRAMES_TOGETHER = 24
"""Latent frames that are decoded at once."""


def export_session(
    out: Path, name: str, what: str, prompt: VideoPrompt, latents: Mapping[str, Tensor], codec: Codec
) -> Path:
    """Write a session as ``mp4``, as ``prompts`` for `kvpo generate`, or add it to the ``training`` prompts.

    Returns the path of the file. Raises StorageError.
    """
    folder = out / "exports"
    folder.mkdir(parents=True, exist_ok=True)
    if what == "mp4":
        path = folder / f"{name}.mp4"
        first, _ = codec.decode_next(next(iter(latents.values()))[:1], None)
        with new_file(path) as temporary:
            frames = (frame for chunk in _decoded(codec, latents) for frame in chunk)
            write_frames(temporary, frames, codec.frames_per_second, scale=enlargement(first.shape[-2:]))
        return path
    path = folder / f"{name if what == 'prompts' else 'training-prompts'}.jsonl"
    text = written([prompt], path)
    if what == "prompts":
        write_atomic(path, text)
        return path
    with whole_lines(path):
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
        sync(path)
    return path


def _decoded(codec: Codec, latents: Mapping[str, Tensor]) -> Iterator[np.ndarray]:
    """Yield the frames of all arms side by side, uint8 [T, H, W, 3], one chunk at a time."""
    states: dict[str, object | None] = dict.fromkeys(latents)
    length = len(next(iter(latents.values())))
    for at in range(0, length, FRAMES_TOGETHER):
        videos = []
        for name, own in latents.items():
            with torch.no_grad():
                pixels, states[name] = codec.decode_next(own[at : at + FRAMES_TOGETHER], states[name])
            videos.append(as_bytes(pixels).numpy())
        yield side_by_side(videos)


def record_choice(out: Path, fork: Branches, best_first: Sequence[int], *, rate: float) -> None:
    """Store the preferred branches of a fork in the study at ``out/choices``; see `record_ranking`.

    Raises ValueError and StorageError.
    """
    videos = [
        mp4_bytes(as_bytes(pixels).numpy(), rate, scale=enlargement(pixels.shape[-2:]))
        for pixels in fork.pixels
    ]
    record_ranking(out / "choices", (fork.prompt,), videos, best_first, rater="live page")
