"""Explains how scorers read a file: frames, rate, size, text and scale; loads nothing large."""

from collections.abc import Mapping, Sequence
from math import inf
from pathlib import Path

from kvpo.app.named_rewards import FILE_RATE, named_rewards, sources_of, split_location
from kvpo.app.video_folder import listed_videos
from kvpo.files import named_list
from kvpo.rewards.catalogue import DECLARATIONS
from kvpo.rewards.protocol import Declaration
from kvpo.rewards.sampling import file_clips
from kvpo.rewards.video_files import VideoFile, fitting, probe, read_frames

INDICES_SHOWN = 16


def explain(
    folder: Path, names: Sequence[str], *, prompts: Path | None, sources: Mapping[str, str] | None = None
) -> list[str]:
    """Explain, line by line, how the first file of ``folder`` would be scored; loads no catalogue rewards.

    Raises ValueError if no file can be read, or for invalid reward names.
    """
    files, shown, texts = listed_videos(folder, prompts)
    found: list[Declaration] = []
    for name in names:
        if split_location(name)[1] is None and name in DECLARATIONS:
            found.append(DECLARATIONS[name])
        else:
            own = sources_of([name], sources or {})
            (reward,) = named_rewards([name], own, prompts=texts is not None)
            found += reward.declarations
    video = probe(files[0])
    height, width = read_frames(video, [0], 2**40).shape[1:3]
    lines = [f"{shown[0]}: {video.num_frames} frames of {height} x {width}, {video.frame_rate:g} per second"]
    for one in found:
        lines += [f"{one.name}:", *(f"  {line}" for line in _explained(one, video, height, width, texts))]
    return lines


def _explained(
    one: Declaration, video: VideoFile, height: int, width: int, texts: Sequence[str] | None
) -> list[str]:
    clips = file_clips(one, video.num_frames, video.frame_rate)
    shown = named_list(map(str, clips[0]), INDICES_SHOWN)
    if one.sampling is None:
        rate = "neighbouring frames"
    elif one.sampling.strides:
        rate = f"{one.sampling.rate:g} per second of the {video.frame_rate:g} that the file states"
    else:
        whole = one.sampling.least >= video.num_frames
        rate = "all of them" if whole else f"clips of {FILE_RATE:g} frames per second assumed"
    read = fitting(height, width, one.max_pixels)
    size = "as they are" if read == (height, width) else f"shrunk to {read[0]} x {read[1]}"
    text = "not read"
    if one.reads_prompt:
        text = repr(texts[0]) if texts else "needed: give --prompts FILE"
    bounds = f"{one.low:g} to {one.high:g}" if (one.low, one.high) != (-inf, inf) else "no bounds"
    unit = f" ({one.unit})" if one.unit else ""
    return [
        f"frames: {len(clips)} clips; the first takes {shown} ({rate})",
        f"size: {size}, then as its network takes them{', rounded to 8 bits' if one.eight_bit else ''}",
        f"prompt: {text}",
        f"scale: {bounds}, higher is better{unit}; weight {one.weight:g}",
    ]
