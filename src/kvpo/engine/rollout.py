"""Causal-semantic exploration: branches and an anchor from one fork, told apart only by their history.

The branches share every noise tensor, prompt and weight; for ``blocks`` blocks from the fork their local
slots hold routed frames of older history instead of the most recent ones (METHOD section 2).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine.forks import Fork, check_forks
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import Tape, keyed_generator
from kvpo.engine.pages import (
    PlannedRollout,
    branch_frames,
    cache_pages,
    groups_together,
    rollout_pages,
)
from kvpo.engine.stream import (
    Stream,
    TextTable,
    advance,
    open_stream,
    switch_prompts,
)
from kvpo.method.routing import dispersed_routes, route_pool
from kvpo.models.cache import FrameCache
from kvpo.models.deployment import reachable_frames, sink_frames
from kvpo.prompts import VideoPrompt


@dataclass(frozen=True)
class RoutedFrame:
    """One routed slot: which frame of which group's history fills it."""

    group: int
    frame: int


@dataclass(frozen=True)
class Group:
    """One fork: its root history and what the branches and the anchor (the last member) made of it."""

    index: int
    """Position among the rollout's groups; a routed frame of the same index is of its own history."""
    root: Stream
    fork: int
    routes: tuple[tuple[tuple[RoutedFrame, ...], ...], ...]
    """[G][P][routed]: which history filled each branch's routed slots in each block."""
    states_MPSFCHW: Tensor
    """Solver states of the routed window; M = G + 1 members, the anchor last."""
    velocities_MPSFCHW: Tensor
    clean_MTCHW: Tensor
    """Clean latents from the fork to the end of the tail."""

    @property
    def branches(self) -> int:
        """G, without the anchor."""
        return len(self.clean_MTCHW) - 1

    @property
    def blocks(self) -> int:
        """P, the blocks of the routed window."""
        return self.states_MPSFCHW.shape[1]

    @property
    def window_frames(self) -> int:
        """Frames of the routed window."""
        return self.blocks * self.states_MPSFCHW.shape[3]


@dataclass
class Rollout:
    """Groups that share a page cache; release it when the update is done."""

    groups: list[Group]
    cache: FrameCache
    forks: Sequence[Fork]
    """Of every group, those to come included."""

    def release(self) -> None:
        """Give the root histories' pages back."""
        for group in self.groups:
            group.root.history.release()


def pool_of(
    generator: StreamingGenerator, prompt: VideoPrompt, fork: int, exploration: ExplorationConfig
) -> tuple[int, ...]:
    """Frames of a video's own history that may be routed at a fork."""
    return route_pool(
        fork,
        sink=sink_frames(generator.deployment, prompt, fork),
        recent=exploration.recent,
        resident=exploration.resident_frames,
    )


def draw_routes(
    pools: Sequence[Sequence[int]], index: int, exploration: ExplorationConfig, generator: torch.Generator
) -> list[tuple[RoutedFrame, ...]]:
    """Routes of one group's branches for one block, ``[G][routed]``, dispersed.

    ``pools`` holds every group's. ``exploration.donor`` of the distinct frames come from another group's pool
    (an extension beyond the paper; 0 routes only a video's own history). Slots are filled by repeating the
    distinct frames evenly.
    """
    own_distinct = exploration.distinct - exploration.donor
    if exploration.donor and len(pools) < 2:
        raise ValueError(
            f"exploration.donor = {exploration.donor}: donor histories need at least two prompts per update"
        )
    chosen: list[list[RoutedFrame]] = [[] for _ in range(exploration.branches)]
    if own_distinct:
        own = dispersed_routes(
            pools[index],
            branches=exploration.branches,
            routed=own_distinct,
            distinct=own_distinct,
            generator=generator,
        )
        chosen = [[RoutedFrame(index, frame) for frame in route] for route in own.tolist()]
    others = [n for n in range(len(pools)) if n != index and len(pools[n])]
    for route in chosen:
        for _ in range(exploration.donor):
            donor = others[int(torch.randint(len(others), (), generator=generator))]
            frame = pools[donor][int(torch.randint(len(pools[donor]), (), generator=generator))]
            route.append(RoutedFrame(donor, frame))
    return [tuple(r[n % len(r)] for n in range(exploration.routed)) for r in chosen]


