"""A Gibbs policy over latent distances: the paper's geometric ablation, and AR-CoPO (arXiv 2603.17461).

    E_theta(g) = sum_b sum_s w_s mean || (x_a - x0_g) / sigma - v_theta(x_a) ||^2,   w = sigma^2 or 1

x_a are the anchor's states, so one replayed trajectory serves every branch of the group. With w = sigma^2 a
cell is the mean squared distance between the branch's clean latents and the policy's. On routed branches this
is the ablation; on neighbouring noise, AR-CoPO.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpo.method.evidence import (
    Credit,
    Evidence,
    Method,
    Metrics,
    Tables,
    Trajectories,
    evidence_of,
    per_branch,
)
from kvpo.method.gibbs import METRICS, gibbs_objective, temperature_of
from kvpo.method.settings import LatentDistanceSettings


def anchor_state_evidence(
    trajectories: Trajectories, branches: Sequence[int], steps: int, weights: float | Tensor = 1.0
) -> Evidence:
    """One row per branch, all asked at the anchor's states: targets (x_a - x0_g) / sigma lead to the branch."""
    anchor = trajectories.anchor
    states_PSFCHW = trajectories.states_MPSFCHW[anchor, :, :steps]
    clean_GPFCHW = trajectories.clean_MPFCHW[list(branches)]
    targets = (states_PSFCHW - clean_GPFCHW[:, :, None]) / trajectories.levels(steps)
    return evidence_of(
        states_PSFCHW[None], [anchor], targets, branches, query_N=[0] * len(branches), weights=weights
    )


def evidence(
    trajectories: Trajectories,
    credit: Credit,
    steps: int,
    settings: LatentDistanceSettings,
    _: torch.Generator,
) -> Evidence:
    """The anchor's states, with the velocities that lead to each branch as targets."""
    latent = trajectories.levels(steps).flatten().square()
    weights = latent if settings.space == "latent" else 1.0
    return anchor_state_evidence(trajectories, credit.branches, steps, weights)


def loss(
    tables: Tables, branch_N: Sequence[int], credit: Credit, settings: LatentDistanceSettings
) -> tuple[Tensor, Metrics]:
    """The clipped objective on the branches' distances."""
    distances = [per_branch(table, branch_N, credit.branches) for table in vars(tables).values()]
    return gibbs_objective(
        *distances,
        credit.advantages_G.to(distances[0]),
        temperature=temperature_of(distances[1].detach(), settings.temperature),
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
    )


METHOD = Method(evidence, loss, METRICS)
