"""KVPO (arXiv 2605.14278): Trajectory Velocity Energy under a Gibbs policy.

    E_theta(g) = sum_b sum_s mean || u_{g,b,s} - v_theta(x_{g,b,s}) ||^2

u is the branch's own velocity, recorded under its routed history; v_theta is the policy's at the same state x
in the deployment context. A branch that differs only in its noise has energy exactly 0 at theta_old, and with
it no gradient: this method needs routed branches.
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
    joined,
)
from kvpo.method.gibbs import METRICS, gibbs_objective, log_probs, temperature_of
from kvpo.method.latent_distance import anchor_state_evidence
from kvpo.method.settings import KvpoSettings


def evidence(
    trajectories: Trajectories, credit: Credit, steps: int, settings: KvpoSettings, _: torch.Generator
) -> Evidence:
    """The branches' visited states with their own velocities as targets.

    ``anchor_state_weight`` moves that share of the energy to the anchor's states (an extension beyond the
    paper, ``kvpo.method.latent_distance``).
    """
    branches, share = list(credit.branches), settings.anchor_state_weight
    visited = evidence_of(
        trajectories.states_MPSFCHW[branches, :, :steps],
        branches,
        trajectories.velocities_MPSFCHW[branches, :, :steps],
        branches,
        weights=1 - share,
    )
    if not share:
        return visited
    at_anchor = anchor_state_evidence(trajectories, branches, steps, weights=share)
    return at_anchor if share == 1 else joined(visited, at_anchor)


def loss(
    tables: Tables, branch_N: Sequence[int], credit: Credit, settings: KvpoSettings
) -> tuple[Tensor, Metrics]:
    """The clipped objective on the branches' energies."""
    now_G, old_G, reference_G = tables.per_branch(branch_N, credit.branches)
    return gibbs_objective(
        now_G,
        old_G,
        reference_G,
        credit.advantages_G.to(now_G),
        temperature=temperature_of(old_G, settings.temperature, settings.anchor_share),
        clip_low=settings.clip_low,
        clip_high=settings.clip_high,
        simplex_kl_weight=settings.simplex_kl,
        anchor_in_pool=settings.anchor_share > 0,
    )


def probabilities(
    table_NPS: Tensor, branch_N: Sequence[int], credit: Credit, settings: KvpoSettings
) -> Tensor:
    """The Gibbs policy of the rollout, whose table is given."""
    energy_G, _, _ = Tables(table_NPS, table_NPS, table_NPS).per_branch(branch_N, credit.branches)
    temperature = temperature_of(energy_G, settings.temperature, settings.anchor_share)
    return log_probs(energy_G, temperature, anchor_in_pool=settings.anchor_share > 0).exp()


METHOD = Method(evidence, loss, METRICS, residual="energy", probabilities=probabilities)
