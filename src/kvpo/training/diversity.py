"""Branch diversity: routed histories compared with noise.

CHR branches share all noise and differ in history. Noise branches share the history and differ in the noise
of the window, which is either freshly drawn or mixed in as sqrt(1 - s^2) eps + s delta, with s chosen so that
branches are as far apart in pixels as CHR's at the same place.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain, combinations
from math import log

from torch import Tensor

from kvpo.engine.explorers import Explorer, Member, Site, noise_branches
from kvpo.engine.forks import Fork
from kvpo.engine.generator import Codec, StreamingGenerator, pixels_of
from kvpo.engine.noise import Tape
from kvpo.engine.pages import PlannedRollout, cache_pages
from kvpo.engine.rollout import Group, Rollout
from kvpo.engine.scoring import score_group
from kvpo.engine.stream import TextTable
from kvpo.method.diagnostics import mean_pairwise_distance
from kvpo.prompts import VideoPrompt
from kvpo.training.evaluation import Judges

Observer = Callable[[Tensor], tuple[list[tuple], Tensor]]
"""Videos [B, T, 3, H, W] -> what each shows at the end, as comparable tuples, and confidences [B]."""


@dataclass(frozen=True)
class ReadOff:
    """Reads what a video shows from its pixels."""

    observe: Observer
    broken_below: float
    """Confidence below which a video counts as broken."""


@dataclass(frozen=True)
class Diversity:
    """Branch diversity, averaged over forks."""

    attribute_diversity: float
    """Share of branch pairs whose decoded attributes differ after the window."""
    pixel_distance: float
    """Root mean square pixel difference between two branches over the window."""
    broken_share: float
    """Share of branches whose confidence is below the bound for clean renders."""
    reward_std: float
    """Standard deviation of the reward over the branches of a fork."""


@dataclass(frozen=True)
class Place:
    """Prompts that fork at one frame, where diversity is measured."""

    prompts: tuple[VideoPrompt, ...]
    fork: Fork


@dataclass(frozen=True)
class Laboratory:
    """A generator with its judges, for measuring diversity."""

    generator: StreamingGenerator
    codec: Codec
    texts: TextTable
    tape: Tape
    judges: Judges
    read_off: ReadOff | None
    """Required by ``measure``."""

    def branches(self, place: Place, explorer: Explorer) -> list[Group]:
        """An explorer's branches at a place, one group per prompt, with the anchor last."""
        with self.roots(place) as explore:
            return explore(explorer)

    @contextmanager
    def roots(self, place: Place) -> Iterator[Callable[[Explorer], list[Group]]]:
        """Yield a function like ``branches`` whose calls share roots that are grown only once."""
        groups = range(len(place.prompts))
        planned = PlannedRollout(place.prompts, [place.fork] * len(groups), keep_pool=True)
        cache = self.generator.new_cache(cache_pages(self.generator, [planned]))
        rollout = Rollout(self.generator, planned, self.texts, self.tape, cache)
        key, steps = ("diversity", place.fork.frame), len(self.generator.sigmas)
        site = Site(self.generator, planned, self.tape, key, steps)

        def explore(explorer: Explorer) -> list[Group]:
            members = [[*explorer(site, group), Member(group)] for group in groups]
            ran = rollout.run([*chain(*members)], rows=place.fork.exploration.rows)
            return [rollout.group_of(own, ran) for own in members]

        with self.generator.held():
            rollout.grow_roots(groups)
            yield explore

    def measure(self, groups: Sequence[Group]) -> Diversity:
        """Diversity of the branches (without the last member), averaged over groups."""
        assert self.read_off is not None
        results = []
        for group in groups:
            score = score_group(group, self.codec, self.judges.scorer, block=self.generator.block)
            pixels = pixels_of(self.codec, group.clean_MTCHW[:-1])
            window, after = pixels[:, : group.window_frames], pixels[:, group.window_frames :]
            # Without a tail the window is all there is to read.
            shown, confidence = self.read_off.observe(after if after.shape[1] else window)
            pairs = list(combinations(range(len(shown)), 2))
            results.append(
                (
                    sum(shown[a] != shown[b] for a, b in pairs) / len(pairs),
                    mean_pairwise_distance(window),
                    float((confidence < self.read_off.broken_below).float().mean()),
                    float((self.judges.weights_K @ score.local_KM)[:-1].std()),
                )
            )
        means = [sum(column) / len(results) for column in zip(*results, strict=True)]
        return Diversity(*means)

    def pixel_distance(self, groups: Sequence[Group]) -> float:
        """``Diversity.pixel_distance`` of the branches (without the last member), averaged over groups."""
        windows = (group.clean_MTCHW[:-1, : group.window_frames] for group in groups)
        return sum(mean_pairwise_distance(pixels_of(self.codec, window)) for window in windows) / len(groups)

    def matched_strength(
        self, explore: Callable[[Explorer], list[Group]], distance: float, fresh: float
    ) -> float:
        """Strength at which noise branches from the roots of ``explore`` are ``distance`` apart in pixels.

        The distance grows as a power of the strength, up to ``fresh``, the distance of fresh noise, at
        strength 1. Each of two trials estimates the exponent.
        """
        strength = distance / fresh if fresh else 1.0
        for _ in range(2):
            if not 0 < strength < 1:
                break
            found = self.pixel_distance(explore(partial(noise_branches, strength=strength)))
            if not found:
                break
            power = max(0.5, log(found / fresh) / log(strength))
            strength *= (distance / found) ** (1 / power)
        return min(1.0, strength)


def mean_diversity(measured: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Mean of each number over several measurements."""
    return {name: sum(row[name] for row in measured) / len(measured) for name in measured[0]}
