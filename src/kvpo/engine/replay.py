"""Replay of branch states in the deployment context: what the policy would do where a branch has been.

Root pages stay as the rollout policy stored them; pages of a branch's own earlier blocks are re-encoded by
the evaluated policy, without gradient, from the branch's stored clean latents (METHOD section 3).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo.engine.generator import StreamingGenerator, TextRows
from kvpo.engine.noise import Tape
from kvpo.engine.rollout import Group
from kvpo.engine.stream import TextTable, append_block, commit_banks, text_of
from kvpo.method.energy import anchor_state_target, velocity_residual
from kvpo.models.context import PageContext
from kvpo.models.deployment import deployment_context


@dataclass(frozen=True)
class Member:
    """One row of a replay: a branch of a group, or its anchor (the last member)."""

    group: Group
    index: int


@dataclass(frozen=True)
class ReplayContext:
    """Deployment contexts of the window's blocks for a batch of members, held while gradients need them."""

    contexts: tuple[PageContext, ...]
    text: TextRows

    def of(self, blocks: range) -> "ReplayContext":
        """Only some consecutive blocks of the window."""
        return ReplayContext(self.contexts[blocks.start : blocks.stop], self.text)


def window_part(group: Group, blocks: range) -> Group:
    """The group with some consecutive blocks for its window; what comes after is left out."""
    frames = group.states_MPSFCHW.shape[3]
    part = slice(blocks.start, blocks.stop)
    return replace(
        group,
        states_MPSFCHW=group.states_MPSFCHW[:, part],
        velocities_MPSFCHW=group.velocities_MPSFCHW[:, part],
        clean_MTCHW=group.clean_MTCHW[:, part.start * frames : part.stop * frames],
    )


def replay_kind(generator: StreamingGenerator, group: Group) -> tuple[int, int]:
    """What groups must agree on to be replayed together: the blocks of the window and the frames they see.

    The latter are as many at every fork once window and memory bank are full, else the fork decides.
    """
    deployment, bank = generator.deployment, group.root.history.bank
    full = deployment.local_past is not None and group.fork >= deployment.sink + deployment.local_past
    banked = not deployment.bank_size or bool(bank) and len(bank[0]) == deployment.bank_size
    return group.blocks, -1 if full and banked else group.fork


@contextmanager
def replay_context(
    generator: StreamingGenerator, members: Sequence[Member], texts: TextTable, tape: Tape
) -> Iterator[ReplayContext]:
    """Re-encode the members' own blocks under the current policy; pages are released on exit.

    The members' groups are of one ``replay_kind``.
    The pages must outlive the backward pass where activations are recomputed, hence a context manager.
    """
    streams = [member.group.root.fork() for member in members]
    try:
        text = text_of(streams, texts)
        contexts = []
        blocks = members[0].group.blocks
        for block in range(blocks):
            commit_banks(generator, streams, text)
            context = deployment_context(generator.deployment, [stream.history for stream in streams])
            contexts.append(context)
            if block == blocks - 1:
                break
            frames = slice(block * generator.block, (block + 1) * generator.block)
            clean = torch.stack([member.group.clean_MTCHW[member.index, frames] for member in members])
            noise = None
            if generator.context_noise:
                at = [(stream.prompt.id, stream.start // generator.block) for stream in streams]
                noise = torch.stack([tape(*where, "context") for where in at]).to(clean)
            append_block(generator, streams, clean, text, context, noise)
        yield ReplayContext(tuple(contexts), text)
    finally:
        for stream in streams:
            stream.history.release()


def replay_velocities(
    generator: StreamingGenerator, members: Sequence[Member], replay: ReplayContext, steps: int
) -> Tensor:
    """The policy's velocities at the members' first ``steps`` states: ``[R, P, steps, F, C, H, W]``.

    Solver steps share their block's context, so they ride in one batch; so do blocks that see equally many
    frames.
    """
    rows = len(members)
    sigmas = torch.tensor(generator.sigmas[:steps], dtype=torch.float32)
    velocities = []
    for together in _equal_sized(replay.contexts):
        blocks = [block for block, _ in together]
        states = torch.stack([m.group.states_MPSFCHW[m.index, blocks, :steps] for m in members], 1)
        repeat = torch.arange(rows, device=states.device).repeat(len(blocks)).repeat_interleave(steps)
        context = _repeated([context for _, context in together], steps)
        sigma = sigmas.to(states.device).repeat(len(blocks) * rows)
        velocity = generator.velocity(states.flatten(0, 2), sigma, replay.text.select(repeat), context)
        velocities.append(velocity.unflatten(0, (len(blocks), rows, steps)).transpose(0, 1))
    return torch.cat(velocities, 1)


def _equal_sized(contexts: Sequence[PageContext]) -> list[list[tuple[int, PageContext]]]:
    """Runs of consecutive blocks whose contexts hold equally many frames."""
    runs: list[list[tuple[int, PageContext]]] = []
    for block, context in enumerate(contexts):
        if runs and runs[-1][-1][1].pages.shape == context.pages.shape:
            runs[-1].append((block, context))
        else:
            runs.append([(block, context)])
    return runs


def _repeated(contexts: Sequence[PageContext], steps: int) -> PageContext:
    """One context over the rows of several blocks, each row repeated for its solver steps."""
    first = contexts[0]
    rows = first.pages.dim() - 2
    return PageContext(
        cache=first.cache,
        pages=torch.cat([context.pages for context in contexts], rows).repeat_interleave(steps, rows),
        start_R=torch.cat([context.start_R for context in contexts]).repeat_interleave(steps),
        own_frames=first.own_frames,
        sparse_pages=first.sparse_pages,
        sparse_own=first.sparse_own,
    )


def branch_residuals(members: Sequence[Member], velocities_RPSFCHW: Tensor) -> Tensor:
    """mean ||u - v_theta||^2 of every block and step, ``[R, P, S]``: the terms of the energy."""
    steps = velocities_RPSFCHW.shape[2]
    own = torch.stack([member.group.velocities_MPSFCHW[member.index, :, :steps] for member in members])
    return velocity_residual(own, velocities_RPSFCHW)


def anchor_state_residuals(
    generator: StreamingGenerator, group: Group, branches: Sequence[int], anchor_velocity_PSFCHW: Tensor
) -> Tensor:
    """Residuals ``[G', P, S]`` between the policy at the anchor's states and what leads to each branch.

    One replayed trajectory, the anchor's, serves every branch of the group (an extension beyond the paper).
    """
    blocks, steps = anchor_velocity_PSFCHW.shape[:2]
    states = group.states_MPSFCHW[-1, :, :steps]
    clean = group.clean_MTCHW[list(branches), : group.window_frames].unflatten(1, (blocks, -1))
    sigma = torch.tensor(generator.sigmas[:steps], dtype=states.dtype, device=states.device)
    target = anchor_state_target(clean[:, :, None], states, sigma.expand(blocks, steps))
    return velocity_residual(target, anchor_velocity_PSFCHW)
