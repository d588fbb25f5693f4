"""How much do routed histories change, beside noise, and which routes change most?

Each row sets some of ``exploration.*``; the base generator forks the same validation stories under all.
Noise branches keep the deployment history and draw fresh noise for the same blocks.

    python benchmarks/exploration.py [--stories 16] [--json PATH] [--settings routed=3 ...]
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path

from measuring import machine
from rich.progress import track

from kvpo.app.build import build_setup
from kvpo.app.configuration import resolve
from kvpo.app.report_data import laboratory, story_places
from kvpo.engine.explorers import Explorer, fresh_noise, routes
from kvpo.training.diversity import mean_diversity

SETTINGS = (
    "routed=3,distinct=2",
    "routed=3,distinct=1",
    "routed=6,distinct=2",
    "routed=6,distinct=1",
    "routed=3,distinct=2,blocks=4",
    "routed=6,distinct=2,blocks=4",
)
NAMES = ("attribute_diversity", "pixel_distance", "broken_share", "reward_std")


def measured(setting: str, stories: int) -> dict[str, dict[str, float]]:
    """Diversity of routed and of noise branches under one setting, every story counted once."""
    flags = dict(part.split("=") for part in setting.split(","))
    config = resolve("demo", None, {f"exploration.{name}": value for name, value in flags.items()})
    setup = build_setup(replace(config, evaluation=replace(config.evaluation, test_prompts=2)))
    places = story_places(setup, stories)
    look = laboratory(setup, [prompt for place in places for prompt in place.prompts])

    def over_places(explorer: Explorer) -> dict[str, float]:
        measured = [(look.measure(look.branches(place, explorer)), len(place.prompts)) for place in places]
        return mean_diversity([found for found, count in measured for _ in range(count)])

    return {"routed": over_places(routes), "noise": over_places(fresh_noise)}


def markdown(results: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row per setting: routed / noise for every number, and the ratio of attribute diversities."""
    lines = [f"| exploration | {' | '.join(NAMES)} | routed / noise |", "|---|---|---|---|---|---|"]
    for setting, found in results.items():
        routed, noise = found["routed"], found["noise"]
        cells = " | ".join(f"{routed[name]:.3f} / {noise[name]:.3f}" for name in NAMES)
        ratio = routed["attribute_diversity"] / noise["attribute_diversity"]
        lines.append(f"| {setting} | {cells} | {ratio:.2f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stories", type=int, default=16)
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--json", type=Path, help="where everything measured goes")
    arguments = parser.parse_args()
    results = {
        setting: measured(setting, arguments.stories) for setting in track(arguments.settings, "routes")
    }
    print(markdown(results))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "routes": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
