"""VBench dimensions (Huang et al. 2023), with VBench's own definitions and networks.

Frames are rounded to 8 bits, as in the files that VBench reads. Axes: T frames, t = T - 1 steps between them.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpo.models.pretrained import strict_pretrained
from kvpo.prompts import ClipPrompt
from kvpo.rewards.catalogue import DECLARATIONS, EIGHT_A_SECOND
from kvpo.rewards.consistency import IMAGENET_MEAN, IMAGENET_STD
from kvpo.rewards.images import standardised
from kvpo.rewards.pretrained import entry_tensors, load_strict
from kvpo.rewards.sampling import checked_batch, spread_indices

FASTEST = 0.05
"""A step's speed is the mean speed of this share of its pixels, the fastest ones."""
MOVING = 6.0 / 256
"""Pixels per step, as a share of the shorter side, above which a step counts as moving."""
MOTION_RATE = EIGHT_A_SECOND.rate
"""Frames per second at which motion is measured."""
MOVING_STEPS = 4 / 16
"""Moving steps per frame that make a video dynamic."""
RAFT_UPDATES = 20
RAFT_SIDE, AMT_SIDE = 8, 16
"""Frame sides are padded to multiples of these."""
DINO_SIDE, MUSIQ_SIDE = 224, 512
"""Shorter side of frames for DINO, and largest longer side of frames for MUSIQ."""
TOGETHER = 16
"""Frames per forward pass of DINO."""


