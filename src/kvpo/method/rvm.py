"""Advantage-weighted matching (RVM): pull toward good clips, push from bad ones, by their advantages.

    loss = (1/G) sum_g A_g mean_{b,s} || v* - v_theta(x) ||^2
    x = (1 - sigma) x0_g + sigma eps,    v* = eps - x0_g

Advantages are divided by the standard deviation over the whole collection (``objective.scale``),
so that a group of nearly equal clips does not count as much as one with real differences.
"""

import torch
from torch import Tensor

from kvpo.method.evidence import Credit, Evidence, Method, Metric, Metrics, Tables, Trajectories, evidence_of
from kvpo.method.matching import noised_again
from kvpo.method.settings import MethodSettings, RvmSettings

METRICS = {
    "loss": Metric("The method's loss, averaged over the groups that were trained on."),
    "matching_error": Metric("Mean squared distance between the policy's velocity and the clips' own."),
}


def evidence(
    trajectories: Trajectories,
    credit: Credit,
    settings: MethodSettings[RvmSettings],
    generator: torch.Generator,
) -> Evidence:
    """Re-noised clean latents of the branches, with the velocities that lead back as targets."""
    branches = list(credit.branches)
    states, toward_clean = noised_again(trajectories, branches, settings.steps, generator)
    return evidence_of(states, branches, toward_clean, branches)


def loss(tables: Tables, credit: Credit, settings: MethodSettings[RvmSettings]) -> tuple[Tensor, Metrics]:
    """The advantage-weighted mean of the table."""
    error_N = tables.now.mean((1, 2))
    value = (credit.advantages_N(tables.branch_N, error_N) * error_N).mean()
    return value, {"loss": float(value.detach()), "matching_error": float(error_N.detach().mean())}


METHOD = Method(evidence, loss, METRICS, linear=True, imitates=True)
