"""Measures a reward's noise floor: how much it moves under changes that make no video better or worse."""

import logging
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import ceil, isqrt
from pathlib import Path
from statistics import stdev

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpo import __version__
from kvpo.app.named_rewards import named_rewards
from kvpo.app.score import as_video
from kvpo.app.video_folder import listed_videos
from kvpo.config_checks import ConfigurationError
from kvpo.files import write_json
from kvpo.prompts import ClipPrompt
from kvpo.report.video import read_video, write_video
from kvpo.rewards.cache import clip_digest
from kvpo.rewards.reward import Reward
from kvpo.rewards.sampling import file_clips
from kvpo.rewards.video_files import probe, read_frames

logger = logging.getLogger(__name__)

FRAMES = 17
"""Maximum number of frames of a measured clip."""
DEMO_CLIPS, DEMO_FRAMES, DEMO_RATE = 8, 15, 8.0
LARGEST_DEMO_SIDE = 256
SMALLEST_ENCODED_SIDE = 128
"""Smaller clips are enlarged for encoding: video codecs store colours at half resolution."""
QUALITIES = (18, 23)
"""H.264 constant rate factors: visually lossless, and the default of most tools."""
SHIFTS = ((1, 0), (-1, 0), (0, 1), (0, -1))
NOISE_DRAWS = 3
ORDER = "order of the batch"
RANDOM_SHARE = 0.1
"""Scores of equal clips may differ by this share of the noise floor: sums on a GPU have no fixed order."""


@dataclass(frozen=True)
class Sample:
    """A clip to measure on."""

    name: str
    video_TCHW: Tensor
    frame_rate: float
    prompt: str


@dataclass(frozen=True)
class Jitter:
    """Effect of one kind of change on a score, over clips and draws."""

    rms: float
    bias: float
    """Mean change: the part of the movement that all clips share."""
    largest: float


@dataclass(frozen=True)
class ComponentNoise:
    """Measurements of one component, or of the total."""

    noise_floor: float
    """Standard deviation of one clip's score under harmless changes, root mean square over clips."""
    spread_between_clips: float
    """Standard deviation of the unchanged clips' scores, for comparison."""
    changes: dict[str, Jitter]
    repetition: float
    """Largest difference between scores of equal clips, in repeated calls or within one batch."""


def reencoded(sample: Sample, quality: int) -> Tensor:
    """The clip after a round trip through an H.264 file."""
    frames, _, height, width = sample.video_TCHW.shape
    scale = ceil(SMALLEST_ENCODED_SIDE / min(height, width))
    pixels = (sample.video_TCHW * 255).round().to(torch.uint8).movedim(1, -1)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "clip.mp4"
        write_video(path, pixels, min(sample.frame_rate, 120.0), scale=scale, quality=quality)
        decoded, _ = read_video(path)
    video = as_video(decoded[:frames])[0][..., : height * scale, : width * scale]
    return F.avg_pool2d(video, scale) if scale > 1 else video


def shifted(video_TCHW: Tensor, dx: int, dy: int) -> Tensor:
    """The clip moved by whole pixels, with its border repeated."""
    height, width = video_TCHW.shape[-2:]
    rows = (torch.arange(height) - dy).clamp(0, height - 1)
    columns = (torch.arange(width) - dx).clamp(0, width - 1)
    return video_TCHW[..., rows[:, None], columns]


def noisy(video_TCHW: Tensor, generator: torch.Generator) -> Tensor:
    """The clip with every value raised or lowered by one grey level or unchanged, at random."""
    steps = torch.randint(-1, 2, video_TCHW.shape, generator=generator)
    return (video_TCHW + steps / 255).clamp(0, 1)


