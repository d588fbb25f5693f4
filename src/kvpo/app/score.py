"""Scores a folder of videos: a table, a JSON file, and a page with the clips sorted by score."""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvpo.app.named_rewards import named_rewards, split_location
from kvpo.app.video_folder import MANIFEST, listed_videos
from kvpo.files import printable, write_json
from kvpo.prompts import ClipPrompt
from kvpo.report.scores import ScoredVideo, write_scores_page
from kvpo.report.video import enlarge, video_bytes
from kvpo.rewards.reward import CombinedScorer, Reward
from kvpo.rewards.sampling import file_clips
from kvpo.rewards.video_files import VideoFile, probe, read_frames

PREVIEW_SECONDS = 4.0
PREVIEW_FRAMES = 48
PREVIEW_PIXELS = 256 * 448
PREVIEW_BYTES = 120_000
PREVIEWS_BYTES = 12_000_000
"""Limit for all previews of a page together; files beyond it are listed without one."""


def as_video(frames_THWC: np.ndarray) -> Tensor:
    """Frames read from a file as a clip [1, T, 3, H, W] in [0, 1]."""
    return torch.from_numpy(frames_THWC).movedim(-1, 1)[None].float() / 255


def score_file(path: Path, prompt: str, rewards: Sequence[Reward], result: ScoredVideo) -> ScoredVideo:
    """Fill ``result`` with every reward's components, or with the errors that concern this file alone."""
    try:
        video = probe(path)
    except ValueError as error:
        result.problems = {reward.name: str(error) for reward in rewards}
        return result
    for reward in rewards:
        try:
            result.scores |= _score(video, prompt, reward)
        except Exception as error:  # a scorer may raise anything, and the other files should still be scored
            text = str(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {error}"
            result.problems[reward.name] = printable(" ".join(text.split()))
    return result


def _score(video: VideoFile, prompt: str, reward: Reward) -> dict[str, float]:
    """Mean score of every component over a file's clips, which are in memory one at a time."""
    needs = max(reward.declarations, key=lambda declaration: declaration.min_frames)
    rows = []
    for indices in file_clips(needs, video.num_frames, video.frame_rate):
        clip = as_video(read_frames(video, indices, needs.max_pixels))
        rows.append(reward(clip, [ClipPrompt(prompt, file_rate=video.frame_rate)]))
    return {name: float(torch.cat([row[name] for row in rows]).mean()) for name in rows[0]}


def preview(path: Path) -> bytes:
    """A small mp4 of a file's first seconds. Raises ValueError if it cannot be read."""
    video = probe(path)
    shown = min(video.num_frames, max(1, math.ceil(PREVIEW_SECONDS * video.frame_rate)))
    stride = -(-shown // PREVIEW_FRAMES)
    frames = read_frames(video, range(0, shown, stride), PREVIEW_PIXELS)
    scale = max(1, 256 // min(frames.shape[1:3]))
    large = np.stack([enlarge(frame, scale) for frame in frames])
    return video_bytes(large, min(60.0, max(1.0, video.frame_rate / stride)), PREVIEW_BYTES)


def score_folder(
    folder: Path,
    names: Sequence[str],
    *,
    prompts: Path | None,
    out: Path,
    sources: Mapping[str, str] | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[ScoredVideo]:
    """Score the videos of ``folder``, write ``out`` (HTML) and a JSON file beside it; return them best first.

    Raises:
        ValueError: nothing to score, prompts that do not fit the files, or no file could be scored.
    """
    table_file = out.with_suffix(".json")
    if table_file.name == MANIFEST or prompts and table_file.resolve() == prompts.resolve():
        raise ValueError(
            f"--out: {table_file}, which is written next to {out.name}, holds prompts; choose another"
        )
    files, shown, known = listed_videos(folder, prompts)
    texts = known or [""] * len(files)
    rewards = named_rewards(names, sources, device=device, prompts=known is not None)
    columns = list(CombinedScorer(tuple(rewards)).components)
    results = []
    for number, (path, name, text) in enumerate(zip(files, shown, texts, strict=True)):
        progress(number, len(files))
        results.append(score_file(path, text, rewards, ScoredVideo(path, name, text)))
    progress(len(files), len(files))
    plain = [split_location(name)[0] for name in names]
    columns.sort(key=lambda c: plain.index(c) if c in plain else len(plain))
    if not any(result.scores for result in results):
        first = next(iter(results[0].problems.values()))
        raise ValueError(f"none of the {len(files)} files could be scored; {results[0].name}: {first}")
    results.sort(key=lambda r: (-r.scores.get(columns[0], -math.inf), r.name))
    _write_json(table_file, results)
    write_scores_page(out, printable(str(folder)), columns, results, _previews(results))
    return results


def _previews(results: Sequence[ScoredVideo]) -> dict[str, bytes]:
    """Previews by name, best and worst first, as far as they fit."""
    readable = [result for result in results if result.scores]
    ends = [readable[i // 2 if i % 2 == 0 else -1 - i // 2] for i in range(len(readable))]
    found: dict[str, bytes] = {}
    left = PREVIEWS_BYTES
    for result in ends:
        try:
            content = preview(result.path)
        except ValueError:
            continue  # listed without a picture
        if len(content) > left:
            break
        found[result.name], left = content, left - len(content)
    return found


def _write_json(path: Path, results: Sequence[ScoredVideo]) -> None:
    rows = [{"file": r.name, "prompt": r.prompt, "scores": r.scores, "problems": r.problems} for r in results]
    write_json(path, rows, ensure_ascii=False)


def score_table(results: Sequence[ScoredVideo]) -> str:
    """The scores as text, full file names last so that no terminal width cuts them."""
    columns = list(dict.fromkeys(name for result in results for name in result.scores))
    widths = [max(10, len(column)) for column in columns]
    lines = ["  ".join([*(c.rjust(w) for c, w in zip(columns, widths, strict=True)), "file"])]
    for result in results:
        cells = [
            (f"{result.scores[c]:.4f}" if c in result.scores else "-").rjust(w)
            for c, w in zip(columns, widths, strict=True)
        ]
        reasons = dict.fromkeys(result.problems.values())
        lines.append("  ".join([*cells, result.name]) + "".join(f"  (not scored: {r})" for r in reasons))
    return "\n".join(lines)
