"""A reward learned from votes: a linear score on frozen features; score differences are log odds.

Axes: B clips, T frames, D features, N tasks, K videos of a task, best first.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from kvpo.files import read_bytes, write_atomic
from kvpo.prompts import ClipPrompt
from kvpo.rewards.pixel_statistics import LOOKS, luminance
from kvpo.rewards.protocol import Scorer

SIDE = 32
"""Rows and columns that pixel features see, so that decoded clips and files of enlarged frames agree."""
PIXELS = (*LOOKS, "red", "green", "blue", "contrast", "flicker", "shake")
"""Names of the pixel features, which depend neither on the prompt nor on what a frame shows."""
ITERATIONS = 200
Features = Callable[[Tensor, Sequence[ClipPrompt]], Tensor]
"""Clips [B, T, 3, H, W] and their prompts -> features [B, D]."""


def pixel_features(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """Light, colour, sharpness and movement of clips, [B, D] in the order of ``PIXELS``."""
    frames = F.adaptive_avg_pool2d(video_BTCHW.float().flatten(0, 1), SIDE)
    small_BTCHW = frames.unflatten(0, video_BTCHW.shape[:2])
    luma_BTHW = luminance(small_BTCHW)
    light_BT = luma_BTHW.mean((2, 3))
    contrast_B = luma_BTHW.flatten(2).std(2, correction=0).mean(1)
    still_B = torch.zeros_like(contrast_B)
    changes = [
        light_BT.diff(dim=1).abs().mean(1) if light_BT.shape[1] > 1 else still_B,
        luma_BTHW.diff(n=2, dim=1).abs().mean((1, 2, 3)) if light_BT.shape[1] > 2 else still_B,
    ]
    measured = [measure(small_BTCHW) for measure in LOOKS.values()]
    colours = small_BTCHW.mean((1, 3, 4)).unbind(1)
    return torch.stack([*measured, *colours, contrast_B, *changes], 1)


@dataclass(frozen=True)
class ScorerFeatures:
    """Features from other rewards: their embeddings if they have any, otherwise their components."""

    scorers: tuple[Scorer, ...]
    version: str = ""
    """Digest of everything that determines the features; "" if unknown."""

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
        """Features [B, D] of all scorers side by side."""
        return torch.cat([_features(scorer, video_BTCHW, prompts) for scorer in self.scorers], 1)


def _features(scorer: Scorer, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    if hasattr(scorer, "features"):
        return scorer.features(video_BTCHW, prompts).float().cpu()
    return torch.stack([values.float().cpu() for values in scorer(video_BTCHW, prompts).values()], 1)


@dataclass(frozen=True)
class Preference:
    """A linear score on standardised features."""

    mean_D: Tensor
    spread_D: Tensor
    weight_D: Tensor

    def __call__(self, features_BD: Tensor) -> Tensor:
        """Score [B]; the difference of two scores is the log odds that the first is preferred."""
        return ((features_BD.double() - self.mean_D) / self.spread_D) @ self.weight_D


@dataclass(frozen=True)
class PreferenceScorer:
    """A learned preference as a reward with one component."""

    components: tuple[str, ...]
    features: Features
    preference: Preference

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]."""
        # One clip at a time: its score cannot depend on the other clips, and features are small.
        rows = [
            self.features(clip[None], [prompt]) for clip, prompt in zip(video_BTCHW, prompts, strict=True)
        ]
        return {self.components[0]: self.preference(torch.cat(rows)).float()}


@dataclass(frozen=True)
class Task:
    """A ranking of videos, best first, given as rows of a feature table."""

    videos: tuple[int, ...]
    ranks: tuple[int, ...]
    """Ascending; the last ones may be equal if those videos were not ranked among each other."""
    prompt: str
    weight: float = 1.0


@dataclass(frozen=True)
class Stacked:
    """Tasks as tensors, padded to the longest."""

    video_NK: Tensor
    """Feature row of the video at each place."""
    there_NK: Tensor
    """True where the task has a video."""
    chosen_NK: Tensor
    """True at places that were preferred to all places after them."""
    weight_N: Tensor


def stacked(tasks: Sequence[Task]) -> Stacked:
    """Stack tasks into tensors."""
    longest = max(len(task.videos) for task in tasks)
    counts = torch.tensor([[len(task.videos)] for task in tasks])
    chosen = torch.tensor([[sum(rank < task.ranks[-1] for rank in task.ranks)] for task in tasks])
    places = torch.arange(longest)
    return Stacked(
        torch.tensor([[*task.videos, *[0] * (longest - len(task.videos))] for task in tasks]),
        places < counts,
        places < chosen,
        torch.tensor([task.weight for task in tasks], dtype=torch.float64),
    )


def plackett_luce(scores_V: Tensor, tasks: Stacked) -> Tensor:
    """Mean negative log-likelihood of rankings (Plackett 1975, Luce 1959); for pairs, Bradley-Terry's.

    P(ranking) is the product over places i of exp(s_i) / sum over places j >= i of exp(s_j).
    """
    scores_NK = scores_V[tasks.video_NK].masked_fill(~tasks.there_NK, -torch.inf)
    rest_NK = scores_NK.flip(1).logcumsumexp(1).flip(1)
    lost_NK = torch.where(tasks.chosen_NK, rest_NK - scores_NK, 0.0)
    return (tasks.weight_N * lost_NK.sum(1)).sum() / tasks.weight_N.sum()


def fit(features_VD: Tensor, tasks: Sequence[Task], ridge: float) -> Preference:
    """Minimise the mean loss plus ``ridge`` / 2 times the sum of squared weights: a convex problem.

    Args:
        features_VD: features of all videos; videos in no task still count for mean and spread.
    """
    table = features_VD.double()
    mean, spread = table.mean(0), table.std(0, correction=0).clamp(min=1e-8)
    standard_VD = (table - mean) / spread
    together = stacked(tasks)
    weight_D = torch.zeros(table.shape[1], dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weight_D], max_iter=ITERATIONS, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        solver.zero_grad()
        value = plackett_luce(standard_VD @ weight_D, together) + ridge / 2 * weight_D.square().sum()
        value.backward()
        return value

    solver.step(loss)
    return Preference(mean, spread, weight_D.detach())


def save_preference(path: Path, preference: Preference, record: Mapping[str, object]) -> None:
    """Write a preference, with ``record`` as JSON metadata. Raises StorageError."""
    tensors = {name: value.contiguous() for name, value in vars(preference).items()}
    write_atomic(path, save(tensors, {"preference": json.dumps(record, ensure_ascii=False)}))


def load_preference(path: Path) -> tuple[Preference, dict[str, object]]:
    """Read what `save_preference` wrote.

    Raises:
        ValueError: the file does not exist or is of another kind.
    """
    read_bytes(path)
    try:
        with safe_open(path, framework="pt") as file:
            record = dict(json.loads((file.metadata() or {})["preference"]))
            if not {"features", "sources"} <= record.keys():
                raise ValueError("no features")
            tensors = {name: file.get_tensor(name) for name in Preference.__dataclass_fields__}
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a learned preference; `kvpo learn-reward VOTES --out FILE` writes one"
        ) from error
    return Preference(**tensors), record
