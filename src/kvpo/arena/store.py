"""A study on disk: a directory with ``study.sqlite`` and its videos, each named after its SHA-256.

Votes go to a write-ahead log (WAL) that is flushed before they are acknowledged, so a process that is killed
at any time loses no acknowledged vote. Nothing is ever deleted: an undone vote stays, marked.
"""

import hashlib
import json
import sqlite3
from base64 import urlsafe_b64encode
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from hmac import compare_digest
from hmac import digest as keyed_hash
from itertools import groupby
from pathlib import Path

from kvpo.arena.database import (
    DATABASE,
    VoteRefused,
    demand_open,
    insert_vote,
    migrate,
    now,
    rater_number,
    transaction,
)
from kvpo.arena.judgements import WINNERS, Judgement, Ranking, prompt_of
from kvpo.arena.pairs import Ballot, ballots
from kvpo.arena.study import ANSWERS, Design, Question, Scene

MOST_NAME = 80
"""Most characters of a rater's name."""


@dataclass(frozen=True)
class Rater:
    """A person who votes."""

    id: int
    name: str


@dataclass(frozen=True)
class Vote:
    """A rater's answers to one ballot."""

    position: int
    """The ballot's index among the rater's ballots."""
    answers: Mapping[str, str]
    """Question -> one of ``ANSWERS``; empty for a ranking."""
    ranking: tuple[int, ...] = ()
    """Places of a ranking's videos as shown from left to right, best first."""
    milliseconds: int = 0
    """Time from showing the ballot to the vote."""
    finished: bool = False
    """True if the videos were watched to the end."""


