"""Self-distillation: learn in the deployment context what the policy does with other pages, without a reward.

    loss = mean over branches, blocks and steps of || v_theta(x_a | routed history of g) - v_theta(x_a) ||^2

x_a are the anchor's states; the teacher is the policy itself, without gradient, under each branch's routed
history. OPSD-V (arXiv 2607.08766) is the same with a teacher whose history is made of real frames.
"""

import torch
from torch import Tensor

from kvpo.method.evidence import Credit, Evidence, Method, Metric, Metrics, Tables, Trajectories, evidence_of
from kvpo.method.settings import MethodSettings, SelfDistillSettings

METRICS = {
    "loss": Metric("Mean squared distance between the velocities under routed and under deployed history.")
}


def evidence(
    trajectories: Trajectories,
    credit: Credit,
    settings: MethodSettings[SelfDistillSettings],
    _: torch.Generator,
) -> Evidence:
    """The anchor's states; each branch's routed history gives one target."""
    anchor, branches = trajectories.anchor, credit.branches
    states = trajectories.states_MPSFCHW[anchor, :, : settings.steps]
    targets = torch.zeros_like(states).expand(len(branches), *states.shape)
    query_N = [0] * len(branches)
    return evidence_of(states[None], [anchor], targets, branches, query_N=query_N, teacher="routed")


def loss(
    tables: Tables, credit: Credit, settings: MethodSettings[SelfDistillSettings]
) -> tuple[Tensor, Metrics]:
    """The mean of the table."""
    value = tables.now.mean()
    return value, {"loss": float(value.detach())}


METHOD = Method(evidence, loss, METRICS, rewarded=False, keep_pool=True, linear=True)
