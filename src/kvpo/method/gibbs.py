"""The Gibbs policy over branches and its clipped objective, shared by KVPO and latent distance.

    pi_theta(g) = softmax_g( -E_theta(g) / tau ),    rho = pi_theta / pi_old
    L = -(1/G) sum_g min( rho_g A_g, clip(rho_g, 1 - c_low, 1 + c_high) A_g ) + lambda KL(pi_theta || pi_ref)

The temperature is a constant of the group: it is set from the old energies and never differentiated. At
ratio 1 and without KL, dL/dE_g = (A_g - pi_g sum A) / (G tau).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.method.evidence import Credit, Evidence, Method, Metric, Metrics, Tables, Trajectories
from kvpo.method.settings import MethodSettings, Own

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to plus or minus this before the exponential, to avoid overflow."""

RATIO_METRICS = {
    "loss": Metric("The method's loss, averaged over the groups that were trained on."),
    "ratio_mean": Metric(
        "Mean of the new over the old probability; exactly 1 in the first step after a rollout, hence always "
        "where inner_epochs and rollouts_per_refresh are 1. velocity_kl shows whether the policy has moved."
    ),
    "ratio_max": Metric("Largest ratio of new to old probability in the update.", largest=True),
    "ratio_deviation": Metric(
        "Largest distance of a ratio from 1; exactly 0 in the first step after a rollout, when the policy "
        "still is the one that generated it. The gradient is not 0 there.",
        largest=True,
    ),
    "clip_fraction": Metric("Share of ratios outside the clip range, which get no gradient outwards."),
}

METRICS = RATIO_METRICS | {
    "policy_loss": Metric("The clipped surrogate alone, without the KL."),
    "simplex_kl": Metric("KL of the branch probabilities to those of the starting policy."),
    "energy_mean": Metric("Mean energy of the branches: how far their motion is from the policy's."),
    "energy_std": Metric("Spread of the energies within a group (ddof 0)."),
    "temperature": Metric("Temperature of the Gibbs policy."),
    "entropy": Metric("Entropy of the branch probabilities over its maximum; 1 is uniform."),
    "anchor_probability": Metric("Probability of the anchor; 0 when it is not in the pool."),
}


def branch_log_probs(energy_G: Tensor, temperature: float) -> Tensor:
    """log pi_theta [G] over the branches."""
    return torch.log_softmax(-energy_G / temperature, dim=0)


def pool_log_probs(energy_G: Tensor, temperature: float) -> Tensor:
    """log pi_theta [G + 1] over the branches and, as the last member, the anchor with energy 0."""
    return branch_log_probs(torch.cat([energy_G, energy_G.new_zeros(1)]), temperature)


def calibrated_temperature(old_energy_G: Tensor) -> float:
    """tau = max(std(E_old), mean(E_old) / 1000, 1e-12), the standard deviation with ddof 1.

    With tau of order one the policy is uniform to three digits, and neither the clip nor the KL binds; in
    units of the energies' own spread they do.
    """
    spread = float(old_energy_G.std(correction=1)) if len(old_energy_G) > 1 else 0.0
    return max(spread, 1e-3 * float(old_energy_G.mean()), 1e-12)


def temperature_for_anchor_share(old_energy_G: Tensor, share: float) -> float:
    """Temperature at which the anchor, in the pool with energy 0, has probability ``share``.

    If every energy were E, tau would be E / log(G share / (1 - share)). The smallest and the largest energy
    therefore bracket tau, and bisection in log tau finds it. If energies of exactly 0 put the share out of
    reach, tau ends at its floor. Raises ValueError unless 1 / (G + 1) < share < 1.
    """
    energies = old_energy_G.to("cpu", torch.float64)
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


