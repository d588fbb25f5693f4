"""CM-GRPO (RAVEN, arXiv 2605.15190): a re-noising sampler already is a stochastic policy.

    x' = alpha x0_theta(x) + sigma' eps,   alpha = 1 - sigma',   x0_theta = x - sigma v

is a Gaussian with mean alpha x0_theta and deviation sigma'. Branches differ in the re-noise eps; neither an
SDE nor a second context is needed. The last step, which lands on the clean latents, has no policy.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvpo.method.evidence import Credit, Evidence, Method, Metrics, Tables, Trajectories
from kvpo.method.flow import renoise_coefficients
from kvpo.method.gaussian import METRICS, gaussian_evidence, gaussian_objective
from kvpo.method.settings import CmGrpoSettings


def evidence(
    trajectories: Trajectories, credit: Credit, steps: int, settings: CmGrpoSettings, _: torch.Generator
) -> Evidence:
    """The branches' visited states; targets (x - x' / alpha) / sigma explain each step."""
    return gaussian_evidence(trajectories, credit, steps, renoise_coefficients)


def loss(
    tables: Tables, branch_N: Sequence[int], credit: Credit, settings: CmGrpoSettings
) -> tuple[Tensor, Metrics]:
    """The clipped surrogate of every stochastic step."""
    return gaussian_objective(tables, branch_N, credit, settings.clip)


METHOD = Method(evidence, loss, METRICS, arrivals=True)
