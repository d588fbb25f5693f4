"""A Gibbs policy over latent distances: the paper's geometric ablation, and AR-CoPO (arXiv 2603.17461).

    E_theta(g) = sum_b sum_s w_s mean || (x_a - x0_g) / sigma - v_theta(x_a) ||^2,   w = sigma^2 or 1

x_a are the anchor's states, so one replayed trajectory serves every branch of the group. With w = sigma^2 a
cell is the mean squared distance between the branch's clean latents and the policy's. On routed branches this
is the ablation; on neighbouring noise, AR-CoPO.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpo.method.evidence import Credit, Evidence, Trajectories, evidence_of
from kvpo.method.flow import velocity_of
from kvpo.method.gibbs import Gibbs, gibbs_method
from kvpo.method.settings import LatentDistanceSettings, MethodSettings


def anchor_state_evidence(
    trajectories: Trajectories, branches: Sequence[int], steps: int, weights: float | Tensor
) -> Evidence:
    """One row per branch, all asked at the anchor's states; targets (x_a - x0_g) / sigma lead to it."""
    anchor = trajectories.anchor
    states = trajectories.states_MPSFCHW[[anchor], :, :steps]
    clean_GPFCHW = trajectories.clean_MPFCHW[list(branches)]
    targets = velocity_of(clean_GPFCHW[:, :, None], states, trajectories.levels(steps))
    return evidence_of(states, [anchor], targets, branches, query_N=[0] * len(branches), weights=weights)


def evidence(
    trajectories: Trajectories,
    credit: Credit,
    settings: MethodSettings[LatentDistanceSettings],
    _: torch.Generator,
) -> Evidence:
    """The anchor's states, with the velocities that lead to each branch as targets."""
    squared = trajectories.levels(settings.steps).square()
    wide = torch.promote_types(trajectories.states_MPSFCHW.dtype, torch.float32)
    weights = squared.to(wide) if settings.own.space == "latent" else 1.0
    return anchor_state_evidence(trajectories, credit.branches, settings.steps, weights)


METHOD = gibbs_method(evidence, lambda settings: Gibbs(settings.temperature, settings.clip), "distance")
