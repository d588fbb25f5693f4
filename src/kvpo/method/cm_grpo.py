"""CM-GRPO (RAVEN, arXiv 2605.15190): a re-noising sampler already is a stochastic policy.

    x' = alpha x0_theta(x) + sigma' eps,   alpha = 1 - sigma',   x0_theta = x - sigma v

is a Gaussian with mean alpha x0_theta and deviation sigma'. Branches differ in the re-noise eps; neither an
SDE nor a second context is needed. The last step, which lands on the clean latents, has no policy.
"""

import torch

from kvpo.method.evidence import Credit, Evidence, Method, Trajectories
from kvpo.method.flow import renoise_coefficients
from kvpo.method.gaussian import gaussian_evidence, gaussian_loss
from kvpo.method.gibbs import RATIO_METRICS
from kvpo.method.settings import CmGrpoSettings, MethodSettings


def evidence(
    trajectories: Trajectories,
    credit: Credit,
    steps: int,
    settings: MethodSettings[CmGrpoSettings],
    _: torch.Generator,
) -> Evidence:
    """The branches' visited states; targets (x - x' / alpha) / sigma explain each step."""
    return gaussian_evidence(trajectories, credit, steps, renoise_coefficients)


METHOD = Method(evidence, gaussian_loss, RATIO_METRICS, arrivals=True)
