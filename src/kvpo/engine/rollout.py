"""Rollouts: branches and an anchor from one fork, as an explorer tells them apart.

They share weights, prompt and past; for ``blocks`` blocks from the fork each sees the history, reads the
noise and takes the solver step of its member. After the window, generation goes on in the deployment context.
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
    """One fork: its root history and what the branches and the anchor (the last member) made of it."""

    index: int
    """Position among the rollout's groups; a routed frame of the same index is of its own history."""
    root: Stream
    fork: int
    """First frame that can differ."""
    recent: int
    """Past frames that routed branches kept."""
    routes: tuple[Routes | None, ...]
    """Routes of each branch, ``[G][P][routed]``."""
    trajectories: Trajectories
    clean_MTCHW: Tensor
    """Clean latents from the fork to the end of the tail; M = G + 1 members, the anchor last."""

    @property
    def branches(self) -> int:
        """G, without the anchor."""
        return len(self.clean_MTCHW) - 1

    @property
    def blocks(self) -> int:
        """P, the blocks of the window."""
        return self.trajectories.clean_MPFCHW.shape[1]

    @property
    def window_frames(self) -> int:
        """Frames of the window."""
        return self.blocks * self.trajectories.clean_MPFCHW.shape[2]

    def routed_pages(self, branch: int) -> tuple[tuple[int, ...], ...]:
        """Pages in a branch's routed slots in every block; all must be of the group's own history."""
        own = self.routes[branch]
        assert own is not None and all(slot.group == self.index for block in own for slot in block)
        pages = self.root.history.pages
        return tuple(tuple(pages[slot.frame] for slot in block) for block in own)


@dataclass
class Rollout:
    """Groups that share a page cache; release it when the update is done.

    Raises ValueError where window and tail do not fit after a fork.
    """

    generator: StreamingGenerator
    planned: PlannedRollout
    texts: TextTable
    tape: Tape
    cache: FrameCache
    """Destination of the pages, with room for ``cache_pages``."""
    roots: dict[int, Stream] = field(default_factory=dict)
    """By group."""
    groups: list[Group] = field(default_factory=list)

    def __post_init__(self) -> None:
        check_forks(self.planned.prompts, self.planned.forks, block=self.generator.block)

    def grow_roots(self, groups: range, routed: Mapping[int, frozenset[int]] | None = None) -> None:
        """Stream the prompts of some groups in their deployment context, each to its fork.

        A switch at a fork is already acted on. ``routed`` holds the frames of every group that branches will
        be routed, which are kept; None keeps all that may be, for which the cache needs ``keep_pool``.
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
        """Continue forks of the roots through window and tail, ``rows`` members at a time (0: all).

        ``steps``: first solver steps whose states and velocities are kept; None: all.
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
        """A fork of a member's root, which ends with its tail."""
        fork = self.planned.forks[member.group]
        blocks = fork.exploration.blocks + fork.exploration.tail_blocks
        branch = self.roots[member.group].fork(member.tape, member.step)
        return replace(branch, pinned=frozenset(), end=fork.frame + blocks * self.generator.block)

    def _run_streams(
        self, batch: Sequence[Member], streams: Sequence[Stream], steps: int | None
    ) -> list[Ran]:
        """Run each member's stream through its own window and tail, all that have blocks left together."""
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
        """The group of some members, the anchor last, and what they visited: the next of ``ran``."""
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
        """Give the root histories' pages back."""
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
    """Roots, branches and anchors of one rollout, a group for every prompt; ``key`` seeds the explorer.

    The plan's own groups are explored in turns; once their members have run, they keep the pages that the
    replay sees. Results do not depend on it beyond rounding. The forks may differ in what fits at them, in
    nothing else; donor histories need one fork for all.

    Args:
        explorer: tells the branches apart; every group's anchor follows them.
        cache: where the pages go, with room for ``cache_pages``; None: a cache of its own.
        steps: solver steps of the window that are learned from; None: all.
        arrivals: keep where the last of them led, too.
        finished: called with every group as soon as its members are generated, in order.
        team: the processes that have the branches dealt among them; each grows the roots and runs the
            anchors, so that all take equally many passes. None: this one alone.
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
            # Not before: with donors, later groups route what earlier ones hold.
            for root in [rollout.roots[group] for group in turn] if not planned.keep_pool else ():
                kept = reachable_frames(generator.deployment, root.start, max(1, generator.deployment.sink))
                root.history.keep(kept)
    return rollout


def _routed(members: Sequence[Sequence[Member]]) -> dict[int, frozenset[int]]:
    """Frames of every group's history that any member is routed."""
    slots = {slot for own in members for one in own for block in one.routes or () for slot in block}
    return {n: frozenset(slot.frame for slot in slots if slot.group == n) for n in range(len(members))}


def _joined(team: Team, own: Sequence[Ran], members: int) -> list[Ran]:
    """All members of a group, from the branches that each process ran and from this one's anchor."""
    if team.count == 1:
        return list(own)
    *branches, anchor = own
    sent = [Ran(*(value.cpu() for value in vars(one).values())) for one in branches]
    every = team.in_order(sent, "exploring")[: members - 1]
    device = anchor.clean_TCHW.device
    return [*(Ran(*(value.to(device) for value in vars(one).values())) for one in every), anchor]
