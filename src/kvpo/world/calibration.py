"""Measures the world's detector and scorers on renders of known content.

``python -m kvpo.world.calibration`` prints the detector's accuracy, the confidences below which a clip or
frame counts as broken (the constants in kvpo.world.detector), the rewards' means on exact and on faulty
videos, their jitter under harmless changes and their speed, and the unseen scorer's numbers.
"""

import time
from collections.abc import Sequence

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.world.codec import PixelCodec, load_codec
from kvpo.world.detector import attributes, detect
from kvpo.world.imperfect import CLEAN, Faults, observe
from kvpo.world.reward import DEFAULT_WEIGHTS, WorldScorer, weighted_total
from kvpo.world.stories import Split, sample_story
from kvpo.world.unseen import load_unseen, measure_unseen
from kvpo.world.vocabulary import Act, Story

CLIP_FRAMES = 15
BEFORE_FRAMES = 5


def round_trip(codec: PixelCodec, video_BTCHW: Tensor) -> Tensor:
    """Frames [B, T, 3, H, W] after a pass through the latent codec."""
    return torch.cat([codec.decode(codec.encode(v)) for v in video_BTCHW.split(16)])


def draw_stories(split: Split, count: int, num_acts: int, num_frames: int, seed: int) -> list[Story]:
    """Draw ``count`` stories of one split."""
    generator = torch.Generator().manual_seed(seed)
    return [sample_story(generator, num_acts, num_frames, split=split) for _ in range(count)]


def true_attributes(act: Act) -> tuple:
    """Values that the detector should decode from an act."""
    return (act.scene, *((a.colour, a.shape, a.size, a.motion) for a in act.actors))


def detector_accuracy(video_BTCHW: Tensor, stories: Sequence[Story]) -> dict[str, float]:
    """Share of one-act clips decoded correctly, per attribute and as a whole.

    Actors are compared only if their number is correct.
    """
    right: dict[str, list[bool]] = {
        k: [] for k in ("scene", "count", "colour", "shape", "size", "motion", "whole")
    }
    for story, read in zip(stories, attributes(detect(video_BTCHW)), strict=True):
        true = true_attributes(story.acts[0])
        right["scene"].append(read[0] == true[0])
        right["count"].append(len(read) == len(true))
        right["whole"].append(read == true)
        if len(read) == len(true):
            for seen, shown in zip(read[1:], true[1:], strict=True):
                for name, a, b in zip(("colour", "shape", "size", "motion"), seen, shown, strict=True):
                    right[name].append(a == b)
    return {name: sum(hits) / len(hits) for name, hits in right.items()}


def switch_clips(video_BTCHW: Tensor, stories: Sequence[Story]) -> tuple[Tensor, list[ClipPrompt]]:
    """Clips of CLIP_FRAMES frames around the first switch of each story, BEFORE_FRAMES of them before it."""
    clips, prompts = [], []
    for video, story in zip(video_BTCHW, stories, strict=True):
        before, act = story.acts[:2]
        start = min(act.start - BEFORE_FRAMES, story.num_frames - CLIP_FRAMES)
        clips.append(video[start : start + CLIP_FRAMES])
        prompts.append(ClipPrompt(act.caption, before.caption, act.start - start))
    return torch.stack(clips), prompts


def broken_thresholds(codec: PixelCodec, count: int = 400) -> tuple[float, float]:
    """1st percentiles of the confidence of clips and of frames, on exact renders after the codec."""
    stories = draw_stories("validation", count, 2, 2 * CLIP_FRAMES, seed=7)
    video = observe(stories, torch.Generator().manual_seed(8), CLEAN)
    seen = detect(round_trip(codec, video).unflatten(1, (2, CLIP_FRAMES)).flatten(0, 1))
    return float(seen.confidence.quantile(0.01)), float(seen.confidence_BT.flatten().quantile(0.01))


def score_jitter(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt], codec: PixelCodec) -> dict[str, float]:
    """Standard deviation of each score and the total under harmless changes of a clip, RMS over clips.

    The clips have passed through the codec once. The changes are a second pass and three draws of noise of
    one grey level.
    """
    noise = torch.Generator().manual_seed(9)
    once = video_BTCHW
    grainy = [(once + torch.randn(once.shape, generator=noise) / 255).clamp(0, 1) for _ in range(3)]
    results = [WorldScorer()(v, prompts) for v in (once, round_trip(codec, once), *grainy)]
    for scores in results:
        scores["total"] = weighted_total(scores, DEFAULT_WEIGHTS)
    return {
        name: float(torch.stack([scores[name] for scores in results]).var(0).mean().sqrt())
        for name in results[0]
    }


def _rewards(console: Console, codec: PixelCodec) -> None:
    stories = draw_stories("test", 200, 2, 2 * CLIP_FRAMES, seed=3)
    columns = {}
    for name, faults in (("exact", CLEAN), ("faulty", Faults())):
        shown = observe(stories, torch.Generator().manual_seed(4), faults)
        video, prompts = switch_clips(shown, stories)
        video = round_trip(codec, video)
        started = time.process_time()
        scores = WorldScorer()(video[:80], prompts[:80])
        seconds = time.process_time() - started
        scores = WorldScorer()(video, prompts)
        scores["total"] = weighted_total(scores, DEFAULT_WEIGHTS)
        columns[name] = {k: float(v.mean()) for k, v in scores.items()}
        columns[f"{name}: std"] = {k: float(v.std()) for k, v in scores.items()}
        columns[f"{name}: jitter"] = score_jitter(video, prompts, codec)
    _print_columns(console, "rewards around a switch, test split, after the codec", columns)
    console.print(f"{seconds:.2f} CPU seconds for 80 clips of {CLIP_FRAMES} frames")


def main() -> None:
    """Measure and print everything."""
    torch.set_num_threads(1)
    console, codec = Console(), load_codec()
    stories = draw_stories("test", 300, 1, CLIP_FRAMES, seed=1)
    video = observe(stories, torch.Generator().manual_seed(2), CLEAN)
    accuracy = {
        "exact": detector_accuracy(video, stories),
        "after the codec": detector_accuracy(round_trip(codec, video), stories),
    }
    _print_columns(console, "detector accuracy, test split", accuracy)
    clip, frame = broken_thresholds(codec)
    console.print(f"BROKEN_BELOW = {clip:.3f}, BROKEN_FRAME_BELOW = {frame:.3f}")
    _rewards(console, codec)
    console.print(measure_unseen(load_unseen()))


def _print_columns(console: Console, title: str, columns: dict[str, dict[str, float]]) -> None:
    table = Table("", *columns, title=title)
    for name in next(iter(columns.values())):
        table.add_row(name, *(f"{column[name]:.4f}" for column in columns.values()))
    console.print(table)


if __name__ == "__main__":
    main()
