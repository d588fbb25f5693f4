"""Solver steps as Gaussian policies, shared by Flow-GRPO and CM-GRPO.

A step x' ~ N(a x + c v, s^2) has -log pi(x') = d c^2 / (2 s^2) mean || (x' - a x) / c - v ||^2 + const over
its d elements: one cell of the table. The constant does not depend on the policy, so a ratio of two policies
is the exponential of a difference between two tables.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor

from kvpo.method.evidence import Credit, Evidence, Method, Metrics, Tables, Trajectories, evidence_of
from kvpo.method.gibbs import RATIO_METRICS, clipped_surrogate, ratio_metrics
from kvpo.method.settings import MethodSettings, Own

Coefficients = Callable[[float, float, float], tuple[float, float, float]]
"""(sigma, sigma', strength of the noise) -> (a, c, s) of the step between two levels."""


def gaussian_loss(tables: Tables, credit: Credit, settings: MethodSettings[Own]) -> tuple[Tensor, Metrics]:
    """Clipped surrogate over all solver steps, with rho = exp(old - now) and each branch's advantage."""
    now, old = -tables.now, -tables.old.detach()
    advantages_N11 = credit.advantages_N(tables.branch_N, now)[:, None, None]
    loss = clipped_surrogate(now, old, advantages_N11, settings.clip)
    return loss, {"loss": float(loss.detach())} | ratio_metrics(now, old, settings.clip)


def gaussian_method(coefficients: Coefficients) -> Method[Own]:
    """A method whose policy is a Gaussian over the next state of every solver step.

    Its evidence is the states that the branches visited, with targets (x' - a x) / c: the velocities that
    explain each step. The last solver step, which lands on the clean latents, draws no noise and is left out.
    The evidence raises ValueError unless there are other steps and all of them draw noise.
    """

    def evidence(
        trajectories: Trajectories, credit: Credit, settings: MethodSettings[Own], _: torch.Generator
    ) -> Evidence:
        sigmas, branches = trajectories.sigmas, list(credit.branches)
        levels = pairwise(sigmas[: settings.steps + 1])
        found = [coefficients(*pair, trajectories.noise) for pair in levels]
        if not found or not all(s for _, _, s in found):
            raise ValueError(
                f"noise = {trajectories.noise} over noise levels {sigmas}: a solver step without noise "
                "defines no policy; explore with noise above 0 and at least two solver steps"
            )
        x, arrived = (trajectories.states_MPSFCHW[branches, :, at : at + len(found)] for at in (0, 1))
        wide = torch.promote_types(x.dtype, torch.float32)
        a, c, s = torch.tensor(found, dtype=torch.float64, device=x.device).T[:, :, None, None, None, None]
        targets = (arrived.to(wide) - a.to(wide) * x.to(wide)) / c.to(wide)
        weights = x[0, 0, 0].numel() * (c / s).square() / 2
        return evidence_of(x, branches, targets, branches, weights=weights.flatten())

    return Method(evidence, gaussian_loss, RATIO_METRICS, arrivals=True)
