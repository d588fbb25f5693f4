"""A study on disk: a directory with ``study.sqlite`` and its videos, each named after its SHA-256.

Votes are written ahead (WAL) and flushed before they are acknowledged, so that a process killed at any moment
loses none that it acknowledged. Nothing is ever deleted: an undone vote stays, marked.
"""

import hashlib
import json
import secrets
import sqlite3
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from hmac import compare_digest
from hmac import digest as keyed_hash
from itertools import groupby
from pathlib import Path

from kvpo.arena.judgements import WINNERS, Judgement, Ranking, prompt_of
from kvpo.arena.pairs import Ballot, ballots
from kvpo.arena.study import ANSWERS, Design, Question, Scene, asked_about
from kvpo.files import new_directory, write_atomic

DATABASE = "study.sqlite"
BUSY_SECONDS = 20
MOST_NAME = 80
"""Characters of a rater's name."""
MIGRATIONS = (
    f"""
    CREATE TABLE study (
        id INTEGER PRIMARY KEY CHECK (id = 1), title TEXT NOT NULL, instructions TEXT NOT NULL,
        key BLOB NOT NULL, pairs INTEGER NOT NULL, ranked INTEGER NOT NULL, sources TEXT NOT NULL,
        opened TEXT NOT NULL, closed TEXT);
    CREATE TABLE question (
        name TEXT PRIMARY KEY, position INTEGER NOT NULL, text TEXT NOT NULL, hint TEXT NOT NULL,
        stories INTEGER NOT NULL);
    CREATE TABLE arm (name TEXT PRIMARY KEY, position INTEGER NOT NULL);
    CREATE TABLE video (digest TEXT PRIMARY KEY);
    CREATE TABLE scene (id INTEGER PRIMARY KEY, segments TEXT NOT NULL, starts TEXT NOT NULL);
    CREATE TABLE made (
        scene INTEGER NOT NULL REFERENCES scene, arm TEXT NOT NULL REFERENCES arm,
        video TEXT NOT NULL REFERENCES video, PRIMARY KEY (scene, arm));
    CREATE TABLE rater (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
    CREATE TABLE vote (
        id INTEGER PRIMARY KEY, rater INTEGER NOT NULL REFERENCES rater, position INTEGER,
        kind TEXT NOT NULL CHECK (kind IN ('pair', 'repeat', 'attention', 'ranking')),
        scene INTEGER NOT NULL REFERENCES scene, milliseconds INTEGER NOT NULL, finished INTEGER NOT NULL,
        voted TEXT NOT NULL, undone TEXT);
    CREATE UNIQUE INDEX standing ON vote (rater, position) WHERE undone IS NULL;
    CREATE TABLE seen (
        vote INTEGER NOT NULL REFERENCES vote, place INTEGER NOT NULL, video TEXT NOT NULL REFERENCES video,
        rank INTEGER, PRIMARY KEY (vote, place));
    CREATE TABLE answer (
        vote INTEGER NOT NULL REFERENCES vote, question TEXT NOT NULL REFERENCES question,
        answer TEXT NOT NULL CHECK (answer IN {ANSWERS}), PRIMARY KEY (vote, question));
    """,
)
"""What brings a database from one version of the schema to the next; ``user_version`` counts them."""


class Refused(ValueError):
    """A vote that cannot be taken; the message is one line for the rater."""


@dataclass(frozen=True)
class Rater:
    """Who votes."""

    id: int
    name: str


@dataclass(frozen=True)
class Vote:
    """What a rater says about one ballot."""

    position: int
    """Which of the rater's ballots."""
    answers: Mapping[str, str]
    """Question -> one of ``ANSWERS``; empty for a ranking."""
    ranking: tuple[int, ...] = ()
    """Places of a ranking's videos as they were shown, the best first."""
    milliseconds: int = 0
    """From showing the ballot to the vote."""
    finished: bool = False
    """True if the videos were seen to their end."""


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction on a study's database, flushed to the disk when the block ends without an error."""
    connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
    try:
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
    finally:
        connection.close()


