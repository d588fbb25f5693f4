import torch

from kvpo.method.energy import (
    anchor_state_target,
    clean_space_weights,
    trajectory_velocity_energy,
    velocity_residual,
)
from kvpo.method.flow import add_noise, clean_of

SIGMAS = torch.tensor([1.0, 0.9375], dtype=torch.float64)


def velocities(seed: int) -> torch.Tensor:
    """[G=3, P=2, S=2, F=3, C=4, H=2, W=2]"""
    return torch.randn(
        3, 2, 2, 3, 4, 2, 2, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )


def test_the_residual_of_a_constant_difference_is_its_square():
    velocity = velocities(0)
    residual = velocity_residual(velocity, velocity + 0.5)
    assert residual.shape == (3, 2, 2)
    torch.testing.assert_close(residual, torch.full_like(residual, 0.25))


def test_energy_is_the_mean_over_elements_and_the_sum_over_blocks_and_steps():
    branch, policy = velocities(0), velocities(1)
    weights = torch.tensor([1.0, 0.25], dtype=torch.float64)
    expected = [
        sum(
            weights[s] * ((branch[g, b, s] - policy[g, b, s]) ** 2).mean() for b in range(2) for s in range(2)
        )
        for g in range(3)
    ]
    torch.testing.assert_close(trajectory_velocity_energy(branch, policy, weights), torch.stack(expected))


def test_energy_accumulates_over_micro_batches_of_rows():
    branch, policy = velocities(0), velocities(1)
    weights = torch.tensor([1.0, 0.25], dtype=torch.float64)
    energy = torch.zeros(3, dtype=torch.float64)
    for b in range(2):
        for s in range(2):
            energy += weights[s] * velocity_residual(branch[:, b, s], policy[:, b, s])
    torch.testing.assert_close(energy, trajectory_velocity_energy(branch, policy, weights))


def test_a_replay_that_repeats_the_branch_has_energy_exactly_zero():
    branch = velocities(0).float()
    assert torch.equal(trajectory_velocity_energy(branch, branch.clone(), torch.ones(2)), torch.zeros(3))


def test_squared_noise_levels_give_the_clean_space_energy():
    state, branch, policy = velocities(0), velocities(1), velocities(2)
    difference = clean_of(branch, state, SIGMAS.expand(3, 2, 2)) - clean_of(
        policy, state, SIGMAS.expand(3, 2, 2)
    )
    torch.testing.assert_close(
        trajectory_velocity_energy(branch, policy, clean_space_weights(SIGMAS)),
        difference.square().mean(dim=(3, 4, 5, 6)).sum(dim=(1, 2)),
    )


def test_half_precision_velocities_are_compared_in_float32():
    branch, policy = velocities(0).bfloat16(), velocities(1).bfloat16()
    residual = velocity_residual(branch, policy)
    assert residual.dtype == torch.float32
    torch.testing.assert_close(residual, velocity_residual(branch.double(), policy.double()).float())


def test_the_gradient_pulls_the_policy_towards_the_branch():
    branch, policy = velocities(0), velocities(1).requires_grad_()
    trajectory_velocity_energy(branch, policy, torch.ones(2)).sum().backward()
    elements = 3 * 4 * 2 * 2
    torch.testing.assert_close(policy.grad, 2 * (policy.detach() - branch) / elements)


def test_the_anchor_state_target_leads_to_the_branch():
    clean, noise = velocities(0)[:, 0, 0], velocities(1)[:, 0, 0]
    other_clean = velocities(2)[:, 0, 0]
    anchor_state = add_noise(clean, noise, 0.9375)
    target = anchor_state_target(other_clean, anchor_state, 0.9375)
    torch.testing.assert_close(clean_of(target, anchor_state, 0.9375), other_clean)
    torch.testing.assert_close(anchor_state_target(clean, anchor_state, 0.9375), noise - clean)
