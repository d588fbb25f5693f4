"""A content-addressed score cache: equal clips are scored once per call and, with a file, once across runs.

The key is a digest of the clip's pixels, its prompt (including earlier texts and the switch) and the reward's
version: its code, files and settings. A lookup may miss, but it never returns another clip's score.
"""

import hashlib
import json
import logging
import os
import sqlite3
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from kvpo.files import local_path
from kvpo.prompts import ClipPrompt

logger = logging.getLogger(__name__)

FILE = "scores.sqlite"
MOST = 1_000_000
"""Maximum number of entries; the oldest are deleted first. An entry takes about 150 bytes."""
WRITER_SECONDS = 30.0
"""Seconds to wait while another process writes."""
DIGEST_BYTES = 24


@dataclass
class Counts:
    """Numbers of cache hits, repeats and misses; every reward counts each of its clips once."""

    hits: int = 0
    """Found in the cache on disk."""
    repeats: int = 0
    """Equal to another clip of the same call."""
    misses: int = 0
    """Scored."""

    def since(self, before: "Counts") -> dict[str, float]:
        """Metrics: the increase of each count since ``before``."""
        return {
            "reward_cache_hits": float(self.hits - before.hits),
            "reward_cache_repeats": float(self.repeats - before.repeats),
            "reward_cache_misses": float(self.misses - before.misses),
        }


@dataclass(frozen=True)
class ScoreCache:
    """A score file that processes share, with counts of hits and misses.

    File problems never end a run: a damaged entry counts as a miss, a damaged file is renamed and started
    anew, and a file that cannot be read or written is logged and ignored.
    """

    file: Path | None = None
    """None: nothing is stored, and clips are only compared within a call."""
    counts: Counts = field(default_factory=Counts)

    def read(self, keys: Sequence[bytes], size: int) -> dict[bytes, list[float]]:
        """Look up ``keys``; returns the ``size`` scores of each key that the file holds."""
        found: dict[bytes, list[float]] = {}

        def look_up(connection: sqlite3.Connection) -> None:
            for key in keys:
                row = connection.execute("SELECT value FROM scores WHERE key = ?", (key,)).fetchone()
                scores = None if row is None else _unpacked(key, row[0], size)
                if scores is not None:
                    found[key] = scores

        self._transaction(look_up)
        return found

    def write(self, entries: Mapping[bytes, Sequence[float]]) -> None:
        """Store scores by key."""

        def insert(connection: sqlite3.Connection) -> None:
            rows = [(key, _packed(key, scores)) for key, scores in entries.items()]
            connection.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
            oldest = "SELECT max(rowid) - ? FROM scores"
            connection.execute(f"DELETE FROM scores WHERE rowid <= ({oldest})", (MOST,))

        self._transaction(insert)

    def _transaction(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """Run ``work`` on a fresh connection, which no thread or child process shares."""
        assert self.file is not None
        try:
            with closing(sqlite3.connect(self.file, timeout=WRITER_SECONDS)) as connection, connection:
                # A power cut may damage the file, which is acceptable for a cache.
                connection.execute("PRAGMA synchronous = OFF")
                connection.execute(
                    "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, value BLOB NOT NULL)"
                )
                work(connection)
        except sqlite3.OperationalError as error:  # locked, full, not permitted
            logger.warning("score cache %s is passed over: %s", self.file, error)
        except sqlite3.DatabaseError as error:
            logger.warning("score cache %s is damaged and is started again: %s", self.file, error)
            with suppress(OSError):  # another process may have been first
                os.replace(self.file, self.file.with_suffix(".damaged"))


def score_cache(directory: str) -> ScoreCache:
    """Open the cache in a directory, creating it if needed; "" stores nothing. Raises ValueError."""
    if not directory:
        return ScoreCache()
    folder = local_path(directory, "rewards.cache")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(
            f"rewards.cache: {folder} cannot be used as a directory ({error.strerror}); name another one"
        ) from error
    return ScoreCache(folder / FILE)


def clip_digest(video_TCHW: Tensor, prompt: str) -> bytes:
    """Digest of a clip's exact pixels, dtype and shape, and of every field of its prompt."""
    asked = prompt if isinstance(prompt, ClipPrompt) else ClipPrompt(prompt)
    said = [str(video_TCHW.dtype), list(video_TCHW.shape), str(asked), *vars(asked).values()]
    digest = hashlib.blake2b(json.dumps(said).encode(), digest_size=DIGEST_BYTES)
    digest.update(video_TCHW.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.digest()


@cache
def code_version(rooms: tuple[str, ...] = ("rewards", "world")) -> str:
    """Digest of torch's version and kvpo's code, that of rewards by default: either may change last bits."""
    package = Path(__file__).parents[1]
    digest = hashlib.blake2b(torch.__version__.encode(), digest_size=DIGEST_BYTES)
    for path in (path for room in rooms for path in sorted((package / room).rglob("*.py"))):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def _packed(key: bytes, scores: Sequence[float]) -> bytes:
    """Scores as float32, preceded by a digest of the key and the scores."""
    content = struct.pack(f"<{len(scores)}f", *scores)
    return hashlib.blake2b(key + content, digest_size=8).digest() + content


def _unpacked(key: bytes, value: bytes, size: int) -> list[float] | None:
    """Scores of an entry; None if the entry is damaged."""
    content = value[8:]
    whole = value[:8] == hashlib.blake2b(key + content, digest_size=8).digest()
    return list(struct.unpack(f"<{size}f", content)) if whole and len(content) == 4 * size else None