def grow_roots(
    generator: StreamingGenerator,
    prompts: Sequence[VideoPrompt],
    fork: int,
    texts: TextTable,
    tape: Tape,
    exploration: ExplorationConfig,
) -> Rollout:
    """Stream every prompt in its deployment context up to one fork; a switch there is already acted on.

    Raises ValueError where window and tail do not fit after the fork.
    """
    forks = [Fork(fork, exploration)] * len(prompts)
    check_forks(prompts, forks, block=generator.block)
    pages = rollout_pages(
        generator,
        exploration,
        groups=len(prompts),
        fork=fork,
        switches=any(prompt.switches for prompt in prompts),
    )
    rollout = Rollout([], generator.new_cache(pages.most), forks)
    _add_roots(generator, rollout, prompts, texts, tape)
    return rollout


def _add_roots(
    generator: StreamingGenerator,
    rollout: Rollout,
    prompts: Sequence[VideoPrompt],
    texts: TextTable,
    tape: Tape,
) -> None:
    """Grow the roots of the next groups in a rollout's cache, each to its fork."""
    forks = rollout.forks[len(rollout.groups) :][: len(prompts)]
    exploration, farthest = forks[0].exploration, max(fork.frame for fork in forks)
    resident = exploration.resident_frames
    pool = (resident or farthest) if exploration.reencode_pool else 0
    roots = [open_stream(generator, rollout.cache, prompt) for prompt in prompts]
    for at in range(0, farthest, generator.block):
        growing = [root for root, fork in zip(roots, forks, strict=True) if at < fork.frame]
        advance(
            generator, growing, texts, tape, rows=exploration.rows, resident=resident, reencode_frames=pool
        )
    switch_prompts(generator, roots, texts, rows=exploration.rows, reencode_frames=pool)
    empty = torch.empty(0)
    for root in roots:
        rollout.groups.append(Group(len(rollout.groups), root, root.start, (), empty, empty, empty))


Member = tuple[int, Sequence[Sequence[RoutedFrame]] | None]
"""A row of a rollout: its group, and its routes per block, or None for the unrouted anchor."""


