import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.method.advantage import centred
from kvpo.method.objective import clipped_surrogate, objective, policy_ratio, simplex_kl, velocity_kl
from kvpo.method.policy import branch_log_probs, calibrated_temperature, pool_log_probs

PLAIN = {"clip_low": 0.1, "clip_high": 0.2, "simplex_kl_weight": 0.0, "anchor_in_pool": False}


@st.composite
def groups(draw):
    """Energies and advantages [G] of one group, and a temperature of the energies' size."""
    size = draw(st.integers(2, 8))
    values = st.lists(st.floats(0.1, 2.0), min_size=size, max_size=size)
    signed = st.lists(st.floats(-2.5, 2.5), min_size=size, max_size=size)
    energy = torch.tensor(draw(values), dtype=torch.float64)
    return energy, torch.tensor(draw(signed), dtype=torch.float64), draw(st.floats(0.2, 5.0))


def coefficients(energy, advantages, temperature, *, old=None, reference=None, **options):
    """dL/dE_g [G], the loss and the diagnostics."""
    energy = energy.clone().requires_grad_()
    old = energy.detach().clone() if old is None else old
    reference = old if reference is None else reference
    loss, diagnostics = objective(
        energy, old, reference, advantages, temperature=temperature, **{**PLAIN, **options}
    )
    (coefficient_G,) = torch.autograd.grad(loss, energy)
    return coefficient_G, loss.detach(), diagnostics


# ---- the gradient at ratio 1 -----------------------------------------------------------------------------


@pytest.mark.parametrize("anchor_in_pool", [False, True])
@given(group=groups())
def test_coefficients_in_closed_form(anchor_in_pool, group):
    energy, advantages, temperature = group
    log_policy = pool_log_probs if anchor_in_pool else branch_log_probs
    policy = log_policy(energy, temperature).exp()
    coefficient, loss, diagnostics = coefficients(
        energy, advantages, temperature, anchor_in_pool=anchor_in_pool
    )
    branches = len(energy)
    expected = (advantages - policy[:branches] * advantages.sum()) / (branches * temperature)
    torch.testing.assert_close(coefficient, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, -advantages.mean())
    assert diagnostics.ratio_deviation == 0.0 and diagnostics.ratio_max == 1.0

    total = policy[-1] * advantages.sum() / (branches * temperature) if anchor_in_pool else 0.0
    assert float(coefficient.sum()) == pytest.approx(float(total), abs=1e-10)


@given(group=groups(), seed=st.integers(0, 2**31))
def test_permuting_centred_advantages_shuffles_the_branches_weights(group, seed):
    """The null control of permuted advantages and that of shuffled weights are one."""
    energy, advantages, temperature = group
    order = torch.randperm(len(energy), generator=torch.Generator().manual_seed(seed))
    weights, _, _ = coefficients(energy, centred(advantages), temperature)
    shuffled, _, _ = coefficients(energy, centred(advantages)[order], temperature)
    torch.testing.assert_close(shuffled, weights[order], rtol=1e-10, atol=1e-12)


@given(group=groups(), shift=st.floats(-3, 3))
def test_a_constant_advantage_matters_only_where_the_policy_is_not_uniform(group, shift):
    energy, advantages, temperature = group
    branches = len(energy)
    change = (
        coefficients(energy, advantages + shift, temperature)[0]
        - coefficients(energy, advantages, temperature)[0]
    )
    policy = branch_log_probs(energy, temperature).exp()
    expected = shift * (1 - branches * policy) / (branches * temperature)
    torch.testing.assert_close(change, expected, rtol=1e-8, atol=1e-9)


def test_all_branches_below_the_anchor_push_away_from_all_of_them():
    energy = torch.tensor([0.3, 0.4, 0.5], dtype=torch.float64)
    advantages = torch.tensor([-1.0, -1.2, -0.9], dtype=torch.float64)
    in_pool = coefficients(energy, advantages, 0.3, anchor_in_pool=True)[0]
    assert bool((in_pool < 0).all()), "gradient descent raises every energy"
    assert float(coefficients(energy, advantages, 0.3)[0].max()) > 0


def test_descent_pulls_towards_better_branches():
    energy = torch.full((4,), 0.5, dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.5], dtype=torch.float64)
    coefficient = coefficients(energy, advantages, 0.1)[0]
    torch.testing.assert_close(coefficient, advantages / (4 * 0.1))


def test_some_branches_only_are_a_smaller_group():
    energy = torch.tensor([0.3, 0.9, 0.5, 0.4], dtype=torch.float64)
    advantages = torch.tensor([1.0, 0.1, -0.2, -0.8], dtype=torch.float64)
    kept = torch.tensor([0, 3])
    selected = coefficients(energy[kept], advantages[kept], 0.3)[0]
    policy = branch_log_probs(energy[kept], 0.3).exp()
    torch.testing.assert_close(selected, (advantages[kept] - policy * 0.2) / (2 * 0.3))


