"""Trajectory Velocity Energy: how far a branch's motion is from what the policy would do (METHOD section 3).

    E_theta(g) = sum_b sum_s w_s mean || u_{g,b,s} - v_theta(x_{g,b,s}) ||^2

u is the branch's own velocity, recorded under its routed history; v_theta is the policy's velocity at the
same state x under the deployment context. Mean over a block's elements, sum over blocks b and solver steps s.
"""

import torch
from torch import Tensor

from kvpo.method.flow import velocity_of


def velocity_residual(branch_velocity: Tensor, policy_velocity: Tensor) -> Tensor:
    """mean || u - v ||^2 over the elements of a block: [..., F, C, H, W] twice (broadcasting) -> [...].

    Computed in float32 or wider. The energy is a weighted sum of these, so micro-batches can be accumulated.
    """
    dtype = torch.promote_types(
        torch.promote_types(branch_velocity.dtype, policy_velocity.dtype), torch.float32
    )
    return (branch_velocity.to(dtype) - policy_velocity.to(dtype)).square().mean(dim=(-4, -3, -2, -1))


def trajectory_velocity_energy(branch_velocity: Tensor, policy_velocity: Tensor, weights_S: Tensor) -> Tensor:
    """E_theta [G] from velocities [G, P, S, F, C, H, W] and step weights w_s [S].

    Weights of one are velocity space; `clean_space_weights` gives the clean-latent form of the public code.
    """
    residual_GPS = velocity_residual(branch_velocity, policy_velocity)
    return (residual_GPS * weights_S.to(residual_GPS)).sum(dim=(1, 2))


def clean_space_weights(sigmas_S: Tensor) -> Tensor:
    """w_s = sigma_s^2 [S]: as x0 = x - sigma v, || x0_g - x0_theta ||^2 = sigma^2 || u - v_theta ||^2."""
    return sigmas_S.square()


def anchor_state_target(branch_clean: Tensor, anchor_state: Tensor, sigma: float | Tensor) -> Tensor:
    """Velocity at the anchor's state that leads to the branch's clean latents: (x_anchor - x0_g) / sigma.

    In place of u it gives the anchor-state energy, an extension beyond the paper: one replayed trajectory per
    group serves all of its branches. A velocity of the anchor at theta_old is not its target, so this energy
    has no zero there.
    """
    return velocity_of(branch_clean, anchor_state, sigma)