def migrate(path: Path) -> None:
    """Bring a database to the present schema.

    Raises:
        ValueError: it is no database of a study, or one of a later version.
    """
    try:
        with transaction(path) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise ValueError(
                    f"{path}: version {version} of the schema, this kvpo knows up to {len(MIGRATIONS)}; update kvpo"
                )
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                for statement in script.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")
    except sqlite3.DatabaseError as error:
        raise ValueError(f"{path}: cannot be used as a study ({error})") from error


def create_study(out: Path, design: Design, videos: Mapping[str, bytes]) -> "Study":
    """Write a new study, whole or not at all; ``videos`` are mp4 files by digest.

    Raises:
        StorageError: the directory cannot be written.
    """
    with new_directory(out) as directory:
        for digest, content in videos.items():
            (directory / f"{digest}.mp4").write_bytes(content)
        path = directory / DATABASE
        migrate(path)
        with transaction(path) as db:
            db.execute(
                "INSERT INTO study VALUES (1, ?, ?, ?, ?, ?, ?, ?, NULL)",
                (design.title, design.instructions, secrets.token_bytes(32), design.pairs, design.ranked,
                 design.sources, _now()),
            )  # fmt: skip
            for number, one in enumerate(design.questions):
                db.execute(
                    "INSERT INTO question VALUES (?, ?, ?, ?, ?)",
                    (one.name, number, one.text, one.hint, one.stories),
                )
            db.executemany("INSERT INTO arm VALUES (?, ?)", [(arm, n) for n, arm in enumerate(design.arms)])
            for scene in design.scenes:
                _add_scene(db, scene)
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        db.close()
    return Study(out)


def _add_scene(db: sqlite3.Connection, scene: Scene) -> int:
    texts = [json.dumps(list(part), ensure_ascii=False) for part in (scene.segments, scene.starts)]
    number = db.execute("INSERT INTO scene (segments, starts) VALUES (?, ?)", texts).lastrowid
    assert number is not None
    for arm, digest in scene.videos.items():
        db.execute("INSERT OR IGNORE INTO video VALUES (?)", (digest,))
        db.execute("INSERT INTO made VALUES (?, ?, ?)", (number, arm, digest))
    return number


