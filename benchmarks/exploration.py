"""Measure how much routed histories change compared with fresh noise, and which routes change most.

The last caption of each test story says only that one of its actors is back; the stories fork there. Two
branches of a story differ validly if both show a possible continuation (an actor of act 1 or act 2, not
broken) and the two actors differ. Each row sets some of ``exploration.*``; the base generator forks the same
stories for every row. Noise branches keep the deployment history and draw fresh noise for the same blocks.

    python benchmarks/exploration.py [--stories 32] [--json FILE] [--settings routed=3 ...] [any setting]
"""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import combinations, islice
from pathlib import Path
from statistics import fmean
from typing import Any

from causality import FEW_PROMPTS, TOGETHER, Look, acts_shown, mean_and_error, shown_after
from measuring import given_settings, machine, section, table, write_json
from rich.progress import track

from kvpo.app.build import build_setup
from kvpo.app.configuration import preset
from kvpo.app.report_data import laboratory
from kvpo.engine.explorers import Explorer, fresh_noise, routes
from kvpo.engine.forks import Fork
from kvpo.engine.rollout import Group
from kvpo.prompts import VideoPrompt
from kvpo.training.diversity import Place, mean_diversity
from kvpo.training.setup import Setup
from kvpo.world.stories import open_prompts

SETTINGS = (
    "routed=3,distinct=2",
    "routed=6,distinct=2",
    "routed=6,distinct=1",
    "routed=6,distinct=2,resident_frames=0",
    "routed=6,distinct=6,resident_frames=0",
    "routed=6,distinct=2,blocks=4,resident_frames=0",
)
COUNTED = ("valid_differences", "valid_share", "broken_share")
NAMES = (*COUNTED, "attribute_diversity", "pixel_distance", "reward_std")


def counted(shown: Sequence[tuple[Look, bool]], possible: set[Look]) -> dict[str, float]:
    """Shares for one story: pairs of branches that differ validly, valid branches, and broken ones."""
    valid = [look if look in possible and not broken else None for look, broken in shown]
    pairs = list(combinations(valid, 2))
    return {
        "valid_differences": fmean(float(None not in pair and pair[0] != pair[1]) for pair in pairs),
        "valid_share": fmean(float(look is not None) for look in valid),
        "broken_share": fmean(float(broken) for _, broken in shown),
    }


def measured(
    setup: Setup, prompts: Sequence[VideoPrompt], explorer: Explorer
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Diversity of the branches of one explorer, and the shares of every story; each counts once."""
    per_story, others = [], []
    fork = Fork(prompts[0].switches[2], setup.config.exploration)
    for first in range(0, len(prompts), TOGETHER):
        batch = prompts[first : first + TOGETHER]
        look = laboratory(setup, batch)
        groups: list[Group] = look.branches(Place(tuple(batch), fork), explorer)
        for group in groups:
            acts = acts_shown(setup, group)
            per_story.append(counted(shown_after(setup, group)[:-1], acts[0] | acts[1]))
            others.append(asdict(look.measure([group])))
    return {**mean_diversity(others), **shares(per_story)}, per_story


def shares(per_story: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Means over stories and their standard errors (``_se``)."""
    found = {}
    for name in COUNTED:
        found[name], found[f"{name}_se"] = mean_and_error([story[name] for story in per_story])
    return found


def under(setting: str, stories: int, given: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Measure routed and noise branches under one setting, and their difference by story."""
    words = [word for part in setting.split(",") for word in f"exploration.{part}".split("=")]
    setup = build_setup(preset("demo", {**given, **FEW_PROMPTS, **given_settings(words)}))
    prompts = list(islice(open_prompts(84, setup.generator.block), stories))
    (routed, by_routes), (noise, by_noise) = (
        measured(setup, prompts, kind) for kind in (routes, fresh_noise)
    )
    pairs = zip(by_routes, by_noise, strict=True)
    differences = [{name: a[name] - b[name] for name in COUNTED} for a, b in pairs]
    return {"routed": routed, "noise": noise, "difference": shares(differences)}


def compared(results: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """The table: routed branches and fresh noise, by exploration setting."""
    rows = [
        (setting, *(f"{found['routed'][name]:.3f} / {found['noise'][name]:.3f}" for name in NAMES))
        for setting, found in results.items()
    ]
    return table(["exploration", *NAMES], rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stories", type=int, default=32)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="where everything measured goes")
    options, extra = parser.parse_known_args(arguments)
    given = given_settings(extra)
    results = {
        setting: under(setting, options.stories, given) for setting in track(options.settings, "routes")
    }
    section("Routed / fresh noise", compared(results))
    write_json(options.json, {"machine": machine(), "routes": results})


if __name__ == "__main__":
    main()
