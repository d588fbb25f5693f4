"""Every number reported about an update (METHOD section 6, last paragraph), as plain floats."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from kvpo.method.advantage import reward_spread


@dataclass(frozen=True)
class ObjectiveDiagnostics:
    """What the objective saw of one group."""

    loss: float
    """Policy loss plus the weighted simplex KL."""
    policy_loss: float
    """Clipped surrogate."""
    simplex_kl: float
    """KL(pi_theta || pi_ref) over the group."""
    energy_mean: float
    """Mean energy of the branches."""
    energy_std: float
    """Standard deviation (ddof 0) of the branches' energies."""
    temperature: float
    """tau of the Gibbs policy."""
    entropy: float
    """Entropy of the policy over log of its members; 1 is uniform."""
    anchor_probability: float
    """Probability of the anchor; 0 when it is not in the pool."""
    ratio_mean: float
    """Mean of pi_theta / pi_old."""
    ratio_max: float
    """Largest pi_theta / pi_old."""
    ratio_deviation: float
    """Largest |pi_theta / pi_old - 1|; 0 by construction in the first inner epoch on a fresh rollout."""
    clip_fraction: float
    """Share of branches whose ratio lies outside the clip range."""
    advantage_mean: float
    """Mean advantage."""
    advantage_std: float
    """Standard deviation (ddof 0) of the advantages."""


@dataclass(frozen=True)
class GroupDiagnostics:
    """What exploration found in one group; filled for skipped groups too."""

    reward_mean: float
    """Mean reward of the branches."""
    anchor_reward: float
    """Reward of the anchor."""
    reward_spread: float
    """Standard deviation (ddof 1) of the rewards of the branches, and of the anchor where advantages are
    relative to it: what the noise floor is compared with."""
    above_anchor: float
    """Share of branches that score above the anchor."""
    branch_distance: float
    """Root mean square latent distance between two branches, averaged over pairs."""
    anchor_distance: float
    """Root mean square latent distance between a branch and the anchor, averaged over branches."""


@dataclass(frozen=True)
class UpdateDiagnostics(ObjectiveDiagnostics, GroupDiagnostics):
    """One update: the mean over its groups (the maximum for ratio_max and ratio_deviation)."""

    skipped_fraction: float
    """Share of groups whose reward spread is noise; they do not enter the objective."""
    velocity_kl: float
    """mean || v_theta - v_ref ||^2 on anchor states."""
    gradient_norm: float
    """Gradient norm before clipping."""

    def to_dict(self) -> dict[str, float]:
        """Name to value, ready for a metrics file."""
        return asdict(self)


def group_diagnostics(
    rewards_G: Tensor,
    anchor_reward: Tensor,
    branch_latents: Tensor,
    anchor_latents: Tensor,
    *,
    relative_to_anchor: bool = True,
) -> GroupDiagnostics:
    """Diagnostics of one group from rewards [G], [] and the latents of the routed window [G, ...], [...]."""
    return GroupDiagnostics(
        reward_mean=float(rewards_G.mean()),
        anchor_reward=float(anchor_reward),
        reward_spread=float(reward_spread(rewards_G, anchor_reward if relative_to_anchor else None)),
        above_anchor=float((rewards_G > anchor_reward).double().mean()),
        branch_distance=mean_pairwise_distance(branch_latents),
        anchor_distance=mean_distance(branch_latents, anchor_latents),
    )


def mean_pairwise_distance(latents: Tensor) -> float:
    """sqrt(mean (x_g - x_h)^2) over the elements of [G, ...], averaged over pairs g < h."""
    rows = latents.flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return float(torch.pdist(rows).mean()) / rows.shape[1] ** 0.5


def mean_distance(latents: Tensor, anchor: Tensor) -> float:
    """sqrt(mean (x_g - x_anchor)^2) over the elements of [G, ...] and [...], averaged over branches."""
    difference = (latents - anchor).flatten(1)
    difference = difference.to(torch.promote_types(difference.dtype, torch.float32))
    return float(difference.square().mean(dim=1).sqrt().mean())


def update_diagnostics(
    objectives: Sequence[ObjectiveDiagnostics],
    groups: Sequence[GroupDiagnostics],
    *,
    velocity_kl: float,
    gradient_norm: float,
) -> UpdateDiagnostics:
    """Summarise an update: `groups` are all of its groups, `objectives` those not skipped (nan if none)."""
    means = {name: _mean(objectives, name) for name in ObjectiveDiagnostics.__dataclass_fields__}
    means |= {name: _mean(groups, name) for name in GroupDiagnostics.__dataclass_fields__}
    for name in ("ratio_max", "ratio_deviation"):
        means[name] = max((vars(item)[name] for item in objectives), default=float("nan"))
    return UpdateDiagnostics(
        **means,
        skipped_fraction=1 - len(objectives) / len(groups),
        velocity_kl=velocity_kl,
        gradient_norm=gradient_norm,
    )


def _mean(items: Sequence[ObjectiveDiagnostics] | Sequence[GroupDiagnostics], name: str) -> float:
    """Mean of one field; nan of no items."""
    return sum(vars(item)[name] for item in items) / len(items) if items else float("nan")