@dataclass(frozen=True)
class VBenchScorer:
    """One dimension: a measure of a clip's frames ``[T, 3, H, W]`` in [0, 1], rounded to 8 bits."""

    components: tuple[str]
    measure: Callable[..., float]
    frame_rate: float = 16.0
    """Frames per second of clips that do not come from a file."""
    timed: bool = False
    """True: the measure also takes the video's frames per second, ``frame_rate``."""

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]; ValueError for clips that are too short or of another shape."""
        (name,) = self.components
        declared = DECLARATIONS[name]
        checked_batch(video_BTCHW, prompts, declared.min_frames)
        assert declared.sampling is not None
        chosen = spread_indices(video_BTCHW.shape[1], self.frame_rate, declared.sampling)
        scores = []
        for video_TCHW, prompt in zip(video_BTCHW, prompts, strict=True):
            rate = (isinstance(prompt, ClipPrompt) and prompt.file_rate) or self.frame_rate
            frames_TCHW = (255 * video_TCHW[chosen].float().clamp(0, 1)).round() / 255
            with torch.no_grad():
                scores.append(self.measure(frames_TCHW, **({"frame_rate": rate} if self.timed else {})))
        return {name: torch.tensor(scores)}


def filled_up(frames_TCHW: Tensor, multiple: int) -> Tensor:
    """Pad frames on both ends, with their outermost pixels, to sides that are multiples of ``multiple``."""
    down, across = (-side % multiple for side in frames_TCHW.shape[-2:])
    return F.pad(
        frames_TCHW, (across // 2, across - across // 2, down // 2, down - down // 2), mode="replicate"
    )


def enough_motion(
    flow: Callable[[Tensor], Tensor], frames_TCHW: Tensor, frame_rate: float = MOTION_RATE
) -> float:
    """1 if enough steps move by ``flow`` (frames ``[T, 3, H, W]`` -> pixels ``[t, 2, H, W]``), else 0.

    Steps of videos slower than ``MOTION_RATE`` take longer, so their threshold is proportionally higher.
    """
    if len(frames_TCHW) == 1:
        return 0.0
    speed_tP = flow(filled_up(frames_TCHW, RAFT_SIDE)).norm(dim=1).flatten(1)
    fastest_t = speed_tP.topk(max(1, int(FASTEST * speed_tP.shape[1])), 1).values.mean(1)
    limit = max(1.0, MOTION_RATE / frame_rate) * MOVING * min(frames_TCHW.shape[-2:])
    moving = int((fastest_t > limit).sum())
    return float(moving >= round(MOVING_STEPS * len(frames_TCHW)))


def interpolated_smoothness(between: nn.Module, frames_TCHW: Tensor) -> float:
    """1 - mean absolute difference between every second frame and its interpolation from its neighbours."""
    device = next(between.parameters()).device
    even, odd = filled_up(frames_TCHW[::2], AMT_SIDE).to(device), frames_TCHW[1::2]
    half = torch.full((1, 1, 1, 1), 0.5, device=device)
    (height, width), (rows, columns) = frames_TCHW.shape[-2:], even.shape[-2:]
    top, left = (rows - height) // 2, (columns - width) // 2
    errors = []
    for before, after, frame in zip(even[:-1, None], even[1:, None], odd, strict=False):
        made = between(before, after, half, scale_factor=1.0, eval=True)["imgt_pred"][0].cpu()
        made = (255 * made[..., top : top + height, left : left + width]).clamp(0, 255).floor() / 255
        errors.append(float((made - frame.cpu()).abs().mean()))
    return 1 - sum(errors) / len(errors)


def mean_steadiness(frames_TCHW: Tensor) -> float:
    """1 - mean absolute difference between neighbouring frames; meant for static videos."""
    return 1 - float(frames_TCHW.diff(dim=0).abs().mean())


def dino_consistency(encoder: nn.Module, frames_TCHW: Tensor) -> float:
    """Mean cosine, clamped at 0, of each frame's DINO features and those of the first and previous frame."""
    device, short = next(encoder.parameters()).device, min(frames_TCHW.shape[-2:])
    size = [DINO_SIDE * side // short for side in frames_TCHW.shape[-2:]]
    pixels = standardised(_resized(frames_TCHW, *size), IMAGENET_MEAN, IMAGENET_STD)
    features = [
        encoder(pixel_values=part.to(device), interpolate_pos_encoding=True).last_hidden_state[:, 0].cpu()
        for part in pixels.split(TOGETHER)
    ]
    features_TD = F.normalize(torch.cat(features), dim=-1)
    first_t = features_TD[1:] @ features_TD[0]
    previous_t = (features_TD[1:] * features_TD[:-1]).sum(1)
    return float((first_t.clamp(min=0) + previous_t.clamp(min=0)).mean() / 2)


def musiq_quality(network: nn.Module, frames_TCHW: Tensor) -> float:
    """Mean over frames of MUSIQ's score, divided by 100."""
    device, long = next(network.parameters()).device, max(frames_TCHW.shape[-2:])
    if long > MUSIQ_SIDE:
        scale = MUSIQ_SIDE / long
        frames_TCHW = _resized(frames_TCHW, *(int(scale * side) for side in frames_TCHW.shape[-2:]))
    scores = [float(network(frame.to(device))) for frame in frames_TCHW[:, None]]
    return sum(scores) / len(scores) / 100


def _resized(frames_TCHW: Tensor, height: int, width: int) -> Tensor:
    return F.interpolate(frames_TCHW, (height, width), mode="bilinear", align_corners=False)


def load_vbench_temporal_flickering() -> VBenchScorer:
    """Build the scorer, which needs no weights."""
    return VBenchScorer(("vbench_temporal_flickering",), mean_steadiness)


def load_vbench_dynamic_degree(raft: Path, *, device: str = "cpu") -> VBenchScorer:
    """Load the scorer with RAFT's weights (VBench's: raft-things.pth). Raises as `load_raft`."""
    from kvpo.rewards.raft import load_raft

    flow = load_raft(raft, device, updates=RAFT_UPDATES)
    return VBenchScorer(("vbench_dynamic_degree",), partial(enough_motion, flow), timed=True)


def load_vbench_motion_smoothness(weights: Path, *, device: str = "cpu") -> VBenchScorer:
    """Load the scorer with AMT-S, whose code is part of the package vbench.

    Raises:
        ValueError: vbench is not installed, or the weights are another network's.
    """
    with _unopened("vbench"):
        network = _network("vbench", "third_party.amt.networks.AMT-S", "Model", {})
    load_strict(network, entry_tensors(weights, "state_dict"), str(weights), device)
    return VBenchScorer(("vbench_motion_smoothness",), partial(interpolated_smoothness, network))


def load_vbench_imaging_quality(weights: Path, *, device: str = "cpu") -> VBenchScorer:
    """Load the scorer with MUSIQ from the package pyiqa (VBench's weights: those for SPAQ).

    Raises:
        ValueError: pyiqa is not installed, or the weights are another network's.
    """
    network = _network("pyiqa", "archs.musiq_arch", "MUSIQ", {"pretrained": False})
    load_strict(network, entry_tensors(weights, "params"), str(weights), device)
    return VBenchScorer(("vbench_imaging_quality",), partial(musiq_quality, network))


def load_vbench_subject_consistency(directory: Path, *, device: str = "cpu") -> VBenchScorer:
    """Load the scorer with the DINO ViT in ``directory``, in transformers' layout. Raises ValueError."""
    from transformers import ViTModel

    encoder = strict_pretrained(ViTModel, directory, dtype=torch.float32, add_pooling_layer=False)
    return VBenchScorer(("vbench_subject_consistency",), partial(dino_consistency, encoder.to(device)))


def _network(package: str, module: str, name: str, settings: dict[str, bool]) -> nn.Module:
    """Build a network from an optional package. Raises ValueError if the package is missing."""
    try:
        network: nn.Module = vars(import_module(f"{package}.{module}"))[name](**settings)
    except ImportError as error:
        raise ValueError(
            f"needs the network {name} of {package} ({error}): pip install --no-deps {package}, and what it "
            "imports"
        ) from error
    return network.eval().requires_grad_(False)


@contextmanager
def _unopened(package: str) -> Iterator[None]:
    """Within this context, modules of a package can be imported without running its own ``__init__``."""
    spec = find_spec(package) if package not in sys.modules else None
    if spec is None:
        yield
        return
    bare = ModuleType(package)
    bare.__path__ = list(spec.submodule_search_locations or ())
    sys.modules[package] = bare
    try:
        yield
    finally:
        del sys.modules[package]
