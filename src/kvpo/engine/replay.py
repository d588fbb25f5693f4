"""Replay: the policy's velocities, in the deployment context, at the solver states that a branch visited.

Root pages stay as the rollout policy stored them. Pages of a branch's own earlier blocks are re-encoded by
the evaluated policy, without gradient, from the branch's stored clean latents.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from kvpo.engine.generator import StreamingGenerator, TextRows
from kvpo.engine.rollout import Group
from kvpo.engine.stream import Stream, append_block, commit_banks, text_of, told
from kvpo.models.context import PageContext
from kvpo.models.deployment import routed_context


@dataclass(frozen=True)
class ReplayRow:
    """One trajectory to replay."""

    root: Stream
    """The stream that the window continues."""
    past_PFCHW: Tensor
    """Clean latents of the window's blocks; each block sees the earlier ones."""
    states_PSFCHW: Tensor
    """Solver states at which the policy's velocity is computed."""
    routes: tuple[tuple[int, ...], ...] | None = None
    """Pages in the routed slots of every block; None: the deployment context."""
    recent: int = 0
    """Most recent past frames that a routed row sees."""


def member_row(group: Group, member: int, steps: int | None = None) -> ReplayRow:
    """A row to replay the first ``steps`` solver states (None: all) of a group's member."""
    trajectories = group.trajectories
    states_PSFCHW = trajectories.states_MPSFCHW[member, :, :steps]
    return ReplayRow(group.root, trajectories.clean_MPFCHW[member], states_PSFCHW)


@dataclass(frozen=True)
class ReplayContext:
    """Contexts of the window's blocks for a batch of rows, kept while gradients need them."""

    contexts: tuple[PageContext, ...]
    texts: tuple[TextRows, ...]
    """Blocks with equal prompt mixtures share one object."""


@contextmanager
def replay_context(generator: StreamingGenerator, rows: Sequence[ReplayRow]) -> Iterator[ReplayContext]:
    """Re-encode the rows' own blocks under the current policy; pages are released on exit.

    All rows belong to one group. Weights must not change in this context. Run the backward pass in it if
    activations are recomputed, since that reads the pages again.
    """
    streams = [row.root.fork() for row in rows]
    with ExitStack() as stack:
        for stream in streams:
            stack.callback(stream.history.release)
        stack.enter_context(generator.held())
        contexts: list[PageContext] = []
        texts: list[TextRows] = []
        heard = None
        blocks = len(rows[0].past_PFCHW)
        for block in range(blocks):
            hears = [told(stream) for stream in streams]
            text = text_of(streams) if hears != heard else texts[-1]
            heard = hears
            texts.append(text)
            commit_banks(generator, streams, text)
            routes = [None if row.routes is None else row.routes[block] for row in rows]
            histories = [stream.history for stream in streams]
            context = routed_context(generator.deployment, histories, routes, rows[0].recent)
            contexts.append(context)
            if block == blocks - 1:
                break
            clean = torch.stack([row.past_PFCHW[block] for row in rows])
            append_block(generator, streams, clean, text, context)
        yield ReplayContext(tuple(contexts), tuple(texts))


def replay_velocities(
    generator: StreamingGenerator, rows: Sequence[ReplayRow], replay: ReplayContext, blocks: range
) -> Tensor:
    """The policy's velocities at the rows' states in consecutive blocks: ``[R, P', S, F, C, H, W]``.

    Solver steps share their block's context and run as one batch, as do blocks that see equally many frames
    under equal prompt mixtures.
    """
    steps = rows[0].states_PSFCHW.shape[1]
    sigmas = torch.tensor(generator.sigmas[:steps], dtype=torch.float32)
    velocities = []
    for together in _alike(replay, blocks):
        states = torch.stack([row.states_PSFCHW[together] for row in rows], 1)
        repeat = torch.arange(len(rows), device=states.device).repeat(len(together)).repeat_interleave(steps)
        context = _repeated([replay.contexts[block] for block in together], steps)
        sigma = sigmas.to(states.device).repeat(len(together) * len(rows))
        text = replay.texts[together[0]].select(repeat)
        velocity = generator.velocity(states.flatten(0, 2), sigma, text, context)
        velocities.append(velocity.unflatten(0, (len(together), len(rows), steps)).transpose(0, 1))
    return torch.cat(velocities, 1)


def _alike(replay: ReplayContext, blocks: range) -> list[list[int]]:
    """Runs of consecutive blocks with equally many frames in context and equal prompt mixtures."""

    def seen(block: int) -> tuple[torch.Size, int]:
        return replay.contexts[block].pages.shape, id(replay.texts[block])

    return [list(run) for _, run in groupby(blocks, seen)]


def _repeated(contexts: Sequence[PageContext], steps: int) -> PageContext:
    """One context over the rows of several blocks, each row repeated for its solver steps."""
    first = contexts[0]
    rows = first.pages.dim() - 2
    return replace(
        first,
        pages=torch.cat([context.pages for context in contexts], rows).repeat_interleave(steps, rows),
        start_R=torch.cat([context.start_R for context in contexts]).repeat_interleave(steps),
    )
