"""Every method's loss written out, from a rollout and the generator's own velocities, in one graph.

Nothing of ``kvpo.method`` is used but the temperature that gives the anchor a share. docs/method.md has
the formulas; G branches, P blocks, S solver steps.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.config import Config
from kvpo.engine.noise import keyed_generator
from kvpo.engine.replay import ReplayRow, replay_context, replay_velocities
from kvpo.engine.rollout import Group
from kvpo.method.evidence import Credit
from kvpo.method.gibbs import temperature_for_anchor_share
from kvpo.training.policy import swapped_parameters
from kvpo.training.trainer import Trainer


@dataclass(frozen=True)
class Fork:
    """A group whose branches have credit, and the policies that a loss compares on it."""

    trainer: Trainer
    group: Group
    credit: Credit
    old: dict[str, Tensor] | None
    """Parameters that generated the rollout; None: the current ones."""

    @property
    def config(self) -> Config:
        return self.trainer.setup.config

    @property
    def steps(self) -> int:
        return self.config.objective.grad_steps

    @property
    def branches(self) -> list[int]:
        return list(self.credit.branches)

    @property
    def anchor(self) -> int:
        return self.group.branches

    @property
    def visited_MPSFCHW(self) -> Tensor:
        return self.group.trajectories.states_MPSFCHW[:, :, : self.steps]

    @property
    def arrived_MPSFCHW(self) -> Tensor:
        return self.group.trajectories.states_MPSFCHW[:, :, 1 : self.steps + 1]

    @property
    def clean_GP1FCHW(self) -> Tensor:
        return self.group.trajectories.clean_MPFCHW[self.branches][:, :, None]

    def level(self, at: int = 0) -> Tensor:
        """Noise levels of the steps' states, or of where they lead: [S, 1, 1, 1, 1]."""
        sigmas = self.trainer.setup.generator.sigmas[at : at + self.steps]
        return torch.tensor(sigmas, dtype=torch.float64)[:, None, None, None, None]

    def velocities(self, states: Tensor, past: Sequence[int], routed: Sequence[int] | None = None) -> Tensor:
        """The current policy's velocities at states [R, ...], each behind the clean blocks of a member."""
        group, clean = self.group, self.group.trajectories.clean_MPFCHW
        rows = [ReplayRow(group.root, clean[m], own) for m, own in zip(past, states, strict=True)]
        if routed is not None:
            pages = [group.routed_pages(branch) for branch in routed]
            rows = [
                ReplayRow(row.root, row.past_PFCHW, row.states_PSFCHW, own, group.recent)
                for row, own in zip(rows, pages, strict=True)
            ]
        generator = self.trainer.setup.generator
        with replay_context(generator, rows) as replay:
            return replay_velocities(generator, rows, replay, range(group.blocks))

    def under_old(self) -> AbstractContextManager[None]:
        return swapped_parameters(self.trainer.policy.parameters, self.old) if self.old else torch.no_grad()  # type: ignore[return-value]

    def noised_again(self) -> tuple[Tensor, Tensor]:
        """x = (1 - sigma) x0 + sigma eps with one eps for all branches, and v* = eps - x0."""
        clean = self.clean_GP1FCHW
        draws = keyed_generator("evidence", self.config.seed, 0, self.group.index)
        shape = (1, clean.shape[1], self.steps, *clean.shape[3:])
        noise = torch.randn(shape, generator=draws).double()
        sigma = self.level()
        return (1 - sigma) * clean + sigma * noise, noise - clean


def mean_square(difference: Tensor) -> Tensor:
    """Over the elements of a block: [..., F, C, H, W] -> [...]."""
    return difference.square().flatten(-4).mean(-1)


def kvpo_energies(fork: Fork) -> Tensor:
    weight = fork.config.kvpo.anchor_state_weight
    members = [*fork.branches, fork.anchor]
    velocity = fork.velocities(fork.visited_MPSFCHW[members], members)
    own = fork.group.trajectories.velocities_MPSFCHW[fork.branches, :, : fork.steps]
    energy_G = mean_square(own - velocity[:-1]).sum((1, 2))
    # The straight line from the anchor's state at level sigma to a branch's clean latents.
    line = (fork.visited_MPSFCHW[fork.anchor] - fork.clean_GP1FCHW) / fork.level()
    return (1 - weight) * energy_G + weight * mean_square(line - velocity[-1]).sum((1, 2))


def distances(fork: Fork) -> Tensor:
    """Between clean latents: the branches' own, and those that the policy points to from the anchor."""
    states = fork.visited_MPSFCHW[fork.anchor]
    (velocity,) = fork.velocities(states[None], [fork.anchor])
    if fork.config.latent_distance.space == "velocity":
        return mean_square((states - fork.clean_GP1FCHW) / fork.level() - velocity).sum((1, 2))
    return mean_square(fork.clean_GP1FCHW - (states - fork.level() * velocity)).sum((1, 2))


def clipped(ratio: Tensor, advantages: Tensor, low: float, high: float) -> Tensor:
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages).mean()


