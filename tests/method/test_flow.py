import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.method.flow import (
    STEPS,
    add_noise,
    clean_of,
    euler_step,
    few_step_sigmas,
    renoise_coefficients,
    renoise_step,
    sde_coefficients,
    sde_step,
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
    x, velocity = add_noise(clean, latents(2), 0.5), latents(2) - clean
    reached = clean_of(velocity, x, 0.5)
    assert torch.equal(renoise_step(x, velocity, 0.5, 0.0, noise), reached)
    assert torch.equal(renoise_step(clean, torch.zeros_like(clean), 0.5, 0.0, noise), clean)
    assert torch.equal(renoise_step(x, velocity, 0.5, 1.0, noise), noise)
    torch.testing.assert_close(renoise_step(x, velocity, 0.5, 0.75, noise), add_noise(clean, noise, 0.75))


# ---- stochastic steps ------------------------------------------------------------------------------------


def moments_after(step, sigma, sigma_next, mean, std):
    """(mean, variance) a step after the marginal of x0 ~ N(mean, std^2), and those of the next marginal.

    The exact velocity is linear in x, so every step is a linear map of (x, eps) that three calls determine.
    """
    centre, variance = (1 - sigma) * mean, (1 - sigma) ** 2 * std**2 + sigma**2

    def after(x, eps):
        x, eps = torch.tensor(x, dtype=torch.float64), torch.tensor(eps, dtype=torch.float64)
        velocity = -mean + (sigma - (1 - sigma) * std**2) / variance * (x - centre)
        return float(step.rule(x, velocity, sigma, sigma_next, eps))

    reached = after(centre, 0.0)
    slope, noise = after(centre + 1.0, 0.0) - reached, after(centre, 1.0) - reached
    found = (reached, slope**2 * variance + noise**2)
    return found, ((1 - sigma_next) * mean, (1 - sigma_next) ** 2 * std**2 + sigma_next**2)


@pytest.mark.parametrize("kappa", [0.0, 0.3, 0.7, 1.5])
@pytest.mark.parametrize("sigma", [0.9, 0.5, 0.2])
def test_a_stochastic_step_keeps_the_flows_marginals_to_second_order(kappa, sigma):
    errors = []
    for dt in (0.02, 0.01, 0.005):
        step = sde_step(kappa, lowest=0.0)
        found, exact = moments_after(step, sigma, sigma - dt, mean=1.3, std=0.4)
        assert found[0] == pytest.approx(exact[0], abs=1e-12), "a straight mean is met at any step size"
        errors.append(abs(found[1] - exact[1]))
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine == pytest.approx(4.0, rel=0.2), "half the step, a quarter of the error"


@given(sigma=st.floats(0.1, 1.0), share=st.floats(0.1, 0.9))
def test_a_stochastic_step_without_strength_is_the_euler_step(sigma, share):
    x, velocity, noise = latents(0), latents(1), latents(2)
    step = sde_step(0.0, lowest=0.0)
    found = step.rule(x, velocity, sigma, share * sigma, noise)
    assert torch.equal(found, euler_step(x, velocity, sigma, share * sigma))
    assert sde_coefficients(sigma, share * sigma, 0.0) == (1.0, share * sigma - sigma, 0.0)


def test_levels_below_the_lowest_and_the_last_step_draw_no_noise():
    x, velocity, noise = latents(0), latents(1), latents(2)
    levels = [*few_step_sigmas(SCHEDULE, 5.0).tolist(), 0.0]
    drawn = []
    for lowest in (0.0, levels[1], 1.0, 2.0):
        step = sde_step(0.7, lowest)
        pairs = list(zip(levels, levels[1:], strict=False))
        drawn.append(
            [
                not torch.equal(step.rule(x, velocity, *pair, noise), euler_step(x, velocity, *pair))
                for pair in pairs
            ]
        )
    assert drawn == [
        [True, True, True, False],
        [True, True, False, False],
        [True, False, False, False],
        [False, False, False, False],
    ]


def test_the_first_stochastic_step_takes_its_strength_from_the_next_level():
    a, c, s = sde_coefficients(1.0, 0.9375, 0.7)
    r_squared = 0.49 * 0.9375 / 0.0625
    assert a == pytest.approx(1 - 0.0625 * r_squared / 2)
    assert c == pytest.approx(-0.0625) and s == pytest.approx((0.0625 * r_squared) ** 0.5)


@pytest.mark.parametrize(("sigma", "sigma_next"), [(1.0, 0.9375), (0.9375, 5 / 6), (5 / 6, 0.625)])
def test_steps_in_the_form_of_a_gaussian(sigma, sigma_next):
    x, velocity, noise = latents(0), latents(1), latents(2)
    for step, (a, c, s) in (
        (STEPS["renoise"], renoise_coefficients(sigma, sigma_next)),
        (sde_step(0.7, 0.0), sde_coefficients(sigma, sigma_next, 0.7)),
    ):
        found = step.rule(x, velocity, sigma, sigma_next, noise)
        torch.testing.assert_close(found, a * x + c * velocity + s * noise, rtol=1e-12, atol=1e-12)


def test_steps_know_if_they_read_noise():
    assert [STEPS["ode"].draws, STEPS["renoise"].draws, sde_step(0.7, 0.0).draws] == [False, True, True]
    x = latents(0)
    assert torch.equal(STEPS["ode"].rule(x, x, 0.5, 0.25, None), euler_step(x, x, 0.5, 0.25, latents(1)))


@pytest.mark.parametrize("step", [STEPS["renoise"], sde_step(0.7, 0.0)])
def test_bfloat16_steps_keep_the_latents_type(step):
    x = latents(0).bfloat16()
    assert step.rule(x, x, 0.5, 0.25, x).dtype == torch.bfloat16
