"""Selection of the frames of a clip, or of a video file, that a reward scores."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvpo.files import counted
from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Declaration, Sampling

if TYPE_CHECKING:
    import av

NEIGHBOURS = 49
"""Consecutive frames per clip of a longer file, for rewards that compare each frame with the next."""
NEIGHBOUR_RATE = 16.0
"""Frames per second at which neighbours are compared; faster files are subsampled by a whole stride."""
CLIPS = 6
"""Maximum number of clips per file; they are spread evenly over it."""
NOMINAL_RATE = 16.0
"""Frames per second assumed for a file that states none."""


def stated_rate(stream: "av.VideoStream") -> float:
    """Frames per second in the header of a stream; nominal if it has none, as GIFs of one frame."""
    rate = stream.average_rate
    return float(rate) if rate and rate.denominator else NOMINAL_RATE


def spread_indices(num_frames: int, frame_rate: float, sampling: Sampling) -> list[int]:
    """Indices of evenly spread frames of a clip of ``num_frames`` at ``frame_rate`` frames per second.

    With ``strides``, frames 0, n, 2 n, ... Otherwise there are n = rate T / frame_rate frames, clamped to
    [least, most] and rounded to the multiple, but never more than T: round(linspace(0, T - 1, n)) in float32,
    as in VideoAlign's ``vision_process.py``.

    Raises:
        ValueError: the clip has fewer frames than ``multiple``.
    """
    if sampling.strides:
        return list(range(0, num_frames, max(1, round(frame_rate / sampling.rate))))
    ceiling = min(sampling.most, num_frames) // sampling.multiple * sampling.multiple
    if ceiling == 0:
        raise ValueError(
            f"the clip has {counted(num_frames, 'frame')}, at least {sampling.multiple} are needed"
        )
    wanted = min(max(num_frames / frame_rate * sampling.rate, sampling.least), ceiling)
    count = min(max(1, round(wanted / sampling.multiple)) * sampling.multiple, ceiling)
    return torch.linspace(0, num_frames - 1, count).round().long().tolist()


def file_clips(declaration: Declaration, num_frames: int, frame_rate: float) -> list[list[int]]:
    """Frames to read from a video file, one list of indices per clip; its score is the mean over clips.

    A short file is one clip. Raises ValueError if the file has too few frames.
    """
    if num_frames < declaration.min_frames:
        raise ValueError(
            f"{declaration.name} needs at least {declaration.min_frames} frames, the file has {num_frames}"
        )
    sampling = declaration.sampling
    if sampling is None:
        stride = max(1, min(round(frame_rate / NEIGHBOUR_RATE), (num_frames - 1) // declaration.min_frames))
        kept = range(0, num_frames, stride)
        return [
            [kept[i] for i in range(start, start + length)]
            for start, length in _stretches(len(kept), NEIGHBOURS)
        ]
    length = num_frames if sampling.seconds is None else max(1, round(sampling.seconds * frame_rate))
    return [
        [start + i for i in spread_indices(length, frame_rate, sampling)]
        for start, length in _stretches(num_frames, length)
    ]


def _stretches(total: int, length: int) -> list[tuple[int, int]]:
    """(start, length) of at most CLIPS stretches, spread evenly over ``total`` frames."""
    if total <= length:
        return [(0, total)]
    count = min(CLIPS, -(-total // length))
    return [(round(i * (total - length) / (count - 1)), length) for i in range(count)]


def present_frames(video_TCHW: Tensor, prompt: str) -> Tensor:
    """Frames of a clip from the prompt's switch on; those before it show the previous prompt.

    Raises ValueError if the switch is outside the clip.
    """
    switch = prompt.switch if isinstance(prompt, ClipPrompt) else 0
    if not 0 <= switch < len(video_TCHW):
        raise ValueError(f"the prompt switches at frame {switch} of a clip of {len(video_TCHW)} frames")
    return video_TCHW[switch:]


def pooled_frames(scores_T: Tensor, top_share: float) -> Tensor:
    """Pool the scores of a clip's frames: the mean of the best ``top_share`` of them, [T] -> [].

    1 averages all frames (the public KVPO), 0.3 the best three tenths (Astrolabe, arXiv 2603.17051); at least
    one frame is used. Raises ValueError for a share outside (0, 1].
    """
    if not 0 < top_share <= 1:
        raise ValueError(f"top_share must be in (0, 1], got {top_share}")
    count = max(1, round(top_share * len(scores_T)))
    return (scores_T if count == len(scores_T) else scores_T.topk(count).values).mean()


def checked_batch(video_BTCHW: Tensor, prompts: Sequence[str], min_frames: int) -> None:
    """Check that clips are floats [B, T, 3, H, W] with one prompt each and at least ``min_frames`` frames.

    Raises:
        ValueError: they are not; the message gives the shape, dtype or count found.
    """
    if video_BTCHW.ndim != 5 or video_BTCHW.shape[2] != 3 or not video_BTCHW.is_floating_point():
        raise ValueError(
            f"video is {video_BTCHW.dtype} {list(video_BTCHW.shape)}, expected floats [B, T, 3, H, W]"
        )
    if len(prompts) != len(video_BTCHW):
        raise ValueError(f"prompts has {len(prompts)} entries for {len(video_BTCHW)} clips: give one each")
    if video_BTCHW.shape[1] < min_frames:
        raise ValueError(
            f"the clip has {counted(video_BTCHW.shape[1], 'frame')}, at least {min_frames} are needed"
        )