class Study:
    """A study in its directory; every method is one transaction, so any number of processes may vote."""

    def __init__(self, directory: Path) -> None:
        """Open a study. Raises ValueError where there is none, or one that cannot be read."""
        self.directory, self.path = directory, directory / DATABASE
        if not self.path.is_file():
            raise ValueError(f"{directory}: holds no study; `kvpo arena SOURCE … --out {directory}` starts one")
        migrate(self.path)

    @cached_property
    def design(self) -> Design:
        """What the study asks, with scenes in the order of their numbers."""
        with transaction(self.path) as db:
            title, instructions, pairs, ranked, sources = db.execute(
                "SELECT title, instructions, pairs, ranked, sources FROM study"
            ).fetchone()
            questions = db.execute("SELECT name, text, hint, stories FROM question ORDER BY position").fetchall()
            scenes = db.execute("SELECT id, segments, starts FROM scene ORDER BY id").fetchall()
            made: dict[int, dict[str, str]] = {}
            for scene, arm, video in db.execute(
                "SELECT scene, arm, video FROM made JOIN arm ON arm = name ORDER BY scene, position"
            ):
                made.setdefault(scene, {})[arm] = video
        return Design(
            title,
            tuple(
                Scene(tuple(json.loads(segments)), made.get(number, {}), tuple(json.loads(starts)))
                for number, segments, starts in scenes
            ),
            tuple(Question(name, text, hint, bool(stories)) for name, text, hint, stories in questions),
            instructions,
            pairs,
            bool(ranked),
            sources,
        )

    @cached_property
    def key(self) -> bytes:
        """The secret of the study's draws and invitations."""
        with transaction(self.path) as db:
            (key,) = db.execute("SELECT key FROM study").fetchone()
        return bytes(key)

    @property
    def closed(self) -> bool:
        """True once no more votes are taken and names are shown."""
        with transaction(self.path) as db:
            return db.execute("SELECT closed FROM study").fetchone()[0] is not None

    def close(self) -> None:
        """Take no more votes; the report then names the arms."""
        with transaction(self.path) as db:
            db.execute("UPDATE study SET closed = ? WHERE closed IS NULL", (_now(),))

    def check_videos(self) -> None:
        """Raise ValueError where a video is missing or no longer the one that is voted on."""
        with transaction(self.path) as db:
            digests = [row[0] for row in db.execute("SELECT digest FROM video")]
        for digest in digests:
            path = self.video_path(digest)
            if not path.is_file():
                raise ValueError(f"{path}: this video of the study is missing; restore it, or start another study")
            if hashlib.sha256(path.read_bytes()).hexdigest() != digest:
                raise ValueError(f"{path}: not the video that is voted on; restore it, or start another study")

    def video_path(self, digest: str) -> Path:
        """Where a video of the study lies."""
        return self.directory / f"{digest}.mp4"

    def invite(self, name: str) -> str:
        """The token of a rater, who is added where there is none of this name.

        Raises:
            ValueError: a name that is empty, too long or not one line.
        """
        name = name.strip()
        if not name or len(name) > MOST_NAME or not name.isprintable():
            raise ValueError(f"a rater's name is one line of at most {MOST_NAME} characters, got {name[:90]!r}")
        with transaction(self.path) as db:
            number = _rater(db, name)
        return f"{number}.{self._signature(number)}"

    def _signature(self, rater: int) -> str:
        signed = keyed_hash(self.key, f"invitation\x1f{rater}".encode(), "sha256")
        return urlsafe_b64encode(signed[:18]).decode()

    def rater_of(self, token: str) -> Rater | None:
        """Who was invited with this token; it is compared in constant time."""
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
        """How many of their ballots a rater has voted on: the position of the next."""
        with transaction(self.path) as db:
            return _done(db, rater)

    def vote(self, rater: Rater, vote: Vote) -> None:
        """Store a vote; it is on the disk when this returns. The same vote once more changes nothing.

        Raises:
            Refused: the study is closed, another ballot is due, or the answers are not those asked for.
        """
        shown = self.ballots_of(rater)
        if not 0 <= vote.position < len(shown):
            raise Refused(f"there is no ballot {vote.position}; there are {len(shown)}")
        ballot = shown[vote.position]
        self._check(ballot, vote)
        with transaction(self.path) as db:
            _demand_open(db)
            done = _done(db, rater)
            if vote.position < done and _answers(db, rater, vote.position) == _said(vote):
                return
            if vote.position != done:
                raise Refused(f"ballot {done} is due, got a vote on ballot {vote.position}: load the page again")
            self._insert(db, rater, ballot, vote)

    def _check(self, ballot: Ballot, vote: Vote) -> None:
        if ballot.kind == "ranking":
            if sorted(vote.ranking) != list(range(len(ballot.videos))) or vote.answers:
                raise Refused(f"a ranking names each of the {len(ballot.videos)} videos once")
            return
        wanted = asked_about(self.design.questions, self.design.scenes[ballot.scene])
        if vote.ranking or set(vote.answers) != set(wanted):
            raise Refused(f"expected answers to {', '.join(wanted)}; got {', '.join(vote.answers) or 'none'}")
        if wrong := [answer for answer in vote.answers.values() if answer not in ANSWERS]:
            raise Refused(f"an answer is one of {', '.join(ANSWERS)}, got {wrong[0][:40]!r}")

    def _insert(self, db: sqlite3.Connection, rater: Rater, ballot: Ballot, vote: Vote) -> None:
        scene = db.execute("SELECT id FROM scene ORDER BY id LIMIT 1 OFFSET ?", (ballot.scene,)).fetchone()[0]
        number = db.execute(
            "INSERT INTO vote (rater, position, kind, scene, milliseconds, finished, voted) VALUES (?, ?, ?, ?, ?, ?, ?)",
            (rater.id, vote.position, ballot.kind, scene, vote.milliseconds, vote.finished, _now()),
        ).lastrowid
        ranks = {place: rank for rank, place in enumerate(vote.ranking)}
        for place, digest in enumerate(ballot.videos):
            db.execute("INSERT INTO seen VALUES (?, ?, ?, ?)", (number, place, digest, ranks.get(place)))
        db.executemany(
            "INSERT INTO answer VALUES (?, ?, ?)", [(number, *answer) for answer in vote.answers.items()]
        )

    def undo(self, rater: Rater) -> int | None:
        """Take a rater's last vote back and return its position; None where there is none.

        Raises:
            Refused: the study is closed.
        """
        with transaction(self.path) as db:
            _demand_open(db)
            last = _done(db, rater) - 1
            if last < 0:
                return None
            db.execute(
                "UPDATE vote SET undone = ? WHERE rater = ? AND position = ? AND undone IS NULL",
                (_now(), rater.id, last),
            )
        return last

    def judgements(self) -> list[Judgement]:
        """Every standing answer about a pair, the left video's arm first, in the order of the votes."""
        with transaction(self.path) as db:
            rows = db.execute(
                """
                SELECT rater.name, scene.segments, answer.question, a.arm, b.arm, answer.answer, vote.kind,
                       vote.milliseconds, l.video, r.video
                FROM vote JOIN rater ON rater.id = vote.rater JOIN scene ON scene.id = vote.scene
                JOIN answer ON answer.vote = vote.id
                JOIN seen l ON l.vote = vote.id AND l.place = 0 JOIN seen r ON r.vote = vote.id AND r.place = 1
                JOIN made a ON a.rowid = (SELECT min(rowid) FROM made WHERE scene = vote.scene AND video = l.video)
                JOIN made b ON b.rowid = (SELECT min(rowid) FROM made WHERE scene = vote.scene AND video = r.video)
                WHERE vote.undone IS NULL ORDER BY vote.id, answer.rowid
                """
            ).fetchall()
        return [
            Judgement(rater, prompt_of(json.loads(segments)), question, one, other, WINNERS[answer], *rest)
            for rater, segments, question, one, other, answer, *rest in rows
        ]

    def rankings(self) -> list[Ranking]:
        """Every standing ranking, its videos best first, in the order of the votes."""
        with transaction(self.path) as db:
            rows = db.execute(
                """
                SELECT vote.id, rater.name, scene.segments, seen.video, seen.rank,
                       (SELECT arm FROM made WHERE scene = vote.scene AND video = seen.video ORDER BY rowid)
                FROM vote JOIN rater ON rater.id = vote.rater JOIN scene ON scene.id = vote.scene
                JOIN seen ON seen.vote = vote.id
                WHERE vote.kind = 'ranking' AND vote.undone IS NULL ORDER BY vote.id, seen.rank
                """
            ).fetchall()
        found = []
        for _, whole in groupby(rows, key=lambda row: row[0]):
            _, raters, segments, videos, ranks, arms = zip(*whole, strict=True)
            found.append(Ranking(raters[0], prompt_of(json.loads(segments[0])), videos, arms, ranks))
        return found

    def add_judgements(self, judgements: Sequence[Judgement]) -> int:
        """Take in answers that were given elsewhere, and return how many were not known yet.

        Raises:
            ValueError: a video that is not one of the study's, two that are of different scenes, an unknown
                question; nothing is then taken in.
        """
        known = set(self.judgements())
        fresh = [one for one in dict.fromkeys(judgements) if one not in known]
        ballots: dict[tuple[str, str, str, str, int], list[Judgement]] = {}
        for one in fresh:
            ballots.setdefault((one.rater, one.video_a, one.video_b, one.kind, one.milliseconds), []).append(one)
        names = {one.name for one in self.design.questions}
        with transaction(self.path) as db:
            _demand_open(db)
            for (rater, left, right, kind, milliseconds), answers in ballots.items():
                scene = db.execute(
                    "SELECT a.scene FROM made a JOIN made b ON a.scene = b.scene WHERE a.video = ? AND b.video = ?",
                    (left, right),
                ).fetchone()
                if scene is None:
                    raise ValueError(
                        f"{rater}'s vote on {left[:12]} against {right[:12]}: no two videos of one scene of this "
                        "study; votes are taken in for the very files that were voted on"
                    )
                number = db.execute(
                    "INSERT INTO vote (rater, kind, scene, milliseconds, finished, voted) VALUES (?, ?, ?, ?, 1, ?)",
                    (_rater(db, rater), kind, scene[0], milliseconds, _now()),
                ).lastrowid
                for place, digest in enumerate((left, right)):
                    db.execute("INSERT INTO seen VALUES (?, ?, ?, NULL)", (number, place, digest))
                for one in answers:
                    if one.question not in names:
                        raise ValueError(f"{one.question!r} is not a question of this study; there are {', '.join(names)}")
                    said = next(answer for answer, winner in WINNERS.items() if winner == one.winner)
                    db.execute("INSERT INTO answer VALUES (?, ?, ?)", (number, one.question, said))
        return len(fresh)


