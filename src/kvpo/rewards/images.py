"""Luminance, and preprocessing for image encoders. Axes: N frames, C = 3 colours, H rows, W columns."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in Rec. 601 luminance."""


def luminance(video_xCHW: Tensor) -> Tensor:
    """Rec. 601 luminance [..., H, W] in float32 of RGB [..., 3, H, W]."""
    # A product of matrices rounds by the memory layout on some processors; clips from a server have another.
    red, green, blue = video_xCHW.float().unbind(-3)
    return LUMA[0] * red + LUMA[1] * green + LUMA[2] * blue


def resized(frames_NCHW: Tensor, height: int, width: int) -> Tensor:
    """Resize by antialiased bicubic interpolation, clamped to [0, 1]; differentiable."""
    frames_NCHW = frames_NCHW.float()
    if frames_NCHW.shape[-2:] == (height, width):
        return frames_NCHW
    return F.interpolate(
        frames_NCHW, (height, width), mode="bicubic", antialias=True, align_corners=False
    ).clamp(0, 1)


def fit_and_crop(frames_NCHW: Tensor, height: int, width: int = 0) -> Tensor:
    """Resize to just cover ``height`` x ``width``, then crop the centre; width 0: CLIP's square."""
    (rows, columns), width = frames_NCHW.shape[-2:], width or height
    if height * columns >= width * rows:
        frames = resized(frames_NCHW, height, height * columns // rows)
    else:
        frames = resized(frames_NCHW, width * rows // columns, width)
    top, left = (frames.shape[-2] - height) // 2, (frames.shape[-1] - width) // 2
    return frames[..., top : top + height, left : left + width]


def fit_and_pad(frames_NCHW: Tensor, size: int) -> Tensor:
    """Resize the longer side to ``size`` and pad the shorter one with black on both ends, as HPSv2 does."""
    height, width = frames_NCHW.shape[-2:]
    long = max(height, width)
    frames = resized(frames_NCHW, max(1, round(size * height / long)), max(1, round(size * width / long)))
    rows, columns = size - frames.shape[-2], size - frames.shape[-1]
    return F.pad(frames, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2))


def standardised(frames_NCHW: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    """(x - mean) / std per colour."""
    mean_C11, std_C11 = (
        torch.tensor(values, dtype=frames_NCHW.dtype, device=frames_NCHW.device)[:, None, None]
        for values in (mean, std)
    )
    return (frames_NCHW - mean_C11) / std_C11
