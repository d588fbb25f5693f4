"""Temporal consistency rewards: steady light and a consistent subject."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpo.files import read_json
from kvpo.models.pretrained import strict_pretrained
from kvpo.rewards.catalogue import SUBJECT_SAMPLING
from kvpo.rewards.images import CLIP_MEAN, CLIP_STD, fit_and_crop, luminance, standardised
from kvpo.rewards.sampling import checked_batch, spread_indices

GRID = 4
"""Luminance is compared in GRID x GRID blocks, so that small movements do not count as flicker."""
FLICKER_WIDTH = 0.02
"""Mean deviation of luminance, on [0, 1], at which the score falls to 1/e."""

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FlickerScorer:
    """1 for steady light, lower the more luminance jumps between neighbouring frames; needs no weights.

    Compares each block's luminance with the mean of the previous and the next frame, so steady changes such
    as fades and pans cost nothing.
    """

    components: tuple[str, ...] = ("flicker",)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]; ValueError for clips that are too short or of another shape."""
        checked_batch(video_BTCHW, prompts, 3)
        blocks_BTP = F.adaptive_avg_pool2d(luminance(video_BTCHW), GRID).flatten(2)
        between = (blocks_BTP[:, :-2] + blocks_BTP[:, 2:]) / 2
        deviation_B = (blocks_BTP[:, 1:-1] - between).abs().mean((1, 2))
        return {"flicker": (-deviation_B / FLICKER_WIDTH).exp()}


@dataclass(frozen=True)
class SubjectConsistencyScorer:
    """Mean cosine similarity of each frame's features to the first and the previous frame's.

    VBench's measure (Huang et al. 2023) on any DINOv2 or CLIP image encoder from transformers.
    """

    encoder: nn.Module
    image_size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    frame_rate: float = 16.0
    """Frames per second of the clips."""
    components: tuple[str, ...] = ("subject_consistency",)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]; ValueError for clips that are too short or of another shape."""
        checked_batch(video_BTCHW, prompts, 2)
        chosen = spread_indices(video_BTCHW.shape[1], self.frame_rate, SUBJECT_SAMPLING)
        # One clip at a time: its score cannot depend on the other clips.
        return {"subject_consistency": torch.stack([self._score(video[chosen]) for video in video_BTCHW])}

    def _score(self, video_TCHW: Tensor) -> Tensor:
        frames_TCHW = video_TCHW.to(next(self.encoder.parameters()).device)
        pixels = standardised(fit_and_crop(frames_TCHW, self.image_size), self.mean, self.std)
        features_TD = F.normalize(self.encoder(pixel_values=pixels).pooler_output, dim=-1)
        first_T = features_TD[1:] @ features_TD[0]
        previous_T = (features_TD[1:] * features_TD[:-1]).sum(1)
        return ((first_T + previous_T) / 2).mean()


def load_subject_consistency(directory: Path, *, device: str = "cpu") -> SubjectConsistencyScorer:
    """Load the scorer with the DINOv2 or CLIP image encoder in ``directory``, in transformers' layout.

    Raises:
        ValueError: the model is of another kind, or weights are missing or unexpected.
    """
    from transformers import CLIPModel, Dinov2Model

    settings = read_json(directory / "config.json")
    kind = settings.get("model_type") if isinstance(settings, dict) else None
    if kind == "dinov2":
        encoder = strict_pretrained(Dinov2Model, directory, dtype=torch.float32)
        patch = encoder.config.patch_size
        size, mean, std = 224 // patch * patch, IMAGENET_MEAN, IMAGENET_STD
    elif kind == "clip":
        encoder = strict_pretrained(CLIPModel, directory, dtype=torch.float32).vision_model
        size, mean, std = encoder.config.image_size, CLIP_MEAN, CLIP_STD
    else:
        raise ValueError(
            f"{directory}: holds a model of type {kind!r}; subject_consistency takes dinov2 or clip"
        )
    return SubjectConsistencyScorer(encoder.to(device), size, mean, std)