def record_ranking(
    directory: Path, segments: Sequence[str], videos: Sequence[bytes], best_first: Sequence[int], *, rater: str
) -> None:
    """Store a choice among videos of one fork, mp4 files, as a ranking in the study at ``directory``.

    A study without arms is started where there is none. ``best_first`` are positions in ``videos``; those
    that are left out rank below the others, which is all a choice says.

    Raises:
        ValueError: positions that are not those of videos, named twice or none.
        StorageError: the directory cannot be written.
    """
    if not best_first or len(set(best_first)) < len(best_first) or not set(best_first) <= set(range(len(videos))):
        raise ValueError(f"best_first: expected positions of {len(videos)} videos, each once, got {list(best_first)}")
    if (directory / DATABASE).is_file():
        study = Study(directory)
    else:
        study = create_study(directory, Design("Choices at forks", ranked=True, sources="kvpo live"), {})
    digests = []
    for content in videos:
        digests.append(hashlib.sha256(content).hexdigest())
        if not study.video_path(digests[-1]).is_file():
            write_atomic(study.video_path(digests[-1]), content)
    ranks = {place: rank for rank, place in enumerate(best_first)}
    with transaction(study.path) as db:
        db.executemany("INSERT OR IGNORE INTO video VALUES (?)", [(digest,) for digest in digests])
        scene = _add_scene(db, Scene(tuple(segments), {}))
        number = db.execute(
            "INSERT INTO vote (rater, kind, scene, milliseconds, finished, voted) VALUES (?, 'ranking', ?, 0, 1, ?)",
            (_rater(db, rater), scene, _now()),
        ).lastrowid
        for place, digest in enumerate(digests):
            rank = ranks.get(place, len(best_first))
            db.execute("INSERT INTO seen VALUES (?, ?, ?, ?)", (number, place, digest, rank))


