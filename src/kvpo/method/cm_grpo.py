"""CM-GRPO (RAVEN, arXiv 2605.15190): a re-noising sampler already is a stochastic policy.

    x' = alpha x0_theta(x) + sigma' eps,   alpha = 1 - sigma',   x0_theta = x - sigma v

is a Gaussian with mean alpha x0_theta and deviation sigma'. Branches differ in the re-noise eps; neither an
SDE nor a second context is needed. The last step, which lands on the clean latents, has no policy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpo.method.evidence import Credit, Evidence, Method, Metrics, Tables, Trajectories, evidence_of
from kvpo.method.gaussian import METRICS, gaussian_objective
from kvpo.method.settings import CmGrpoSettings


def evidence(
    trajectories: Trajectories, credit: Credit, steps: int, settings: CmGrpoSettings, _: torch.Generator
) -> Evidence:
    """The branches' visited states; targets (x - x' / alpha) / sigma are the velocities that explain each step.

    Weights d (alpha sigma)^2 / (2 sigma'^2); 0 for the last solver step.
    """
    branches = list(credit.branches)
    x = trajectories.states_MPSFCHW[branches, :, :steps]
    arrived = trajectories.arrivals_MPSFCHW[branches, :, :steps]
    elements = x[0, 0, 0].numel()
    levels = (*trajectories.sigmas, 0.0)
    targets, weights = torch.zeros_like(x), []
    for step, (sigma, following) in enumerate(zip(levels[:steps], levels[1:], strict=False)):
        if following == 0.0:
            weights.append(0.0)
            continue
        alpha = 1 - following
        targets[:, :, step] = (x[:, :, step] - arrived[:, :, step] / alpha) / sigma
        weights.append(elements * (alpha * sigma) ** 2 / (2 * following**2))
    return evidence_of(x, branches, targets, branches, weights=x.new_tensor(weights))


def loss(
    tables: Tables, branch_N: Sequence[int], credit: Credit, settings: CmGrpoSettings
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of every stochastic step."""
    return gaussian_objective(tables, branch_N, credit, settings.clip)


METHOD = Method(evidence, loss, METRICS)
