"""The policy gradient of one rollout: replay, energies, objective, and backward in micro-batches.

The objective sees a branch only as its energy, a number. It is differentiated on those numbers, and each
micro-batch of branches is backpropagated with its coefficients dL/dE: exact, with one micro-batch's
activations in memory (METHOD section 6).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.config import ObjectiveConfig
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import Tape
from kvpo.engine.replay import (
    Member,
    ReplayContext,
    anchor_state_residuals,
    branch_residuals,
    replay_context,
    replay_kind,
    replay_velocities,
    window_part,
)
from kvpo.engine.rollout import Group
from kvpo.engine.stream import TextTable
from kvpo.method.diagnostics import ObjectiveDiagnostics
from kvpo.method.objective import objective, velocity_kl
from kvpo.method.policy import calibrated_temperature, log_probs, temperature_for_anchor_share
from kvpo.models.finite import require_finite
from kvpo.training.credit import Credit
from kvpo.training.policy import Policy


@dataclass(frozen=True)
class Trained:
    """A group that is trained on."""

    group: Group
    credit: Credit

    @property
    def anchor(self) -> int:
        """Index of the anchor among the group's members."""
        return self.group.branches


@dataclass(frozen=True)
class Replayer:
    """Everything a replay needs besides the groups."""

    generator: StreamingGenerator
    policy: Policy
    texts: TextTable
    tape: Tape
    config: ObjectiveConfig
    rows: int
    """Forward rows (members x blocks x steps) per forward pass; 0 means no limit."""


@dataclass(frozen=True)
class Replayed:
    """What one pass over some groups gives: a share of every branch's energy, and the anchors' velocities."""

    energies: tuple[Tensor, ...]
    """Per group [G']; energies of branches outside the micro-batch are 0."""
    anchor_velocities: dict[int, Tensor]
    """Group index -> [blocks, S, F, C, H, W]."""
    share: float
    """Of the window's blocks."""


