"""``kvpo learn-reward``: learns a reward from the votes of studies and tests it on held-out prompts."""

import json
import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from math import nan
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kvpo.app.calibrate import calibrate
from kvpo.app.named_rewards import FILE_RATE, PREFERENCE, frozen_features
from kvpo.app.score import as_video
from kvpo.arena.analysis import Interval, bootstrap, reliability, trusted, win_rate
from kvpo.arena.report import ends
from kvpo.arena.store import Study
from kvpo.arena.study import Scene
from kvpo.config_checks import ConfigurationError
from kvpo.files import finite, write_json
from kvpo.prompts import ClipPrompt
from kvpo.report.video import read_video
from kvpo.rewards.preference import Features, Task, fit, plackett_luce, save_preference, stacked
from kvpo.rewards.protocol import Declaration
from kvpo.rewards.sampling import file_clips

logger = logging.getLogger(__name__)

FOLDS = 5
RIDGES = (1e-3, 1e-2, 1e-1, 1.0)
BINS = 5
CALIBRATED = 8
"""Videos on which the noise floor is measured."""


@dataclass(frozen=True)
class Bin:
    """Held-out pairs with similar predicted probabilities."""

    predicted: float
    observed: float
    """Share of pairs in which the predicted winner was preferred."""
    pairs: int


@dataclass(frozen=True)
class Worth:
    """Quality of predictions for votes on prompts that the model has not seen."""

    accuracy: Interval
    """Share of decided pairs predicted correctly, with its interval over prompts."""
    loss: float
    """Mean negative log-likelihood of a vote."""
    coin: float
    """Loss of a model without preferences: log 2 for pairs, another for rankings and choices."""
    calibration: tuple[Bin, ...]
    votes: int
    prompts: int
    ridge: float
    noise_floor: float = nan