def _demand_open(db: sqlite3.Connection) -> None:
    if db.execute("SELECT closed FROM study").fetchone()[0] is not None:
        raise Refused("the study is closed")


def _rater(db: sqlite3.Connection, name: str) -> int:
    """The number of a rater, added where there is none of this name."""
    db.execute("INSERT OR IGNORE INTO rater (name) VALUES (?)", (name,))
    return int(db.execute("SELECT id FROM rater WHERE name = ?", (name,)).fetchone()[0])


def _done(db: sqlite3.Connection, rater: Rater) -> int:
    standing = "rater = ? AND position IS NOT NULL AND undone IS NULL"
    return int(db.execute(f"SELECT count(*) FROM vote WHERE {standing}", (rater.id,)).fetchone()[0])


def _said(vote: Vote) -> tuple[dict[str, str], tuple[int, ...]]:
    return dict(vote.answers), vote.ranking


def _answers(db: sqlite3.Connection, rater: Rater, position: int) -> tuple[dict[str, str], tuple[int, ...]]:
    """What the standing vote at a position says, as ``_said`` puts it."""
    (number,) = db.execute(
        "SELECT id FROM vote WHERE rater = ? AND position = ? AND undone IS NULL", (rater.id, position)
    ).fetchone()
    answers = dict(db.execute("SELECT question, answer FROM answer WHERE vote = ?", (number,)).fetchall())
    ranked = db.execute(
        "SELECT place FROM seen WHERE vote = ? AND rank IS NOT NULL ORDER BY rank", (number,)
    ).fetchall()
    return answers, tuple(place for (place,) in ranked)
