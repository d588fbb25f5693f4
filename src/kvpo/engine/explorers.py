"""Explorers: what makes the branches of a fork differ from one another and from the anchor.

An explorer is a function (site, group) -> the group's branches as members. A member sets the pages in its
routed slots, the noise it reads and the solver step it takes; branches share everything else. To add an
explorer, write a function and add a line to ``EXPLORERS``.
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
    """The history frame in a routed slot, and the group that it belongs to."""

    group: int
    frame: int


Routes = tuple[tuple[RoutedFrame, ...], ...]
"""[P][routed]: the frames in a branch's routed slots, for every block of the window."""


@dataclass(frozen=True)
class Member:
    """One row of a rollout. A member that overrides nothing is the anchor."""

    group: int
    routes: Routes | None = None
    """None: the deployment context."""
    tape: Tape | None = None
    """Noise from the fork on; None: the root's."""
    step: Step | None = None
    """Solver step in the window; None: the generator's."""


@dataclass(frozen=True)
class Site:
    """A planned rollout, and the inputs that an explorer needs to create its branches."""

    generator: StreamingGenerator
    planned: PlannedRollout
    tape: Tape
    key: tuple[int | str, ...]
    """Seeds the explorer's random draws."""
    steps: int = 1
    """Number of leading solver steps to train on."""

    def exploration(self, group: int) -> ExplorationConfig:
        """The exploration settings fitted to a group's fork."""
        return self.planned.forks[group].exploration

    def blocks(self, group: int) -> range:
        """Blocks of a group's window."""
        first = self.planned.forks[group].frame // self.generator.block
        return range(first, first + self.exploration(group).blocks)

    @cached_property
    def pools(self) -> list[tuple[int, ...]]:
        """Routable frames of every group's own history."""
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
    """An explorer that gives branches fixed routes, ``[groups][G][routed]``, in every block."""

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
    """Branches with their own noise in the window, of the given ``kinds`` and ``strength`` in [0, 1]."""
    return [
        Member(
            group, tape=BranchTape(site.tape, (*site.key, group, branch), site.blocks(group), strength, kinds)
        )
        for branch in range(site.exploration(group).branches)
    ]


def renoise(site: Site, group: int) -> list[Member]:
    """Branches that share the initial noise and differ in the noise of the re-noising steps."""
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
    """Draw dispersed routes for one group's branches in one block, ``[G][routed]``.

    ``pools`` holds the routable frames of every group. Of the distinct frames, ``exploration.donor`` come
    from other groups' pools (an extension beyond the paper; 0 routes only a video's own history). The
    distinct frames are repeated evenly to fill the slots. Raises ValueError for donors with fewer than two
    groups.
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
