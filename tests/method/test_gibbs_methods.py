"""KVPO and latent distance against their papers' equations, written without the table of residuals."""

import math

import pytest
import torch
from torch import Tensor
from torch.distributions import Categorical, kl_divergence

from kvpo.method.evidence import Tables
from kvpo.method.methods import METHODS
from kvpo.method.settings import (
    KvpoSettings,
    LatentDistanceSettings,
    MethodSettings,
)
from tests.method.cases import EXACT, FORKS, KNOWN, agrees, at, evidence_for
from tests.method.toy import (
    BLOCKS,
    ELEMENTS,
    SIGMAS,
    credit,
    table_of,
)


def branch_distance(policy, fork, branch, steps) -> Tensor:
    """Trajectory Velocity Energy: || u - v ||^2 at the states that the branch visited."""
    cells = [
        (fork.velocities_MPSFCHW[branch, b, s] - at(policy, fork, branch, b, s)).square().sum() / ELEMENTS
        for b in range(BLOCKS)
        for s in range(steps)
    ]
    return torch.stack(cells).sum()


def anchor_distance(policy, fork, branch, steps, space) -> Tensor:
    """Distance at the anchor's states between the branch's clean latents and the policy's."""
    anchor, cells = len(fork.states_MPSFCHW) - 1, []
    for b in range(BLOCKS):
        for s in range(steps):
            clean = fork.states_MPSFCHW[anchor, b, s] - SIGMAS[s] * at(policy, fork, anchor, b, s)
            squared = (fork.clean_MPFCHW[branch, b] - clean).square().sum() / ELEMENTS
            cells.append(squared if space == "latent" else squared / SIGMAS[s] ** 2)
    return torch.stack(cells).sum()


def gibbs_loss(energy, earned, settings, temperature, anchor=False) -> Tensor:
    """-(1/G) sum min(rho A, clip(rho) A) + lambda KL over branches (and the anchor, of energy 0)."""

    def over(policy):
        energies = [energy(policy, branch) for branch in earned.branches]
        pool = [*energies, torch.zeros_like(energies[0])] if anchor else energies
        return torch.softmax(-torch.stack(pool) / temperature, 0)

    def loss(now):
        policy, old, reference = over(now), over(KNOWN.old).detach(), over(KNOWN.reference).detach()
        terms = []
        for g, advantage in enumerate(earned.advantages_G.tolist()):
            ratio = policy[g] / old[g]
            held = ratio.clamp(1 - settings.clip[0], 1 + settings.clip[1])
            terms.append(torch.minimum(ratio * advantage, held * advantage))
        kl = kl_divergence(Categorical(probs=policy), Categorical(probs=reference))
        return -torch.stack(terms).mean() + vars(settings.own).get("simplex_kl", 0.0) * kl

    return loss


def spread(energies: list[Tensor]) -> float:
    """Standard deviation, ddof 1."""
    values = [float(energy.detach()) for energy in energies]
    mean = sum(values) / len(values)
    return math.sqrt(sum((value - mean) ** 2 for value in values) / (len(values) - 1))


@pytest.mark.parametrize("branches", [(0, 1, 2, 3), (0, 2, 3)])
@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("simplex_kl", [0.0, 10.0])
def test_kvpo_is_the_clipped_gibbs_objective_on_velocity_energies(branches, weight, simplex_kl):
    fork, earned = FORKS["routes"], credit(*branches)

    def energy(policy, branch):
        own = branch_distance(policy, fork, branch, 2)
        return (1 - weight) * own + weight * anchor_distance(policy, fork, branch, 2, "velocity")

    temperature = spread([energy(KNOWN.old, branch) for branch in branches])
    fractions = []
    for low, high in ((0.002, 0.003), (0.2, 0.3)):
        own = KvpoSettings(simplex_kl=simplex_kl, anchor_state_weight=weight)
        settings = MethodSettings(own, clip=(low, high))
        metrics = agrees("kvpo", settings, fork, earned, gibbs_loss(energy, earned, settings, temperature))
        assert metrics["temperature"] == pytest.approx(temperature, rel=EXACT)
        assert metrics["loss"] == pytest.approx(metrics["policy_loss"] + simplex_kl * metrics["simplex_kl"])
        assert metrics["simplex_kl"] > 0
        fractions.append(metrics["clip_fraction"])
    assert fractions[0] > fractions[1], "one of the clip ranges holds some branches and not others"


