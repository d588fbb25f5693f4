"""Compare bases of the embedded world before alignment: how much they get right, and how much is broken.

The validation stories have one act, or four acts over as many frames as in pretraining; every base uses the
same noise. A clip is broken if the detector's confidence is below the 1st percentile of clean renders. For
stories of four acts, only the last act is checked.

    python benchmarks/bases.py NAME=FILE ... [--stories 32] [--json FILE] [any setting]
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from measuring import given_settings, machine, section, table, write_json
from rich.progress import track

from kvpo.app.build import build_setup
from kvpo.app.configuration import preset
from kvpo.engine.generator import pixels_of
from kvpo.prompts import VideoPrompt
from kvpo.training.evaluation import accuracies, batches, segment_scores
from kvpo.training.setup import Setup
from kvpo.world.detector import detect
from kvpo.world.stories import distinct_prompts

ACTS, FRAMES = 4, 84
TOGETHER = 8


def measured(setup: Setup, prompts: Sequence[VideoPrompt]) -> dict[str, Any]:
    """Means over stories (reward, unseen scorer, broken last acts), and the shares of demands met."""
    codec, judges, block = setup.backbone.codec, setup.judges, setup.generator.block
    assert judges.exam is not None and judges.unseen is not None
    rewards, unseen, exam, broken = [], [], [], []
    for some in batches(prompts, TOGETHER):
        videos = pixels_of(codec, setup.backbone.latents(some, setup.evaluation_tape()))
        frames = codec.frames_per_latent
        with torch.no_grad():
            rewards.append(
                judges.weights_K @ segment_scores(judges.scorer, videos, some, frames, block, block)
            )
            unseen.append(segment_scores(judges.unseen, videos, some, frames, block, 0)[0])
            exam.append(segment_scores(judges.exam, videos, some, frames, block, 0, counted=True))
            for video, prompt in zip(videos, some, strict=True):
                last = max(prompt.switches, default=0)
                broken.append(float(detect(video[None, last:]).broken))
    counts = torch.cat(exam, 1)
    right = accuracies(judges.exam.components, counts, counts)
    return {
        "reward": float(torch.cat(rewards).mean()),
        "unseen": float(torch.cat(unseen).mean()),
        "broken": sum(broken) / len(broken),
        "right": {name: found["base"] for name, found in right.items()},
    }


def of_base(path: str, stories: int, given: dict[str, Any]) -> dict[str, Any]:
    """Measure one base on short and on long stories."""
    prompts = {"evaluation.validation_prompts": stories, "evaluation.test_prompts": 2}
    setup = build_setup(preset("demo", {**given, **prompts, "backbone.checkpoint": path}))
    long = distinct_prompts("validation", stories, ACTS, FRAMES, 303, 40_000_000)
    return {
        "sha256": setup.backbone.weights.base_sha256,
        "short": measured(setup, setup.validation["short"]),
        "long": measured(setup, long),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("bases", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--stories", type=int, default=32)
    parser.add_argument("--json", type=Path, metavar="FILE", help="where everything measured goes")
    options, extra = parser.parse_known_args(arguments)
    paths = dict(base.split("=", 1) for base in options.bases)
    given = given_settings(extra)
    results = {name: of_base(path, options.stories, given) for name, path in track(paths.items(), "bases")}
    section("Bases", compared(results))
    write_json(options.json, {"machine": machine(), "stories": options.stories, "bases": results})


def compared(results: dict[str, dict[str, Any]]) -> str:
    """The table, with a column per base."""
    rows: list[list[object]] = []
    for kind, words in (("short", "one act"), ("long", f"{ACTS} acts")):
        own = [base[kind] for base in results.values()]
        rows += [[f"{words}: {key}", *(one[key] for one in own)] for key in ("reward", "unseen", "broken")]
        rows += [[f"{words}: right {name}", *(one["right"][name] for one in own)] for name in own[0]["right"]]
    return table(["", *results], rows)


if __name__ == "__main__":
    main()
