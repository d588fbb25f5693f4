"""Advantages: how much better a branch is than the anchor, or than its group (docs/method.md, "Credit").

    A_g = (r_g - r_anchor) / max( std{r_1 .. r_G, r_anchor}, noise floor )

Rewards are [G], or [K, G] for K components at once (anchor and noise floor then [K]); the noise floor is the
measured jitter of the reward, so that noise is not amplified into an advantage.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ADVANTAGE_LIMIT = 2.5
"""Advantages are clamped to plus or minus this. One outlier among eight branches has (8 - 1) / sqrt(8) = 2.47
in one signal, so clamping cuts only what two signals agree on. At the limit, nft counts a branch as wholly
good (its paper uses 5)."""
GLOBAL_WEIGHT = 0.5
"""Weight of the global (post-fork) signal relative to the local one. Branches differ in the window; the video
after it depends on the window, but with more noise."""
SUSPICION = {"selective": (0.25, 0.0), "reversing": (0.0, 1.0)}
"""Fusion -> (margin, penalty): a positive advantage whose rank gap exceeds the margin is multiplied by
-penalty. A margin of a quarter tolerates the ordinary disagreement of rewards; benchmarks/RESULTS.md has
measurements of both."""
SMALLEST_SPREAD = 1e-12
"""Keeps 0 / 0 at 0 where no noise floor is given and all rewards are equal."""


def reward_spread(rewards: Tensor, anchor: Tensor | None = None) -> Tensor:
    """Standard deviation (ddof 1) over the branches, and the anchor if given: [..., G], [...] -> [...].

    Exactly 0 if all are equal, whose rounded mean may lie beside them.
    """
    members = rewards if anchor is None else torch.cat([rewards, anchor.unsqueeze(-1)], dim=-1)
    return members.std(dim=-1, correction=1).masked_fill(_equal(members), 0.0)


def pooled_spread(groups: Sequence[Tensor]) -> Tensor:
    """Spread of rewards around their own group's mean over a whole collection: [..., n] each -> [...].

    sqrt(sum_g sum_i (r_gi - mean r_g)^2 / sum_g (n_g - 1)); for one group, its standard deviation (ddof 1).
    """
    squares = torch.stack([centred(rewards).square().sum(-1) for rewards in groups]).sum(0)
    return (squares / sum(rewards.shape[-1] - 1 for rewards in groups)).sqrt()


def group_relative(
    rewards: Tensor, anchor: Tensor | None, noise_floor: float | Tensor, spread: Tensor | None = None
) -> Tensor:
    """A_g = (r_g - baseline) / max(spread, noise floor): [..., G].

    The baseline is the anchor's reward [...]. Without an anchor it is the group's mean, and advantages add up
    to 0. ``spread`` [...] is by default the standard deviation over the branches and the anchor, if given.
    """
    scale = reward_spread(rewards, anchor) if spread is None else spread
    floor = torch.as_tensor(noise_floor, dtype=scale.dtype, device=scale.device).clamp_min(SMALLEST_SPREAD)
    differences = centred(rewards) if anchor is None else rewards - anchor.unsqueeze(-1)
    return differences / torch.maximum(scale, floor).unsqueeze(-1)


def is_noise(rewards: Tensor, anchor: Tensor | None, noise_floor: float | Tensor) -> bool:
    """True if no component's spread exceeds its noise floor: the group teaches nothing and is skipped."""
    return bool((reward_spread(rewards, anchor) <= noise_floor).all())


def fuse_components(advantages_KG: Tensor, weights_K: Tensor) -> Tensor:
    """Weighted sum over reward components: [K, G], [K] -> [G]."""
    return weights_K.to(advantages_KG) @ advantages_KG


def total_floor(floors_K: Tensor, weights_K: Tensor) -> Tensor:
    """Noise floor of a weighted sum of components with independent jitters: sqrt(sum (w floor)^2), []."""
    return (weights_K.to(floors_K) * floors_K).square().sum().sqrt()


def ranks(rewards: Tensor) -> Tensor:
    """Share of the other branches that each branch beats, ties counting half: [..., G] in [0, 1]."""
    against = (rewards.unsqueeze(-1) - rewards.unsqueeze(-2)).sign().sum(-1)
    return (against / (rewards.shape[-1] - 1) + 1) / 2


def rank_gap(rewards_KG: Tensor, votes_K: Tensor, primary: int) -> Tensor:
    """Rank under component `primary` minus the mean rank under the others, weighted by votes: [G] in [-1, 1].

    0 if no other component has a vote.
    """
    others_K = votes_K.to(rewards_KG).clone()
    others_K[primary] = 0
    if not bool(others_K.any()):
        return torch.zeros_like(rewards_KG[primary])
    ranks_KG = ranks(rewards_KG)
    return ranks_KG[primary] - others_K @ ranks_KG / others_K.sum()


def selective(advantages_G: Tensor, gap_G: Tensor, margin: float, penalty: float) -> Tensor:
    """Multiply positive advantages by -penalty where the rank gap exceeds the margin: [G]."""
    suspect_G = (gap_G > margin) & (advantages_G > 0)
    return torch.where(suspect_G, -penalty * advantages_G, advantages_G)


def fuse_signals(local_G: Tensor, global_G: Tensor, global_weight: float) -> Tensor:
    """A = A_local + global_weight A_global, [G]: signals of the routed window and of the video after it."""
    return local_G + global_weight * global_G


def centred(advantages: Tensor) -> Tensor:
    """A - mean A over the last axis, as a softmax over the branches alone requires; 0 if all are equal."""
    difference = advantages - advantages.mean(dim=-1, keepdim=True)
    return difference.masked_fill(_equal(advantages).unsqueeze(-1), 0.0)


def _equal(values: Tensor) -> Tensor:
    """True where all values along the last axis are the same: [..., n] -> [...]."""
    return values.amax(-1) == values.amin(-1)


def clamp(advantages_G: Tensor, limit: float) -> Tensor:
    """Clamp advantages to [-limit, limit]; the last step in computing them."""
    return advantages_G.clamp(-limit, limit)


def permuted(advantages_G: Tensor, generator: torch.Generator) -> Tensor:
    """Null control: the same advantages, assigned to the branches in random order (by a CPU generator)."""
    order = torch.randperm(len(advantages_G), generator=generator)
    return advantages_G[order.to(advantages_G.device)]


def best_and_worst(advantages_G: Tensor, best: int, worst: int) -> Tensor:
    """Indices of the `best` highest and `worst` lowest advantages, ascending int64 [best + worst].

    0 and 0 select every branch. Train on these branches only, with `centred(advantages[indices])`. Raises
    ValueError for a negative count, or if more branches are requested than exist.
    """
    branches = len(advantages_G)
    if min(best, worst) < 0 or best + worst > branches:
        raise ValueError(
            f"objective.keep = {best},{worst}: must add up to between 0 and the {branches} branches"
        )
    if best + worst == 0:
        return torch.arange(branches, device=advantages_G.device)
    order = advantages_G.argsort(descending=True, stable=True)
    return torch.cat([order[:best], order[branches - worst :]]).sort().values
