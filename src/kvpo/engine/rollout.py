"""Rollouts: branches and an anchor that continue one fork.

They share weights, prompt and past. In the window, ``blocks`` blocks from the fork on, each uses the history,
noise and solver step that the explorer gave it. Generation then continues in the deployment context.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any, Protocol

import torch
from torch import Tensor

from kvpo.engine.explorers import Explorer, Member, Routes, Site, routes
from kvpo.engine.forks import check_forks
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import Tape
from kvpo.engine.pages import PlannedRollout, branch_resident, cache_pages
from kvpo.engine.stream import Stream, TextTable, advance, open_stream, switch_prompts
from kvpo.method.evidence import Trajectories
from kvpo.models.cache import FrameCache
from kvpo.models.deployment import reachable_frames


@dataclass(frozen=True)
class Ran:
    """The trajectory of one member."""

    states_PSFCHW: Tensor
    """Solver states of the window."""
    velocities_PSFCHW: Tensor
    clean_TCHW: Tensor
    """Clean latents from the fork to the end of the tail."""


class Team(Protocol):
    """Processes that explore the same groups; ``kvpo.training.ranks.Ranks`` documents the calls."""

    @property
    def count(self) -> int: ...

    def deal(self, items: Sequence[Any]) -> list[Any]: ...

    def in_order(self, shares: Sequence[Any], doing: str) -> list[Any]: ...


@dataclass(frozen=True)
class Group:
    """One fork: its root history, and the branches and the anchor (the last member) generated from it."""

    index: int
    """Index among the rollout's groups; routed frames with this index are of the group's own history."""
    root: Stream
    fork: int
    """First frame that can differ."""
    recent: int
    """Most recent past frames that routed branches see."""
    routes: tuple[Routes | None, ...]
    """Routes of each branch, ``[G][P][routed]``."""
    trajectories: Trajectories
    clean_MTCHW: Tensor
    """Clean latents from the fork to the end of the tail; M = G + 1 members, the anchor last."""

    @property
    def branches(self) -> int:
        """Number of branches G, without the anchor."""
        return len(self.clean_MTCHW) - 1

    @property
    def blocks(self) -> int:
        """Number of blocks P in the window."""
        return self.trajectories.clean_MPFCHW.shape[1]

    @property
    def window_frames(self) -> int:
        """Number of frames in the window."""
        return self.blocks * self.trajectories.clean_MPFCHW.shape[2]

    def routed_pages(self, branch: int) -> tuple[tuple[int, ...], ...]:
        """Pages in a branch's routed slots, for every block; all must belong to the group's own history."""
        own = self.routes[branch]
        assert own is not None and all(slot.group == self.index for block in own for slot in block)
        pages = self.root.history.pages
        return tuple(tuple(pages[slot.frame] for slot in block) for block in own)


@dataclass
class Rollout:
    """Groups that share a page cache; call ``release`` when the update is done.

    Raises ValueError if window and tail do not fit after a fork.
    """

    generator: StreamingGenerator
    planned: PlannedRollout
    texts: TextTable
    tape: Tape
    cache: FrameCache
    """The cache for all pages, with room for ``cache_pages``."""
    roots: dict[int, Stream] = field(default_factory=dict)
    """Root stream of each group."""
    groups: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_forks(self.planned.prompts, self.planned.forks, block=self.generator.block)

    def grow_roots(self, groups: range, routed: Mapping[int, frozenset[int]] | None = None) -> None:
        """Stream the prompts of some groups in the deployment context, each up to its fork.

        A switch at the fork is already applied. ``routed`` holds the frames of every group that its branches
        route; they are kept. None keeps all routable frames; size the cache with ``keep_pool`` for that.
        """
        forks = [self.planned.forks[group] for group in groups]
        prompts = [self.planned.prompts[group] for group in groups]
        exploration, farthest = forks[0].exploration, max(fork.frame for fork in forks)
        rows, resident = exploration.rows, exploration.resident_frames
        roots = [open_stream(self.generator, self.cache, one, self.texts, self.tape) for one in prompts]
        if routed is not None:
            resident = branch_resident(self.generator, exploration)
            for group, root in zip(groups, roots, strict=True):
                root.pinned = routed[group]
        for at in range(0, farthest, self.generator.block):
            growing = [root for root, fork in zip(roots, forks, strict=True) if at < fork.frame]
            advance(self.generator, growing, rows=rows, resident=resident)
        switch_prompts(self.generator, roots, rows=rows)
        for root in roots:
            reachable = reachable_frames(self.generator.deployment, root.start, resident)
            root.history.keep(root.pinned.union(reachable))
        self.roots |= zip(groups, roots, strict=True)

    def run(self, members: Sequence[Member], *, rows: int = 0, steps: int | None = None) -> Iterator[Ran]:
        """Run members from their roots through window and tail, ``rows`` members at a time (0: all).

        The states and velocities of the first ``steps`` solver steps are kept; None: of all.
        """
        for at in range(0, len(members), rows or len(members)):
            batch = members[at : at + (rows or len(members))]
            streams = [self._branch(one) for one in batch]
            try:
                ran = self._run_streams(batch, streams, steps)
            finally:
                for stream in streams:
                    stream.history.release()
            yield from ran

    def _branch(self, member: Member) -> Stream:
        """Fork a member's root; the new stream ends with the member's tail."""
        fork = self.planned.forks[member.group]
        blocks = fork.exploration.blocks + fork.exploration.tail_blocks
        branch = self.roots[member.group].fork(member.tape, member.step)
        return replace(branch, pinned=frozenset(), end=fork.frame + blocks * self.generator.block)

    def _run_streams(
        self, batch: Sequence[Member], streams: Sequence[Stream], steps: int | None
    ) -> list[Ran]:
        """Run each member's stream through its own window and tail, batching those that have blocks left."""
        windows = [self.planned.forks[member.group].exploration for member in batch]
        lengths = [window.blocks + window.tail_blocks for window in windows]
        # The roots hold what is routed; a branch holds only what its own blocks see.
        resident = branch_resident(self.generator, windows[0])

        def pages(n: int, block: int) -> list[int] | None:
            own = batch[n].routes
            if own is None or block >= windows[n].blocks:
                return None
            return [self.roots[slot.group].history.pages[slot.frame] for slot in own[block]]

        states: list[list[Tensor]] = [[] for _ in batch]
        velocities: list[list[Tensor]] = [[] for _ in batch]
        for block in range(max(lengths)):
            under_way = [n for n, length in enumerate(lengths) if block < length]
            for n in under_way:
                if block == windows[n].blocks:
                    streams[n].step = None
            trajectory = advance(
                self.generator,
                [streams[n] for n in under_way],
                routes=[pages(n, block) for n in under_way],
                recent=windows[0].recent,
                resident=resident,
            )
            for row, n in enumerate(under_way):
                if block < windows[n].blocks:
                    states[n].append(trajectory.states_RSFCHW[row, :steps])
                    velocities[n].append(trajectory.velocities_RSFCHW[row, :steps])
        return [
            Ran(torch.stack(states[n]), torch.stack(velocities[n]), torch.cat(stream.latents[-lengths[n] :]))
            for n, stream in enumerate(streams)
        ]

    def group_of(self, members: Sequence[Member], ran: Iterator[Ran]) -> Group:
        """Build a group from its members, the anchor last, and the next of their results in ``ran``."""
        index = members[0].group
        fork = self.planned.forks[index]
        own = list(islice(ran, len(members)))
        clean_MTCHW = torch.stack([one.clean_TCHW for one in own])
        blocks, block = fork.exploration.blocks, self.generator.block
        trajectories = Trajectories(
            torch.stack([one.states_PSFCHW for one in own]),
            torch.stack([one.velocities_PSFCHW for one in own]),
            clean_MTCHW[:, : blocks * block].unflatten(1, (blocks, block)),
            self.generator.sigmas,
            fork.exploration.noise,
        )
        own_routes = tuple(member.routes for member in members[:-1])
        root, recent = self.roots[index], fork.exploration.recent
        return Group(index, root, fork.frame, recent, own_routes, trajectories, clean_MTCHW)

    def release(self) -> None:
        """Release the pages of the roots."""
        for root in self.roots.values():
            root.history.release()


