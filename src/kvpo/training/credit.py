"""From scores to advantages: which branches of a group to train on, and how hard."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.config import ObjectiveConfig, RewardConfig
from kvpo.config_checks import ConfigurationError
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
    pooled_spread,
    rank_gap,
    reward_spread,
    selective,
    total_floor,
)
from kvpo.method.evidence import Credit


@dataclass(frozen=True)
class Blend:
    """The fusion of a reward's components into one advantage."""

    weights_K: Tensor
    floors_K: Tensor | None
    """Noise floor of every component; None: none was measured, the total's holds for each."""
    rewards: RewardConfig
    primary: int = 0
    """Component that selective fusion checks against the others."""
    anchor_in_pool: bool = False
    """The method's policy counts the anchor among its members."""


def blend_of(
    components: Sequence[str],
    weights_K: Tensor,
    rewards: RewardConfig,
    default_floor: float,
    *,
    anchor_in_pool: bool = False,
) -> Blend:
    """The blend that ``rewards`` asks for; components without a measured floor have ``default_floor``.

    Raises ConfigurationError for names that are not components, and for selective fusion with nothing to
    compare.
    """
    floors = rewards.noise_floors
    for field, names in (("noise_floors", floors), ("primary", [rewards.primary] if rewards.primary else [])):
        if unknown := [name for name in names if name not in components]:
            raise ConfigurationError(
                f"rewards.{field}: {unknown[0]!r} is not a component of the run's rewards; "
                f"there are {', '.join(components)}"
            )
    primary = components.index(rewards.primary) if rewards.primary else 0
    if rewards.fusion == "selective" and (weights_K[primary] <= 0 or int((weights_K > 0).sum()) < 2):
        raise ConfigurationError(
            f"rewards.fusion: selective compares the primary component {components[primary]!r} with others; "
            "it and at least one other need a weight above 0"
        )
    measured = torch.tensor([floors.get(name, default_floor) for name in components]) if floors else None
    return Blend(weights_K, measured, rewards, primary, anchor_in_pool)


Scale = tuple[Tensor, Tensor]
"""Reward spread of a whole collection in the local and in the global signal, [K] or [] each."""


def collection_scale(scores: Sequence[Scores], blend: Blend, config: ObjectiveConfig) -> Scale | None:
    """Spread that all advantages of a collection are divided by; None: each group's own is.

    One scale for every group needs no noise floor: a group of nearly equal clips has small advantages.
    """
    if config.advantage_scale == "group":
        return None
    last = None if config.advantages == "anchor" else -1
    signals = ([item.local_KM for item in scores], [item.global_KM for item in scores])
    local, whole = (pooled_spread([_fused(one, blend)[..., :last] for one in own]) for own in signals)
    return local, whole


def assign_credit(
    scores: Scores,
    blend: Blend,
    config: ObjectiveConfig,
    generator: torch.Generator,
    scale: Scale | None = None,
) -> Credit | None:
    """Advantages of one group (docs/method.md, "Credit"), or None where its reward spread is noise.

    Components become one advantage as ``blend`` says; the local and the global signal are fused; clamping
    comes last. With ``advantages`` "random" the same numbers are dealt to the branches at random. The
    selected ones are centred unless they are relative to an anchor in the policy's pool: over branches alone
    a constant that all advantages share does not cancel, but turns the gradient.
    """
    floor = config.noise_floor if blend.floors_K is None else total_floor(blend.floors_K, blend.weights_K)
    if scale is None and group_is_noise(scores, blend, config, floor):
        return None
    if scale is not None and not any(bool(one.any()) for one in scale):
        return None
    before = fuse_signals(
        signal(scores.local_KM, blend, config, floor, scale and scale[0]),
        signal(scores.global_KM, blend, config, floor, scale and scale[1]),
        config.global_weight,
    )
    advantages, gap_G = before, _gap(scores, blend, config)
    if blend.rewards.fusion == "selective":
        advantages = selective(before, gap_G, blend.rewards.rank_margin, blend.rewards.rank_penalty)
    withheld = int((advantages != before).sum())
    advantages = clamp(advantages, config.advantage_clamp)
    if config.advantages == "random":
        advantages = permuted(advantages, generator)
    chosen = best_and_worst(advantages, config.keep_best, config.keep_worst)
    selected = advantages[chosen]
    if config.advantages != "anchor" or not blend.anchor_in_pool:
        selected = centred(selected)
    return Credit(tuple(chosen.tolist()), selected, advantages, gap_G[chosen], withheld)


def group_is_noise(scores: Scores, blend: Blend, config: ObjectiveConfig, floor: float | Tensor) -> bool:
    """True for a group that teaches nothing: its total, or with measured floors every component, is noise.

    Raw fusion normalises the total, so there the total decides in either case. Components of weight 0 do not
    count, and neither does the anchor unless advantages are relative to it.
    """
    members, floors = scores.totals(blend.weights_K, config.global_weight), floor
    if blend.floors_K is not None and blend.rewards.fusion != "rewards":
        counted = blend.weights_K > 0
        members, floors = scores.combined(config.global_weight)[counted], blend.floors_K[counted]
    anchor = members[..., -1] if config.advantages == "anchor" else None
    return is_noise(members[..., :-1], anchor, floors)


def signal(
    members_KM: Tensor,
    blend: Blend,
    config: ObjectiveConfig,
    floor: float | Tensor,
    scale: Tensor | None = None,
) -> Tensor:
    """One signal's advantages ``[G]`` from the scores of branches and anchor, ``[K, M]``."""
    members = _fused(members_KM, blend)
    floors = floor if blend.rewards.fusion == "rewards" or blend.floors_K is None else blend.floors_K
    if config.advantages == "anchor":
        normalised = anchor_relative(members[..., :-1], members[..., -1], floors, scale)
    else:
        normalised = group_centred(members[..., :-1], floors, scale)
    if blend.rewards.fusion == "rewards":
        return normalised
    return fuse_components(normalised, blend.weights_K / blend.weights_K.sum())


def _fused(members_KM: Tensor, blend: Blend) -> Tensor:
    """The scores to normalise: every component ``[K, M]``, or with raw fusion their weighted sum ``[M]``."""
    if blend.rewards.fusion == "rewards":
        return fuse_components(members_KM, blend.weights_K)
    return members_KM


def _gap(scores: Scores, blend: Blend, config: ObjectiveConfig) -> Tensor:
    """Rank gap of the primary component; components within their noise have no vote."""
    members_KM = scores.combined(config.global_weight)
    floors_K = config.noise_floor if blend.floors_K is None else blend.floors_K
    votes_K = blend.weights_K * (reward_spread(members_KM[:, :-1]) > floors_K)
    return rank_gap(members_KM[:, :-1], votes_K, blend.primary)
