"""Explorers: how the branches of a fork are told apart from one another and from the anchor.

An explorer is a function (site, group) -> the group's branches as members: which pages each sees in its
routed slots, which noise it reads and which solver step it takes. Branches share everything else. A new one
is a function and a line in ``EXPLORERS``.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from kvpo.config import ExplorationConfig
from kvpo.engine.forks import pool_of
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import BranchTape, Tape, keyed_generator
from kvpo.engine.pages import PlannedRollout
from kvpo.method.flow import Step, sde_step
from kvpo.method.routing import dispersed_routes


@dataclass(frozen=True)
class RoutedFrame:
    """One routed slot: which frame of which group's history fills it."""

    group: int
    frame: int


Routes = tuple[tuple[RoutedFrame, ...], ...]
"""[P][routed]: what fills a branch's routed slots in every block of the window."""


@dataclass(frozen=True)
class Member:
    """One row of a rollout. A member that differs in nothing is the anchor."""

    group: int
    routes: Routes | None = None
    """None: the deployment context."""
    tape: Tape | None = None
    """Noise from the fork on; None: the root's."""
    step: Step | None = None
    """Solver step in the window; None: the generator's."""


@dataclass(frozen=True)
class Site:
    """A planned rollout, and what an explorer needs to tell its branches apart."""

    generator: StreamingGenerator
    planned: PlannedRollout
    tape: Tape
    key: tuple[int | str, ...]
    """Seeds what is drawn."""
    steps: int = 1
    """First solver steps that will be learned from."""

    def exploration(self, group: int) -> ExplorationConfig:
        """The exploration that fits at a group's fork."""
        return self.planned.forks[group].exploration

    def blocks(self, group: int) -> range:
        """Blocks of a group's window."""
        first = self.planned.forks[group].frame // self.generator.block
        return range(first, first + self.exploration(group).blocks)

    @cached_property
    def pools(self) -> list[tuple[int, ...]]:
        """Frames of every group's own history that may be routed."""
        pairs = zip(self.planned.prompts, self.planned.forks, strict=True)
        return [pool_of(self.generator.deployment, p, fork.frame, fork.exploration) for p, fork in pairs]


Explorer = Callable[[Site, int], list[Member]]


def routes(site: Site, group: int) -> list[Member]:
    """Causal History Routing: branches share all noise and differ in which history fills the local slots."""
    exploration = site.exploration(group)
    draws = keyed_generator("routes", *site.key, group)
    drawn = [draw_routes(site.pools, group, exploration, draws)] * exploration.blocks
    return [Member(group, routes=own) for own in zip(*drawn, strict=True)]


def chosen_routes(groups: Sequence[Sequence[tuple[RoutedFrame, ...]]]) -> Explorer:
    """An explorer whose branches have given routes, ``[groups][G][routed]``, in every block."""

    def explorer(site: Site, group: int) -> list[Member]:
        blocks = site.exploration(group).blocks
        return [Member(group, routes=(route,) * blocks) for route in groups[group]]

    return explorer


def fresh_noise(site: Site, group: int) -> list[Member]:
    """Branches in the deployment context with fresh noise in the window."""
    return noise_branches(site, group, 1.0)


def neighbour_noise(site: Site, group: int) -> list[Member]:
    """Branches whose noise in the window is sqrt(1 - k^2) eps + k delta, k = ``exploration.noise``."""
    return noise_branches(site, group, site.exploration(group).noise)


def noise_branches(
    site: Site, group: int, strength: float, kinds: tuple[str, ...] = ("initial", "renoise")
) -> list[Member]:
    """Branches with noise of their own in the window: its kinds, and its strength in [0, 1]."""
    return [
        Member(
            group, tape=BranchTape(site.tape, (*site.key, group, branch), site.blocks(group), strength, kinds)
        )
        for branch in range(site.exploration(group).branches)
    ]


def renoise(site: Site, group: int) -> list[Member]:
    """Branches that share the initial noise and differ in what the re-noising step draws."""
    return noise_branches(site, group, 1.0, kinds=("renoise",))


def sde(site: Site, group: int) -> list[Member]:
    """Branches that take stochastic solver steps of strength ``exploration.noise`` (Flow-GRPO)."""
    step = sde_step(site.exploration(group).noise, site.generator.sigmas[site.steps - 1])
    return [Member(group, tape=one.tape, step=step) for one in renoise(site, group)]


EXPLORERS: dict[str, Explorer] = {
    "routes": routes,
    "fresh": fresh_noise,
    "neighbour": neighbour_noise,
    "sde": sde,
    "renoise": renoise,
}


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
