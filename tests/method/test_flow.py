import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.method.flow import (
    add_noise,
    clean_of,
    euler_step,
    few_step_sigmas,
    renoise_step,
    velocity_of,
)

SCHEDULE = (1.0, 0.75, 0.5, 0.25)
noise_levels = st.floats(0.01, 1.0)


def latents(seed: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_public_schedule_in_closed_form():
    expected = torch.tensor([1, 15 / 16, 5 / 6, 5 / 8], dtype=torch.float64)
    torch.testing.assert_close(few_step_sigmas(SCHEDULE, 5.0), expected, rtol=0, atol=1e-15)
    assert few_step_sigmas(SCHEDULE, 1.0).tolist() == list(SCHEDULE)


def test_golden_schedule(golden_file):
    from safetensors.torch import load_file

    timesteps = load_file(golden_file("units.safetensors"))["warped"].double()
    torch.testing.assert_close(1000 * few_step_sigmas(SCHEDULE, 5.0), timesteps, rtol=1e-6, atol=0)


@pytest.mark.parametrize("schedule", [(), (0.75, 0.5), (1.0, 0.5, 0.5), (1.0, 0.0), (1.0, 0.5, 0.75)])
def test_a_schedule_that_does_not_fall_from_one_is_refused(schedule):
    with pytest.raises(ValueError, match="schedule = .*fall strictly from 1"):
        few_step_sigmas(schedule, 5.0)


@pytest.mark.parametrize("shift", [0.0, -1.0, float("nan")])
def test_a_shift_that_is_not_positive_is_refused(shift):
    with pytest.raises(ValueError, match="shift = "):
        few_step_sigmas(SCHEDULE, shift)


@given(sigma=noise_levels)
def test_conversions_agree_with_the_definition_of_velocity(sigma):
    clean, noise = latents(0), latents(1)
    x = add_noise(clean, noise, sigma)
    torch.testing.assert_close(clean_of(noise - clean, x, sigma), clean)
    torch.testing.assert_close(velocity_of(clean, x, sigma), noise - clean, rtol=1e-9, atol=1e-9)


@given(sigma=noise_levels)
def test_clean_and_velocity_are_inverses(sigma):
    x, velocity = latents(0), latents(1)
    torch.testing.assert_close(
        velocity_of(clean_of(velocity, x, sigma), x, sigma), velocity, rtol=1e-9, atol=1e-9
    )


def test_one_noise_level_per_row():
    clean, noise = latents(0), latents(1)
    sigmas_R = torch.tensor([0.3, 0.9], dtype=torch.float64)
    rows = [add_noise(clean[row], noise[row], float(sigmas_R[row])) for row in range(2)]
    assert torch.equal(add_noise(clean, noise, sigmas_R), torch.stack(rows))
    assert torch.equal(add_noise(clean, noise, sigmas_R[0]), add_noise(clean, noise, 0.3))


def test_noise_levels_over_several_leading_axes():
    velocity, x = latents(0, 6).unflatten(0, (2, 3)), latents(1, 6).unflatten(0, (2, 3))
    sigmas = torch.rand(2, 3, dtype=torch.float64)
    expected = clean_of(velocity.flatten(0, 1), x.flatten(0, 1), sigmas.flatten())
    assert torch.equal(clean_of(velocity, x, sigmas).flatten(0, 1), expected)


def test_float32_latents_stay_float32_under_float64_noise_levels():
    x = latents(0).float()
    sigmas_R = torch.full((2,), 0.5, dtype=torch.float64)
    assert clean_of(x, x, sigmas_R).dtype == torch.float32
    assert euler_step(x, x, sigmas_R, 0.0).dtype == torch.float32


@pytest.mark.parametrize("sigma", [0.9375, torch.tensor([0.9375, 0.625])])
def test_bfloat16_latents_are_rounded_once(sigma):
    x, velocity = latents(0).bfloat16(), latents(1).bfloat16()
    for function in (clean_of, velocity_of, add_noise):
        expected = function(x.double(), velocity.double(), sigma).bfloat16()
        assert torch.equal(function(x, velocity, sigma), expected)
    expected = euler_step(x.double(), velocity.double(), sigma, 0.5).bfloat16()
    assert torch.equal(euler_step(x, velocity, sigma, 0.5), expected)


def test_euler_is_exact_on_a_straight_path():
    clean, noise = latents(0), latents(1)
    sigmas = [*few_step_sigmas(SCHEDULE, 5.0).tolist(), 0.0]
    x = noise
    for sigma, sigma_next in zip(sigmas, sigmas[1:], strict=False):
        x = euler_step(x, noise - clean, sigma, sigma_next)
        torch.testing.assert_close(x, add_noise(clean, noise, sigma_next))


def test_renoising_ends_at_the_clean_latents_and_starts_from_the_noise():
    clean, noise = latents(0), latents(1)
    assert torch.equal(renoise_step(clean, noise, 0.0), clean)
    assert torch.equal(renoise_step(clean, noise, 1.0), noise)
