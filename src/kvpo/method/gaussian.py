"""Solver steps as Gaussian policies: what Flow-GRPO and CM-GRPO share (METHOD section 10).

A step x' ~ N(a x + c v, s^2) has -log pi(x') = d c^2 / (2 s^2) mean || (x' - a x) / c - v ||^2 + const over
its d elements: one cell of the table. The constant does not depend on the policy, so a ratio of two policies
is the exponential of a difference between two tables.
"""

from collections.abc import Sequence

from torch import Tensor

from kvpo.method.evidence import Credit, Metrics, Tables
from kvpo.method.gibbs import RATIO_METRICS, clipped_surrogate, ratio_metrics

METRICS = RATIO_METRICS


def gaussian_objective(
    tables: Tables, branch_N: Sequence[int], credit: Credit, clip: float
) -> tuple[Tensor, Metrics]:
    """Clipped surrogate of every solver step with its branch's advantage; cells of weight 0 do not count.

    rho = exp(old - now) for each cell of the tables [N, P, S]; advantages are the branches'.
    """
    place = [list(credit.branches).index(branch) for branch in branch_N]
    stochastic_S = (tables.old != 0).any(0).any(0)
    now, old = (-table[:, :, stochastic_S] for table in (tables.now, tables.old.detach()))
    advantages_N11 = credit.advantages_G.to(now)[place][:, None, None]
    loss = clipped_surrogate(now, old, advantages_N11, clip, clip)
    return loss, {"loss": float(loss.detach())} | ratio_metrics(now, old, clip, clip)