def policy_ratio(log_probs: Tensor, old_log_probs: Tensor) -> Tensor:
    """rho = pi_theta / pi_old, from log-probabilities of any shape."""
    return (log_probs - old_log_probs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def clipped_surrogate(
    log_probs_G: Tensor, old_log_probs_G: Tensor, advantages_G: Tensor, clip: tuple[float, float]
) -> Tensor:
    """-(1/G) sum_g min(rho_g A_g, clip(rho_g, 1 - low, 1 + high) A_g), a scalar to minimise.

    ``clip`` is (low, high). Advantages broadcast over further axes, and the mean is over all of them.
    """
    ratio = policy_ratio(log_probs_G, old_log_probs_G)
    low, high = clip
    clipped = ratio.clamp(1 - low, 1 + high)
    return -torch.minimum(ratio * advantages_G, clipped * advantages_G).mean()


def simplex_kl(log_probs: Tensor, reference_log_probs: Tensor) -> Tensor:
    """KL(pi_theta || pi_ref) = sum pi_theta (log pi_theta - log pi_ref), a scalar; blind to shared drift."""
    return (log_probs.exp() * (log_probs - reference_log_probs)).sum()


def ratio_metrics(log_probs: Tensor, old_log_probs: Tensor, clip: tuple[float, float]) -> Metrics:
    """Mean and largest ratio, its largest distance from 1, and the share outside the clip range."""
    ratio = policy_ratio(log_probs.detach(), old_log_probs)
    low, high = clip
    outside = (ratio < 1 - low) | (ratio > 1 + high)
    return {
        "ratio_mean": float(ratio.mean()),
        "ratio_max": float(ratio.max()),
        "ratio_deviation": float((ratio - 1).abs().max()),
        "clip_fraction": float(outside.to(ratio.dtype).mean()),
    }


@dataclass(frozen=True)
class Gibbs:
    """A Gibbs policy over branches, and how far one update may move it."""

    temperature: float | None
    """None: calibrated to the old energies of each group."""
    clip: tuple[float, float]
    """(low, high): the ratio is clipped to [1 - low, 1 + high]."""
    simplex_kl: float = 0.0
    """Weight of the KL to the starting policy."""
    anchor_share: float = 0.0
    """Probability of the anchor, from which the temperature follows; 0: the anchor is not in the pool."""

    def temperature_of(self, old_energy_G: Tensor) -> float:
        """Temperature of the group."""
        if self.temperature is not None:
            return self.temperature
        if self.anchor_share:
            return temperature_for_anchor_share(old_energy_G, self.anchor_share)
        return calibrated_temperature(old_energy_G)

    def log_probs(self, energy_G: Tensor, temperature: float) -> Tensor:
        """log pi_theta over the policy's pool: [G] branches, or [G + 1] with the anchor last."""
        return (pool_log_probs if self.anchor_share > 0 else branch_log_probs)(energy_G, temperature)

    def probabilities(self, old_energy_G: Tensor) -> Tensor:
        """pi_old over the policy's pool, [G] or [G + 1]."""
        return self.log_probs(old_energy_G, self.temperature_of(old_energy_G)).exp()

    def objective(
        self, energy_G: Tensor, old_energy_G: Tensor, reference_energy_G: Tensor, advantages_G: Tensor
    ) -> tuple[Tensor, Metrics]:
        """Loss (scalar, differentiable in energy_G) and metrics of one group.

        With the anchor in the pool the policy has G + 1 members; the anchor's advantage is 0, so 1/G stays
        1/G. To train on some branches only, pass only theirs: the policy is the softmax over those.
        """
        temperature, branches = self.temperature_of(old_energy_G), len(energy_G)
        assert all(len(other) == branches for other in (old_energy_G, reference_energy_G, advantages_G))
        log_pi, old_log_pi, reference_log_pi = (
            self.log_probs(energies, temperature)
            for energies in (energy_G, old_energy_G.detach(), reference_energy_G.detach())
        )
        ratio = log_pi[:branches], old_log_pi[:branches]
        policy_loss = clipped_surrogate(*ratio, advantages_G, self.clip)
        kl = simplex_kl(log_pi, reference_log_pi)
        loss = policy_loss + self.simplex_kl * kl
        energy_G, log_pi = energy_G.detach(), log_pi.detach()
        metrics = {
            "loss": float(loss.detach()),
            "policy_loss": float(policy_loss.detach()),
            "simplex_kl": float(kl.detach()),
            "energy_mean": float(energy_G.mean()),
            "energy_std": float(energy_G.std(correction=0)),
            "temperature": temperature,
            "entropy": float(normalised_entropy(log_pi)),
            "anchor_probability": float(log_pi[-1].exp()) if self.anchor_share > 0 else 0.0,
        }
        return loss, metrics | ratio_metrics(*ratio, self.clip)


def gibbs_method(
    evidence: Callable[[Trajectories, Credit, MethodSettings[Own], torch.Generator], Evidence],
    gibbs_of: Callable[[MethodSettings[Own]], Gibbs],
    residual: str,
) -> Method[Own]:
    """A method whose policy is a softmax over branches; ``gibbs_of`` reads it from the method's settings."""

    def loss(tables: Tables, credit: Credit, settings: MethodSettings[Own]) -> tuple[Tensor, Metrics]:
        energies = tables.per_branch(credit.branches)
        return gibbs_of(settings).objective(*energies, credit.advantages_G.to(tables.now))

    def probabilities(tables: Tables, credit: Credit, settings: MethodSettings[Own]) -> Tensor:
        _, old_G, _ = tables.per_branch(credit.branches)
        return gibbs_of(settings).probabilities(old_G)

    return Method(evidence, loss, METRICS, residual=residual, probabilities=probabilities)