def test_backpropagating_branch_by_branch_is_full_autograd():
    generator = torch.Generator().manual_seed(0)
    target = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    advantages = torch.randn(5, generator=generator, dtype=torch.float64)
    parameter = torch.randn(7, generator=generator, dtype=torch.float64, requires_grad=True)
    old = (target - parameter.detach() + 0.1).square().mean(dim=1)
    arguments = {"temperature": calibrated_temperature(old), **PLAIN, "simplex_kl_weight": 10.0}

    loss, _ = objective((target - parameter).square().mean(dim=1), old, 1.1 * old, advantages, **arguments)
    (full,) = torch.autograd.grad(loss, parameter)

    energy = (target - parameter).square().mean(dim=1).detach().requires_grad_()
    loss, _ = objective(energy, old, 1.1 * old, advantages, **arguments)
    (coefficient_G,) = torch.autograd.grad(loss, energy)
    for g in range(5):
        (coefficient_G[g] * (target[g] - parameter).square().mean()).backward()
    torch.testing.assert_close(parameter.grad, full, rtol=1e-12, atol=1e-14)


# ---- clip, ratio, KL ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "has_gradient"),
    [
        (1.1, 1.0, -1.1, True),
        (1.5, 1.0, -1.2, False),
        (0.5, 1.0, -0.5, True),
        (1.5, -1.0, 1.5, True),
        (0.5, -1.0, 0.9, False),
        (0.95, -1.0, 0.95, True),
    ],
)
def test_the_clip_is_pessimistic_and_asymmetric(ratio, advantage, loss, has_gradient):
    log_prob = torch.tensor([math.log(ratio)], dtype=torch.float64, requires_grad=True)
    value = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), 0.1, 0.2)
    (gradient,) = torch.autograd.grad(value, log_prob)
    assert float(value.detach()) == pytest.approx(loss)
    assert (float(gradient) != 0) == has_gradient


def test_extreme_ratios_stay_finite():
    ratio = policy_ratio(torch.tensor([0.0, -800.0]), torch.tensor([-800.0, 0.0]))
    torch.testing.assert_close(ratio, torch.tensor([20.0, -20.0]).exp())


@given(group=groups())
def test_simplex_kl_is_zero_at_the_reference_and_positive_elsewhere(group):
    energy, other, temperature = group
    policy = branch_log_probs(energy, temperature)
    assert float(simplex_kl(policy, policy.clone())) == 0.0
    assert float(simplex_kl(policy, branch_log_probs(other, temperature))) >= -1e-12


def test_simplex_kl_in_closed_form():
    policy = torch.tensor([0.5, 0.5], dtype=torch.float64).log()
    reference = torch.tensor([0.25, 0.75], dtype=torch.float64).log()
    assert float(simplex_kl(policy, reference)) == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))


def test_simplex_kl_is_blind_to_shared_drift_and_velocity_kl_is_not():
    energy = torch.tensor([0.3, 0.4], dtype=torch.float64)
    drifted = branch_log_probs(energy + 1, 0.1)
    assert float(simplex_kl(drifted, branch_log_probs(energy, 0.1))) == pytest.approx(0.0, abs=1e-12)
    velocity = torch.zeros(2, 3, 4, 2, 2)
    assert float(velocity_kl(velocity + 0.5, velocity)) == 0.25
    assert float(velocity_kl(velocity, velocity)) == 0.0


def test_the_kl_weight_enters_the_loss():
    energy = torch.tensor([0.3, 0.5, 0.4], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.3, 0.4], dtype=torch.float64)
    _, loss, diagnostics = coefficients(
        energy, torch.zeros(3), 0.2, reference=reference, simplex_kl_weight=10.0
    )
    expected = simplex_kl(branch_log_probs(energy, 0.2), branch_log_probs(reference, 0.2))
    assert diagnostics.simplex_kl == pytest.approx(float(expected))
    assert float(loss) == pytest.approx(10 * float(expected)) and diagnostics.policy_loss == 0.0


def test_the_reference_and_the_old_policy_get_no_gradient():
    old = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)
    energy = torch.tensor([0.4, 0.3], dtype=torch.float64, requires_grad=True)
    options = {**PLAIN, "simplex_kl_weight": 1.0}
    loss, _ = objective(energy, old, old, torch.tensor([1.0, -1.0]), temperature=0.2, **options)
    loss.backward()
    assert old.grad is None and energy.grad is not None


# ---- diagnostics -------------------------------------------------------------------------------------------


def test_diagnostics_of_a_moved_policy():
    energy = torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
    old = torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.3], dtype=torch.float64)
    _, loss, diagnostics = coefficients(energy, advantages, 0.2, old=old, anchor_in_pool=True)
    policy, old_policy = pool_log_probs(energy, 0.2).exp(), pool_log_probs(old, 0.2).exp()
    ratio = (policy / old_policy)[:3]
    assert diagnostics.loss == float(loss)
    assert diagnostics.ratio_mean == pytest.approx(float(ratio.mean()))
    assert diagnostics.ratio_max == pytest.approx(math.exp(2))
    assert diagnostics.ratio_deviation == pytest.approx(math.exp(2) - 1)
    assert diagnostics.clip_fraction == pytest.approx(2 / 3)
    assert diagnostics.anchor_probability == pytest.approx(float(policy[3]))
    assert diagnostics.energy_mean == pytest.approx(0.3)
    assert diagnostics.energy_std == pytest.approx(float(energy.std(correction=0)))
    assert diagnostics.advantage_mean == pytest.approx(0.1)
    assert 0 < diagnostics.entropy < 1