def roll_out(
    generator: StreamingGenerator,
    planned: PlannedRollout,
    texts: TextTable,
    tape: Tape,
    key: tuple[int | str, ...],
    *,
    explorer: Explorer = routes,
    cache: FrameCache | None = None,
    steps: int | None = None,
    arrivals: bool = False,
    finished: Callable[[Group], None] = lambda group: None,
    team: Team | None = None,
) -> Rollout:
    """Generate a rollout: root, branches and anchor for every prompt; ``key`` seeds the explorer.

    The groups of this process are explored in turns. Once the members of a turn have run, their roots keep
    only the pages that the replay sees. Turns change results by rounding alone. The explorations at the forks
    may differ only in what was shrunk to fit; donor histories need one fork for all groups.

    Args:
        explorer: creates the branches of a group; the anchor is appended to them.
        cache: holds the pages, with room for ``cache_pages``; None: a new cache.
        steps: number of leading solver steps of the window to train on; None: all.
        arrivals: also keep the states that the last of these steps leads to.
        finished: called with every group as soon as its members are generated, in order.
        team: processes that share the branches of each group. Each grows the roots and runs the anchors,
            so that all run equally many passes. None: this process alone.
    """
    cache = cache or generator.new_cache(cache_pages(generator, [planned]))
    rollout = Rollout(generator, planned, texts, tape, cache)
    forks = planned.forks
    site = Site(generator, planned, tape, key, steps or len(generator.sigmas))
    members = [[*explorer(site, n), Member(n)] for n in range(len(forks))]
    dealt = [own if team is None else [*team.deal(own[:-1]), own[-1]] for own in members]
    routed = None if planned.keep_pool else _routed(dealt)
    with generator.held():
        for turn in planned.own_turns:
            rollout.grow_roots(turn, routed)
            every = [member for group in turn for member in dealt[group]]
            ran = rollout.run(every, rows=forks[0].exploration.rows, steps=steps and steps + arrivals)
            for group in turn:
                own, mine = members[group], dealt[group]
                whole = ran if team is None else iter(_joined(team, list(islice(ran, len(mine))), len(own)))
                rollout.groups.append(rollout.group_of(own, whole))
                finished(rollout.groups[-1])
            # Only now: with donors, later groups route frames that earlier ones hold.
            for root in [rollout.roots[group] for group in turn] if not planned.keep_pool else ():
                kept = reachable_frames(generator.deployment, root.start, max(1, generator.deployment.sink))
                root.history.keep(kept)
    return rollout


def _routed(members: Sequence[Sequence[Member]]) -> dict[int, frozenset[int]]:
    """Frames of every group's history that any member routes."""
    slots = {slot for own in members for one in own for block in one.routes or () for slot in block}
    return {n: frozenset(slot.frame for slot in slots if slot.group == n) for n in range(len(members))}


def _joined(team: Team, own: Sequence[Ran], members: int) -> list[Ran]:
    """All members of a group: the branches of every process and the anchor of this one."""
    if team.count == 1:
        return list(own)
    *branches, anchor = own
    sent = [Ran(*(value.cpu() for value in vars(one).values())) for one in branches]
    every = team.in_order(sent, "exploring")[: members - 1]
    device = anchor.clean_TCHW.device
    return [*(Ran(*(value.to(device) for value in vars(one).values())) for one in every), anchor]
