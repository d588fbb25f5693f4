"""Do votes lead to videos that the voters prefer? From a hidden taste to a reward to a fresh blind round.

Synthetic raters like calm: the world's own measures of smooth paths and steady light, which the trainer does
not see. They vote on pairs of base videos (same prompts, two noise seeds) by a logistic choice. A reward is
learned from the votes on pixel features that know neither prompts nor actors. The demo is aligned with this
reward alone while the radar watches the world's reward. Then the same raters compare base and aligned on
prompts that neither the votes nor the training have seen.

    python benchmarks/preference_loop.py --out runs/preference --seeds 0 1 2 [--fresh-pairs 128] [--json FILE]
"""

import argparse
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from measuring import table, write_json

from kvpo.app.align import align
from kvpo.app.arena import open_study, report
from kvpo.app.comparison.command import source_commit
from kvpo.app.configuration import preset
from kvpo.app.generate import generate
from kvpo.app.learn_reward import learn_reward
from kvpo.app.score import as_video
from kvpo.arena.pairs import Ballot
from kvpo.arena.store import Study, Vote
from kvpo.files import finite, write_atomic
from kvpo.prompts import ClipPrompt
from kvpo.report.video import read_video
from kvpo.world.reward import WorldScorer
from kvpo.world.stories import distinct_prompts
from kvpo.world.vocabulary import FRAME_SIZE

FRAMES = 30
TASTE = {"smoothness": 8.0, "no_flicker": 8.0}
"""The raters' taste, in log odds of a choice per unit of the world's components."""
INDIFFERENCE = 0.15
"""A lead below this, including noise, is voted the same."""


@dataclass(frozen=True)
class Sizes:
    """Numbers of videos, raters and updates."""

    pairs: int = 50
    raters: int = 6
    fresh_pairs: int = 32
    updates: int = 24


