"""The database of a study: its schema, migrations and durable transactions."""

import sqlite3
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from kvpo.arena.study import ANSWERS
from kvpo.files import StorageError, storage_error

DATABASE = "study.sqlite"
BUSY_SECONDS = 20
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
    CREATE TABLE scene (
        id INTEGER PRIMARY KEY, segments TEXT NOT NULL, starts TEXT NOT NULL, rate REAL NOT NULL);
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
"""Scripts that each upgrade the schema by one version; ``user_version`` counts the applied ones."""


class VoteRefused(ValueError):
    """A vote that is not accepted; the message is one line for the rater."""


def now() -> str:
    """The current UTC time in ISO 8601 format, with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


@contextmanager
def transaction(path: Path) -> Iterator[sqlite3.Connection]:
    """One transaction on a study's database, flushed to disk when the block ends without an error.

    Raises StorageError: the disk is full or read-only, or another process keeps the database locked.
    """
    connection = None
    try:
        connection = sqlite3.connect(path, timeout=BUSY_SECONDS, isolation_level=None)
        connection.execute("PRAGMA foreign_keys = ON")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")
        connection.execute("BEGIN IMMEDIATE")
        try:
            yield connection
        except BaseException:
            if connection.in_transaction:  # on a full disk, SQLite has taken it back already
                connection.execute("ROLLBACK")
            raise
        connection.execute("COMMIT")
    except sqlite3.OperationalError as error:
        raise storage_error(path, error) from error
    finally:
        if connection is not None:
            connection.close()


def migrate(path: Path) -> None:
    """Upgrade a database to the current schema.

    Raises:
        ValueError: it is not the database of a study, or its schema has a later version.
    """
    try:
        with transaction(path) as db:
            (version,) = db.execute("PRAGMA user_version").fetchone()
            if version > len(MIGRATIONS):
                raise ValueError(
                    f"{path}: version {version} of the schema, and this kvpo knows up to "
                    f"{len(MIGRATIONS)}; update kvpo"
                )
            for number, script in enumerate(MIGRATIONS[version:], version + 1):
                for statement in script.split(";"):
                    db.execute(statement)
                db.execute(f"PRAGMA user_version = {number}")
    except (sqlite3.DatabaseError, StorageError) as error:
        raise ValueError(f"{path}: cannot be used as a study ({error})") from error


def demand_open(db: sqlite3.Connection) -> None:
    """Raise VoteRefused if the study is closed."""
    if db.execute("SELECT closed FROM study").fetchone()[0] is not None:
        raise VoteRefused("the study is closed")


def rater_number(db: sqlite3.Connection, name: str) -> int:
    """The id of the rater of this name, who is added if there is none."""
    db.execute("INSERT OR IGNORE INTO rater (name) VALUES (?)", (name,))
    return int(db.execute("SELECT id FROM rater WHERE name = ?", (name,)).fetchone()[0])


def insert_vote(
    db: sqlite3.Connection,
    rater: int,
    scene: int,
    kind: str,
    seen: Sequence[tuple[str, int | None]],
    answers: Mapping[str, str],
    *,
    position: int | None = None,
    milliseconds: int = 0,
    finished: bool = True,
) -> None:
    """Add a vote on the videos ``seen``, (digest, rank) from left to right; only rankings have ranks.

    ``position`` is that of the rater's ballot, or None if the vote was given elsewhere.
    """
    number = db.execute(
        "INSERT INTO vote (rater, position, kind, scene, milliseconds, finished, voted) "
        "VALUES (?, ?, ?, ?, ?, ?, ?)",
        (rater, position, kind, scene, milliseconds, finished, now()),
    ).lastrowid
    for place, (digest, rank) in enumerate(seen):
        db.execute("INSERT INTO seen VALUES (?, ?, ?, ?)", (number, place, digest, rank))
    db.executemany("INSERT INTO answer VALUES (?, ?, ?)", [(number, *answer) for answer in answers.items()])