def harmless_changes(sample: Sample, seed: int) -> dict[str, list[Tensor]]:
    """Kind of change -> versions of the clip."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "re-encoding": [reencoded(sample, quality) for quality in QUALITIES],
        "one pixel": [shifted(sample.video_TCHW, dx, dy) for dx, dy in SHIFTS],
        "one grey level": [noisy(sample.video_TCHW, generator) for _ in range(NOISE_DRAWS)],
    }


def measure(
    reward: Reward, samples: Sequence[Sample], seed: int, done: Callable[[int], None] = lambda n: None
) -> dict[str, ComponentNoise]:
    """Noise of every component and of their weighted ``total``.

    Every changed version shares a batch with its original, alternately after and before it. The effect on the
    original's own score is reported as the change ``ORDER``.
    """
    original: dict[str, list[float]] = {}
    repetition: dict[str, float] = {}
    deltas: dict[str, dict[str, list[list[float]]]] = {}
    for number, sample in enumerate(samples):
        prompt = ClipPrompt(sample.prompt, file_rate=sample.frame_rate)
        alone = _totalled(reward, reward(sample.video_TCHW[None], [prompt]))
        again = _totalled(reward, reward(sample.video_TCHW[None], [prompt]))
        twins = _totalled(reward, reward(torch.stack([sample.video_TCHW] * 2), [prompt, prompt]))
        for name, value in alone.items():
            original.setdefault(name, []).append(float(value))
            differ = max(float((again[name] - value).abs()), float((twins[name][0] - twins[name][1]).abs()))
            repetition[name] = max(repetition.get(name, 0.0), differ)
        for kind, versions in harmless_changes(sample, seed + number).items():
            for index, version in enumerate(versions):
                place = index % 2
                pair = [sample.video_TCHW, sample.video_TCHW]
                pair[1 - place] = version
                scores = _totalled(reward, reward(torch.stack(pair), [prompt, prompt]))
                for name, values in scores.items():
                    moved = {kind: values[1 - place], ORDER: values[place]}
                    for what, value in moved.items():
                        per_clip = deltas.setdefault(name, {}).setdefault(what, [])
                        if len(per_clip) == number:
                            per_clip.append([])
                        per_clip[number].append(float(value - alone[name]))
        done(number + 1)
    return {name: _noise(original[name], deltas[name], repetition[name]) for name in original}


def _totalled(reward: Reward, scores: dict[str, Tensor]) -> dict[str, Tensor]:
    if len(scores) == 1:
        return scores
    return scores | {"total": torch.stack([w * scores[name] for name, w in reward.weights.items()]).sum(0)}


def _noise(original: list[float], deltas: dict[str, list[list[float]]], repetition: float) -> ComponentNoise:
    # The versions of a clip are the original and its changes. Batch effects are already part of the changes;
    # adding the original again for each of them would hide how far they moved.
    versions = [per_clip for kind, per_clip in deltas.items() if kind != ORDER]
    variances = [
        torch.tensor([0.0, *(delta for per_clip in versions for delta in per_clip[clip])]).var(correction=1)
        for clip in range(len(original))
    ]
    changes = {}
    for kind, per_clip in deltas.items():
        moved = torch.tensor(per_clip).flatten()
        changes[kind] = Jitter(
            float(moved.square().mean().sqrt()), float(moved.mean()), float(moved.abs().max())
        )
    spread = stdev(original) if len(original) > 1 else 0.0  # exactly 0 for equal scores
    return ComponentNoise(float(torch.stack(variances).mean().sqrt()), spread, changes, repetition)


def check_usable(found: Mapping[str, ComponentNoise], different: int) -> None:
    """Refuse a reward that cannot train: it is random on equal clips, or constant on different ones.

    Warns of components that are constant while others are not, and of those that harmless changes move by
    more than half the spread between clips.

    Args:
        different: number of distinct clips that it was measured on.

    Raises:
        ValueError: names the component and what was measured.
    """
    for name, noise in found.items():
        if noise.repetition > RANDOM_SHARE * noise.noise_floor:
            raise ValueError(
                f"{name} is random: equal clips differ by up to {noise.repetition:.2e}, where harmless "
                f"changes move it by {noise.noise_floor:.2e}; switch dropout off, seed its draws, or have "
                "its server answer equal questions alike"
            )
    if different < 2:
        return
    constant = [name for name, noise in found.items() if noise.spread_between_clips == 0]
    if list(found)[-1] in constant:
        raise ValueError(
            f"{constant[-1]} is the same for all {different} clips: there is nothing to learn from it "
            "(rewards of prompt switches need clips with one: rewards.transition_blocks of a run makes them)"
        )
    for name in constant:
        logger.warning("%s is the same for all %d clips: its noise floor says little", name, different)
    for name, noise in found.items():
        if 2 * noise.noise_floor > noise.spread_between_clips > 0:
            logger.warning(
                "%s moves by %.2e under harmless changes, more than half as much as different clips differ "
                "(%.2e): most of what it tells apart is noise",
                name,
                noise.noise_floor,
                noise.spread_between_clips,
            )


def check_pixels_count(reward: Reward, samples: Sequence[Sample]) -> None:
    """Refuse a reward that scores all clips the same once they have the same prompt.

    Raises:
        ValueError: names the constant component.
    """
    text = samples[0].prompt
    scores = [
        _totalled(reward, reward(one.video_TCHW[None], [ClipPrompt(text, file_rate=one.frame_rate)]))
        for one in samples
    ]
    name = list(scores[0])[-1]
    if all(bool(score[name] == scores[0][name]) for score in scores):
        raise ValueError(
            f"{name} is the same for all {len(samples)} clips under one prompt: it does not look at the "
            "pixels, so branches of one prompt cannot differ by it"
        )


def folder_samples(folder: Path, reward: Reward, prompts: Path | None, count: int) -> list[Sample]:
    """The first clip of each of the first ``count`` videos in a folder that are readable and long enough.

    Raises:
        ValueError: no video can be measured, or the prompts do not fit the files.
    """
    files, names, known = listed_videos(folder, prompts)
    texts = known or [""] * len(files)
    needs = max(reward.declarations, key=lambda declaration: declaration.min_frames)
    samples: list[Sample] = []
    problems: list[str] = []
    for path, name, text in zip(files, names, texts, strict=True):
        if len(samples) == count:
            break
        try:
            video = probe(path)
            indices = file_clips(needs, video.num_frames, video.frame_rate)[0][:FRAMES]
            frames = read_frames(video, indices, needs.max_pixels)
        except ValueError as error:
            problems.append(f"{name}: {error}")
            continue
        samples.append(Sample(name, as_video(frames)[0], video.frame_rate, text))
    if not samples:
        others = f", and {len(problems) - 1} more that cannot be measured on" if len(problems) > 1 else ""
        raise ValueError(problems[0] + others)
    for problem in problems:
        logger.warning("left out: %s", problem)
    return samples


def demo_samples(reward: Reward, seed: int) -> list[Sample]:
    """Clips of the embedded world with their captions, enlarged towards the resolution the reward reads."""
    from kvpo.world.render import render
    from kvpo.world.stories import distinct_stories

    samples = []
    for number, story in enumerate(distinct_stories("validation", DEMO_CLIPS, 1, DEMO_FRAMES, seed)):
        video = (render(story) * 255).round() / 255
        side = min(LARGEST_DEMO_SIDE, isqrt(min(d.max_pixels for d in reward.declarations)))
        scale = max(1, side // video.shape[-1])
        video = video.repeat_interleave(scale, -1).repeat_interleave(scale, -2)
        samples.append(Sample(f"demo {number + 1}", video, DEMO_RATE, story.acts[0].caption))
    return samples


def calibrate(
    name: str,
    folder: Path | None,
    *,
    prompts: Path | None = None,
    clips: int = 8,
    seed: int = 0,
    out: Path,
    sources: Mapping[str, str] | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, ComponentNoise]:
    """Measure reward ``name`` on a folder's videos, or on generated clips, and write ``out`` (JSON).

    Raises:
        ValueError: unknown reward, nothing to measure on, a reward that fails, is random or is constant.
    """
    if clips < 1:
        raise ConfigurationError(f"--clips: must be at least 1, got {clips}")
    if folder is None and clips > DEMO_CLIPS:
        raise ConfigurationError(f"--clips: {DEMO_CLIPS} clips are generated, got {clips}; give a FOLDER")
    if folder is None and prompts is not None:
        raise ConfigurationError("--prompts: needs a FOLDER, whose videos show them")
    given = folder is None or prompts is not None
    (reward,) = named_rewards([name], sources, field="REWARD", device=device, prompts=given)
    samples = (
        demo_samples(reward, seed)[:clips]
        if folder is None
        else folder_samples(folder, reward, prompts, clips)
    )
    found = measure(reward, samples, seed, lambda done: progress(done, len(samples)))
    different = len({clip_digest(sample.video_TCHW, sample.prompt) for sample in samples})
    check_usable(found, different)
    last = list(found)[-1]  # the total if there are several components
    if different > 1 and found[last].noise_floor == 0:  # normal for a count, or the pixels are ignored
        check_pixels_count(reward, samples)
    record = {
        "reward": name,
        "noise_floor": found[last].noise_floor,
        "components": {component: asdict(noise) for component, noise in found.items()},
        "clips": [sample.name for sample in samples],
        "seed": seed,
        "kvpo": __version__,
    }
    write_json(out, record, ensure_ascii=False)
    return found


def noise_table(found: Mapping[str, ComponentNoise]) -> str:
    """The measurement as text: per component the noise floor, the spread between clips, and every change."""
    kinds = list(next(iter(found.values())).changes)
    header = ["", "noise floor", "clips differ by", *kinds]
    rows = [
        [name, noise.noise_floor, noise.spread_between_clips, *(noise.changes[kind].rms for kind in kinds)]
        for name, noise in found.items()
    ]
    cells = [header, *([str(row[0]), *(f"{value:.2e}" for value in row[1:])] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    )
