"""How different the branches of a fork are, and in what: routed histories beside noise.

CHR branches share all noise and differ in history; noise branches share the history and differ in the noise
of the window, either freshly drawn or mixed in as sqrt(1 - s^2) eps + s delta with s set so that branches lie
as far apart in pixels as CHR's do.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine.generator import StreamingGenerator, pixels_of
from kvpo.engine.noise import Tape, keyed_generator, keyed_normal
from kvpo.engine.rollout import Group, Rollout, RoutedFrame, draw_routes, grow_roots, pool_of, run_members
from kvpo.engine.scoring import score_groups
from kvpo.engine.stream import TextTable
from kvpo.prompts import VideoPrompt
from kvpo.training.evaluation import Judges

Observer = Callable[[Tensor], tuple[list[tuple], Tensor]]
"""Videos [B, T, 3, H, W] -> what each shows at the end, as comparable tuples, and how sure that is [B]."""


@dataclass(frozen=True)
class Diversity:
    """Branch diversity, averaged over forks."""

    attribute_diversity: float
    """Share of branch pairs whose decoded attributes differ after the window."""
    pixel_distance: float
    """Root mean square pixel difference between two branches over the window."""
    broken_share: float
    """Share of branches whose confidence lies below the bound for clean renders."""
    reward_std: float
    """Standard deviation of the reward over the branches of a fork."""


@dataclass(frozen=True)
class NoiseBranches:
    """A tape in which every branch has its own noise inside the window: sqrt(1 - s^2) eps + s delta.

    Branch ``b`` of video ``v`` asks under the id ``v * branches + b``.
    """

    tape: Tape
    branches: int
    first_block: int
    blocks: int
    strength: float
    """s in [0, 1]; 1 is fresh noise."""

    def __call__(self, video: int, block: int, kind: str) -> Tensor:
        shared = self.tape(video // self.branches, block, kind)
        if not self.first_block <= block < self.first_block + self.blocks:
            return shared
        own = keyed_normal(tuple(shared.shape), "noise branch", video, block, kind)
        return (1 - self.strength**2) ** 0.5 * shared + self.strength * own


@dataclass(frozen=True)
class Fork:
    """Where diversity is measured: prompts that fork at one frame, and what is explored there."""

    prompts: tuple[VideoPrompt, ...]
    frame: int
    exploration: ExplorationConfig


@dataclass(frozen=True)
class Explorer:
    """What every measurement needs."""

    generator: StreamingGenerator
    texts: TextTable
    tape: Tape
    judges: Judges
    observe: Observer
    broken_below: float

    def routed(self, fork: Fork) -> list[Group]:
        """CHR branches, the anchor last."""
        pools = [pool_of(self.generator, one, fork.frame, fork.exploration) for one in fork.prompts]
        draws = keyed_generator("diversity routes", fork.frame)
        routes = [draw_routes(pools, index, fork.exploration, draws) for index in range(len(pools))]
        return self.chosen(fork, routes)

    def chosen(self, fork: Fork, routes: Sequence[Sequence[tuple[RoutedFrame, ...]]]) -> list[Group]:
        """Branches with given routes, ``[prompts][G][routed]``, and the anchor."""
        members = [
            (index, route and [route] * fork.exploration.blocks)
            for index, own in enumerate(routes)
            for route in [*own, None]
        ]
        return self._run(fork, members, self.tape, None)

    def noisy(self, fork: Fork, strength: float) -> list[Group]:
        """Branches with their own noise in the deployment context; the last member keeps branch noise too."""
        count = fork.exploration.branches + 1
        tape = NoiseBranches(
            self.tape, count, fork.frame // self.generator.block, fork.exploration.blocks, strength
        )
        members = [(index, None) for index in range(len(fork.prompts)) for _ in range(count)]
        videos = [prompt.id * count + branch for prompt in fork.prompts for branch in range(count)]
        return self._run(fork, members, tape, videos)

    def _run(self, fork, members, tape, videos) -> list[Group]:
        rollout: Rollout = grow_roots(
            self.generator, fork.prompts, fork.frame, self.texts, self.tape, fork.exploration
        )
        states, velocities, clean = run_members(
            self.generator, rollout, members, self.texts, tape, videos=videos, rows=fork.exploration.rows
        )
        rollout.release()
        rows = [[n for n, (owner, _) in enumerate(members) if owner == g] for g in range(len(rollout.groups))]
        return [
            replace(
                group,
                routes=tuple(tuple(members[n][1]) for n in own if members[n][1] is not None),
                states_MPSFCHW=states[own],
                velocities_MPSFCHW=velocities[own],
                clean_MTCHW=clean[own],
            )
            for group, own in zip(rollout.groups, rows, strict=True)
        ]

    def measure(self, groups: Sequence[Group]) -> Diversity:
        """Diversity of the branches (without the last member), averaged over groups."""
        scores = score_groups(groups, self.judges.codec, self.judges.scorer, block=self.generator.block)
        results = []
        for group, score in zip(groups, scores, strict=True):
            pixels = pixels_of(self.judges.codec, group.clean_MTCHW[:-1])
            window, after = pixels[:, : group.window_frames], pixels[:, group.window_frames :]
            # Without a tail the window is all there is to read.
            shown, confidence = self.observe(after if after.shape[1] else window)
            pairs = list(combinations(range(len(shown)), 2))
            distance = torch.pdist(window.flatten(1)).mean() / window[0].numel() ** 0.5
            results.append(
                (
                    sum(shown[a] != shown[b] for a, b in pairs) / len(pairs),
                    float(distance),
                    float((confidence < self.broken_below).float().mean()),
                    float(score.totals(self.judges.weights_K, 0.0)[:-1].std()),
                )
            )
        means = [sum(column) / len(results) for column in zip(*results, strict=True)]
        return Diversity(*means)

    def matched_strength(self, forks: Sequence[Fork], distance: float) -> float:
        """Noise strength at which noise branches lie ``distance`` apart in pixels, by bisection."""
        low, high = 0.0, 1.0
        for _ in range(6):
            middle = (low + high) / 2
            found = sum(self.measure(self.noisy(fork, middle)).pixel_distance for fork in forks) / len(forks)
            low, high = (middle, high) if found < distance else (low, middle)
        return (low + high) / 2


def averaged(measured: Sequence[Diversity]) -> dict[str, float]:
    """Mean of each number over several measurements."""
    rows = [asdict(item) for item in measured]
    return {name: sum(row[name] for row in rows) / len(rows) for name in rows[0]}