def members_together(rows: int, blocks: int, steps: int) -> int:
    """Members that one replay micro-batch of at most ``rows`` forward rows holds; 0: no limit."""
    return max(1, rows // (blocks * steps)) if rows else 0


def blocks_together(rows: int, blocks: int, steps: int) -> int:
    """Blocks of a window that one forward pass of at most ``rows`` rows holds, at least one; 0: all."""
    return min(blocks, max(1, rows // steps)) if rows else blocks


def micro_batches(replayer: Replayer, trained: Sequence[Trained]) -> list[list[tuple[int, int]]]:
    """(group index, member) pairs split into micro-batches of at most ``replayer.rows`` forward rows.

    The groups are of one ``replay_kind``.
    With the pure anchor-state energy only the anchors are replayed.
    """
    weight = replayer.config.anchor_state_weight
    pairs = []
    for index, item in enumerate(trained):
        branches = item.credit.branches if weight < 1 else ()
        pairs += [(index, branch) for branch in branches] + [(index, item.anchor)]
    together = members_together(replayer.rows, trained[0].group.blocks, replayer.config.grad_steps)
    size = together or len(pairs)
    return [pairs[at : at + size] for at in range(0, len(pairs), size)]


def group_batches(replayer: Replayer, trained: Sequence[Trained]) -> list[list[Trained]]:
    """Whole groups of one kind whose replay fits one micro-batch; a group that does not fit stands alone."""
    batches: list[list[Trained]] = []
    kinds = [replay_kind(replayer.generator, item.group) for item in trained]
    for item, kind, before in zip(trained, kinds, [None, *kinds], strict=False):
        if kind == before and len(micro_batches(replayer, [*batches[-1], item])) == 1:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches


@contextmanager
def replay_pairs(
    replayer: Replayer, trained: Sequence[Trained], pairs: Sequence[tuple[int, int]], *, gradients: bool
) -> Iterator[Iterator[Replayed]]:
    """Replay a micro-batch under the current policy, some blocks of the window at a time.

    With ``gradients``, backpropagate each part, inside the context, before the next one is taken.
    """
    members = [Member(trained[index].group, member) for index, member in pairs]
    window = members[0].group.blocks
    size = blocks_together(replayer.rows, window, replayer.config.grad_steps)
    with replay_context(replayer.generator, members, replayer.texts, replayer.tape) as replay:
        yield (
            _replayed(
                replayer, trained, pairs, replay, range(at, min(at + size, window)), gradients=gradients
            )
            for at in range(0, window, size)
        )


def replay_without_gradients(replayer: Replayer, trained: Sequence[Trained]) -> list[Replayed]:
    """Replay all micro-batches of some groups under the current policy."""
    found: list[Replayed] = []
    for pairs in micro_batches(replayer, trained):
        with replay_pairs(replayer, trained, pairs, gradients=False) as parts:
            found += parts
    return found


def _replayed(
    replayer: Replayer,
    trained: Sequence[Trained],
    pairs: Sequence[tuple[int, int]],
    replay: ReplayContext,
    blocks: range,
    *,
    gradients: bool,
) -> Replayed:
    """One forward pass over some blocks of a micro-batch's members."""
    weight, steps = replayer.config.anchor_state_weight, replayer.config.grad_steps
    groups = [window_part(item.group, blocks) for item in trained]
    members = [Member(groups[index], member) for index, member in pairs]
    energies, anchors = [], {}
    with torch.set_grad_enabled(gradients):
        velocities = replay_velocities(replayer.generator, members, replay.of(blocks), steps)
        residuals = branch_residuals(members, velocities).sum((1, 2))
        for index, item in enumerate(trained):
            rows = {member: row for row, (owner, member) in enumerate(pairs) if owner == index}
            zero = residuals.new_zeros(())
            own = [residuals[rows[b]] if b in rows else zero for b in item.credit.branches]
            energy = (1 - weight) * torch.stack(own)
            if item.anchor in rows:
                anchors[index] = velocities[rows[item.anchor]]
                if weight:
                    at_anchor = anchor_state_residuals(
                        replayer.generator, groups[index], item.credit.branches, anchors[index]
                    )
                    energy = energy + weight * at_anchor.sum((1, 2))
            energies.append(energy)
    return Replayed(tuple(energies), anchors, len(blocks) / trained[0].group.blocks)


def energies_of(replayer: Replayer, trained: Sequence[Trained]) -> list[Tensor]:
    """Energies ``[G']`` of every group under the current policy, without gradients. Raises NonFiniteError."""
    energies = []
    for batch in group_batches(replayer, trained):
        found = _sum_energies([part.energies for part in replay_without_gradients(replayer, batch)])
        _require_finite_energies(batch, found)
        energies += found
    return energies


def accumulate_gradients(
    replayer: Replayer, trained: Sequence[Trained], old_energies: Sequence[Tensor] | None
) -> tuple[list[ObjectiveDiagnostics], float]:
    """Add the gradient of the mean objective over the groups to the parameters' ``.grad``.

    Args:
        old_energies: energies under the rollout policy; None while the current policy still is that policy
            (they are then the current energies, and the ratio is exactly 1).

    Returns:
        diagnostics per group and the velocity KL to the starting policy, averaged over groups.

    Raises NonFiniteError where an energy is not finite.
    """
    diagnostics: list[ObjectiveDiagnostics] = []
    drift, done = 0.0, 0
    for batch in group_batches(replayer, trained):
        old = None if old_energies is None else old_energies[done : done + len(batch)]
        done += len(batch)
        found, kl = _accumulate_batch(replayer, batch, old, len(trained))
        diagnostics += found
        drift += kl / len(trained)
    return diagnostics, drift


def _accumulate_batch(
    replayer: Replayer, batch: Sequence[Trained], old: Sequence[Tensor] | None, groups: int
) -> tuple[list[ObjectiveDiagnostics], float]:
    with replayer.policy.reference():
        reference = replay_without_gradients(replayer, batch)
    reference_energies = _sum_energies([part.energies for part in reference])
    coefficients: list[Tensor] = []
    found: list[ObjectiveDiagnostics] = []
    if len(reference) > 1:
        # The loss couples the branches of a group, so their energies must all be known before any backward.
        energies = _sum_energies([part.energies for part in replay_without_gradients(replayer, batch)])
        found, coefficients = _coefficients(replayer, batch, energies, old, reference_energies)
    drift, done = 0.0, iter(reference)
    for pairs in micro_batches(replayer, batch):
        with replay_pairs(replayer, batch, pairs, gradients=True) as parts:
            for part in parts:
                if len(reference) == 1:
                    energies = [energy.detach() for energy in part.energies]
                    found, coefficients = _coefficients(replayer, batch, energies, old, reference_energies)
                drift += _backward(replayer, part, coefficients, next(done), groups)
    return found, drift


def _sum_energies(parts: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(share).sum(0).detach() for share in zip(*parts, strict=True)]


def _require_finite_energies(batch: Sequence[Trained], energies: Sequence[Tensor], policy: str = "") -> None:
    named = {f"prompt {item.group.root.prompt.id}": own for item, own in zip(batch, energies, strict=True)}
    source = f"replayed branch energies{policy}"
    require_finite(named, source, "the policy has diverged, lower optim.lr, or try --optim.autocast none")


def _coefficients(
    replayer: Replayer,
    batch: Sequence[Trained],
    energies: Sequence[Tensor],
    old_energies: Sequence[Tensor] | None,
    reference_energies: Sequence[Tensor],
) -> tuple[list[ObjectiveDiagnostics], list[Tensor]]:
    """Differentiate each group's loss on its G' energies."""
    config = replayer.config
    _require_finite_energies(batch, energies)
    _require_finite_energies(batch, reference_energies, " of the starting policy")
    diagnostics, coefficients = [], []
    for n, item in enumerate(batch):
        energy = energies[n].detach().requires_grad_()
        old = energies[n] if old_energies is None else old_energies[n]
        with torch.enable_grad():
            loss, found = objective(
                energy,
                old,
                reference_energies[n],
                item.credit.advantages_G.to(energy),
                temperature=temperature_of(old, config),
                clip_low=config.clip_low,
                clip_high=config.clip_high,
                simplex_kl_weight=config.simplex_kl,
                anchor_in_pool=config.anchor_in_pool,
            )
            (coefficient,) = torch.autograd.grad(loss, energy)
        diagnostics.append(found)
        coefficients.append(coefficient)
    return diagnostics, coefficients


def temperature_of(old_energy_G: Tensor, config: ObjectiveConfig) -> float:
    """The group's Gibbs temperature: fixed, or calibrated to its energies (METHOD section 4)."""
    if config.temperature is not None:
        return config.temperature
    if config.anchor_in_pool:
        return temperature_for_anchor_share(old_energy_G, config.anchor_share)
    return calibrated_temperature(old_energy_G)


def policy_of_energies(energy_G: Tensor, config: ObjectiveConfig) -> Tensor:
    """Rollout policy over the branches, [G], or [G + 1] with the anchor last, from their energies [G]."""
    temperature = temperature_of(energy_G, config)
    return log_probs(energy_G, temperature, anchor_in_pool=config.anchor_in_pool).exp()


def _backward(
    replayer: Replayer,
    part: Replayed,
    coefficients: Sequence[Tensor],
    reference: Replayed,
    groups: int,
) -> float:
    """Backpropagate one micro-batch; returns the sum over its anchors of the velocity KL."""
    loss = torch.stack([(c * e).sum() for c, e in zip(coefficients, part.energies, strict=True)]).sum()
    drift = 0.0
    for index, velocity in part.anchor_velocities.items():
        kl = part.share * velocity_kl(velocity, reference.anchor_velocities[index])
        drift += float(kl.detach())
        if replayer.config.velocity_kl:
            loss = loss + replayer.config.velocity_kl * kl
    if loss.requires_grad:  # a micro-batch may hold anchors alone, which then only report their drift
        (loss / groups).backward()
    return drift
