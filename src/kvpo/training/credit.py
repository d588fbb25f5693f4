"""From scores to advantages: which branches of a group to train on, and how hard."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.config import TOTAL, WORLD_NOISE_FLOOR, Config
from kvpo.config_checks import ConfigurationError
from kvpo.engine.scoring import Scores
from kvpo.method.advantage import (
    ADVANTAGE_LIMIT,
    GLOBAL_WEIGHT,
    SUSPICION,
    best_and_worst,
    centred,
    clamp,
    fuse_components,
    fuse_signals,
    group_relative,
    is_noise,
    permuted,
    pooled_spread,
    rank_gap,
    reward_spread,
    selective,
    total_floor,
)
from kvpo.method.evidence import Credit
from kvpo.method.methods import METHODS


@dataclass(frozen=True)
class Blend:
    """The rule that turns a run's scores into one advantage per branch."""

    weights_K: Tensor
    floors_K: Tensor | None
    """Noise floor of every component; None if none was measured, and the total's applies to each."""
    default_floor: float
    """Noise floor of the weighted sum, and of every component without its own."""
    config: Config

    @property
    def anchor_in_pool(self) -> bool:
        """True if the method's policy includes the anchor among its members."""
        return self.config.method == "kvpo" and self.config.kvpo.anchor_share > 0

    @property
    def floor(self) -> float | Tensor:
        """Noise floor of the weighted sum of all components."""
        return self.default_floor if self.floors_K is None else total_floor(self.floors_K, self.weights_K)


def blend_of(components: Sequence[str], weights_K: Tensor, config: Config) -> Blend:
    """The blend that a run's settings ask for; components without a measured floor use that of the sum.

    Raises ConfigurationError for unknown components, and for settings that compare the first component with
    others if it, or every other one, has no weight.
    """
    rewards = config.rewards
    floors = dict(rewards.noise_floors)
    default = floors.pop(TOTAL, WORLD_NOISE_FLOOR)
    if unknown := [name for name in floors if name not in components]:
        raise ConfigurationError(
            f"rewards.noise_floors: {unknown[0]!r} is not a component of the run's rewards; "
            f"there are {', '.join(components)}, and {TOTAL} for their weighted sum"
        )
    comparing = {"rewards.fusion": rewards.fusion} if rewards.fusion in SUSPICION else {}
    if config.method == "nft" and config.nft.selective_kl:
        comparing["nft.selective_kl"] = str(config.nft.selective_kl)
    if comparing and (weights_K[0] <= 0 or int((weights_K > 0).sum()) < 2):
        setting, value = comparing.popitem()
        raise ConfigurationError(
            f"{setting}: {value} compares the first component {components[0]!r} with others; it and at least "
            "one other need a weight above 0"
        )
    measured = torch.tensor([floors.get(name, default) for name in components]) if floors else None
    return Blend(weights_K, measured, default, config)


Scale = tuple[Tensor, Tensor]
"""Reward spreads of a whole collection in the local and in the global signal, [K] or [] each."""


def collection_scale(scores: Sequence[Scores], blend: Blend) -> Scale | None:
    """Spread by which all advantages of a collection are divided; None if each group uses its own.

    With one scale no group has to be skipped, because a group of nearly equal clips has small advantages. The
    noise floor remains the smallest divisor, for a collection that differs by noise alone.
    """
    if blend.config.objective.scale == "group":
        return None
    last = None if blend.config.objective.advantages == "anchor" else -1
    signals = ([item.local_KM for item in scores], [item.global_KM for item in scores])
    local, whole = (pooled_spread([_fused(one, blend)[..., :last] for one in own]) for own in signals)
    return local, whole


def assign_credit(
    scores: Scores, blend: Blend, generator: torch.Generator, scale: Scale | None = None
) -> Credit | None:
    """Advantages of one group (docs/method.md, "Credit"), or None if its reward spread is noise.

    ``blend`` combines the components into one advantage; the local and the global signal are fused; clamping
    comes last. With ``advantages`` "random" the values are permuted among the branches; with "flipped" they
    are negated. The selected advantages are centred unless they are relative to an anchor in the policy's
    pool: over branches alone, a constant shared by all advantages does not cancel but turns the gradient. A
    method that imitates has no such policy. If it keeps the best branches alone, their advantages are not
    centred, and those below 0 become 0, so that nothing is pushed away.
    """
    config, objective, fusion = blend.config, blend.config.objective, blend.config.rewards.fusion
    if group_is_noise(scores, blend) if scale is None else not any(bool(one.any()) for one in scale):
        return None
    before = fuse_signals(
        signal(scores.local_KM, blend, scale and scale[0]),
        signal(scores.global_KM, blend, scale and scale[1]),
        GLOBAL_WEIGHT,
    )
    advantages, gap_G = before, _gap(scores, blend)
    if fusion in SUSPICION:
        advantages = selective(before, gap_G, *SUSPICION[fusion])
    withheld = int((advantages != before).sum())
    advantages = clamp(advantages, ADVANTAGE_LIMIT)
    if objective.advantages == "random":
        advantages = permuted(advantages, generator)
    elif objective.advantages == "flipped":
        advantages = -advantages
    chosen = best_and_worst(advantages, *objective.keep)
    selected = advantages[chosen]
    only_best = METHODS[config.method].imitates and objective.keep[0] > 0 and objective.keep[1] == 0
    if only_best:
        selected = selected.clamp_min(0)
    elif not (objective.advantages == "anchor" and blend.anchor_in_pool):
        selected = centred(selected)
    return Credit(tuple(chosen.tolist()), selected, advantages, gap_G[chosen], withheld)


def group_is_noise(scores: Scores, blend: Blend) -> bool:
    """True if a group teaches nothing: its total, or every component if floors were measured, is noise.

    Raw fusion normalises the total, so there the total decides in either case. Components of weight 0 do not
    count, and neither does the anchor unless advantages are relative to it.
    """
    members, floors = scores.totals(blend.weights_K), blend.floor
    if blend.floors_K is not None and blend.config.rewards.fusion != "rewards":
        counted = blend.weights_K > 0
        members, floors = scores.combined_KM[counted], blend.floors_K[counted]
    anchor = members[..., -1] if blend.config.objective.advantages == "anchor" else None
    return is_noise(members[..., :-1], anchor, floors)


def signal(members_KM: Tensor, blend: Blend, scale: Tensor | None = None) -> Tensor:
    """One signal's advantages ``[G]`` from the scores of branches and anchor, ``[K, M]``."""
    members = _fused(members_KM, blend)
    raw = blend.config.rewards.fusion == "rewards"
    floors = blend.floor if raw or blend.floors_K is None else blend.floors_K
    anchor = members[..., -1] if blend.config.objective.advantages == "anchor" else None
    normalised = group_relative(members[..., :-1], anchor, floors, scale)
    return normalised if raw else fuse_components(normalised, blend.weights_K / blend.weights_K.sum())


def _fused(members_KM: Tensor, blend: Blend) -> Tensor:
    """The scores to normalise: every component ``[K, M]``, or with raw fusion their weighted sum ``[M]``."""
    if blend.config.rewards.fusion == "rewards":
        return fuse_components(members_KM, blend.weights_K)
    return members_KM


def _gap(scores: Scores, blend: Blend) -> Tensor:
    """Rank gap of the first component; components within their noise have no vote."""
    members_KM = scores.combined_KM
    floors_K = blend.default_floor if blend.floors_K is None else blend.floors_K
    votes_K = blend.weights_K * (reward_spread(members_KM[:, :-1]) > floors_K)
    return rank_gap(members_KM[:, :-1], votes_K, 0)
