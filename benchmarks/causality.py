"""What does routed history bring back? Same noise, same prompt: act 1 only, act 2 only, and the anchor.

Long validation stories of the embedded world fork where their third act begins, and its caption says only
that one of them is back: who, and where, is for the history to decide. What acts 1 and 2 showed is read off
the pixels before the fork, what a branch shows off the blocks after its window. Only stories count whose acts
differ in the attribute.

    python benchmarks/causality.py [--stories 48] [--draws 4] [--json PATH] [any setting]
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean

import torch
from measuring import machine
from rich.progress import track

from kvpo.app.build import build_setup
from kvpo.app.configuration import resolve
from kvpo.app.report_data import laboratory
from kvpo.engine.explorers import RoutedFrame, chosen_routes
from kvpo.engine.forks import Fork, plan_forks
from kvpo.engine.noise import keyed_generator
from kvpo.engine.rollout import Group
from kvpo.prompts import VideoPrompt
from kvpo.training.diversity import Place
from kvpo.training.setup import Setup
from kvpo.world.detector import attributes, detect

OPEN = "Then one of them is back again."
ATTRIBUTES = ("scene", "colour", "shape")
ANCHOR, ACT_1, ACT_2 = "anchor", "act 1 only", "act 2 only"


def shown(pixels_MTCHW: torch.Tensor) -> list[dict[str, str]]:
    """Scene, and colour and shape of the first actor, of each clip."""
    found = attributes(detect(pixels_MTCHW))
    return [dict(zip(ATTRIBUTES, (clip[0], clip[1][0], clip[1][1]), strict=True)) for clip in found]


def drawn_routes(setup: Setup, prompt: VideoPrompt, fork: int, draws: int) -> list[tuple[str, list[int]]]:
    """``draws`` routes into each act: distinct frames of it, repeated to fill the routed slots."""
    exploration = setup.config.exploration
    generator = keyed_generator("causality", prompt.id)
    spans = {ACT_1: (setup.config.stream.sink, prompt.switches[0]),
             ACT_2: (prompt.switches[0], fork - exploration.recent)}  # fmt: skip
    routes = []
    for act, (first, stop) in spans.items():
        for _ in range(draws):
            chosen = first + torch.randperm(stop - first, generator=generator)[: exploration.distinct]
            frames = [int(chosen[n % len(chosen)]) for n in range(exploration.routed)]
            routes.append((act, sorted(frames)))
    return routes


def story(setup: Setup, prompt: VideoPrompt, draws: int) -> tuple[list[dict[str, str]], list]:
    """What acts 1 and 2 showed, and (history, what was shown) of every branch and the anchor."""
    fork, block = prompt.switches[1], setup.generator.block
    routes = drawn_routes(setup, prompt, fork, draws)
    # Act 1 may lie further back than training keeps pages for: here every frame stays.
    exploration = replace(setup.config.exploration, resident_frames=0)
    branches = [tuple(RoutedFrame(0, frame) for frame in frames) for _, frames in routes]
    place = Place((prompt,), Fork(fork, exploration))
    (group,) = laboratory(setup, [prompt]).branches(place, chosen_routes([branches]))
    with torch.no_grad():
        before = setup.backbone.codec.decode(torch.cat(group.root.latents)[None])
        after = _after_window(group, setup)
    acts = [shown(before[:, end - 2 * block : end])[0] for end in prompt.switches]
    return acts, list(zip([*(act for act, _ in routes), ANCHOR], shown(after), strict=True))


def _after_window(group: Group, setup: Setup) -> torch.Tensor:
    return setup.backbone.codec.decode(group.clean_MTCHW)[:, group.window_frames :]


def stories(setup: Setup, count: int) -> list[VideoPrompt]:
    """Validation stories whose third act begins at an eligible fork, its caption replaced by the open one."""
    found = []
    for prompt in setup.validation["long"]:
        asked = setup.config.exploration
        forks = plan_forks([prompt], asked, setup.generator.deployment).forks
        if any(fork.frame == prompt.switches[1] and fork.exploration == asked for fork in forks):
            found.append(replace(prompt, segments=(*prompt.segments[:2], OPEN)))
    return found[:count]


def shares(results: Sequence[tuple[list[dict[str, str]], list]]) -> dict[str, dict[str, dict[str, float]]]:
    """Attribute -> history -> share of branches that show what an act showed, averaged over stories."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for attribute in ATTRIBUTES:
        telling = [(acts, seen) for acts, seen in results if acts[0][attribute] != acts[1][attribute]]
        table[attribute] = {"stories": {"number": float(len(telling))}}
        for history in (ANCHOR, ACT_1, ACT_2):
            table[attribute][history] = {
                name: mean(
                    mean(float(look[attribute] == acts[n][attribute]) for h, look in seen if h == history)
                    for acts, seen in telling
                )
                for n, name in enumerate(("act 1", "act 2"))
            }
    return table


def markdown(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """One row per attribute and history."""
    lines = ["| attribute (stories) | routed history | shows act 1's | shows act 2's |", "|---|---|---|---|"]
    for attribute, rows in table.items():
        number = int(rows["stories"]["number"])
        for history in (ANCHOR, ACT_1, ACT_2):
            found = rows[history]
            lines.append(
                f"| {attribute} ({number}) | {history} | {found['act 1']:.2f} | {found['act 2']:.2f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stories", type=int, default=48)
    parser.add_argument("--draws", type=int, default=4, help="routes into each act")
    parser.add_argument("--json", type=Path, help="where everything measured goes")
    arguments, extra = parser.parse_known_args()
    settings = {name.removeprefix("--"): value for name, value in zip(extra[::2], extra[1::2], strict=True)}
    config = resolve("demo", None, settings)
    # About half of the stories have their second switch at an eligible fork.
    evaluation = replace(config.evaluation, validation_prompts=3 * arguments.stories, test_prompts=2)
    setup = build_setup(replace(config, evaluation=evaluation))
    chosen = stories(setup, arguments.stories)
    results = [story(setup, prompt, arguments.draws) for prompt in track(chosen, "stories")]
    table = shares(results)
    print(markdown(table))
    if arguments.json:
        arguments.json.write_text(json.dumps({"machine": machine(), "shares": table}, indent=1) + "\n")


if __name__ == "__main__":
    main()