@pytest.mark.parametrize("steps", [1, 4])
def test_kvpo_counts_the_first_solver_steps(steps):
    settings, fork, earned = MethodSettings(KvpoSettings(), temperature=0.3), FORKS["routes"], credit(1, 3)
    formula = gibbs_loss(lambda p, g: branch_distance(p, fork, g, steps), earned, settings, 0.3)
    agrees("kvpo", settings, fork, earned, formula, steps=steps)


def test_kvpo_with_the_anchor_in_the_pool():
    settings = MethodSettings(KvpoSettings(anchor_share=0.4, simplex_kl=2.0), clip=(0.02, 0.03))
    fork, earned = FORKS["routes"], credit(0, 1, 2)

    def energy(policy, branch):
        return branch_distance(policy, fork, branch, 2)

    evidence = evidence_for("kvpo", settings, fork, earned)
    old = table_of(KNOWN.old, fork, evidence)
    _, metrics = METHODS["kvpo"].loss(Tables(old, old, old, evidence.branch_N), earned, settings)
    temperature = metrics["temperature"]
    odds = sum(math.exp(-float(energy(KNOWN.old, branch)) / temperature) for branch in earned.branches)
    assert 1 / (1 + odds) == pytest.approx(0.4, abs=1e-12) == metrics["anchor_probability"]
    agrees("kvpo", settings, fork, earned, gibbs_loss(energy, earned, settings, temperature, anchor=True))


@pytest.mark.parametrize("space", ["velocity", "latent"])
@pytest.mark.parametrize("explorer", ["routes", "renoise"])
def test_latent_distance_is_the_clipped_gibbs_objective_on_clean_latents(space, explorer):
    settings = MethodSettings(LatentDistanceSettings(space=space), clip=(0.02, 0.03))
    fork, earned = FORKS[explorer], credit(0, 1, 3)

    def energy(policy, branch):
        return anchor_distance(policy, fork, branch, 3, space)

    temperature = spread([energy(KNOWN.old, branch) for branch in earned.branches])
    formula = gibbs_loss(energy, earned, settings, temperature)
    metrics = agrees("latent-distance", settings, fork, earned, formula, steps=3)
    assert metrics["temperature"] == pytest.approx(temperature, rel=EXACT)
    assert len(evidence_for("latent-distance", settings, fork, earned).past_Q) == 1


@pytest.mark.parametrize(
    "name, settings, anchor",
    [
        ("kvpo", MethodSettings(KvpoSettings()), 0),
        ("kvpo", MethodSettings(KvpoSettings(), temperature=0.3), 0),
        ("kvpo", MethodSettings(KvpoSettings(anchor_share=0.4)), 1),
        ("latent-distance", MethodSettings(LatentDistanceSettings()), 0),
        ("latent-distance", MethodSettings(LatentDistanceSettings(), temperature=0.3), 0),
    ],
)
def test_probabilities_are_those_of_the_policy_that_the_loss_compares_with(name, settings, anchor):
    fork, earned = FORKS["routes"], credit(0, 1, 3)
    evidence = evidence_for(name, settings, fork, earned)
    table = table_of(KNOWN.old, fork, evidence)
    _, metrics = METHODS[name].loss(Tables(table, table, table, evidence.branch_N), earned, settings)
    energies = [
        table[[n for n, at in enumerate(evidence.branch_N) if at == branch]].sum() for branch in (0, 1, 3)
    ]
    pool = torch.stack(energies + [torch.zeros(()).double()] * anchor)
    expected = torch.softmax(-pool / metrics["temperature"], 0)
    found = METHODS[name].probabilities(Tables(table, table, table, evidence.branch_N), earned, settings)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_noise_branches_teach_velocity_energies_nothing():
    """They follow the old policy in its own context: energy and gradient are exactly 0 there."""
    fork, earned = FORKS["renoise"], credit(0, 1, 2, 3)
    table = table_of(KNOWN.old, fork, evidence_for("kvpo", MethodSettings(KvpoSettings()), fork, earned))
    assert float(table.max()) < 1e-28
