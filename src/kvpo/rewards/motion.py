"""Smoothness and strength of a clip's motion, measured on optical flow.

Axes: T frames, t = T - 1 steps from one frame to the next, 2 = (x, y) in pixels.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpo.extras import extra
from kvpo.rewards.catalogue import DECLARATIONS, FLOW_PIXELS
from kvpo.rewards.sampling import checked_batch

with extra("rewards"):
    import cv2

Flow = Callable[[Tensor], Tensor]
"""Frames [T, 3, H, W] in [0, 1] -> displacement to the next frame in pixels, [T - 1, 2, H, W]."""

SMALLEST_SIDE = 128
"""Smaller frames are enlarged to this: the coarse levels of the flow's pyramid need enough pixels."""
QUIET = 0.5
"""Speed in pixels per frame, at the measured size, below which flow is mostly noise; motion this fast counts
half."""
NEIGHBOURHOOD = 9
FLAT = 4.0
"""NEIGHBOURHOOD is the side of the square around a pixel. FLAT is the mean squared gradient in it (in grey
levels per pixel) at which half of the pixel's motion counts; noise of one grey level has 0.7."""
FULL_MOTION = 0.15
"""Distance per frame, as a share of the diagonal, that counts as full motion (as in the public KVPO)."""
FASTEST_SHARE = 0.05
"""A frame's motion is the mean speed of this share of its pixels, the fastest ones."""


def dis_flow(video_TCHW: Tensor) -> Tensor:
    """OpenCV's dense inverse search flow (Kroeger et al. 2016) on 8-bit luminance; needs no weights."""
    grey_THW = (video_TCHW.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8)
    images = [
        cv2.cvtColor(np.ascontiguousarray(f), cv2.COLOR_RGB2GRAY) for f in grey_THW.movedim(1, -1).numpy()
    ]
    search = cv2.DISOpticalFlow_create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flows = [search.calc(a, b, None) for a, b in zip(images, images[1:], strict=False)]
    return torch.from_numpy(np.stack(flows)).movedim(-1, 1)


def visibility(video_TCHW: Tensor) -> Tensor:
    """Share in [0, 1] of each pixel's motion that is visible, [T, 1, H, W]: 0 in flat areas, 1 on texture.

    In flat areas flow is estimated from noise: one grey level of it would pass for motion.
    """
    luma_T1HW = 255 * video_TCHW.float().mean(1, keepdim=True)
    dy = F.pad((luma_T1HW[..., 2:, :] - luma_T1HW[..., :-2, :]) / 2, (0, 0, 1, 1))
    dx = F.pad((luma_T1HW[..., 2:] - luma_T1HW[..., :-2]) / 2, (1, 1))
    energy = F.avg_pool2d(
        dx.square() + dy.square(), NEIGHBOURHOOD, 1, NEIGHBOURHOOD // 2, count_include_pad=False
    )
    return energy.square() / (energy.square() + FLAT**2)


def measured_flow(video_TCHW: Tensor, flow: Flow) -> Tensor:
    """Visible flow [T - 1, 2, H', W'] as a share of the diagonal, at a size that suits the method."""
    height, width = video_TCHW.shape[-2:]
    shrink = min(1.0, (FLOW_PIXELS / (height * width)) ** 0.5)
    if shrink < 1:
        video_TCHW = _sized(video_TCHW, round(height * shrink), round(width * shrink))
    visible_t1HW = visibility(video_TCHW[:-1])
    height, width = video_TCHW.shape[-2:]
    enlarge = max(1.0, SMALLEST_SIDE / min(height, width))
    if enlarge > 1:
        height, width = round(height * enlarge), round(width * enlarge)
        video_TCHW, visible_t1HW = _sized(video_TCHW, height, width), _sized(visible_t1HW, height, width)
    return flow(video_TCHW) * visible_t1HW.cpu() / math.hypot(height, width)


def _sized(images: Tensor, height: int, width: int) -> Tensor:
    smaller = height < images.shape[-2]
    return F.interpolate(
        images.float(), (height, width), mode="bilinear", antialias=smaller, align_corners=False
    )


def motion_smoothness(flow_t2HW: Tensor) -> Tensor:
    """1 - the relative change of velocity along the motion, in [0, 1].

    Follows every point along the flow of one step and compares its velocity with the next step's: 1 if it
    glides or stands still, near 0 if it goes elsewhere in each frame. ``flow_t2HW`` holds at least two steps,
    as a share of the diagonal per frame.
    """
    here, height, width = flow_t2HW[:-1], *flow_t2HW.shape[-2:]
    diagonal = math.hypot(height, width)
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    place_tHW2 = torch.stack([columns, rows], -1) + here.movedim(1, -1) * diagonal
    grid_tHW2 = 2 * (place_tHW2 + 0.5) / torch.tensor([width, height]) - 1
    there = F.grid_sample(flow_t2HW[1:], grid_tHW2, align_corners=False)
    inside_tHW = (grid_tHW2.abs() <= 1).all(-1)
    change_tHW = (there - here).norm(dim=1) * inside_tHW
    speed_tHW = (there.norm(dim=1) + here.norm(dim=1)) * inside_tHW
    noise_t = inside_tHW.sum((1, 2)).clamp(min=1) * QUIET / diagonal
    return 1 - (change_tHW.sum((1, 2)) / (speed_tHW.sum((1, 2)) + noise_t)).mean()


def dynamic_degree(flow_t2HW: Tensor) -> Tensor:
    """Speed of the fastest 5% of the pixels relative to full motion, averaged over steps, in [0, 1]."""
    speed_tP = flow_t2HW.norm(dim=1).flatten(1)
    fastest_tk = speed_tP.topk(max(1, round(FASTEST_SHARE * speed_tP.shape[1])), dim=1).values
    return (fastest_tk.mean(1) / FULL_MOTION).clamp(max=1).mean()


MOTION_MEASURES = {"motion_smoothness": motion_smoothness, "dynamic_degree": dynamic_degree}


@dataclass(frozen=True)
class MotionScorer:
    """Motion smoothness and dynamic degree of clips of any size; the flow is computed once for both."""

    components: tuple[str, ...] = tuple(MOTION_MEASURES)
    flow: Flow = dis_flow

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]; ValueError for clips that are too short or of another shape."""
        checked_batch(video_BTCHW, prompts, max(DECLARATIONS[name].min_frames for name in self.components))
        flows = [measured_flow(video_TCHW, self.flow) for video_TCHW in video_BTCHW]
        return {
            name: torch.stack([MOTION_MEASURES[name](flow) for flow in flows]) for name in self.components
        }


def load_motion(raft: Path | None, *, device: str = "cpu") -> MotionScorer:
    """Load the scorer with the RAFT weights in ``raft``, or OpenCV's flow if None. Raises as `load_raft`."""
    if raft is None:
        return MotionScorer()
    from kvpo.rewards.raft import load_raft

    return MotionScorer(flow=load_raft(raft, device))
