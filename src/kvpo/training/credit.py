"""From scores to advantages: which branches of a group to train on, and how hard."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.config import ObjectiveConfig
from kvpo.engine.scoring import Scores
from kvpo.method.advantage import (
    anchor_relative,
    best_and_worst,
    centred,
    clamp,
    fuse_components,
    fuse_signals,
    group_centred,
    is_noise,
    permuted,
)


@dataclass(frozen=True)
class Credit:
    """The branches of one group that are trained on, and their advantages."""

    branches: tuple[int, ...]
    advantages_G: Tensor
    """Of the selected branches."""
    all_advantages_G: Tensor
    """Of every branch, before selection."""


def no_credit(branches: int) -> Credit:
    """Every branch, none better than another: for looking at a group without training on it."""
    return Credit(tuple(range(branches)), torch.zeros(branches), torch.zeros(branches))


def assign_credit(
    scores: Scores, weights_K: Tensor, config: ObjectiveConfig, generator: torch.Generator
) -> Credit | None:
    """Advantages of one group (METHOD section 5), or None where its reward spread is noise.

    Components are normalised one by one, weighted and summed; the local and the global signal are fused;
    clamping comes last. With ``advantages`` "random" the same numbers are dealt to the branches at random.
    """
    totals_M = scores.totals(weights_K, config.global_weight)
    if is_noise(totals_M[:-1], totals_M[-1], config.noise_floor):
        return None

    def signal(members_KM: Tensor) -> Tensor:
        branches, anchor = members_KM[:, :-1], members_KM[:, -1]
        if config.advantages == "anchor":
            normalised = anchor_relative(branches, anchor, config.noise_floor)
        else:
            normalised = group_centred(branches, config.noise_floor)
        return fuse_components(normalised, weights_K / weights_K.sum())

    advantages = fuse_signals(signal(scores.local_KM), signal(scores.global_KM), config.global_weight)
    advantages = clamp(advantages, config.advantage_clamp)
    if config.advantages == "random":
        advantages = permuted(advantages, generator)
    chosen = best_and_worst(advantages, config.keep_best, config.keep_worst)
    selected = advantages[chosen]
    if config.advantages != "anchor":
        selected = centred(selected)
    return Credit(tuple(chosen.tolist()), selected, advantages)
