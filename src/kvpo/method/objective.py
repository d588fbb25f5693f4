"""The clipped objective on branch energies (METHOD section 6).

    L = -(1/G) sum_g min( rho_g A_g, clip(rho_g, 1 - c_low, 1 + c_high) A_g ) + lambda KL,   rho = pi / pi_old

A branch enters only through its energy. So the loss is differentiated on G numbers,

    (coefficient_G,) = torch.autograd.grad(loss, energy_G)

and each branch is replayed and backpropagated by itself with its coefficient: exact, with the activations
of one branch in memory. At ratio 1 and without KL, dL/dE_g = (A_g - pi_g sum A) / (G tau).
"""

import torch
from torch import Tensor

from kvpo.method import policy
from kvpo.method.diagnostics import ObjectiveDiagnostics

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus or minus this before the exponential, against overflow."""


def policy_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """rho = pi_theta / pi_old, from log-probabilities of any one shape."""
    return (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    log_probs_G: Tensor, old_log_probs_G: Tensor, advantages_G: Tensor, clip_low: float, clip_high: float
) -> Tensor:
    """-(1/G) sum_g min(rho_g A_g, clip(rho_g, 1 - clip_low, 1 + clip_high) A_g), a scalar to minimise."""
    ratio_G = policy_ratio(log_probs_G, old_log_probs_G)
    clipped_G = ratio_G.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio_G * advantages_G, clipped_G * advantages_G).mean()


def simplex_kl(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """KL(pi_theta || pi_ref) = sum pi_theta (log pi_theta - log pi_ref) blind to shared drift."""
    return (log_probs.exp() * (log_probs - reference_log_probs)).sum()


def velocity_kl(velocity: Tensor, reference_velocity: Tensor) -> Tensor:
    """mean || v_theta - v_ref ||^2 on anchor states: sees the drift that all branches share."""
    return (velocity - reference_velocity).square().mean()


def objective(
    energy_G: Tensor,
    old_energy_G: Tensor,
    reference_energy_G: Tensor,
    advantages_G: Tensor,
    *,
    temperature: float,
    clip_low: float,
    clip_high: float,
    simplex_kl_weight: float,
    anchor_in_pool: bool,
) -> tuple[Tensor, ObjectiveDiagnostics]:
    """Loss (scalar, differentiable in energy_G) and diagnostics of one group; every input tensor is [G].

    With `anchor_in_pool` the policy has G + 1 members; the anchor's advantage is 0, so 1/G stays 1/G. To
    train on some branches only, pass only theirs: the policy is then the softmax over the selected ones.
    """
    branches = len(energy_G)
    assert all(len(other) == branches for other in (old_energy_G, reference_energy_G, advantages_G))
    log_probs, old_log_probs, reference_log_probs = (
        policy.log_probs(energies, temperature, anchor_in_pool=anchor_in_pool)
        for energies in (energy_G, old_energy_G.detach(), reference_energy_G.detach())
    )

    policy_loss = clipped_surrogate(
        log_probs[:branches], old_log_probs[:branches], advantages_G, clip_low, clip_high
    )
    kl = simplex_kl(log_probs, reference_log_probs)
    loss = policy_loss + simplex_kl_weight * kl

    with torch.no_grad():
        ratio_G = policy_ratio(log_probs[:branches], old_log_probs[:branches])
        outside_G = (ratio_G < 1 - clip_low) | (ratio_G > 1 + clip_high)
        diagnostics = ObjectiveDiagnostics(
            loss=float(loss),
            policy_loss=float(policy_loss),
            simplex_kl=float(kl),
            energy_mean=float(energy_G.mean()),
            energy_std=float(energy_G.std(correction=0)),
            temperature=temperature,
            entropy=float(policy.normalised_entropy(log_probs)),
            anchor_probability=float(log_probs[-1].exp()) if anchor_in_pool else 0.0,
            ratio_mean=float(ratio_G.mean()),
            ratio_max=float(ratio_G.max()),
            ratio_deviation=float((ratio_G - 1).abs().max()),
            clip_fraction=float(outside_G.to(ratio_G.dtype).mean()),
            advantage_mean=float(advantages_G.mean()),
            advantage_std=float(advantages_G.std(correction=0)),
        )
    return loss, diagnostics