class Study:
    """A study in its directory; every method is one transaction, so any number of processes may vote."""

    def __init__(self, directory: Path) -> None:
        """Open a study. Raises ValueError if there is none, or it cannot be read."""
        self.directory, self.path = directory, directory / DATABASE
        if not self.path.is_file():
            raise ValueError(
                f"{directory}: holds no study; `kvpo arena SOURCE … --out {directory}` starts one"
            )
        migrate(self.path)

    @cached_property
    def design(self) -> Design:
        """Everything but the votes, with scenes in the order of their ids."""
        with transaction(self.path) as db:
            title, instructions, pairs, ranked, sources = db.execute(
                "SELECT title, instructions, pairs, ranked, sources FROM study"
            ).fetchone()
            questions = db.execute(
                "SELECT name, text, hint, stories FROM question ORDER BY position"
            ).fetchall()
            scenes = db.execute("SELECT id, segments, starts, rate FROM scene ORDER BY id").fetchall()
            made: dict[int, dict[str, str]] = {}
            for scene, arm, video in db.execute(
                "SELECT scene, arm, video FROM made JOIN arm ON arm = name ORDER BY scene, position"
            ):
                made.setdefault(scene, {})[arm] = video
        return Design(
            title,
            tuple(
                Scene(tuple(json.loads(segments)), made.get(number, {}), tuple(json.loads(starts)), rate)
                for number, segments, starts, rate in scenes
            ),
            tuple(Question(name, text, hint, bool(stories)) for name, text, hint, stories in questions),
            instructions,
            pairs,
            bool(ranked),
            sources,
        )

    @cached_property
    def key(self) -> bytes:
        """The secret key of the study's draws and invitations."""
        with transaction(self.path) as db:
            (key,) = db.execute("SELECT key FROM study").fetchone()
        return bytes(key)

    @property
    def closed(self) -> bool:
        """True once voting has ended and the report names the arms."""
        with transaction(self.path) as db:
            return db.execute("SELECT closed FROM study").fetchone()[0] is not None

    def close(self) -> None:
        """End voting; the report then names the arms."""
        with transaction(self.path) as db:
            db.execute("UPDATE study SET closed = ? WHERE closed IS NULL", (now(),))

    def check_videos(self) -> None:
        """Raise ValueError if a video is missing or its content has changed."""
        with transaction(self.path) as db:
            digests = [row[0] for row in db.execute("SELECT digest FROM video")]
        for digest in digests:
            path = self.video_path(digest)
            if not path.is_file():
                raise ValueError(
                    f"{path}: this video of the study is missing; restore it, or start another study"
                )
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise ValueError(
                    f"{path}: not the video that is voted on; restore it, or start another study"
                )

    def video_path(self, digest: str) -> Path:
        """The path of a video of the study."""
        return self.directory / f"{digest}.mp4"

    def invite(self, name: str) -> str:
        """The token of the rater of this name, who is added if there is none.

        Raises:
            ValueError: the name is empty, too long or not one line.
        """
        name = name.strip()
        if not name or len(name) > MOST_NAME or not name.isprintable():
            raise ValueError(
                f"a rater's name is one line of at most {MOST_NAME} characters, got {name[:90]!r}"
            )
        with transaction(self.path) as db:
            number = rater_number(db, name)
        return f"{number}.{self._signature(number)}"

    def _signature(self, rater: int) -> str:
        signed = keyed_hash(self.key, f"invitation\x1f{rater}".encode(), "sha256")
        return urlsafe_b64encode(signed[:18]).decode()

    def rater_of(self, token: str) -> Rater | None:
        """The rater who was invited with this token, or None. Tokens are compared in constant time."""
        number, _, signature = token.partition(".")
        if not (number.isascii() and number.isdecimal() and len(number) < 10):
            return None
        if not compare_digest(signature.encode(), self._signature(int(number)).encode()):
            return None
        with transaction(self.path) as db:
            row = db.execute("SELECT id, name FROM rater WHERE id = ?", (int(number),)).fetchone()
        return None if row is None else Rater(*row)

    def ballots_of(self, rater: Rater) -> list[Ballot]:
        """All ballots of a rater, in order."""
        design = self.design
        return ballots(self.key, rater.name, design.scenes, most=design.pairs, ranked=design.ranked)

    def done(self, rater: Rater) -> int:
        """Number of ballots that a rater has voted on, which is the position of the next one."""
        with transaction(self.path) as db:
            return _done(db, rater)

    def vote(self, rater: Rater, vote: Vote) -> None:
        """Store a vote; it is on disk when this returns. Storing the same vote again changes nothing.

        Raises:
            VoteRefused: the study is closed, another ballot is due, or the answers are not those asked for.
        """
        shown = self.ballots_of(rater)
        if not 0 <= vote.position < len(shown):
            raise VoteRefused(f"there is no ballot {vote.position}; there are {len(shown)}")
        ballot = shown[vote.position]
        self._check(ballot, vote)
        with transaction(self.path) as db:
            demand_open(db)
            done = _done(db, rater)
            said = dict(vote.answers), vote.ranking
            if vote.position < done and _answers(db, rater, vote.position) == said:
                return
            if vote.position != done:
                raise VoteRefused(
                    f"ballot {done} is due, got a vote on ballot {vote.position}: load the page again"
                )
            self._insert(db, rater, ballot, vote)

    def _check(self, ballot: Ballot, vote: Vote) -> None:
        if ballot.kind == "ranking":
            if sorted(vote.ranking) != list(range(len(ballot.videos))) or vote.answers:
                raise VoteRefused(f"a ranking names each of the {len(ballot.videos)} videos once")
            return
        wanted = self.design.asked_about(self.design.scenes[ballot.scene])
        if vote.ranking or set(vote.answers) != set(wanted):
            raise VoteRefused(
                f"expected answers to {', '.join(wanted)}; got {', '.join(vote.answers)[:90]!a}"
            )
        if wrong := [answer for answer in vote.answers.values() if answer not in ANSWERS]:
            raise VoteRefused(f"an answer is one of {', '.join(ANSWERS)}, got {wrong[0][:40]!a}")

    def _insert(self, db: sqlite3.Connection, rater: Rater, ballot: Ballot, vote: Vote) -> None:
        ranks = {place: rank for rank, place in enumerate(vote.ranking)}
        ordered = "SELECT id FROM scene ORDER BY id LIMIT 1 OFFSET ?"
        insert_vote(
            db,
            rater.id,
            db.execute(ordered, (ballot.scene,)).fetchone()[0],
            ballot.kind,
            [(digest, ranks.get(place)) for place, digest in enumerate(ballot.videos)],
            vote.answers,
            position=vote.position,
            milliseconds=vote.milliseconds,
            finished=vote.finished,
        )

    def undo(self, rater: Rater) -> int | None:
        """Undo a rater's last vote and return its position, or None if there is none.

        Raises:
            VoteRefused: the study is closed.
        """
        with transaction(self.path) as db:
            demand_open(db)
            last = _done(db, rater) - 1
            if last < 0:
                return None
            db.execute(
                "UPDATE vote SET undone = ? WHERE rater = ? AND position = ? AND undone IS NULL",
                (now(), rater.id, last),
            )
        return last

    def judgements(self) -> list[Judgement]:
        """Every answer about a pair that was not undone, the left arm as model_a, in order of the votes."""
        with transaction(self.path) as db:
            rows = db.execute(
                """
                SELECT scene.id, scene.segments, rater.name, question, answer, kind, milliseconds,
                       one.video, other.video
                FROM vote JOIN rater ON rater.id = vote.rater JOIN scene ON scene.id = vote.scene
                JOIN answer ON answer.vote = vote.id
                JOIN seen one ON one.vote = vote.id AND one.place = 0
                JOIN seen other ON other.vote = vote.id AND other.place = 1
                WHERE undone IS NULL ORDER BY vote.id, answer.rowid
                """
            ).fetchall()
            arms = _arms(db)
        return [
            Judgement(
                rater,
                prompt_of(json.loads(segments)),
                question,
                arms[scene, one],
                arms[scene, other],
                WINNERS[answer],
                kind,
                milliseconds,
                one,
                other,
            )
            for scene, segments, rater, question, answer, kind, milliseconds, one, other in rows
        ]

    def rankings(self) -> list[Ranking]:
        """Every ranking that was not undone, its videos best first, in the order of the votes."""
        with transaction(self.path) as db:
            rows = db.execute(
                """
                SELECT vote.id, rater.name, scene.id, scene.segments, video, rank
                FROM vote JOIN rater ON rater.id = vote.rater JOIN scene ON scene.id = vote.scene
                JOIN seen ON seen.vote = vote.id
                WHERE kind = 'ranking' AND undone IS NULL ORDER BY vote.id, rank
                """
            ).fetchall()
            arms = _arms(db)
        found = []
        for _, whole in groupby(rows, key=lambda row: row[0]):
            _, raters, scenes, segments, videos, ranks = zip(*whole, strict=True)
            made_by = tuple(arms.get((scenes[0], video)) for video in videos)
            found.append(Ranking(raters[0], prompt_of(json.loads(segments[0])), videos, made_by, ranks))
        return found


