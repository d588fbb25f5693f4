"""Flow-GRPO and CM-GRPO against the log-densities of their solver steps."""

import math
from dataclasses import replace

import pytest
import torch
from torch.distributions import Normal

from kvpo.method.evidence import Tables
from kvpo.method.methods import METHODS
from tests.method.cases import CASES, FORKS, KAPPA, KNOWN, agrees, at, evidence_for
from tests.method.toy import (
    BLOCKS,
    SIGMAS,
    credit,
    seeded,
    table_of,
)


def sde_policy(policy, fork, branch, block, step) -> Normal:
    """Flow-GRPO, equation of the stochastic step: one Euler-Maruyama step of the reverse SDE."""
    t, dt = SIGMAS[step], SIGMAS[step + 1] - SIGMAS[step]
    diverges_at = t if t < 1 else SIGMAS[step + 1]
    sigma = KAPPA * math.sqrt(diverges_at / (1 - diverges_at))
    x, v = fork.states_MPSFCHW[branch, block, step], at(policy, fork, branch, block, step)
    mean = x + (v + sigma**2 / (2 * t) * (x + (1 - t) * v)) * dt
    return Normal(mean, sigma * math.sqrt(-dt))


def renoising_policy(policy, fork, branch, block, step) -> Normal:
    """CM-GRPO: the clean estimate, noised to the next level."""
    x, v = fork.states_MPSFCHW[branch, block, step], at(policy, fork, branch, block, step)
    following = SIGMAS[step + 1]
    return Normal((1 - following) * (x - SIGMAS[step] * v), following)


GAUSSIAN = {
    "flow-grpo": ("sde", sde_policy, CASES["flow-grpo"][0]),
    "cm-grpo": ("renoise", renoising_policy, CASES["cm-grpo"][0]),
}


def step_loss(law, fork, earned, clip, steps):
    """The clipped surrogate of every stochastic step, from log-densities of the state that it led to."""

    def log_density(policy, branch, block, step):
        arrived = fork.states_MPSFCHW[branch, block, step + 1]
        return law(policy, fork, branch, block, step).log_prob(arrived).sum()

    def loss(now):
        terms = []
        for branch, advantage in zip(earned.branches, earned.advantages_G.tolist(), strict=True):
            for block in range(BLOCKS):
                for step in range(min(steps, len(SIGMAS) - 1)):
                    place = (branch, block, step)
                    ratio = (log_density(now, *place) - log_density(KNOWN.old, *place)).exp()
                    held = ratio.clamp(1 - clip, 1 + clip)
                    terms.append(torch.minimum(ratio * advantage, held * advantage))
        return -torch.stack(terms).mean()

    return loss


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("name", GAUSSIAN)
def test_solver_steps_are_clipped_gaussian_policies(name, steps):
    """With all four steps, the last one counts for nothing: it draws no noise."""
    explorer, law, settings = GAUSSIAN[name]
    fork, earned = FORKS[explorer], credit(0, 1, 3)
    fractions = []
    for clip in (0.03, 0.3):
        formula = step_loss(law, fork, earned, clip, steps)
        fractions.append(
            agrees(name, replace(settings, clip=(clip, clip)), fork, earned, formula, steps=steps)[
                "clip_fraction"
            ]
        )
    assert fractions[0] > fractions[1], "one of the clip ranges holds some steps and not others"


@pytest.mark.parametrize("name", GAUSSIAN)
def test_a_difference_of_tables_is_a_difference_of_log_densities(name):
    explorer, law, settings = GAUSSIAN[name]
    fork = FORKS[explorer]
    evidence = evidence_for(name, settings, fork, credit(2), steps=3)
    now, old = (table_of(policy, fork, evidence)[0] for policy in (KNOWN.now, KNOWN.old))
    for block in range(BLOCKS):
        for step in range(3):
            arrived = fork.states_MPSFCHW[2, block, step + 1]
            logs = [
                law(policy, fork, 2, block, step).log_prob(arrived).sum() for policy in (KNOWN.now, KNOWN.old)
            ]
            torch.testing.assert_close((old - now)[block, step], logs[0] - logs[1], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_the_old_policys_own_steps_are_half_a_squared_noise_each(name):
    """Under the policy that made it, a step's cell is || eps ||^2 / 2 at every level."""
    explorer, law, settings = GAUSSIAN[name]
    fork = FORKS[explorer]
    table = table_of(KNOWN.old, fork, evidence_for(name, settings, fork, credit(0, 1, 2, 3), steps=3))
    for branch in range(4):
        for block in range(BLOCKS):
            for step in range(3):
                made = law(KNOWN.old, fork, branch, block, step)
                noise = (fork.states_MPSFCHW[branch, block, step + 1] - made.mean) / made.stddev
                torch.testing.assert_close(table[branch, block, step], noise.square().sum() / 2)


def test_the_gradient_of_a_renoising_step_in_the_clean_latents():
    """d(-A log pi)/d x0 = -A alpha (x' - alpha x0) / sigma'^2."""
    fork, earned = FORKS["renoise"], credit(0, 1, 2, 3)
    evidence = evidence_for("cm-grpo", CASES["cm-grpo"][0], fork, earned, steps=3)
    states = fork.states_MPSFCHW[:4]
    levels = torch.tensor(SIGMAS, dtype=torch.float64).view(1, 1, 4, 1, 1, 1, 1)
    clean = (states - levels * fork.velocities_MPSFCHW[:4])[:, :, :3].requires_grad_()
    asked = (states[:, :, :3] - clean) / levels[:, :, :3]
    cells = evidence.weights_NPS * (evidence.targets_NPSFCHW - asked).square().mean((3, 4, 5, 6))
    loss, _ = METHODS["cm-grpo"].loss(
        Tables(cells, cells.detach(), cells.detach(), evidence.branch_N), earned, CASES["cm-grpo"][0]
    )
    (gradient,) = torch.autograd.grad(loss, clean)
    following = levels[:, :, 1:]
    alpha, arrived = 1 - following, states[:, :, 1:]
    advantages = earned.advantages_G.view(4, 1, 1, 1, 1, 1, 1)
    expected = -advantages * alpha * (arrived - alpha * clean.detach()) / following**2
    torch.testing.assert_close(gradient * cells.numel(), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", GAUSSIAN)
def test_solver_steps_without_noise_are_refused(name):
    _, _, settings = GAUSSIAN[name]
    with pytest.raises(ValueError, match="noise = 0.0 .*no policy; explore with noise above 0"):
        one_step = replace(FORKS["routes"], sigmas=(1.0,))
        METHODS[name].evidence(one_step, credit(0, 1), replace(settings, steps=1), seeded(0))


def test_flow_grpo_refuses_a_fork_that_was_explored_without_noise():
    with pytest.raises(ValueError, match="noise = 0.0 over noise levels .*: a solver step without noise"):
        METHODS["flow-grpo"].evidence(FORKS["routes"], credit(0, 1), CASES["flow-grpo"][0], seeded(0))
