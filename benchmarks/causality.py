"""Show that routed history decides who comes back: same noise and prompt, different frames.

The test stories have four acts, of which the first three show different actors; the fourth caption says only
that one of them is back. When it begins, the deployment window holds act 1 (the sink) and act 3 (the recent
frames); act 2 is hidden. Branches are routed to six distinct frames: n of act 2 and 6 - n of act 1 for
n = 0 to 6, or six of another story's act 2. Colours and shapes are read off pixels, both of the acts and of
each branch in the blocks after its window.

    python benchmarks/causality.py [--stories 48] [--draws 3] [--json FILE] [any setting]
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations, islice
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from measuring import given_settings, machine, section, table, write_json
from rich.progress import track

from kvpo.app.build import build_setup
from kvpo.app.configuration import preset
from kvpo.app.report_data import act_ends, after_window, laboratory
from kvpo.engine.explorers import RoutedFrame, chosen_routes
from kvpo.engine.forks import Fork
from kvpo.engine.noise import keyed_generator
from kvpo.engine.rollout import Group
from kvpo.prompts import VideoPrompt
from kvpo.training.diversity import Place
from kvpo.training.setup import Setup
from kvpo.world.detector import attributes, detect
from kvpo.world.stories import open_prompts

ROUTED = 6
ANCHOR, DONOR = "anchor", "donor"
TOGETHER = 8
"""Stories that fork in one rollout."""
FEW_PROMPTS = {"evaluation.validation_prompts": 2, "evaluation.test_prompts": 2}
"""Prompts of the setup itself, which are not used here."""

Look = tuple[str, str]
"""Colour and shape of an actor."""


@dataclass(frozen=True)
class Shown:
    """The actors that a member of a group shows after its window."""

    history: str
    """Number of routed frames of act 2, ANCHOR or DONOR."""
    look: Look
    broken: bool


@dataclass(frozen=True)
class Observed:
    """One story: the actors of acts 1 to 3 and of another story's act 2, and who came back."""

    acts: list[set[Look]]
    donor: set[Look]
    members: list[Shown]

    @property
    def telling(self) -> bool:
        """True if the acts can be told apart by their looks."""
        return all(not a & b for a, b in combinations(self.acts, 2))

    def share(self, history: str, looks: set[Look]) -> float:
        """Share of the members with a given history that show one of ``looks``."""
        return fmean(float(m.look in looks) for m in self.members if m.history == history)


def drawn_routes(
    prompts: Sequence[VideoPrompt], index: int, draws: int, sink: int
) -> list[tuple[str, tuple[RoutedFrame, ...]]]:
    """(history, route) of every branch: per draw, every n frames of act 2, then another story's act 2."""
    first, second, third = prompts[index].switches
    generator = keyed_generator("causality", prompts[index].id)
    other = (index + 1) % len(prompts)

    def some(start: int, stop: int, count: int, video: int) -> list[RoutedFrame]:
        chosen = (start + torch.randperm(stop - start, generator=generator)[:count]).sort().values
        return [RoutedFrame(video, frame) for frame in chosen.tolist()]

    routes = []
    for _ in range(draws):
        for n in range(ROUTED + 1):
            route = some(sink, first, ROUTED - n, index) + some(first, second, n, index)
            routes.append((str(n), tuple(route)))
        routes.append((DONOR, tuple(some(first, second, ROUTED, other))))
    return routes


def observed(setup: Setup, prompts: Sequence[VideoPrompt], draws: int) -> list[Observed]:
    """The actors that each story brings back; all stories switch at the same frames."""
    deployment = setup.generator.deployment
    routes = [drawn_routes(prompts, n, draws, deployment.sink) for n in range(len(prompts))]
    # Keep all pages: act 1 may be older than those that training keeps, and donors are in another group.
    exploration = replace(
        setup.config.exploration,
        branches=len(routes[0]),
        routed=ROUTED,
        distinct=ROUTED,
        resident_frames=0,
        rows=0,
    )
    place = Place(tuple(prompts), Fork(prompts[0].switches[2], exploration))
    explorer = chosen_routes([[route for _, route in own] for own in routes])
    groups = laboratory(setup, prompts).branches(place, explorer)
    acts = [acts_shown(setup, group) for group in groups]
    found = []
    for n, (group, own) in enumerate(zip(groups, routes, strict=True)):
        histories = [*(history for history, _ in own), ANCHOR]
        members = [
            Shown(history, look, broken)
            for history, (look, broken) in zip(histories, shown_after(setup, group), strict=True)
        ]
        found.append(Observed(acts[n], acts[(n + 1) % len(acts)][1], members))
    return found


