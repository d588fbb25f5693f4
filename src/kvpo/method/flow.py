"""Rectified-flow conversions and deterministic solver steps (METHOD, notation and section 1).

    x = (1 - sigma) x0 + sigma eps,    v = eps - x0,    x0 = x - sigma v

A noise level `sigma` is a float, or a tensor over the leading axes of the latents: [R] for [R, F, C, H, W].
Nothing is computed in less than float32; results have the latents' type.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def few_step_sigmas(schedule: Sequence[float], shift: float) -> Tensor:
    """Noise levels of the few-step solver: sigma(u) = shift u / (1 + (shift - 1) u), float64 [S].

    `schedule` holds u, falling strictly from 1 (pure noise) to above 0; (1, .75, .5, .25) with shift 5 gives
    (1, .9375, .8333, .625). Raises ValueError for any other schedule, or a shift that is not positive.
    """
    u_S = torch.tensor(list(schedule), dtype=torch.float64)
    falling = len(u_S) > 0 and u_S[0] == 1 and u_S[-1] > 0 and bool((u_S.diff() < 0).all())
    if not falling:
        raise ValueError(f"schedule = {tuple(schedule)}: must fall strictly from 1.0 and end above 0")
    if not shift > 0:
        raise ValueError(
            f"shift = {shift}: must be positive; 1 leaves the schedule as it is, the public models use 5"
        )
    return shift * u_S / (1 + (shift - 1) * u_S)


def clean_of(velocity: Tensor, x: Tensor, sigma: float | Tensor) -> Tensor:
    """Clean latents that a velocity points to: x0 = x - sigma v; all [..., F, C, H, W]."""
    return (_wide(x) - _expand(sigma, x) * _wide(velocity)).to(x.dtype)


def velocity_of(clean: Tensor, x: Tensor, sigma: float | Tensor) -> Tensor:
    """Velocity that leads from x to the clean latents: v = (x - x0) / sigma, sigma > 0."""
    return ((_wide(x) - _wide(clean)) / _expand(sigma, x)).to(x.dtype)


def add_noise(clean: Tensor, noise: Tensor, sigma: float | Tensor) -> Tensor:
    """Latents at a noise level: x = (1 - sigma) x0 + sigma eps."""
    sigma = _expand(sigma, clean)
    return ((1 - sigma) * _wide(clean) + sigma * _wide(noise)).to(clean.dtype)


def euler_step(x: Tensor, velocity: Tensor, sigma: float | Tensor, sigma_next: float | Tensor) -> Tensor:
    """Step rule `ode`: x' = x + (sigma' - sigma) v; sigma' = 0 arrives at the clean latents."""
    return (_wide(x) + (_expand(sigma_next, x) - _expand(sigma, x)) * _wide(velocity)).to(x.dtype)


def renoise_step(clean: Tensor, noise: Tensor, sigma_next: float | Tensor) -> Tensor:
    """Step rule `renoise`: x' = (1 - sigma') x0 + sigma' eps, with eps from the noise tape.

    Self-Forcing, LongLive and MemFlow are distilled with this rule; sigma' = 0 returns the clean latents.
    """
    return add_noise(clean, noise, sigma_next)


def _wide(x: Tensor) -> Tensor:
    """The same numbers in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expand(sigma: float | Tensor, x: Tensor) -> float | Tensor:
    """Noise levels over the leading axes of x, shaped to broadcast against all of its axes."""
    if not isinstance(sigma, Tensor):
        return sigma
    dtype = torch.promote_types(x.dtype, torch.float32)
    return sigma.to(x.device, dtype).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
