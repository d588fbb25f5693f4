"""KVPO (arXiv 2605.14278): Trajectory Velocity Energy under a Gibbs policy.

    E_theta(g) = sum_b sum_s mean || u_{g,b,s} - v_theta(x_{g,b,s}) ||^2

u is the branch's own velocity, recorded under its routed history; v_theta is the policy's at the same state x
in the deployment context. A branch that differs only in its noise has energy exactly 0 at theta_old, and with
it no gradient: this method needs routed branches.
"""

import torch

from kvpo.method.evidence import Credit, Evidence, Trajectories, evidence_of, joined_evidence
from kvpo.method.gibbs import Gibbs, gibbs_method
from kvpo.method.latent_distance import anchor_state_evidence
from kvpo.method.settings import KvpoSettings, MethodSettings


def evidence(
    trajectories: Trajectories, credit: Credit, settings: MethodSettings[KvpoSettings], _: torch.Generator
) -> Evidence:
    """The branches' visited states with their own velocities as targets.

    ``anchor_state_weight`` moves that share of the energy to the anchor's states (an extension beyond the
    paper, ``kvpo.method.latent_distance``).
    """
    branches, share = list(credit.branches), settings.own.anchor_state_weight
    visited = evidence_of(
        trajectories.states_MPSFCHW[branches, :, : settings.steps],
        branches,
        trajectories.velocities_MPSFCHW[branches, :, : settings.steps],
        branches,
        weights=1 - share,
    )
    if not share:
        return visited
    at_anchor = anchor_state_evidence(trajectories, branches, settings.steps, weights=share)
    return at_anchor if share == 1 else joined_evidence(visited, at_anchor)


def gibbs_of(settings: MethodSettings[KvpoSettings]) -> Gibbs:
    """The Gibbs policy of these settings."""
    own = settings.own
    return Gibbs(settings.temperature, settings.clip, own.simplex_kl, own.anchor_share)


METHOD = gibbs_method(evidence, gibbs_of, "energy")
