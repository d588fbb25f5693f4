import math

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from kvpo.method.advantage import centred
from kvpo.method.evidence import drift_evidence, residual_table
from kvpo.method.gibbs import (
    Gibbs,
    branch_log_probs,
    calibrated_temperature,
    clipped_surrogate,
    normalised_entropy,
    policy_ratio,
    pool_log_probs,
    simplex_kl,
    temperature_for_anchor_share,
)

PLAIN = {"clip": (0.1, 0.2), "simplex_kl": 0.0, "anchor_share": 0.0}


@st.composite
def groups(draw):
    """Energies and advantages [G] of one group, and a temperature of the energies' size."""
    size = draw(st.integers(2, 8))
    values = st.lists(st.floats(0.1, 2.0), min_size=size, max_size=size)
    signed = st.lists(st.floats(-2.5, 2.5), min_size=size, max_size=size)
    energy = torch.tensor(draw(values), dtype=torch.float64)
    return energy, torch.tensor(draw(signed), dtype=torch.float64), draw(st.floats(0.2, 5.0))


def coefficients(energy, advantages, temperature, *, old=None, reference=None, **options):
    """dL/dE_g [G], the loss and the metrics."""
    energy = energy.clone().requires_grad_()
    old = energy.detach().clone() if old is None else old
    reference = old if reference is None else reference
    policy = Gibbs(temperature=temperature, **{**PLAIN, **options})
    loss, metrics = policy.objective(energy, old, reference, advantages)
    (coefficient_G,) = torch.autograd.grad(loss, energy)
    return coefficient_G, loss.detach(), metrics


# ---- probabilities and temperature ---------------------------------------------------------------------


energies = st.lists(st.floats(1e-3, 10.0), min_size=2, max_size=10).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)
ENERGY = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)


def test_gibbs_probabilities_in_closed_form():
    weights = torch.exp(-ENERGY / 0.1)
    torch.testing.assert_close(branch_log_probs(ENERGY, 0.1).exp(), weights / weights.sum())
    torch.testing.assert_close(
        pool_log_probs(ENERGY, 0.1).exp(), torch.cat([weights, torch.ones(1)]) / (1 + weights.sum())
    )


@given(energy=energies, shift=st.floats(-5, 5), scale=st.floats(0.1, 10))
def test_only_energy_differences_in_units_of_the_temperature_count(energy, shift, scale):
    policy = branch_log_probs(energy, 0.7)
    torch.testing.assert_close(branch_log_probs(energy + shift, 0.7), policy)
    torch.testing.assert_close(branch_log_probs(energy * scale, 0.7 * scale), policy)


@given(energy=energies)
@example(energy=torch.tensor([0.0014648437500000002, 0.00146484375], dtype=torch.float64))
def test_the_order_of_branches_does_not_matter_and_low_energy_is_likely(energy):
    policy = branch_log_probs(energy, 0.7)
    torch.testing.assert_close(branch_log_probs(energy.flip(0), 0.7), policy.flip(0))
    assert policy[energy.argmin()] == policy.max()