def learn_reward(
    places: Sequence[Path],
    out: Path,
    *,
    features: Sequence[str] = (),
    question: str = "overall",
    sources: Mapping[str, str] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> Worth:
    """Learn a reward from the votes of studies and write it, to be named as ``preference:FILE``.

    Also writes its worth on held-out prompts (.json) and its noise floor (.noise.json) next to ``out``.

    Args:
        places: directories of studies; raters flagged in a study's report do not count.
        features: rewards that provide the features, as embeddings or components; empty: pixel features.
        question: question to learn the answers to.

    Raises:
        ValueError: no study there, an unknown question, votes on fewer than ``FOLDS`` prompts, features that
            cannot be computed.
        StorageError: ``out`` cannot be written.
    """
    if out.suffix != ".safetensors":
        raise ConfigurationError(f"--out: must be a .safetensors file, got {out}")
    studies = [Study(place) for place in places]
    found, needs = frozen_features(features, sources or {}, prompts=True, frame_rate=FILE_RATE, device=device)
    votes, shown = votes_of(studies, question)
    if (found_on := len({vote.prompt for vote in votes})) < FOLDS:
        asked = dict.fromkeys(one.name for study in studies for one in study.design.questions)
        if question not in asked:
            raise ConfigurationError(
                f"--question: the {'studies have' if len(studies) > 1 else 'study has'} no question "
                f"{question!r}; there are {', '.join(asked)}"
            )
        raise ValueError(
            f"{', '.join(map(str, places))}: only {found_on} prompts have votes that decide {question!r}; at "
            f"least {FOLDS} are needed"
        )
    table_VD = torch.cat([features_of(path, scene, found, needs) for path, scene in shown])
    worth = worth_of(table_VD, votes, seed)
    preference = fit(table_VD, votes, worth.ridge)
    record = {"features": list(features), "sources": dict(sources or {}), "question": question}
    for suffix in (".json", ".noise.json"):  # if killed from here on, no stale numbers remain
        out.with_suffix(suffix).unlink(missing_ok=True)
    save_preference(out, preference, record | {"worth": finite(asdict(worth))})
    if worth.accuracy.low <= 0.5:
        logger.warning(
            "held-out accuracy cannot be told from chance (%.3f, %s): get more votes or features",
            worth.accuracy.value, ends(worth.accuracy, "{:.3f}".format),
        )  # fmt: skip
    floor = _noise_floor(out, shown, seed, device)
    worth = Worth(**{**vars(worth), "noise_floor": floor})
    write_json(out.with_suffix(".json"), finite(asdict(worth)))
    return worth


def votes_of(studies: Sequence[Study], question: str) -> tuple[list[Task], list[tuple[Path, Scene]]]:
    """Answers and rankings as tasks on rows of a table, and the video and scene of each row.

    "Same" and "both bad" count as half a vote for each side. Rankings answer the study's first question; its
    answers also decide which raters are flagged, as in the report.

    Raises:
        ValueError: a study's files have changed.
    """
    rows: dict[tuple[str, str], int] = {}
    shown: list[tuple[Path, Scene]] = []
    tasks: list[Task] = []
    for study in studies:
        study.check_videos()
        scenes = {scene.prompt: scene for scene in study.design.scenes}
        first, every = study.design.questions[0].name, study.judgements()
        raters = [reliability(every, name, first) for name in {one.rater for one in every}]
        flagged = {one.rater for one in raters if one.flags}
        counted = [one for one in trusted(every, raters) if one.question == question]
        ranked = study.rankings() if question == first else []
        rankings = [one for one in ranked if one.rater not in flagged]
        pairs = [(one.prompt, video) for one in counted for video in (one.video_a, one.video_b)]
        for prompt, video in [*pairs, *((one.prompt, video) for one in rankings for video in one.videos)]:
            if (prompt, video) not in rows:
                rows[prompt, video] = len(shown)
                shown.append((study.video_path(video), scenes[prompt]))
        for one in counted:
            pair = rows[one.prompt, one.video_a], rows[one.prompt, one.video_b]
            if one.winner in ("model_a", "model_b"):
                tasks.append(Task(pair if one.winner == "model_a" else pair[::-1], (0, 1), one.prompt))
            else:
                tasks += [Task(pair, (0, 1), one.prompt, 0.5), Task(pair[::-1], (0, 1), one.prompt, 0.5)]
        tasks += [
            Task(tuple(rows[one.prompt, video] for video in one.videos), one.ranks, one.prompt)
            for one in rankings
        ]
    return tasks, shown


def features_of(path: Path, scene: Scene, features: Features, needs: Declaration) -> Tensor:
    """Features [1, D] of a video: the mean over the stretches of its prompts, weighted by length.

    Raises:
        ValueError: it has fewer frames than the features need.
    """
    frames, rate = read_video(path)
    video = as_video(frames)[0]
    starts = scene.starts if len(scene.starts) == len(scene.segments) else (0.0,)
    texts = scene.segments if len(starts) > 1 else scene.segments[:1]
    edges = [round(start * len(video)) for start in (*starts, 1.0)]
    rows, lengths = [], []
    for text, first, end in zip(texts, edges, edges[1:], strict=False):
        if end - first < needs.min_frames and len(texts) > 1:
            continue
        for indices in file_clips(needs, end - first, rate):
            clip = video[first:end][indices]
            rows.append(features(clip[None], [ClipPrompt(text, file_rate=rate)])[0] * len(clip))
            lengths.append(len(clip))
    if not rows:
        raise ValueError(f"{path}: no prompt is shown for the {needs.min_frames} frames that are needed")
    return (torch.stack(rows).sum(0) / sum(lengths))[None]


def worth_of(table_VD: Tensor, votes: Sequence[Task], seed: int) -> Worth:
    """The worth of a preference by cross-validation: votes on held-out prompts are predicted from the others.

    The ridge is chosen within the votes that each fold learns from.
    """
    scored: list[tuple[Task, Tensor]] = []
    losses = []
    for learned, held_out in _folds(votes, seed):
        scores_V = fit(table_VD, learned, _ridge(table_VD, learned, seed + 1))(table_VD)
        losses.append(_lost(scores_V, held_out))
        scored += [(vote, scores_V) for vote in held_out]
    pairs = [
        (vote.prompt, margin, vote.weight) for vote, scores in scored for margin in _margins(vote, scores)
    ]
    decided = [(prompt, margin) for prompt, margin, weight in pairs if weight == 1.0]
    counts: dict[str, list[float]] = {}
    for prompt, margin in decided:
        row = counts.setdefault(prompt, [0.0, 0.0, 0.0])
        row[0 if margin > 0 else 2 if margin < 0 else 1] += 1
    table = np.array(list(counts.values())).reshape(-1, 3)
    return Worth(
        bootstrap(win_rate, table, np.random.default_rng(seed)),
        sum(losses) / _weight(votes),
        _lost(torch.zeros(len(table_VD)).double(), votes) / _weight(votes),
        _calibration([margin for _, margin in decided]),
        round(_weight(votes)),
        len({vote.prompt for vote in votes}),
        _ridge(table_VD, votes, seed + 1),
    )


def _weight(votes: Sequence[Task]) -> float:
    return sum(vote.weight for vote in votes)


def _lost(scores_V: Tensor, votes: Sequence[Task]) -> float:
    """Summed loss rather than the mean, so that folds add up."""
    return float(plackett_luce(scores_V, stacked(votes))) * _weight(votes)


def _folds(votes: Sequence[Task], seed: int) -> Iterator[tuple[list[Task], list[Task]]]:
    """Yield votes to learn from and votes on held-out prompts, fold by fold, as drawn by the seed alone."""
    prompts = {vote.prompt for vote in votes}
    drawn = sorted(prompts, key=lambda text: sha256(f"{seed} {text}".encode()).digest())
    for fold in range(FOLDS):
        left_out = set(drawn[fold::FOLDS])
        learned = [vote for vote in votes if vote.prompt not in left_out]
        held_out = [vote for vote in votes if vote.prompt in left_out]
        if learned and held_out:
            yield learned, held_out


def _ridge(table_VD: Tensor, votes: Sequence[Task], seed: int) -> float:
    """The ridge with the lowest cross-validated loss on ``votes``."""
    losses = dict.fromkeys(RIDGES, 0.0)
    for learned, held_out in _folds(votes, seed):
        for ridge in RIDGES:
            scores_V = fit(table_VD, learned, ridge)(table_VD)
            losses[ridge] += _lost(scores_V, held_out)
    return min(losses, key=lambda ridge: losses[ridge])


def _margins(vote: Task, scores_V: Tensor) -> list[float]:
    """Predicted log odds of every pair that a vote decides."""
    placed = list(zip(vote.videos, vote.ranks, strict=True))
    return [
        float(scores_V[better] - scores_V[worse])
        for better, above in placed
        for worse, below in placed
        if above < below
    ]


def _calibration(margins: Sequence[float]) -> tuple[Bin, ...]:
    """Predicted and observed win rates of predicted winners, binned by predicted probability."""
    odds = np.array(margins)
    predicted, right = 1 / (1 + np.exp(-np.abs(odds))), odds > 0
    places = np.minimum(((predicted - 0.5) * 2 * BINS).astype(int), BINS - 1)
    return tuple(
        Bin(float(predicted[places == n].mean()), float(right[places == n].mean()), int((places == n).sum()))
        for n in range(BINS)
        if (places == n).any()
    )


def _noise_floor(out: Path, shown: Sequence[tuple[Path, Scene]], seed: int, device: str) -> float:
    """Measure the reward's noise floor on the studies' own videos, and write it next to the reward."""
    name, noise = f"{PREFERENCE}{out}", out.with_suffix(".noise.json")
    with tempfile.TemporaryDirectory() as folder:
        prompts = {path.name: scene.segments[0] for path, scene in shown[:CALIBRATED]}
        for path in {path for path, _ in shown[:CALIBRATED]}:
            (Path(folder) / path.name).symlink_to(path.resolve())
        (Path(folder) / "prompts.json").write_text(json.dumps(prompts), encoding="utf-8")
        found = calibrate(
            name, Path(folder), prompts=Path(folder) / "prompts.json", seed=seed, out=noise, device=device
        )
    return list(found.values())[-1].noise_floor


def table(worth: Worth) -> str:
    """The worth as text."""
    accuracy = worth.accuracy
    lines = [
        f"votes {worth.votes} on {worth.prompts} prompts",
        f"held-out accuracy {accuracy.value:.3f} ({ends(accuracy, '{:.3f}'.format)})",
        f"held-out loss {worth.loss:.3f} (a coin: {worth.coin:.3f})",
        *(f"predicted {b.predicted:.2f}: observed {b.observed:.2f} of {b.pairs}" for b in worth.calibration),
    ]
    return "\n".join(lines)
