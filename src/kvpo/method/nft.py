"""DiffusionNFT (arXiv 2509.16117), with Astrolabe's old-policy average and selective KL as settings.

    r = clip(A / A_max, -1, 1) / 2 + 1/2,      v* = eps - x0
    target = v_old + ((2 r - 1) / beta) (v* - v_old),      weight beta^2,      loss = mean of the table

This equals r || v+ - v* ||^2 + (1 - r) || v- - v* ||^2 with v+ = beta v + (1 - beta) v_old and
v- = (1 + beta) v_old - beta v, up to a constant without gradient. The adaptive weight of the published code
is left out, as in Astrolabe.
"""

import torch
from torch import Tensor

from kvpo.method.advantage import ADVANTAGE_LIMIT
from kvpo.method.evidence import (
    Credit,
    Evidence,
    Method,
    Metric,
    Metrics,
    Tables,
    Trajectories,
    anchor_drift,
    drift_evidence,
    evidence_of,
)
from kvpo.method.matching import noised_again
from kvpo.method.settings import MethodSettings, NftSettings

METRICS = {
    "loss": Metric("The method's loss, averaged over the groups that were trained on."),
    "target_distance": Metric("Mean squared distance of the policy's velocity from its target."),
    "good_share": Metric("Mean r of the trained branches: 1 is wholly good, 0 wholly bad."),
}


def goodness(advantages_G: Tensor, limit: float) -> Tensor:
    """r = clip(A / A_max, -1, 1) / 2 + 1/2, float64 [G] in [0, 1]."""
    return (advantages_G.double() / limit).clamp(-1, 1) / 2 + 0.5


def evidence(
    trajectories: Trajectories,
    credit: Credit,
    settings: MethodSettings[NftSettings],
    generator: torch.Generator,
) -> Evidence:
    """Re-noised clean latents of the branches; targets lead from v_old toward v*, or away from it."""
    branches = list(credit.branches)
    states, toward_clean = noised_again(trajectories, branches, settings.steps, generator)
    step_G = ((2 * goodness(credit.advantages_G, ADVANTAGE_LIMIT) - 1) / settings.own.beta).tolist()
    scale = states.new_tensor(step_G).view(-1, 1, 1, 1, 1, 1, 1)
    return evidence_of(
        states,
        branches,
        scale * toward_clean,
        branches,
        weights=settings.own.beta**2,
        teacher="old",
        share_N=[1 - step for step in step_G],
    )


def overrated(gap_G: Tensor, share: float) -> list[int]:
    """Positions of the branches whose rank gap lies in the top ``share`` of the positive gaps; may be []."""
    positive = gap_G[gap_G > 0]
    if not len(positive) or share <= 0:
        return []
    bound = torch.quantile(positive, 1 - share)
    return [g for g, gap in enumerate(gap_G.tolist()) if gap > 0 and gap >= float(bound)]


def drift(
    trajectories: Trajectories, credit: Credit, evidence: Evidence, settings: MethodSettings[NftSettings]
) -> Evidence | None:
    """The velocity KL on the anchor, or with ``selective_kl`` on the overrated branches alone."""
    if not settings.own.selective_kl:
        return anchor_drift(trajectories, credit, evidence, settings)
    chosen = overrated(credit.gap_G, settings.own.selective_kl)
    if not chosen:
        return None
    return drift_evidence(evidence.states_QPSFCHW[chosen], [credit.branches[g] for g in chosen])


def loss(tables: Tables, credit: Credit, settings: MethodSettings[NftSettings]) -> tuple[Tensor, Metrics]:
    """The mean of the table."""
    value = tables.now.mean()
    good = goodness(credit.advantages_G, ADVANTAGE_LIMIT)
    metrics = {
        "loss": float(value.detach()),
        "target_distance": float(value.detach()) / settings.own.beta**2,
        "good_share": float(good.mean()),
    }
    return value, metrics


METHOD = Method(
    evidence, loss, METRICS, drift, averaged_old=lambda settings: settings.own.old == "average", linear=True
)
