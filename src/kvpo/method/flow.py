"""Rectified-flow conversions and solver steps, deterministic and stochastic.

    x = (1 - sigma) x0 + sigma eps,    v = eps - x0,    x0 = x - sigma v

Nothing is computed in less than float32; results have the latents' type.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

Sigma = float | Tensor
"""A noise level: one for everything, or one per element of the leading axes, [R] for [R, F, C, H, W]."""


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


def clean_of(velocity: Tensor, x: Tensor, sigma: Sigma) -> Tensor:
    """Clean latents that a velocity points to: x0 = x - sigma v; all [..., F, C, H, W]."""
    return (_wide(x) - _expand(sigma, x) * _wide(velocity)).to(x.dtype)


def velocity_of(clean: Tensor, x: Tensor, sigma: Sigma) -> Tensor:
    """Velocity that leads from x to the clean latents: v = (x - x0) / sigma, sigma > 0."""
    return ((_wide(x) - _wide(clean)) / _expand(sigma, x)).to(x.dtype)


def add_noise(clean: Tensor, noise: Tensor, sigma: Sigma) -> Tensor:
    """Latents at a noise level: x = (1 - sigma) x0 + sigma eps."""
    sigma = _expand(sigma, clean)
    return ((1 - sigma) * _wide(clean) + sigma * _wide(noise)).to(clean.dtype)


Rule = Callable[[Tensor, Tensor, Sigma, Sigma, Tensor | None], Tensor]
"""(x, v, sigma, sigma', noise) -> x': from a state and its velocity to the state at the next noise level."""


@dataclass(frozen=True)
class Step:
    """A solver step."""

    rule: Rule
    draws: bool
    """The rule reads noise from the tape."""


def euler_step(
    x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma, noise: Tensor | None = None
) -> Tensor:
    """Rule ``ode``: x' = x + (sigma' - sigma) v, all [..., F, C, H, W]; no noise."""
    return (_wide(x) + (_expand(sigma_next, x) - _expand(sigma, x)) * _wide(velocity)).to(x.dtype)


def renoise_step(
    x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma, noise: Tensor | None
) -> Tensor:
    """Rule ``renoise``: x' = (1 - sigma') x0 + sigma' eps with x0 = x - sigma v, all [..., F, C, H, W].

    Self-Forcing, LongLive and MemFlow are distilled with this rule.
    """
    assert noise is not None
    return add_noise(clean_of(velocity, x, sigma), noise, sigma_next)


def renoise_coefficients(sigma: float, sigma_next: float, _: float = 1.0) -> tuple[float, float, float]:
    """(a, c, s) of the re-noising step in the form x' = a x + c v + s eps; its noise strength is fixed."""
    return 1 - sigma_next, -(1 - sigma_next) * sigma, sigma_next


def sde_coefficients(sigma: float, sigma_next: float, kappa: float) -> tuple[float, float, float]:
    """(a, c, s) of the stochastic step x' = a x + c v + s eps that keeps the flow's marginals.

    ``kvpo.method.flow_grpo`` has the formulas.
    """
    level = sigma if sigma < 1 else sigma_next
    r_squared, dt = kappa**2 * level / (1 - level), sigma_next - sigma
    a = 1 + r_squared / (2 * sigma) * dt
    c = (1 + r_squared * (1 - sigma) / (2 * sigma)) * dt
    return a, c, math.sqrt(-r_squared * dt)


@cache
def sde_step(kappa: float, lowest: float) -> Step:
    """A stochastic step at levels down to ``lowest``; an Euler step below that and for the step to 0.

    With kappa = 0, every step is an Euler step. Noise levels are floats.
    """

    def rule(x: Tensor, velocity: Tensor, sigma: Sigma, sigma_next: Sigma, noise: Tensor | None) -> Tensor:
        assert noise is not None and isinstance(sigma, float) and isinstance(sigma_next, float)
        if sigma < lowest or sigma_next == 0:
            return euler_step(x, velocity, sigma, sigma_next)
        a, c, s = sde_coefficients(sigma, sigma_next, kappa)
        return (a * _wide(x) + c * _wide(velocity) + s * _wide(noise)).to(x.dtype)

    return Step(rule, draws=True)


STEPS = {"ode": Step(euler_step, draws=False), "renoise": Step(renoise_step, draws=True)}
"""Step rules that generators are deployed with, by name."""


def _wide(x: Tensor) -> Tensor:
    """The same numbers in float32 or wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expand(sigma: Sigma, x: Tensor) -> Sigma:
    """Noise levels over the leading axes of x, shaped to broadcast against all of its axes."""
    if not isinstance(sigma, Tensor):
        return sigma
    dtype = torch.promote_types(x.dtype, torch.float32)
    return sigma.to(x.device, dtype).reshape(sigma.shape + (1,) * (x.ndim - sigma.ndim))
