import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.method.policy import (
    branch_log_probs,
    calibrated_temperature,
    log_probs,
    normalised_entropy,
    pool_log_probs,
    temperature_for_anchor_share,
)

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
def test_the_order_of_branches_does_not_matter_and_low_energy_is_likely(energy):
    policy = branch_log_probs(energy, 0.7)
    torch.testing.assert_close(branch_log_probs(energy.flip(0), 0.7), policy.flip(0))
    assert policy.argmax() == energy.argmin()


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


def test_the_pool_of_the_policy_may_hold_the_anchor():
    energy = torch.tensor([0.1, 0.3], dtype=torch.float64)
    weights = torch.exp(-torch.tensor([0.1, 0.3, 0.0], dtype=torch.float64) / 0.2)
    alone = log_probs(energy, 0.2, anchor_in_pool=False).exp()
    torch.testing.assert_close(alone, weights[:2] / weights[:2].sum())
    torch.testing.assert_close(log_probs(energy, 0.2, anchor_in_pool=True).exp(), weights / weights.sum())