def _arms(db: sqlite3.Connection) -> dict[tuple[int, str], str]:
    """(scene id, video digest) -> arm; the first one if several arms made the same video."""
    rows = db.execute("SELECT scene, video, arm FROM made ORDER BY rowid DESC").fetchall()
    return {(scene, video): arm for scene, video, arm in rows}


def _done(db: sqlite3.Connection, rater: Rater) -> int:
    standing = "rater = ? AND position IS NOT NULL AND undone IS NULL"
    return int(db.execute(f"SELECT count(*) FROM vote WHERE {standing}", (rater.id,)).fetchone()[0])


def _answers(db: sqlite3.Connection, rater: Rater, position: int) -> tuple[dict[str, str], tuple[int, ...]]:
    """Answers and ranking of the vote at a position; undone votes do not count."""
    (number,) = db.execute(
        "SELECT id FROM vote WHERE rater = ? AND position = ? AND undone IS NULL", (rater.id, position)
    ).fetchone()
    answers = dict(db.execute("SELECT question, answer FROM answer WHERE vote = ?", (number,)).fetchall())
    ranked = db.execute(
        "SELECT place FROM seen WHERE vote = ? AND rank IS NOT NULL ORDER BY rank", (number,)
    ).fetchall()
    return answers, tuple(place for (place,) in ranked)