def calm(path: Path, prompt: str) -> float:
    """The raters' hidden utility of a video file."""
    frames, _ = read_video(path)
    scale = frames.shape[1] // FRAME_SIZE
    video = as_video(frames[:, scale // 2 :: scale, scale // 2 :: scale])
    scores = WorldScorer()(video, [ClipPrompt(prompt)])
    return sum(weight * float(scores[name]) for name, weight in TASTE.items())


def vote_all(study: Study, raters: int, seed: int) -> int:
    """Have synthetic raters vote on all their ballots; returns the number of votes on pairs."""
    utility = {
        video: calm(study.video_path(video), scene.segments[0])
        for scene in study.design.scenes
        for video in scene.videos.values()
    }
    generator, count = np.random.default_rng(seed), 0
    for n in range(raters):
        rater = study.rater_of(study.invite(f"rater {n + 1}"))
        assert rater is not None
        for position, ballot in enumerate(study.ballots_of(rater)):
            said = answer(ballot, utility.__getitem__, generator)
            names = study.design.asked_about(study.design.scenes[ballot.scene])
            study.vote(rater, Vote(position, dict.fromkeys(names, said), milliseconds=5000, finished=True))
            count += ballot.kind == "pair"
    return count


def answer(ballot: Ballot, utility: Callable[[str], float], generator: np.random.Generator) -> str:
    """A logistic choice by utility; equal videos and small leads are voted the same."""
    left, right = ballot.videos
    lead = utility(left) - utility(right) + generator.logistic()
    if left == right or abs(lead) < INDIFFERENCE:
        return "same"
    return "left" if lead > 0 else "right"


def loop(out: Path, seed: int, sizes: Sizes, changes: dict[str, Any]) -> dict[str, Any]:
    """Run votes, reward, alignment and fresh round; returns their numbers."""
    config = preset("demo", {"seed": seed, **changes})
    prompts = distinct_prompts("validation", sizes.pairs, 1, FRAMES, 300 + seed)
    folders = []
    for tape in (1, 2):
        folders.append(out / f"base-{tape}")
        generate(replace(config, seed=1000 * tape + seed), folders[-1], prompts=prompts)
    votes = open_study([str(one) for one in folders], out / "votes", pairs=sizes.pairs)
    count = vote_all(votes, sizes.raters, seed)
    file = out / "preference.safetensors"
    worth = learn_reward([votes.directory], file, seed=seed)

    rewarded = {
        "rewards.scorers": [f"preference:{file}"],
        "rewards.noise_floors": {file.stem: str(file.with_suffix(".noise.json"))},
        "evaluation.watchers": ["world"],
        "optim.updates": sizes.updates,
        "evaluation.every": max(1, sizes.updates // 4),
        "evaluation.validation_prompts": 16,
        "evaluation.test_prompts": 16,
    }
    run = out / "run"
    summary = align(preset("demo", {"seed": seed, **rewarded, **changes}), run)
    assert summary is not None

    fresh_prompts = out / "fresh.txt"
    fresh = distinct_prompts("test", sizes.fresh_pairs, 1, FRAMES, 400 + seed)
    write_atomic(fresh_prompts, "".join(f"{prompt.segments[0]}\n" for prompt in fresh))
    study = open_study([str(run)], out / "fresh", prompts=fresh_prompts, pairs=sizes.fresh_pairs)
    vote_all(study, sizes.raters, seed + 1)
    _, result = report(study.directory, close=True)
    pairing = result.questions[0].pairings[0].counted
    assert pairing is not None
    return {
        "votes": count,
        "worth": asdict(worth),
        "held_out": summary["held_out"],
        "radar": summary.get("radar"),
        "fresh": asdict(pairing),
    }


def loops(numbers: Mapping[str, Any]) -> str:
    """A row per seed: the learned reward, the gain from training with it, and the fresh round."""

    def within(found: Mapping[str, float]) -> str:
        return f"{found['value']:.3f} ({found['low']:.3f} to {found['high']:.3f})"

    rows = []
    for seed, one in numbers["loops"].items():
        fresh, held_out = one["fresh"], one["held_out"]
        gains = (f"{held_out[name]['paired_gain']:+.2f}" for name in ("short", "long"))
        counted = f"{fresh['good']}, {fresh['same']}, {fresh['bad']}"
        rows.append(
            (seed, one["votes"], within(one["worth"]["accuracy"]), *gains, counted, within(fresh["win_rate"]))
        )
    columns = (
        "seed", "votes", "held-out accuracy of the learned reward", "its gain on short videos", "long",
        "fresh round: for aligned, same, for base", "win rate of aligned",
    )  # fmt: skip
    return table(columns, rows)


def kept_loop(out: Path, seed: int, sizes: Sizes) -> dict[str, Any]:
    """The numbers of a loop, run only if needed. Raises ValueError if it was run with other sizes."""
    file = out / "loop.json"
    if not file.exists():
        out.mkdir(parents=True, exist_ok=True)
        found = {"commit": source_commit(), "sizes": asdict(sizes), **loop(out, seed, sizes, {})}
        write_atomic(file, json.dumps(finite(found), indent=1) + "\n")
    kept: dict[str, Any] = json.loads(file.read_text())
    if kept.get("sizes") != asdict(sizes):
        raise ValueError(
            f"{file} has the sizes {kept.get('sizes')}, not {asdict(sizes)}; choose another --out"
        )
    return kept


def main() -> None:
    """Run the missing loops, and print the results of all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--updates", type=int, default=Sizes.updates)
    parser.add_argument("--fresh-pairs", type=int, default=Sizes.fresh_pairs)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    sizes = Sizes(updates=arguments.updates, fresh_pairs=arguments.fresh_pairs)
    numbers: dict[str, Any] = {"sizes": asdict(sizes), "loops": {}}
    for seed in arguments.seeds:
        numbers["loops"][str(seed)] = kept_loop(arguments.out / str(seed), seed, sizes)
        write_json(arguments.json, numbers)
    print(loops(numbers))


if __name__ == "__main__":
    main()
