"""Upper bounds on page usage of streams, rollouts and replays: caches and ``kvpo plan`` take them.

Pages that no later block will see are given back before new ones are written. Where a prompt may switch
(``switches``), frames may be re-encoded, more of them than the window keeps.
"""

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

from kvpo.config import ExplorationConfig
from kvpo.engine.forks import Fork
from kvpo.engine.generator import StreamingGenerator
from kvpo.models.deployment import RECORD_INTERVAL
from kvpo.models.settings import Deployment
from kvpo.prompts import VideoPrompt


def stream_pages(generator: StreamingGenerator, num_frames: int, resident: int = 0, *, switches: bool) -> int:
    """Pages that one stream of ``num_frames`` frames holds at most, the current block included.

    ``resident`` frames are kept for routing, counting the sink; 0 keeps no more than the window needs.
    """
    kept = kept_pages(generator, num_frames, resident, switches=switches)
    return kept + pages_at_switch(generator, num_frames, resident, switches=switches)


def kept_pages(generator: StreamingGenerator, num_frames: int, resident: int = 0, *, switches: bool) -> int:
    """Pages that a stream holds between blocks; see ``stream_pages``."""
    deployment = generator.deployment
    if deployment.local_past is None:
        return num_frames + _encoded_anew(generator, num_frames, switches)
    kept = _resident(deployment, deployment.local_past, resident)
    first = deployment.sink if deployment.keep_sink_at_switch else 0
    gone = range(first, num_frames - (kept - deployment.sink))
    bank = max(bank_pages(generator, gone), _encoded_anew(generator, num_frames, switches))
    return min(num_frames, kept) + bank


def _encoded_anew(generator: StreamingGenerator, num_frames: int, switches: bool) -> int:
    """Pages of a memory bank, which no switch re-encodes: the stream may hold others of the same frames."""
    return bank_pages(generator, range(num_frames)) if switches else 0


def pages_at_switch(
    generator: StreamingGenerator, num_frames: int, resident: int = 0, *, switches: bool
) -> int:
    """Pages that a stream holds in addition once a prompt switch has re-encoded more than it keeps."""
    deployment = generator.deployment
    if not switches or deployment.local_past is None:
        return 0
    kept = min(num_frames, _resident(deployment, deployment.local_past, resident))
    return max(0, min(num_frames, deployment.sink + deployment.reencoded(num_frames)) - kept)


def _resident(deployment: Deployment, local_past: int, resident: int) -> int:
    """History frames that a stream keeps: of its window, which its newest block may exceed, or more."""
    return max(deployment.sink + max(local_past, deployment.block), resident)


def bank_pages(generator: StreamingGenerator, gone: range) -> int:
    """Pages that a memory bank holds at most of frames that the stream has let go of otherwise.

    Layers may keep different frames; one more is the frame that the bank takes in next.
    """
    deployment = generator.deployment
    if not deployment.bank_size:
        return 0
    every = deployment.block * (1 if deployment.bank_every_block else RECORD_INTERVAL)
    recorded = sum(frame % every == 0 for frame in gone)
    return min(deployment.bank_size * generator.pages.num_layers + 1, recorded)


@dataclass(frozen=True)
class Pages:
    """Pages that a rollout holds at most, by what holds them."""

    waiting: int
    """Per group whose members have run: the pages that the replay will see."""
    root: int
    """Per group that is being explored: the pages of its window, and those that are routed."""
    growing: int
    """Pages that switches at the forks re-encode in addition."""
    branches: int
    """Own blocks of the members that run together."""
    replay: int
    """Own blocks of the members that are replayed together."""
    groups: int
    """All groups of the rollout."""
    together: int
    """Groups that are explored together."""

    @property
    def exploring(self) -> int:
        """While the last groups are explored and all others wait."""
        explored = self.together * self.root + max(self.growing, self.branches)
        return (self.groups - self.together) * self.waiting + explored


