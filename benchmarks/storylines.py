"""A preference about what happens: when "one of them is back again", it should be the actor seen last.

The stories have three acts: two with different actors, and one whose caption says only that one of them is
back. The demo's base brings back the actor of the first act, whom the sink shows, whatever the noise; routed
history changes that. `write` writes such stories, `kvpo compare` trains on them with ``last_seen``, and
`count` says who comes back in the test stories after each of its runs.

    python benchmarks/storylines.py write stories.jsonl [--stories 1000]
    kvpo compare --prompts.file stories.jsonl --rewards.scorers benchmarks.storylines:last_seen --out DIR ...
    python benchmarks/storylines.py count DIR [--json FILE]
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from rich.progress import track
from torch import Tensor

from kvpo.app.build import build_setup, source_of
from kvpo.app.configuration import resolve_run
from kvpo.engine.generator import pixels_of
from kvpo.engine.noise import keyed_generator
from kvpo.files import write_atomic
from kvpo.prompt_files import written
from kvpo.prompts import ClipPrompt, VideoPrompt
from kvpo.training.checkpoint import find_checkpoint
from kvpo.training.run import open_checkpoint
from kvpo.training.setup import Setup
from kvpo.world.detector import attributes, detect
from kvpo.world.reward import DEFAULT_WEIGHTS, WorldScorer, weighted_total
from kvpo.world.stories import OPEN, sample_story, video_prompt

STARTS, FRAMES = (0, 15, 51), 72
"""First latent frame of every act, and their number."""
WORLD = WorldScorer()


def last_seen(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """The world's reward of an open act, judged by the caption before it, [B] in [0, 1]; 1 in other acts."""
    asked = [ClipPrompt(prompt.before or prompt, switch=prompt.switch) for prompt in prompts]
    total = weighted_total(WORLD(video_BTCHW, asked), DEFAULT_WEIGHTS)
    return torch.where(torch.tensor([prompt == OPEN for prompt in prompts]), total, 1.0)


def stories() -> Iterator[VideoPrompt]:
    """Stories of two acts with different actors, in attributes of the training split, and an open one."""
    generator, number = keyed_generator("storylines"), 0
    while True:
        story = sample_story(generator, 2, FRAMES)
        first, second = ({(a.colour, a.shape) for a in act.actors} for act in story.acts)
        if len(first) == len(second) == 1 and not {*first.pop()} & {*second.pop()}:
            captions = video_prompt(story, number).segments
            yield VideoPrompt(number, (*captions, OPEN), STARTS[1:], FRAMES)
            number += 1


def looks(video_BTCHW: Tensor) -> list[tuple[str, str]]:
    """Colour and shape of every clip's first actor."""
    return [(clip[1][0], clip[1][1]) for clip in attributes(detect(video_BTCHW))]


def shares(setup: Setup, prompts: Sequence[VideoPrompt]) -> dict[str, float]:
    """Who comes back in the current weights' videos, among those whose first acts show different actors.

    ``last`` and ``first`` are the shares in which the actor of the second and of the first act does (0 if no
    video's first acts differ).
    ``broken`` is the share of all videos whose open act the detector is less sure of than of 99 % of clean
    renders.
    """
    codec, block = setup.backbone.codec, setup.generator.block
    videos = pixels_of(codec, setup.backbone.latents(prompts, setup.final_tape()))

    def part(start: int, end: int) -> Tensor:
        return videos[:, start * codec.frames_per_latent : end * codec.frames_per_latent]

    with torch.no_grad():
        acts = [looks(part(end - 2 * block, end)) for end in STARTS[1:]]
        back = looks(part(STARTS[2] + 3 * block, FRAMES))  # three blocks for the change
        broken = detect(part(STARTS[2] + 3 * block, FRAMES)).broken
    told = [n for n, (one, two) in enumerate(zip(*acts, strict=True)) if one != two]
    of_act = [sum(back[n] == act[n] for n in told) / max(1, len(told)) for act in acts]
    return {"last": of_act[1], "first": of_act[0], "broken": float(broken.float().mean())}


def count(comparison: Path) -> dict[str, Any]:
    """`shares` of the base and, by arm, of every run of a comparison."""
    runs = sorted((comparison / "runs").glob("run-*"))  # not its trials
    config = resolve_run(runs[0])
    setup, prompts = build_setup(config), source_of(config).split(config)[2]["long"]
    found: dict[str, list[dict[str, float]]] = {}
    for run in track(runs, "runs"):
        sides = open_checkpoint(setup.backbone.weights, find_checkpoint(run / "checkpoints", "latest"))
        if not found:
            with sides.base():
                found["base"] = [shares(setup, prompts)]
        arm = run.name.removeprefix("run-").rpartition("-")[0]
        with sides.aligned():
            found.setdefault(arm, []).append(shares(setup, prompts))
    return {"stories": len(prompts), "arms": found}


def counted(numbers: Mapping[str, Any]) -> str:
    """The table: shares of stories by arm, mean and standard deviation over runs."""
    from measuring import table  # `kvpo compare` imports this file without its neighbours

    def cell(values: Sequence[float]) -> str:
        return f"{fmean(values):.2f}" + (f" ± {stdev(values):.2f}" if len(values) > 1 else "")

    rows = [
        (arm, len(runs), *(cell([run[name] for run in runs]) for name in ("last", "first", "broken")))
        for arm, runs in numbers["arms"].items()
    ]
    return table(("arm", "runs", "the last actor is back", "the first one is", "broken open acts"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the stories, or count who comes back."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    writing = commands.add_parser("write", help="write a prompt file (.jsonl)")
    writing.add_argument("out", type=Path)
    writing.add_argument("--stories", type=int, default=1000)
    counting = commands.add_parser("count", help="say who comes back after each run of a comparison")
    counting.add_argument("comparison", type=Path)
    counting.add_argument("--json", type=Path, metavar="FILE", help="where everything measured goes")
    options = parser.parse_args(arguments)
    if options.command == "write":
        write_atomic(options.out, written(list(islice(stories(), options.stories)), options.out))
        return
    from measuring import section, write_json

    numbers = count(options.comparison)
    section("Who comes back", counted(numbers))
    write_json(options.json, numbers)


if __name__ == "__main__":
    main()
