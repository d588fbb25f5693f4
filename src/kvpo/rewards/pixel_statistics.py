"""Content-independent pixel statistics; their drift reveals reward hacking.

None of them is a reward: more is not better. All but brightness are relative to the clip's own light or
contrast, so that they can vary independently. Axes: B clips, T frames, H x W pixels.
"""

import torch
from torch import Tensor

from kvpo.rewards.images import luminance

DARKEST = 1e-4
"""Lower bound, on [0, 1], of the light or contrast that a relative measure divides by."""


def brightness(video_BTCHW: Tensor) -> Tensor:
    """Mean luminance in [0, 1], [B]."""
    return luminance(video_BTCHW).mean((1, 2, 3))


def saturation(video_BTCHW: Tensor) -> Tensor:
    """HSV saturation of the pixels, weighted by their largest channel, in [0, 1], [B].

    0 for grey and 1 for pure colours, however bright; the weighting suppresses noise in dark pixels.
    """
    video_BTCHW = video_BTCHW.float()
    largest_BTHW, smallest_BTHW = video_BTCHW.amax(2), video_BTCHW.amin(2)
    light_B = largest_BTHW.mean((1, 2, 3))
    return (largest_BTHW - smallest_BTHW).mean((1, 2, 3)) / light_B.clamp(min=DARKEST)


def _contrast(luma_BTHW: Tensor) -> Tensor:
    """Standard deviation of luminance over each frame's pixels, averaged over frames, [B]."""
    return luma_BTHW.flatten(2).std(2, correction=0).mean(1).clamp(min=DARKEST)


def sharpness(video_BTCHW: Tensor) -> Tensor:
    """RMS difference between neighbouring pixels, divided by the contrast, [B]; blur lowers it."""
    luma_BTHW = luminance(video_BTCHW)
    across_B = luma_BTHW.diff(dim=3).square().mean((1, 2, 3))
    down_B = luma_BTHW.diff(dim=2).square().mean((1, 2, 3))
    return ((across_B + down_B) / 2).sqrt() / _contrast(luma_BTHW)


def motion(video_BTCHW: Tensor) -> Tensor:
    """RMS difference between neighbouring frames, divided by the contrast, [B]; 0 for a still clip."""
    if video_BTCHW.shape[1] == 1:
        return video_BTCHW.new_zeros(len(video_BTCHW), dtype=torch.float32)
    luma_BTHW = luminance(video_BTCHW)
    return luma_BTHW.diff(dim=1).square().mean((1, 2, 3)).sqrt() / _contrast(luma_BTHW)


LOOKS = {"brightness": brightness, "saturation": saturation, "sharpness": sharpness, "motion": motion}


def looks(video_BTCHW: Tensor) -> Tensor:
    """All measures of RGB clips in [0, 1], in the order of ``LOOKS``: [L, B] on the CPU."""
    # One clip at a time: a long video at full size is gigabytes by itself.
    columns = [torch.cat([measure(clip[None]) for measure in LOOKS.values()]) for clip in video_BTCHW]
    return torch.stack(columns, 1).cpu()
