"""Re-noised clean latents: the states of methods that learn from the forward process (NFT, RVM)."""

import torch
from torch import Tensor

from kvpo.method.evidence import Trajectories
from kvpo.method.flow import add_noise


def noised_again(
    trajectories: Trajectories, branches: list[int], steps: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """States (1 - sigma) x0 + sigma eps at the first solver levels, and the velocities v* = eps - x0.

    Both [G, P, S, F, C, H, W]. All branches share eps, so that they are compared at equal noise.
    """
    clean = trajectories.clean_MPFCHW[branches][:, :, None]
    shape = (1, clean.shape[1], steps, *clean.shape[3:])
    noise = torch.randn(shape, generator=generator, dtype=torch.float32).to(clean)
    states = add_noise(clean, noise, trajectories.levels(steps))
    return states, noise - clean