def groups_together(exploration: ExplorationConfig, groups: int, ranks: int = 1) -> int:
    """Groups that are explored together: as many as ``exploration.rows`` holds all members of, at least one.

    Without that limit they are a rank's share of all. Donor histories need every group's root at once.
    """
    if exploration.donor:
        return groups
    if not exploration.rows:
        return math.ceil(groups / ranks)
    return min(groups, max(1, exploration.rows // (exploration.branches + 1)))


def rollout_pages(
    generator: StreamingGenerator,
    exploration: ExplorationConfig,
    *,
    groups: int,
    fork: int,
    together: int = 0,
    switches: bool = True,
    replayed: int = 0,
    keep_pool: bool = False,
) -> Pages:
    """Pages that a rollout forked at ``fork``, and its replay, need at most.

    ``together`` of its ``groups`` are explored together (0: all), ``replayed`` members of one are replayed
    together (0: all); with ``keep_pool`` roots keep all that may be routed, also until the replay.
    """
    together = together or groups
    members = together * (exploration.branches + 1)
    rows = min(exploration.rows or members, members)
    own = (exploration.blocks + exploration.tail_blocks) * generator.block
    resident = exploration.resident_frames or fork
    root = kept_pages(generator, fork, resident, switches=switches)
    if not (keep_pool or exploration.donor):  # of a donor's frames any may be drawn
        window = branch_resident(generator, exploration)
        routed = exploration.branches * exploration.distinct
        few = kept_pages(generator, fork, window, switches=switches) + routed
        if few < root:
            root, resident = few, window
    return Pages(
        waiting=root if keep_pool else kept_pages(generator, fork, switches=switches),
        root=root,
        growing=together * pages_at_switch(generator, fork, resident, switches=switches),
        branches=rows * _branch_pages(generator, exploration, fork, own, switches=switches),
        replay=(replayed or exploration.branches + 1) * (exploration.blocks - 1) * generator.block,
        groups=groups,
        together=together,
    )


def _branch_pages(
    generator: StreamingGenerator, exploration: ExplorationConfig, fork: int, own: int, *, switches: bool
) -> int:
    """Pages a branch adds to its root's.

    It lets go of its blocks as its window moves on, so a long tail costs none, and has none of its last
    block. Only in the tail may the prompt switch; frames that were the root's are then re-encoded.
    """
    deployment, block = generator.deployment, generator.block
    recent = branch_frames(generator, exploration)
    switches = switches and exploration.tail_blocks > 0
    if not recent:
        bank = bank_pages(generator, range(fork, fork + own)) if switches else 0
        return (fork if switches else 0) + own - block + bank
    bank = bank_pages(generator, range(fork, fork + own - (0 if switches else recent)))
    moved_sink = 0 if deployment.keep_sink_at_switch or not switches else deployment.sink
    kept = min(own - block, max(recent, block))
    reencoded = deployment.reencoded(fork + own - block) if switches else 0
    return max(kept, moved_sink + reencoded) + bank


def branch_frames(generator: StreamingGenerator, exploration: ExplorationConfig) -> int:
    """Most recent frames, the sink not counted, that a branch must keep pages of; 0: all."""
    local_past = generator.deployment.local_past
    return 0 if local_past is None else max(local_past, exploration.recent)


def branch_resident(generator: StreamingGenerator, exploration: ExplorationConfig) -> int:
    """History frames that the window of a branch keeps, counting the sink; 0: all."""
    recent = branch_frames(generator, exploration)
    return recent and generator.deployment.sink + recent


@dataclass(frozen=True)
class PlannedRollout:
    """A rollout before it is made."""

    prompts: Sequence[VideoPrompt]
    forks: Sequence[Fork]
    """The fork of every prompt's group."""
    replayed: int = 0
    """Members that will be replayed together; 0: all of a group."""
    keep_pool: bool = False
    """Roots keep all that may be routed, until the replay; else what is routed, until branches have run."""
    share: Sequence[range] | None = None
    """Turns that this process takes, of the groups that are explored together; None: all."""
    branch_ranks: int = 1
    """Processes that the branches of each group are dealt among."""

    def dealt(self, fork: Fork) -> ExplorationConfig:
        """The exploration at a fork with as many branches as this process runs of it."""
        branches = math.ceil(fork.exploration.branches / self.branch_ranks)
        return replace(fork.exploration, branches=branches)

    def turns(self, ranks: int = 1) -> list[range]:
        """All groups, in turns of those that are explored together."""
        groups = len(self.forks)
        size = groups_together(self.forks[0].exploration, groups, ranks)
        return [range(at, min(at + size, groups)) for at in range(0, groups, size)]

    @property
    def own_turns(self) -> Sequence[range]:
        """The turns that this process takes."""
        return self.turns() if self.share is None else self.share


def cache_pages(generator: StreamingGenerator, rollouts: Sequence[PlannedRollout]) -> int:
    """Pages of one cache for rollouts that are all collected, in order, before any is replayed.

    Groups that fork at different frames count as the one that needs most.
    """
    most, waiting, replay = 0, 0, 0
    for rollout in rollouts:
        own = [group for turn in rollout.own_turns for group in turn]
        if not own:
            continue
        each = [
            rollout_pages(
                generator,
                rollout.dealt(fork),
                groups=len(own),
                fork=fork.frame,
                together=max(map(len, rollout.own_turns)),
                switches=any(prompt.switches for prompt in rollout.prompts),
                replayed=rollout.replayed,
                keep_pool=rollout.keep_pool,
            )
            for fork in (rollout.forks[group] for group in own)
        ]
        pages = Pages(*map(max, zip(*map(astuple, each), strict=True)))
        most = max(most, waiting + pages.exploring)
        waiting += pages.groups * pages.waiting
        replay = max(replay, pages.replay)
    return max(most, waiting + replay)
