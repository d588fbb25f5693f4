"""The surrogate policy: a Gibbs distribution over the branches of a group (METHOD section 4).

    pi_theta(g) = softmax_g( -E_theta(g) / tau )

The temperature is a constant of the group: it is set from the stored energies and never differentiated.
"""

import math

import torch
from torch import Tensor


def branch_log_probs(energy_G: Tensor, temperature: float) -> Tensor:
    """log pi_theta [G] over the branches."""
    return torch.log_softmax(-energy_G / temperature, dim=0)


def pool_log_probs(energy_G: Tensor, temperature: float) -> Tensor:
    """log pi_theta [G + 1] over the branches and, as the last member, the anchor with energy 0."""
    return branch_log_probs(torch.cat([energy_G, energy_G.new_zeros(1)]), temperature)


def log_probs(energy_G: Tensor, temperature: float, *, anchor_in_pool: bool) -> Tensor:
    """log pi_theta over the policy's pool: [G] branches, or [G + 1] with the anchor last."""
    return (pool_log_probs if anchor_in_pool else branch_log_probs)(energy_G, temperature)


def calibrated_temperature(old_energy_G: Tensor) -> float:
    """tau = max(std(E_old), mean(E_old) / 1000, 1e-12), the standard deviation with ddof 1.

    Energies are means over elements, so with tau of order one the policy is uniform to three digits, and
    neither the clip nor the KL binds. In units of the energies' own spread they do.
    """
    spread = float(old_energy_G.std(correction=1)) if len(old_energy_G) > 1 else 0.0
    return max(spread, 1e-3 * float(old_energy_G.mean()), 1e-12)


def temperature_for_anchor_share(old_energy_G: Tensor, share: float) -> float:
    """Temperature at which the anchor, in the pool with energy 0, has probability `share`.

    pi_anchor = 1 / (1 + sum_g exp(-E_g / tau)) falls from 1 towards 1 / (G + 1) as tau rises. Were every
    energy E, tau would be E / log(G share / (1 - share)): the smallest and the largest energy bracket the
    answer, and bisection in log tau finds it. Where energies of exactly 0 put the share out of reach, tau
    ends at its floor. Raises ValueError unless 1 / (G + 1) < share < 1.
    """
    energies = old_energy_G.detach().to("cpu", torch.float64)
    uniform = 1 / (len(energies) + 1)
    if not uniform < share < 1:
        raise ValueError(f"anchor_share = {share}: must lie between {uniform:.4f} (1 / (branches + 1)) and 1")
    log_odds = math.log(len(energies) * share / (1 - share))
    low = math.log(max(float(energies.min()) / log_odds, 1e-12))
    high = math.log(max(float(energies.max()) / log_odds, 1e-12))
    for _ in range(100):
        middle = (low + high) / 2
        if float(pool_log_probs(energies, math.exp(middle))[-1]) > math.log(share):
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def normalised_entropy(log_probs: Tensor) -> Tensor:
    """-sum pi log pi / log n: 1 for the uniform policy over n members, 0 when one member has everything."""
    return -(log_probs.exp() * log_probs).sum() / math.log(len(log_probs))
