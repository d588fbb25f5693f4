"""Ways to share a run among ranks: teams that have groups in common, with whole or spread weights.

``kvpo.training.trainer`` does what is counted here; docs/scale.md has the formulas.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from kvpo.config import Config
from kvpo.engine.pages import groups_together
from kvpo.plan.memory import Parameters
from kvpo.plan.replays import Replays
from kvpo.training.reduction import BUCKET

GATHERED = 2
"""Layers of spread weights that are whole at a time: the one that runs, and the one that comes next."""


@dataclass(frozen=True)
class Sharing:
    """The ranks of a run. The default is one process."""

    ranks: int = 1
    branch_ranks: int = 1
    """Ranks that have each group in common."""
    shard: bool = False
    """Weights are spread over these."""
    per_node: int = 1
    """Ranks of a node."""

    @property
    def teams(self) -> int:
        """Teams of ranks, each with groups of its own."""
        return self.ranks // self.branch_ranks

    @property
    def parts(self) -> int:
        """Ranks that weights are spread over."""
        return self.branch_ranks if self.shard else 1

    @property
    def name(self) -> str:
        """The split in words."""
        if self.ranks == 1:
            return "one process"
        shared = f"teams of {self.branch_ranks}" if self.branch_ranks > 1 else "groups"
        return shared + (", weights spread" if self.shard else "")

    @property
    def flags(self) -> str:
        """Settings that ask for it."""
        shared = f"--distributed.branch_ranks {self.branch_ranks}"
        return shared + (" --distributed.shard true" if self.shard else "")

    def share(self, config: Config) -> Config:
        """The groups of the busiest team, with as many branches as a rank runs of each."""
        exploration, optim = config.exploration, config.optim
        turn = groups_together(exploration, optim.prompts_per_update, self.teams)
        turns = math.ceil(math.ceil(optim.prompts_per_update / turn) / self.teams)
        groups = min(optim.prompts_per_update, turns * turn)
        branches = math.ceil(exploration.branches / self.branch_ranks)
        return replace(
            config,
            exploration=replace(exploration, branches=branches),
            optim=replace(optim, prompts_per_update=groups),
        )

    def replayed(self, replays: Replays) -> Replays:
        """The replays of a rank."""
        each = math.ceil(replays.trajectories / self.branch_ranks)
        together = min(replays.together, each)
        return replace(
            replays,
            trajectories=each,
            routed=math.ceil(replays.routed / self.branch_ranks),
            together=together,
            states=replays.states * together // replays.together,
            apart=replays.apart or each < replays.trajectories,
        )

    def kept(self, replays: Replays) -> int:
        """Gradients of micro-batches that a rank holds at a time; of its own ``replays``."""
        if self.shard or self.branch_ranks == 1:
            return 1
        return math.ceil(replays.trajectories / replays.together)

    def exchanged(self, config: Config, parameters: Parameters, replays: Replays) -> float:
        """Bytes of gradients that a rank sends per update; ``config`` and ``replays`` are its share."""
        ranks, numbers = self.ranks, 4.0 * parameters.trained
        groups, inner = config.optim.prompts_per_update, config.optim.inner_epochs
        if not self.shard:
            return inner * numbers * (groups * self.kept(replays) + 1) * (ranks - 1) / ranks
        own, teams, team = numbers / self.parts, self.teams, self.branch_ranks
        between = own * (groups + 1) * (teams - 1) / teams
        batches = groups * math.ceil(replays.trajectories / replays.together)
        return inner * (between + batches * numbers * (team - 1) / team)

    def buckets(self, parameters: Parameters, replays: Replays, together: int) -> float:
        """Bytes of the gradients that are being exchanged, sent and received."""
        if self.ranks == 1:
            return 0.0
        return 2.0 * together * self.kept(replays) * min(4 * BUCKET, 4 * parameters.trained / self.parts)

    def gathered(self, parameters: Parameters, layers: int) -> float:
        """Bytes of spread weights that are whole at a time."""
        return GATHERED * (parameters.weights + parameters.adapter) / layers if self.shard else 0.0


def splits(gpus: int, nodes: int) -> Iterator[Sharing]:
    """All ways to share a run among ``nodes`` of ``gpus``; teams stay within a node."""
    for size in (size for size in range(1, gpus + 1) if gpus % size == 0):
        for shard in (False, True) if size > 1 else (False,):
            yield Sharing(gpus * nodes, size, shard, gpus)
