"""Causal-semantic exploration: branches and an anchor from one fork, told apart only by their history.

The branches share every noise tensor, prompt and weight; for ``blocks`` blocks from the fork their local
slots hold routed frames of older history instead of the most recent ones (METHOD section 2).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine.forks import check_fork
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
    Trajectory,
    advance,
    open_stream,
    switch_prompts,
)
from kvpo.method.routing import dispersed_routes, route_pool
from kvpo.models.cache import FrameCache
from kvpo.models.deployment import reachable_frames
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
    exploration: ExplorationConfig
    """What was explored with: what fits the videos."""

    def release(self) -> None:
        """Give the root histories' pages back."""
        for group in self.groups:
            group.root.history.release()


def draw_routes(
    pools: Sequence[range], exploration: ExplorationConfig, generator: torch.Generator
) -> list[list[tuple[RoutedFrame, ...]]]:
    """Routes of every group's branches for one block, ``[groups][G][routed]``, dispersed within a group.

    ``exploration.donor`` of the distinct frames come from another group's pool (an extension beyond the
    paper; 0 routes only a video's own history). Slots are filled by repeating the distinct frames evenly.
    """
    own_distinct = exploration.distinct - exploration.donor
    if exploration.donor and len(pools) < 2:
        raise ValueError(
            f"exploration.donor = {exploration.donor}: donor histories need at least two prompts per update"
        )
    groups = []
    for index, pool in enumerate(pools):
        chosen: list[list[RoutedFrame]] = [[] for _ in range(exploration.branches)]
        if own_distinct:
            own = dispersed_routes(
                pool,
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
        groups.append([tuple(r[n % len(r)] for n in range(exploration.routed)) for r in chosen])
    return groups


def grow_roots(
    generator: StreamingGenerator,
    prompts: Sequence[VideoPrompt],
    fork: int,
    texts: TextTable,
    tape: Tape,
    exploration: ExplorationConfig,
) -> Rollout:
    """Stream every prompt in its deployment context up to the fork; a switch there is already acted on.

    Raises ValueError where window and tail do not fit after the fork.
    """
    check_fork(prompts, fork, exploration, block=generator.block)
    pages = rollout_pages(
        generator,
        exploration,
        groups=len(prompts),
        fork=fork,
        switches=any(prompt.switches for prompt in prompts),
    )
    rollout = Rollout([], generator.new_cache(pages.most), exploration)
    _add_roots(generator, rollout, prompts, fork, texts, tape, exploration)
    return rollout


def _add_roots(
    generator: StreamingGenerator,
    rollout: Rollout,
    prompts: Sequence[VideoPrompt],
    fork: int,
    texts: TextTable,
    tape: Tape,
    exploration: ExplorationConfig,
) -> None:
    """Grow the roots of some more groups in a rollout's cache."""
    roots = [open_stream(generator, rollout.cache, prompt) for prompt in prompts]
    resident = exploration.resident_frames
    while roots[0].start < fork:
        advance(generator, roots, texts, tape, rows=exploration.rows, resident=resident)
    pool = (resident or fork) if exploration.reencode_pool else 0
    switch_prompts(generator, roots, texts, rows=exploration.rows, reencode_frames=pool)
    empty = torch.empty(0)
    for root in roots:
        rollout.groups.append(Group(len(rollout.groups), root, fork, (), empty, empty, empty))


Member = tuple[int, Sequence[Sequence[RoutedFrame]] | None]
"""A row of a rollout: its group, and its routes per block, or None for the unrouted anchor."""


def run_members(
    generator: StreamingGenerator,
    rollout: Rollout,
    members: Sequence[Member],
    texts: TextTable,
    tape: Tape,
    exploration: ExplorationConfig,
    *,
    videos: Sequence[int] | None = None,
    steps: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Continue forks of the roots through window and tail.

    Args:
        videos: video id each row asks the tape for; None: its prompt's own, so that all noise is shared.
        steps: first solver steps whose states and velocities are kept; None: all.

    Returns:
        states and velocities ``[R, P, S, F, C, H, W]`` of the window and clean latents ``[R, T, C, H, W]`` of
        window and tail.
    """
    chunks = member_chunks(generator, rollout, members, texts, tape, exploration, videos=videos, steps=steps)
    states, velocities, clean = (torch.cat(part) for part in zip(*chunks, strict=True))
    return states, velocities, clean


def member_chunks(
    generator: StreamingGenerator,
    rollout: Rollout,
    members: Sequence[Member],
    texts: TextTable,
    tape: Tape,
    exploration: ExplorationConfig,
    *,
    videos: Sequence[int] | None = None,
    steps: int | None = None,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """``run_members``, ``exploration.rows`` members at a time, each chunk when it is generated."""
    size = exploration.rows or len(members)
    # The roots hold what may be routed; a branch holds only what its own blocks see.
    recent = branch_frames(generator, exploration)
    resident = recent and generator.deployment.sink + recent
    roots = [group.root for group in rollout.groups]
    for at in range(0, len(members), size):
        batch = members[at : at + size]
        streams = [roots[group].fork() for group, _ in batch]
        if videos is not None:
            for stream, video in zip(streams, videos[at : at + size], strict=True):
                stream.prompt = replace(stream.prompt, id=video)
        trajectories: list[Trajectory] = []
        for block in range(exploration.blocks + exploration.tail_blocks):
            pages: list[list[int] | None] | None = None
            if block < exploration.blocks:
                pages = [
                    None if routes is None else [roots[r.group].history.pages[r.frame] for r in routes[block]]
                    for _, routes in batch
                ]
            trajectories.append(
                advance(
                    generator,
                    streams,
                    texts,
                    tape,
                    routes=pages,
                    recent=exploration.recent,
                    resident=resident,
                )
            )
        for stream in streams:
            stream.history.release()
        window = trajectories[: exploration.blocks]
        yield (
            torch.stack([trajectory.states_RSFCHW[:, :steps] for trajectory in window], 1),
            torch.stack([trajectory.velocities_RSFCHW[:, :steps] for trajectory in window], 1),
            torch.cat([trajectory.clean_RFCHW for trajectory in trajectories], 1),
        )


def collect(
    generator: StreamingGenerator,
    prompts: Sequence[VideoPrompt],
    fork: int,
    texts: TextTable,
    tape: Tape,
    exploration: ExplorationConfig,
    key: tuple[int | str, ...],
    *,
    cache: FrameCache | None = None,
    steps: int | None = None,
    finished: Callable[[Group], None] = lambda group: None,
) -> Rollout:
    """Roots, branches and anchors of one rollout; ``key`` seeds the routes.

    Groups are explored ``groups_together``; once its members have run, a group keeps the pages that its
    replay sees. Results do not depend on it beyond rounding.

    Args:
        cache: where the pages go, with room for ``rollout_pages``; None: a cache of its own.
        steps: solver steps of the window to keep (the replay's); None: all.
        finished: called with every group as soon as its members are generated, in order.

    Raises ValueError where window and tail do not fit after the fork.
    """
    check_fork(prompts, fork, exploration, block=generator.block)
    pool = route_pool(
        fork,
        sink=generator.deployment.sink,
        recent=exploration.recent,
        resident=exploration.resident_frames,
    )
    draws = keyed_generator("routes", *key)
    first = draw_routes([pool] * len(prompts), exploration, draws)
    per_block = [first]
    for _ in range(exploration.blocks - 1):
        redraw = exploration.redraw_every_block
        per_block.append(draw_routes([pool] * len(prompts), exploration, draws) if redraw else first)
    together = groups_together(exploration, len(prompts))
    if cache is None:
        cache = generator.new_cache(cache_pages(generator, [PlannedRollout(prompts, fork, exploration)]))
    rollout = Rollout([], cache, exploration)
    for at in range(0, len(prompts), together):
        _add_roots(generator, rollout, prompts[at : at + together], fork, texts, tape, exploration)
        for group in _explored(generator, rollout, at, per_block, texts, tape, exploration, steps):
            history = group.root.history
            history.keep(reachable_frames(generator.deployment, history, max(1, generator.deployment.sink)))
            rollout.groups[group.index] = group
            finished(group)
    return rollout


def _explored(
    generator: StreamingGenerator,
    rollout: Rollout,
    first: int,
    per_block: Sequence[Sequence[Sequence[tuple[RoutedFrame, ...]]]],
    texts: TextTable,
    tape: Tape,
    exploration: ExplorationConfig,
    steps: int | None,
) -> Iterator[Group]:
    """The groups from ``first`` on with what their members did, each as soon as they have run."""
    waiting = list(rollout.groups[first:])
    members: list[Member] = []
    for group in waiting:
        for branch in range(exploration.branches):
            members.append((group.index, [routes[group.index][branch] for routes in per_block]))
        members.append((group.index, None))
    size = exploration.branches + 1
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for chunk in member_chunks(generator, rollout, members, texts, tape, exploration, steps=steps):
        rows += zip(*chunk, strict=True)
        while len(rows) >= size:
            states, velocities, clean = map(torch.stack, zip(*rows[:size], strict=True))
            group = waiting.pop(0)
            routes = tuple(tuple(route) for _, route in members[:size] if route is not None)
            del rows[:size], members[:size]
            yield replace(
                group,
                routes=routes,
                states_MPSFCHW=states,
                velocities_MPSFCHW=velocities,
                clean_MTCHW=clean,
            )
