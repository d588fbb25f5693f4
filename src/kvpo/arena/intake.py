"""Creates studies, and adds votes that were given elsewhere and choices at forks."""

import hashlib
import json
import secrets
import shutil
import sqlite3
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock

from kvpo.arena.database import (
    DATABASE,
    demand_open,
    insert_vote,
    migrate,
    now,
    rater_number,
    transaction,
)
from kvpo.arena.judgements import NO_RATER, WINNERS, Judgement
from kvpo.arena.store import Study
from kvpo.arena.study import Design, Scene
from kvpo.files import new_directory, write_atomic

_ANSWERS = {winner: answer for answer, winner in WINNERS.items()}


def refuse_taken(out: Path) -> None:
    """Raise ValueError if a new study at ``out`` would replace something."""
    if out.is_dir() and any(out.iterdir()) or out.exists() and not out.is_dir():
        raise ValueError(f"{out} is not empty and holds no study; choose another --out")


def create_study(out: Path, design: Design, videos: Mapping[str, Path]) -> Study:
    """Write a new study atomically, with copies of ``videos`` (digest -> mp4 file).

    Raises:
        ValueError: ``out`` is not empty.
        StorageError: the directory cannot be written.
    """
    refuse_taken(out)
    with new_directory(out) as directory:
        for digest, video in videos.items():
            shutil.copyfile(video, directory / f"{digest}.mp4")
        path = directory / DATABASE
        migrate(path)
        with transaction(path) as db:
            db.execute(
                "INSERT INTO study VALUES (1, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (design.title, design.instructions, secrets.token_bytes(32), design.pairs, design.ranked,
                 design.sources, now()),
            )  # fmt: skip
            for number, one in enumerate(design.questions):
                db.execute(
                    "INSERT INTO question VALUES (?, ?, ?, ?, ?)",
                    (one.name, number, one.text, one.hint, one.stories),
                )
            db.executemany("INSERT INTO arm VALUES (?, ?)", [(arm, n) for n, arm in enumerate(design.arms)])
            for scene in design.scenes:
                _add_scene(db, scene)
    return Study(out)


def _add_scene(db: sqlite3.Connection, scene: Scene) -> int:
    texts = [json.dumps(list(part), ensure_ascii=False) for part in (scene.segments, scene.starts)]
    number = db.execute(
        "INSERT INTO scene (segments, starts, rate) VALUES (?, ?, ?)", (*texts, scene.rate)
    ).lastrowid
    assert number is not None
    for arm, digest in scene.videos.items():
        db.execute("INSERT OR IGNORE INTO video VALUES (?)", (digest,))
        db.execute("INSERT INTO made VALUES (?, ?, ?)", (number, arm, digest))
    return number


def add_judgements(study: Study, judgements: Sequence[Judgement]) -> int:
    """Import answers that were given elsewhere, and return how many were new.

    Raises:
        ValueError: a vote has no rater, is not on two videos of one scene of the study, or answers an unknown
            question; or the study is closed. Nothing is imported then.
    """
    if any(one.rater == NO_RATER for one in judgements):
        raise ValueError(
            "votes without a rater cannot be told from each other; say who gave them (column rater, Label "
            "Studio's completed_by)"
        )
    known = {_by_videos(one) for one in study.judgements()}
    fresh = [one for one in dict.fromkeys(map(_by_videos, judgements)) if one not in known]
    ballots: dict[tuple[str, str, str, str, int, int], dict[str, str]] = {}
    times: Counter[tuple[object, ...]] = Counter()
    for one in fresh:
        ballot = (one.rater, one.video_a, one.video_b, one.kind, one.milliseconds)
        times[*ballot, one.question] += 1  # a second answer to a question is from another ballot
        said = ballots.setdefault((*ballot, times[*ballot, one.question]), {})
        said[one.question] = _ANSWERS[one.winner]
    names = [one.name for one in study.design.questions]
    with transaction(study.path) as db:
        demand_open(db)
        for (rater, left, right, kind, milliseconds, _), said in ballots.items():
            scene = db.execute(
                "SELECT a.scene FROM made a JOIN made b ON a.scene = b.scene "
                "WHERE a.video = ? AND b.video = ?",
                (left, right),
            ).fetchone()
            if scene is None:
                raise ValueError(
                    f"{rater}'s vote on {left[:12]} against {right[:12]}: no two videos of one scene of this "
                    "study; votes are taken in for the very files that were voted on"
                )
            if unknown := [name for name in said if name not in names]:
                raise ValueError(
                    f"{unknown[0]!r} is not a question of this study; there are {', '.join(names)}"
                )
            seen = [(left, None), (right, None)]
            who = rater_number(db, rater)
            insert_vote(db, who, scene[0], kind, seen, said, milliseconds=milliseconds)
    return len(fresh)


def _by_videos(one: Judgement) -> Judgement:
    """A vote without the prompt and the arms, which the study itself knows from the videos."""
    return replace(one, prompt="", model_a="", model_b="")


def record_ranking(
    directory: Path,
    segments: Sequence[str],
    videos: Sequence[bytes],
    best_first: Sequence[int],
    *,
    rater: str,
) -> None:
    """Store a choice among videos of one fork (mp4 contents) as a ranking in the study at ``directory``.

    If there is no study yet, one without arms is created. ``best_first`` holds positions in ``videos``; those
    that it leaves out share the rank below the others.

    Raises:
        ValueError: ``best_first`` is empty or has invalid or repeated positions, or ``directory`` holds other
            files.
        StorageError: the directory cannot be written.
    """
    if (
        not best_first
        or len(set(best_first)) < len(best_first)
        or not set(best_first) <= set(range(len(videos)))
    ):
        raise ValueError(
            f"best_first: expected positions of {len(videos)} videos, each once, got {list(best_first)}"
        )
    digests = [hashlib.sha256(content).hexdigest() for content in videos]
    # Choices come from several threads and processes, and each may find that there is no study yet.
    with FileLock(directory.with_name(f".{directory.name}.lock")):
        if (directory / DATABASE).is_file():
            study = Study(directory)
        else:
            study = create_study(directory, Design("Choices at forks", ranked=True, sources="kvpo live"), {})
        for digest, content in zip(digests, videos, strict=True):
            if not study.video_path(digest).is_file():
                write_atomic(study.video_path(digest), content)
    ranks = {place: rank for rank, place in enumerate(best_first)}
    with transaction(study.path) as db:
        db.executemany("INSERT OR IGNORE INTO video VALUES (?)", [(digest,) for digest in digests])
        scene = _add_scene(db, Scene(tuple(segments), {}))
        seen = [(digest, ranks.get(place, len(best_first))) for place, digest in enumerate(digests)]
        insert_vote(db, rater_number(db, rater), scene, "ranking", seen, {})