def test_the_calibrated_temperature_is_the_spread_of_the_energies():
    assert calibrated_temperature(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(1.0)
    assert calibrated_temperature(torch.tensor([2.0, 2.0, 2.0])) == pytest.approx(2e-3)
    assert calibrated_temperature(torch.zeros(3)) == 1e-12
    assert calibrated_temperature(torch.tensor([2.0])) == pytest.approx(2e-3)


@given(energy=energies, scale=st.floats(1e-3, 1e3))
def test_calibration_makes_the_policy_independent_of_the_energies_unit(energy, scale):
    policy = branch_log_probs(energy, calibrated_temperature(energy))
    rescaled = branch_log_probs(energy * scale, calibrated_temperature(energy * scale))
    torch.testing.assert_close(policy, rescaled, rtol=1e-5, atol=1e-5)


@given(energy=energies, share=st.floats(0.4, 0.999))
def test_the_temperature_gives_the_anchor_its_share(energy, share):
    temperature = temperature_for_anchor_share(energy, share)
    assert float(pool_log_probs(energy, temperature)[-1].exp()) == pytest.approx(share, abs=1e-9)


def test_the_anchor_share_of_equal_energies_in_closed_form():
    energy = torch.full((8,), 0.3, dtype=torch.float64)
    assert temperature_for_anchor_share(energy, 0.5) == pytest.approx(0.3 / math.log(8))


def test_the_anchor_share_where_the_spread_saturates():
    """With mean/std = 50, tau = std(E) gives the anchor everything; calibrating to a share does not."""
    energy = 50.0 + torch.randn(8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(pool_log_probs(energy, calibrated_temperature(energy))[-1].exp()) > 1 - 1e-12
    temperature = temperature_for_anchor_share(energy, 0.5)
    assert float(pool_log_probs(energy, temperature)[-1].exp()) == pytest.approx(0.5, abs=1e-9)


def test_the_groups_temperature_is_fixed_or_calibrated():
    def temperature(fixed, share=0.0):
        return Gibbs(**{**PLAIN, "temperature": fixed, "anchor_share": share}).temperature_of(ENERGY)

    assert temperature(0.7, 0.5) == 0.7
    assert temperature(None) == calibrated_temperature(ENERGY)
    assert temperature(None, 0.5) == temperature_for_anchor_share(ENERGY, 0.5)


def test_energies_of_zero_still_give_a_finite_temperature():
    for energy in (torch.zeros(4), torch.tensor([0.0, 1.0])):
        temperature = temperature_for_anchor_share(energy, 0.9)
        assert temperature > 0 and bool(pool_log_probs(energy, temperature).isfinite().all())


@pytest.mark.parametrize("share", [0.25, 0.1, 1.0, float("nan")])
def test_a_share_that_no_temperature_gives_is_refused(share):
    with pytest.raises(ValueError, match="anchor_share = .*between 0.2500"):
        temperature_for_anchor_share(ENERGY, share)


def test_entropy_is_one_when_uniform_and_zero_when_certain():
    assert float(normalised_entropy(branch_log_probs(torch.full((5,), 0.3), 1.0))) == pytest.approx(1.0)
    assert float(normalised_entropy(branch_log_probs(torch.tensor([0.0, 1e3, 1e3]), 1.0))) == pytest.approx(
        0.0
    )
    even_pair = branch_log_probs(torch.tensor([0.0, 0.0, 1e3, 1e3]), 1.0)
    assert float(normalised_entropy(even_pair)) == pytest.approx(0.5)


# ---- the gradient at ratio 1 -----------------------------------------------------------------------------


@pytest.mark.parametrize("anchor_share", [0.0, 0.5])
@given(group=groups())
def test_coefficients_in_closed_form(anchor_share, group):
    energy, advantages, temperature = group
    log_policy = pool_log_probs if anchor_share else branch_log_probs
    policy = log_policy(energy, temperature).exp()
    coefficient, loss, metrics = coefficients(energy, advantages, temperature, anchor_share=anchor_share)
    branches = len(energy)
    expected = (advantages - policy[:branches] * advantages.sum()) / (branches * temperature)
    torch.testing.assert_close(coefficient, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(loss, -advantages.mean())
    assert metrics["ratio_deviation"] == 0.0 and metrics["ratio_max"] == 1.0

    total = policy[-1] * advantages.sum() / (branches * temperature) if anchor_share else 0.0
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
    in_pool = coefficients(energy, advantages, 0.3, anchor_share=0.5)[0]
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
    policy = Gibbs(**{**PLAIN, "temperature": None, "simplex_kl": 10.0})

    loss, _ = policy.objective((target - parameter).square().mean(dim=1), old, 1.1 * old, advantages)
    (full,) = torch.autograd.grad(loss, parameter)

    energy = (target - parameter).square().mean(dim=1).detach().requires_grad_()
    loss, _ = policy.objective(energy, old, 1.1 * old, advantages)
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
    value = clipped_surrogate(log_prob, torch.zeros(1), torch.tensor([advantage]), (0.1, 0.2))
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
    velocity = torch.zeros(1, 1, 2, 3, 4, 2, 2)
    rows = drift_evidence(velocity, [0]).with_teacher("reference", velocity)
    drift = [
        residual_table(rows.weights_NPS, rows.targets_NPSFCHW, moved) for moved in (velocity + 0.5, velocity)
    ]
    assert [float(table.sum()) for table in drift] == [0.25, 0.0]


def test_the_kl_weight_enters_the_loss():
    energy = torch.tensor([0.3, 0.5, 0.4], dtype=torch.float64)
    reference = torch.tensor([0.5, 0.3, 0.4], dtype=torch.float64)
    _, loss, metrics = coefficients(energy, torch.zeros(3), 0.2, reference=reference, simplex_kl=10.0)
    expected = simplex_kl(branch_log_probs(energy, 0.2), branch_log_probs(reference, 0.2))
    assert metrics["simplex_kl"] == pytest.approx(float(expected))
    assert float(loss) == pytest.approx(10 * float(expected)) and metrics["policy_loss"] == 0.0


def test_the_reference_and_the_old_policy_get_no_gradient():
    old = torch.tensor([0.5, 0.3], dtype=torch.float64, requires_grad=True)
    energy = torch.tensor([0.4, 0.3], dtype=torch.float64, requires_grad=True)
    policy = Gibbs(**{**PLAIN, "temperature": 0.2, "simplex_kl": 1.0})
    loss, _ = policy.objective(energy, old, old, torch.tensor([1.0, -1.0]))
    loss.backward()
    assert old.grad is None and energy.grad is not None


# ---- metrics -----------------------------------------------------------------------------------------------


def test_metrics_of_a_moved_policy():
    energy = torch.tensor([0.1, 0.5, 0.3], dtype=torch.float64)
    old = torch.tensor([0.5, 0.1, 0.3], dtype=torch.float64)
    advantages = torch.tensor([1.0, -1.0, 0.3], dtype=torch.float64)
    _, loss, metrics = coefficients(energy, advantages, 0.2, old=old, anchor_share=0.5)
    policy, old_policy = pool_log_probs(energy, 0.2).exp(), pool_log_probs(old, 0.2).exp()
    ratio = (policy / old_policy)[:3]
    assert metrics["loss"] == float(loss)
    assert metrics["ratio_mean"] == pytest.approx(float(ratio.mean()))
    assert metrics["ratio_max"] == pytest.approx(math.exp(2))
    assert metrics["ratio_deviation"] == pytest.approx(math.exp(2) - 1)
    assert metrics["clip_fraction"] == pytest.approx(2 / 3)
    assert metrics["anchor_probability"] == pytest.approx(float(policy[3]))
    assert metrics["energy_mean"] == pytest.approx(0.3)
    assert metrics["energy_std"] == pytest.approx(float(energy.std(correction=0)))
    assert metrics["entropy"] == pytest.approx(float(-(policy * policy.log()).sum()) / math.log(4))
    assert metrics["temperature"] == 0.2
    _, _, without = coefficients(energy, advantages, 0.2, old=old)
    assert without["anchor_probability"] == 0.0