def gibbs_loss(fork: Fork) -> Tensor:
    """-(1/G) sum min(rho A, clip(rho) A) + lambda KL(pi || pi_ref) under a softmax of -E / tau."""
    kvpo = fork.config.method == "kvpo"
    energies = kvpo_energies if kvpo else distances
    settings = fork.config.method_settings
    share = settings.own.anchor_share if kvpo else 0.0
    with fork.under_old():
        old = energies(fork).detach()
    with fork.trainer.policy.reference():
        reference = energies(fork).detach()
    tau = settings.temperature
    if tau is None:
        tau = max(float(old.std()), 1e-3 * float(old.mean()), 1e-12)
        tau = temperature_for_anchor_share(old, share) if share else tau

    def log_policy(energy: Tensor) -> Tensor:
        pool = torch.cat([energy, energy.new_zeros(1)]) if share else energy
        return torch.log_softmax(-pool / tau, 0)

    now, advantages = log_policy(energies(fork)), fork.credit.advantages_G.double()
    ratio = (now - log_policy(old))[: len(advantages)].exp()
    loss = clipped(ratio, advantages, *settings.clip)
    if kvpo:
        loss = loss + settings.own.simplex_kl * (now.exp() * (now - log_policy(reference))).sum()
    return loss


def log_density(fork: Fork) -> Tensor:
    """log N(x'; mean, deviation) of every solver step of every branch, without its constant: [G, P, S]."""
    x, arrived = fork.visited_MPSFCHW[fork.branches], fork.arrived_MPSFCHW[fork.branches]
    v, t, next_t = fork.velocities(x, fork.branches), fork.level(), fork.level(1)
    if fork.config.method == "cm-grpo":
        mean, deviation = (1 - next_t) * (x - t * v), next_t
    else:
        dt = next_t - t
        below_one = torch.where(t < 1, t, next_t)
        rate = fork.config.exploration.noise**2 * below_one / (1 - below_one)
        mean = x + v * dt + rate / (2 * t) * (x + (1 - t) * v) * dt
        deviation = (-rate * dt).sqrt()
    return -((arrived - mean) / deviation).square().flatten(-4).sum(-1) / 2


def gaussian_loss(fork: Fork) -> Tensor:
    """The ratio of every solver step, clipped, with its branch's advantage."""
    with fork.under_old():
        old = log_density(fork).detach()
    clip, advantages = fork.config.method_settings.clip, fork.credit.advantages_G.double()
    return clipped((log_density(fork) - old).exp(), advantages[:, None, None], *clip)


def nft_loss(fork: Fork) -> Tensor:
    """r || v+ - v* ||^2 + (1 - r) || v- - v* ||^2 with implicit positive and negative policies."""
    settings = fork.config.nft
    states, wanted = fork.noised_again()
    # The teacher stays the policy of the collection, however often a rollout is used.
    with fork.under_old():
        old = fork.velocities(states, fork.branches).detach()
    velocity = fork.velocities(states, fork.branches)
    good = (fork.credit.advantages_G.double() / 2.5).clamp(-1, 1) / 2 + 0.5
    good = good[:, None, None]
    beta = settings.beta
    positive = mean_square(beta * velocity + (1 - beta) * old - wanted)
    negative = mean_square((1 + beta) * old - beta * velocity - wanted)
    return (good * positive + (1 - good) * negative).mean()


def rvm_loss(fork: Fork) -> Tensor:
    """(1/G) sum A_g || v* - v ||^2."""
    states, wanted = fork.noised_again()
    error = mean_square(wanted - fork.velocities(states, fork.branches)).mean((1, 2))
    return (fork.credit.advantages_G.double() * error).mean()


def self_distillation_loss(fork: Fork) -> Tensor:
    """|| v(x_a | a branch's routed history) - v(x_a) ||^2, the first without gradient."""
    states = fork.visited_MPSFCHW[[fork.anchor]]
    (student,) = fork.velocities(states, [fork.anchor])
    count = len(fork.branches)
    with torch.no_grad():
        repeated = states.expand(count, *states.shape[1:])
        teacher = fork.velocities(repeated, [fork.anchor] * count, fork.branches)
    return mean_square(teacher - student).mean()


LOSSES = {
    "kvpo": gibbs_loss,
    "latent-distance": gibbs_loss,
    "flow-grpo": gaussian_loss,
    "cm-grpo": gaussian_loss,
    "nft": nft_loss,
    "rvm": rvm_loss,
    "self-distill": self_distillation_loss,
}


def velocity_drift(fork: Fork) -> Tensor:
    """The velocity KL to the starting policy: at the anchor's states, or at those of overrated branches."""
    states, members = fork.visited_MPSFCHW[[fork.anchor]], [fork.anchor]
    if fork.config.method == "nft" and fork.config.nft.selective_kl:
        gaps = fork.credit.gap_G.double()
        positive = gaps[gaps > 0]
        if not len(positive):
            return torch.zeros((), dtype=torch.float64)
        overrated = gaps >= positive.quantile(1 - fork.config.nft.selective_kl)
        chosen = [g for g, own in enumerate(overrated & (gaps > 0)) if own]
        states, members = fork.noised_again()[0][chosen], [fork.branches[g] for g in chosen]
    with fork.trainer.policy.reference():
        reference = fork.velocities(states, members).detach()
    return (fork.velocities(states, members) - reference).square().mean()


def whole_loss(forks: Sequence[Fork]) -> Tensor:
    """The mean over forks of the method's loss and the weighted velocity KL."""
    losses = []
    for fork in forks:
        drift = fork.config.objective.velocity_kl * velocity_drift(fork)
        losses.append(LOSSES[fork.config.method](fork) + drift)
    return torch.stack(losses).mean()
