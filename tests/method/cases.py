"""A fork and settings for every method, and the comparison with a formula written from its paper."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from kvpo.method.flow import STEPS, sde_step
from kvpo.method.methods import METHODS
from kvpo.method.settings import (
    CmGrpoSettings,
    FlowGrpoSettings,
    KvpoSettings,
    LatentDistanceSettings,
    MethodSettings,
    NftSettings,
    RvmSettings,
    SelfDistillSettings,
)
from tests.method.toy import (
    BLOCKS,
    SHAPE,
    SIGMAS,
    SPLITS,
    history_of,
    policies,
    relative_difference,
    sampled,
    seeded,
    taught,
    through_the_table,
    velocity,
)

EXACT = 1e-12
KNOWN = policies()
KAPPA = 0.7
FORKS = {
    "routes": sampled(KNOWN.old, STEPS["ode"], routed=True),
    "sde": sampled(KNOWN.old, sde_step(KAPPA, lowest=0.0), noise=KAPPA),
    "renoise": sampled(KNOWN.old, STEPS["renoise"]),
}
EVEN = (0.2, 0.2)
"""The clip that policies of solver steps start from."""
CASES = {
    "kvpo": (MethodSettings(KvpoSettings()), "routes"),
    "latent-distance": (MethodSettings(LatentDistanceSettings()), "routes"),
    "flow-grpo": (MethodSettings(FlowGrpoSettings(), EVEN), "sde"),
    "cm-grpo": (MethodSettings(CmGrpoSettings(), EVEN), "renoise"),
    "nft": (MethodSettings(NftSettings(beta=0.5)), "renoise"),
    "rvm": (MethodSettings(RvmSettings()), "renoise"),
    "self-distill": (MethodSettings(SelfDistillSettings()), "routes"),
}
"""Method -> settings, and the explorer of the fork it learns from."""


def evidence_for(name, settings, fork, earned, steps=2, known=KNOWN):
    evidence = METHODS[name].evidence(fork, earned, replace(settings, steps=steps), seeded(3))
    return taught(evidence, fork, known)


def agrees(name, settings, fork, earned, formula, *, steps=2, known=KNOWN, constant=False):
    """Loss and gradients through the table equal those of ``formula(parameters)``; returns the metrics.

    ``constant``: the losses may differ by a number that does not depend on the policy.
    """
    expected = formula(known.now)
    gradients = list(torch.autograd.grad(expected, known.now))
    evidence = evidence_for(name, settings, fork, earned, steps, known)
    for splits in SPLITS.values():
        loss, metrics, found = through_the_table(
            METHODS[name], settings, fork, evidence, earned, known, splits
        )
        assert relative_difference(found, gradients) <= EXACT
        if not constant:
            assert float(loss) == pytest.approx(float(expected.detach()), rel=EXACT, abs=1e-14)
    assert metrics["loss"] == float(loss)
    return metrics


def at(policy, fork, member, block, step) -> Tensor:
    """A policy's velocity at a state that a member visited, behind the member's own past."""
    past = history_of(fork.clean_MPFCHW[member])[block]
    return velocity(policy, fork.states_MPSFCHW[member, block, step], past)


def matched(fork, branches, steps):
    """(branch, block, state, v*, history) of every clean block noised again; one noise for all branches."""
    noise = torch.randn((1, BLOCKS, steps, *SHAPE), generator=seeded(3)).double()
    for branch in branches:
        past = history_of(fork.clean_MPFCHW[branch])
        for b in range(BLOCKS):
            for s in range(steps):
                clean, eps = fork.clean_MPFCHW[branch, b], noise[0, b, s]
                yield branch, (1 - SIGMAS[s]) * clean + SIGMAS[s] * eps, eps - clean, past[b]
