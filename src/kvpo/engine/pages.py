"""Upper bounds on the pages of streams, rollouts and replays, for sizing caches and for ``kvpo plan``.

Pages that no later block will see are released before new ones are written. If a prompt may switch
(``switches``), more frames may be re-encoded than the window keeps.
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
    """Most pages that a stream of ``num_frames`` frames holds, including those of the current block.

    ``resident`` frames are kept for routing, counting the sink; 0 keeps no more than the window needs.
    """
    kept = kept_pages(generator, num_frames, resident, switches=switches)
    return kept + pages_at_switch(generator, num_frames, resident, switches=switches)


def kept_pages(generator: StreamingGenerator, num_frames: int, resident: int = 0, *, switches: bool) -> int:
    """Most pages that a stream holds between blocks; see ``stream_pages``."""
    deployment = generator.deployment
    if deployment.local_past is None:
        return num_frames + _encoded_anew(generator, num_frames, switches)
    kept = _resident(deployment, deployment.local_past, resident)
    first = deployment.sink if deployment.keep_sink_at_switch else 0
    gone = range(first, num_frames - (kept - deployment.sink))
    bank = max(bank_pages(generator, gone), _encoded_anew(generator, num_frames, switches))
    return min(num_frames, kept) + bank


def _encoded_anew(generator: StreamingGenerator, num_frames: int, switches: bool) -> int:
    """Pages of a memory bank; switches do not re-encode them, so the stream may hold these frames twice."""
    return bank_pages(generator, range(num_frames)) if switches else 0


def pages_at_switch(
    generator: StreamingGenerator, num_frames: int, resident: int = 0, *, switches: bool
) -> int:
    """Extra pages of a stream after a prompt switch has re-encoded more frames than it keeps."""
    deployment = generator.deployment
    if not switches or deployment.local_past is None:
        return 0
    kept = min(num_frames, _resident(deployment, deployment.local_past, resident))
    return max(0, min(num_frames, deployment.sink + deployment.reencoded(num_frames)) - kept)


def _resident(deployment: Deployment, local_past: int, resident: int) -> int:
    """History frames that a stream keeps: ``resident``, or those of its window or newest block if more."""
    return max(deployment.sink + max(local_past, deployment.block), resident)


def bank_pages(generator: StreamingGenerator, gone: range) -> int:
    """Most pages that a memory bank holds of frames that the stream has otherwise released.

    Layers may keep different frames; one more page is for the frame that the bank takes in next.
    """
    deployment = generator.deployment
    if not deployment.bank_size:
        return 0
    every = deployment.block * (1 if deployment.bank_every_block else RECORD_INTERVAL)
    recorded = sum(frame % every == 0 for frame in gone)
    return min(deployment.bank_size * generator.pages.num_layers + 1, recorded)


@dataclass(frozen=True)
class Pages:
    """Most pages that a rollout holds, by use."""

    waiting: int
    """Per group that has run: the pages that the replay will see."""
    root: int
    """Per group being explored: the pages of its window and its routed pages."""
    growing: int
    """Extra pages that switches at the forks re-encode."""
    branches: int
    """Own blocks of the members that run together."""
    replay: int
    """Own blocks of the members that are replayed together."""
    groups: int
    """Number of groups in the rollout."""
    together: int
    """Number of groups explored together."""

    @property
    def exploring(self) -> int:
        """Pages held while the last groups are explored and all others wait."""
        explored = self.together * self.root + max(self.growing, self.branches)
        return (self.groups - self.together) * self.waiting + explored


def groups_together(exploration: ExplorationConfig, groups: int, ranks: int = 1) -> int:
    """Number of groups explored together: as many as fit whole in ``exploration.rows``, at least one.

    Without that limit, a rank's share of all groups. Donor histories need every group's root at once.
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
    """Most pages that a rollout forked at ``fork`` and its replay need.

    ``together`` of the ``groups`` are explored at a time (0: all), and ``replayed`` members of a group are
    replayed at a time (0: all). With ``keep_pool``, roots keep all routable frames until the replay.
    """
    together = together or groups
    members = together * (exploration.branches + 1)
    rows = min(exploration.rows or members, members)
    own = (exploration.blocks + exploration.tail_blocks) * generator.block
    resident = exploration.resident_frames or fork
    root = kept_pages(generator, fork, resident, switches=switches)
    if not (keep_pool or exploration.donor):  # any of a donor's frames may be drawn
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
    """Pages that a branch adds to its root's.

    A branch releases its blocks as its window moves on, so a long tail costs nothing; its last block has no
    pages. The prompt may switch only in the tail; frames of the root are then re-encoded.
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
    """Number of most recent frames, not counting the sink, that a branch must keep pages of; 0: all."""
    local_past = generator.deployment.local_past
    return 0 if local_past is None else max(local_past, exploration.recent)


def branch_resident(generator: StreamingGenerator, exploration: ExplorationConfig) -> int:
    """Number of history frames in a branch's window, counting the sink; 0: all."""
    recent = branch_frames(generator, exploration)
    return recent and generator.deployment.sink + recent


@dataclass(frozen=True)
class PlannedRollout:
    """The plan of a rollout."""

    prompts: Sequence[VideoPrompt]
    forks: Sequence[Fork]
    """The fork of every prompt's group."""
    replayed: int = 0
    """Members replayed at a time; 0: all of a group."""
    keep_pool: bool = False
    """Keep all routable frames until the replay; else only the routed ones, until the branches have run."""
    share: Sequence[range] | None = None
    """Turns (groups explored together) that this process takes; None: all."""
    branch_ranks: int = 1
    """Number of processes that share the branches of each group."""

    def dealt(self, fork: Fork) -> ExplorationConfig:
        """The exploration at a fork, with the largest number of branches that one process runs."""
        branches = math.ceil(fork.exploration.branches / self.branch_ranks)
        return replace(fork.exploration, branches=branches)

    def turns(self, ranks: int = 1) -> list[range]:
        """Split all groups into turns; the groups of a turn are explored together."""
        groups = len(self.forks)
        size = groups_together(self.forks[0].exploration, groups, ranks)
        return [range(at, min(at + size, groups)) for at in range(0, groups, size)]

    @property
    def own_turns(self) -> Sequence[range]:
        """The turns that this process takes."""
        return self.turns() if self.share is None else self.share


def cache_pages(generator: StreamingGenerator, rollouts: Sequence[PlannedRollout]) -> int:
    """Pages of one cache for rollouts that are all collected, in order, before any is replayed.

    If groups fork at different frames, each counts as much as the most demanding one.
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