def shown_after(setup: Setup, group: Group) -> list[tuple[Look, bool]]:
    """Each member's look (its first actor's colour and shape) after the window, and whether it is broken."""
    with torch.no_grad():
        seen = detect(after_window(group, setup.backbone.codec))
    looks = [(clip[1][0], clip[1][1]) for clip in attributes(seen)]
    return list(zip(looks, seen.broken.tolist(), strict=True))


def acts_shown(setup: Setup, group: Group) -> list[set[Look]]:
    """Colours and shapes in the last two blocks of each of acts 1 to 3."""
    with torch.no_grad():
        seen = detect(act_ends(group, setup.backbone.codec, setup.generator.block))
    return [{(look[0], look[1]) for look in clip[1:]} for clip in attributes(seen)]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean over stories, and its standard error."""
    return fmean(values), stdev(values) / sqrt(len(values))


def summary(results: Sequence[Observed]) -> dict[str, Any]:
    """The published shares with standard errors, over stories whose acts can be told apart."""
    stories = [story for story in results if story.telling]
    if len(stories) < 2:
        raise SystemExit(f"only {len(stories)} of {len(results)} stories tell their acts apart: ask for more")
    numbers: dict[str, Any] = {"stories": len(stories), "stories_shown": len(results)}

    def add(name: str, history: str, act: int) -> None:
        values = [story.share(history, story.acts[act]) for story in stories]
        numbers[name], numbers[f"{name}_se"] = mean_and_error(values)

    add("act1_when_routed_to_act1", "0", 0)
    add("act2_when_routed_to_act2", str(ROUTED), 1)
    add("act2_when_not_routed", ANCHOR, 1)
    add("act1_when_not_routed", ANCHOR, 0)
    add("act1_when_routed_to_act2", str(ROUTED), 0)
    add("act2_when_routed_to_act1", "0", 1)
    # A donor that looks like one of the story's own acts proves nothing.
    donors = [story for story in stories if not any(story.donor & act for act in story.acts)]
    numbers["stories_with_donor"] = len(donors)
    if len(donors) > 1:
        for name, looks in (
            ("donor_when_routed_to_donor", [story.donor for story in donors]),
            ("act2_when_routed_to_donor", [story.acts[1] for story in donors]),
        ):
            values = [story.share(DONOR, own) for story, own in zip(donors, looks, strict=True)]
            numbers[name], numbers[f"{name}_se"] = mean_and_error(values)
    by_frames = [
        mean_and_error([story.share(str(n), story.acts[1]) for story in stories]) for n in range(ROUTED + 1)
    ]
    numbers["act2_by_routed_frames"] = [value for value, _ in by_frames]
    numbers["act2_by_routed_frames_se"] = [error for _, error in by_frames]
    numbers["broken"] = {
        history: fmean(float(m.broken) for story in results for m in story.members if m.history == history)
        for history in (ANCHOR, DONOR, *map(str, range(ROUTED + 1)))
    }
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stories", type=int, default=48)
    parser.add_argument("--draws", type=int, default=3, help="routes of every kind")
    parser.add_argument("--frames", type=int, default=84, help="latent frames of a story")
    parser.add_argument("--json", type=Path, metavar="FILE", help="where everything measured goes")
    options, extra = parser.parse_known_args(arguments)
    setup = build_setup(preset("demo", {**given_settings(extra), **FEW_PROMPTS}))
    prompts = list(islice(open_prompts(options.frames, setup.generator.block), options.stories))
    batches = [prompts[n : n + TOGETHER] for n in range(0, len(prompts), TOGETHER)]
    results = [o for batch in track(batches, "stories") for o in observed(setup, batch, options.draws)]
    numbers = summary(results)
    shares = [(name, numbers[name], numbers[f"{name}_se"]) for name in numbers if f"{name}_se" in numbers]
    *shares, (_, counts, errors) = shares
    rising = [(n, *pair) for n, pair in enumerate(zip(counts, errors, strict=True))]
    section(
        f"Who comes back ({numbers['stories']} stories)",
        table(["share of branches", "mean", "standard error"], shares),
        table(["frames of act 2 routed", "act 2's actor", "standard error"], rising),
    )
    write_json(options.json, {"machine": machine(), **numbers})


if __name__ == "__main__":
    main()