def run_members(
    generator: StreamingGenerator,
    rollout: Rollout,
    members: Sequence[Member],
    texts: TextTable,
    tape: Tape,
    *,
    videos: Sequence[int] | None = None,
    rows: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue forks of the roots through window and tail, which must be equally long.

    Args:
        videos: video id each row asks the tape for; None: its prompt's own, so that all noise is shared.
        rows: members that run together; 0: all.

    Returns:
        states and velocities ``[R, P, S, F, C, H, W]`` of the window and clean latents ``[R, T, C, H, W]`` of
        window and tail.
    """
    ran = members_in_turn(generator, rollout, members, texts, tape, videos=videos, rows=rows)
    states, velocities, clean = map(torch.stack, zip(*ran, strict=True))
    return states, velocities, clean


def members_in_turn(
    generator: StreamingGenerator,
    rollout: Rollout,
    members: Sequence[Member],
    texts: TextTable,
    tape: Tape,
    *,
    videos: Sequence[int] | None = None,
    rows: int = 0,
    steps: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What ``run_members`` returns, member by member; ``rows`` of them are generated at a time (0: all).

    ``steps``: first solver steps whose states and velocities are kept; None: all.
    """
    for at in range(0, len(members), rows or len(members)):
        batch = members[at : at + (rows or len(members))]
        streams = [rollout.groups[group].root.fork() for group, _ in batch]
        if videos is not None:
            for stream, video in zip(streams, videos[at:], strict=False):
                stream.prompt = replace(stream.prompt, id=video)
        try:
            ran = _run_streams(generator, rollout, batch, streams, texts, tape, steps)
        finally:
            for stream in streams:
                stream.history.release()
        yield from ran


def _run_streams(
    generator: StreamingGenerator,
    rollout: Rollout,
    batch: Sequence[Member],
    streams: Sequence[Stream],
    texts: TextTable,
    tape: Tape,
    steps: int | None,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Run each member's stream through its own window and tail, as many as are under way at a time."""
    windows = [rollout.forks[group].exploration for group, _ in batch]
    # The roots hold what may be routed; a branch holds only what its own blocks see.
    recent = branch_frames(generator, windows[0])
    resident = recent and generator.deployment.sink + recent

    def pages(n: int, block: int) -> list[int] | None:
        _, routes = batch[n]
        if routes is None or block >= windows[n].blocks:
            return None
        return [rollout.groups[r.group].root.history.pages[r.frame] for r in routes[block]]

    states: list[list[Tensor]] = [[] for _ in batch]
    velocities: list[list[Tensor]] = [[] for _ in batch]
    for block in range(max(window.blocks + window.tail_blocks for window in windows)):
        under_way = [n for n, window in enumerate(windows) if block < window.blocks + window.tail_blocks]
        trajectory = advance(
            generator,
            [streams[n] for n in under_way],
            texts,
            tape,
            routes=[pages(n, block) for n in under_way],
            recent=windows[0].recent,
            resident=resident,
        )
        for row, n in enumerate(under_way):
            if block < windows[n].blocks:
                states[n].append(trajectory.states_RSFCHW[row, :steps])
                velocities[n].append(trajectory.velocities_RSFCHW[row, :steps])
    return [
        (
            torch.stack(states[n]),
            torch.stack(velocities[n]),
            torch.cat(stream.latents[-(windows[n].blocks + windows[n].tail_blocks) :]),
        )
        for n, stream in enumerate(streams)
    ]


def collect(
    generator: StreamingGenerator,
    prompts: Sequence[VideoPrompt],
    forks: Sequence[Fork],
    texts: TextTable,
    tape: Tape,
    key: tuple[int | str, ...],
    *,
    cache: FrameCache | None = None,
    steps: int | None = None,
    finished: Callable[[Group], None] = lambda group: None,
) -> Rollout:
    """Roots, branches and anchors of one rollout, a fork for every prompt; ``key`` seeds the routes.

    Groups are explored ``groups_together``; once their members have run, they keep the pages that the replay
    sees. Results do not depend on it beyond rounding. The forks may differ in what fits at them, in nothing
    else; donor histories want one fork for all.

    Args:
        cache: where the pages go, with room for ``rollout_pages``; None: a cache of its own.
        steps: solver steps of the window to keep (the replay's); None: all.
        finished: called with every group as soon as its members are generated, in order.

    Raises ValueError where window and tail do not fit after the fork.
    """
    check_forks(prompts, forks, block=generator.block)
    pools = [
        pool_of(generator, prompt, fork.frame, fork.exploration)
        for prompt, fork in zip(prompts, forks, strict=True)
    ]
    members = [_members(pools, n, fork.exploration, key) for n, fork in enumerate(forks)]
    if cache is None:
        cache = generator.new_cache(cache_pages(generator, [PlannedRollout(prompts, forks)]))
    rollout = Rollout([], cache, forks)
    together = groups_together(forks[0].exploration, len(prompts))
    for at in range(0, len(prompts), together):
        _add_roots(generator, rollout, prompts[at : at + together], texts, tape)
        for group in _explored(generator, rollout, members[at : at + together], texts, tape, steps):
            rollout.groups[group.index] = group
            finished(group)
        # Not before: with donors, later groups route what earlier ones hold.
        for group in rollout.groups[at:]:
            history = group.root.history
            history.keep(reachable_frames(generator.deployment, history, max(1, generator.deployment.sink)))
    return rollout


def _members(
    pools: Sequence[Sequence[int]], index: int, exploration: ExplorationConfig, key: tuple[int | str, ...]
) -> list[Member]:
    """A group's branches with their routes, and its anchor."""
    draws = keyed_generator("routes", *key, index)
    drawn = [draw_routes(pools, index, exploration, draws)] * exploration.blocks
    if exploration.redraw_every_block:
        drawn[1:] = [draw_routes(pools, index, exploration, draws) for _ in drawn[1:]]
    return [*((index, list(routes)) for routes in zip(*drawn, strict=True)), (index, None)]


def _explored(
    generator: StreamingGenerator,
    rollout: Rollout,
    members: Sequence[Sequence[Member]],
    texts: TextTable,
    tape: Tape,
    steps: int | None,
) -> Iterator[Group]:
    """Groups with what their members did, each as soon as they have run."""
    every = [member for own in members for member in own]
    rows = rollout.forks[0].exploration.rows
    ran = members_in_turn(generator, rollout, every, texts, tape, rows=rows, steps=steps)
    for own in members:
        states, velocities, clean = map(torch.stack, zip(*islice(ran, len(own)), strict=True))
        yield replace(
            rollout.groups[own[0][0]],
            routes=tuple(tuple(routes) for _, routes in own if routes is not None),
            states_MPSFCHW=states,
            velocities_MPSFCHW=velocities,
            clean_MTCHW=clean,
        )
