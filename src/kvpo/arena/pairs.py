"""Draws a rater's ballots, their order and their sides: a pure function of (key, rater, scenes).

Every draw is a keyed hash (HMAC-SHA256) of the rater and the pair, so a study can be audited from its key,
and nobody can predict sides without it.
"""

import hmac
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

from kvpo.arena.study import Scene

Kind = Literal["pair", "repeat", "attention", "ranking"]

REPEATED = 0.1
"""Share of pairs that are shown once more, with their sides swapped."""
ATTENTION = 0.05
"""Attention pairs, which show one video on both sides, as a share of the pairs."""
FEWEST_PAIRS = 5
"""With fewer pairs than this, none is repeated and no attention pair is added."""


@dataclass(frozen=True)
class Ballot:
    """One page for a rater; ``videos`` are digests from left to right."""

    kind: Kind
    scene: int
    videos: tuple[str, ...]


def draw(key: bytes, *words: object) -> float:
    """A number in [0, 1) that depends only on the key and the words."""
    text = "\x1f".join(map(str, words)).encode()
    return int.from_bytes(hmac.digest(key, text, "sha256")[:6]) / 2**48


def ballots(
    key: bytes, rater: str, scenes: Sequence[Scene], *, most: int, ranked: bool = False
) -> list[Ballot]:
    """The ballots of a rater, in order.

    There are at most ``most`` pairs of different videos. Repeats come in the second half and show pairs of
    the first half with swapped sides. Attention pairs come anywhere after the start. With ``ranked``, the
    ballots are at most ``most`` whole scenes, their videos in a drawn order.
    """
    if ranked:
        wholes = [(n, tuple(dict.fromkeys(scene.videos.values()))) for n, scene in enumerate(scenes)]
        shown = [
            Ballot("ranking", n, tuple(sorted(whole, key=lambda video: draw(key, rater, "place", n, video))))
            for n, whole in wholes
            if len(whole) > 1
        ]
        return sorted(shown, key=lambda one: draw(key, rater, "order", one.scene))[:most]
    distinct = {
        (n, *sorted(pair))
        for n, scene in enumerate(scenes)
        for pair in combinations(scene.videos.values(), 2)
        if pair[0] != pair[1]
    }
    chosen = sorted(distinct, key=lambda pair: draw(key, rater, "order", *pair))[:most]
    placed = [((i + 0.5) / len(chosen), _sided(key, rater, pair)) for i, pair in enumerate(chosen)]
    if len(chosen) >= FEWEST_PAIRS:
        placed += _repeats(key, rater, [one for _, one in placed])
        placed += _attention(key, rater, [one for _, one in placed])
    return [one for _, one in sorted(placed, key=lambda item: item[0])]


def _sided(key: bytes, rater: str, pair: tuple[int, str, str]) -> Ballot:
    scene, one, other = pair
    swapped = draw(key, rater, "side", *pair) < 0.5
    return Ballot("pair", scene, (other, one) if swapped else (one, other))


def _repeats(key: bytes, rater: str, pairs: Sequence[Ballot]) -> list[tuple[float, Ballot]]:
    first = sorted(
        pairs[: len(pairs) // 2], key=lambda one: draw(key, rater, "repeat", one.scene, *one.videos)
    )
    return [
        (
            0.6 + 0.4 * draw(key, rater, "repeated at", one.scene, *one.videos),
            Ballot("repeat", one.scene, one.videos[::-1]),
        )
        for one in first[: max(1, round(REPEATED * len(pairs)))]
    ]


def _attention(key: bytes, rater: str, pairs: Sequence[Ballot]) -> list[tuple[float, Ballot]]:
    chosen = sorted(pairs, key=lambda one: draw(key, rater, "attention", one.scene, *one.videos))
    return [
        (
            0.1 + 0.9 * draw(key, rater, "attention at", one.scene, *one.videos),
            Ballot("attention", one.scene, one.videos[:1] * 2),
        )
        for one in chosen[: max(1, round(ATTENTION * len(pairs)))]
    ]
