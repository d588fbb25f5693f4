"""Ways to split a run over ranks: teams that share groups, with whole or sharded weights.

``kvpo.training.trainer`` does the work that is counted here; docs/scale.md has the formulas.
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
"""Sharded layers that are gathered at a time: the one that runs and the next one."""


@dataclass(frozen=True)
class Sharing:
    """The ranks of a run. The default is one process."""

    ranks: int = 1
    branch_ranks: int = 1
    """Ranks that share each group."""
    shard: bool = False
    """Shard the weights over the ranks that share a group."""
    per_node: int = 1
    """Ranks per node."""

    @property
    def teams(self) -> int:
        """Teams of ranks, each with groups of its own."""
        return self.ranks // self.branch_ranks

    @property
    def parts(self) -> int:
        """Ranks that weights are sharded over; 1 without sharding."""
        return self.branch_ranks if self.shard else 1

    @property
    def adding(self) -> int:
        """Ranks that add up gradients, each a part of them: of sharded weights, those of different teams."""
        return self.teams if self.shard else self.ranks

    @property
    def name(self) -> str:
        """The split in words."""
        if self.ranks == 1:
            return "one process"
        shared = f"teams of {self.branch_ranks}" if self.branch_ranks > 1 else "groups"
        return shared + (", weights spread" if self.shard else "")

    @property
    def flags(self) -> str:
        """Command-line flags that select the split."""
        shared = f"--distributed.branch_ranks {self.branch_ranks}"
        return shared + (" --distributed.shard true" if self.shard else "")

    def share(self, config: Config) -> Config:
        """The configuration with the busiest team's groups and the branches that one rank runs of each."""
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
        """A rank's share of the replays of whole groups."""
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
        """Micro-batch gradients that a rank holds at a time; ``replays`` is its share."""
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
        """Bytes of the gradients that are in exchange, sent and received."""
        if self.ranks == 1:
            return 0.0
        return 2.0 * together * self.kept(replays) * min(4 * BUCKET, 4 * parameters.trained / self.parts)

    def gathered(self, parameters: Parameters, layers: int) -> float:
        """Bytes of sharded weights that are gathered at a time."""
        return GATHERED * (parameters.weights + parameters.adapter) / layers if self.shard else 0.0


def splits(gpus: int, nodes: int) -> Iterator[Sharing]:
    """All ways to split a run over ``nodes`` nodes of ``gpus`` GPUs each; teams stay within a node."""
    for size in (size for size in range(1, gpus + 1) if gpus % size == 0):
        for shard in (False, True) if size > 1 else (False,):
            yield Sharing(gpus * nodes, size, shard, gpus)
