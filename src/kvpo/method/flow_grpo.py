"""Flow-GRPO: stochastic solver steps in place of the ODE's, each one a Gaussian policy.

    x' = a x + c v + s eps   with   a = 1 + r^2 / (2 t) dt,  c = (1 + r^2 (1 - t) / (2 t)) dt,  s^2 = -r^2 dt
    r = kappa sqrt(t / (1 - t)),  dt = t' - t < 0;  at t = 1, r is that of the next level

Every coefficient keeps the marginal distribution of the flow; kappa = 0 is the Euler step. Branches differ in
eps. As published, except that no noise is added after the solver steps that are trained on, and never in the
last one: with few steps, noise that no later step can remove would show in the video.
"""

import torch

from kvpo.method.evidence import Credit, Evidence, Method, Trajectories
from kvpo.method.flow import sde_coefficients
from kvpo.method.gaussian import gaussian_evidence, gaussian_loss
from kvpo.method.gibbs import RATIO_METRICS
from kvpo.method.settings import FlowGrpoSettings, MethodSettings


def evidence(
    trajectories: Trajectories,
    credit: Credit,
    steps: int,
    settings: MethodSettings[FlowGrpoSettings],
    _: torch.Generator,
) -> Evidence:
    """The branches' visited states; targets are the velocities that explain each step."""

    def coefficients(sigma: float, sigma_next: float) -> tuple[float, float, float]:
        return sde_coefficients(sigma, sigma_next, trajectories.noise)

    return gaussian_evidence(trajectories, credit, steps, coefficients)


METHOD = Method(evidence, gaussian_loss, RATIO_METRICS, arrivals=True)
