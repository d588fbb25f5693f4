"""Answers about pairs, and rankings: the records that are exported, analysed and learned from."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

WINNERS = {"left": "model_a", "right": "model_b", "same": "tie", "both_bad": "both_bad"}
"""Answer -> its name in tables of pairwise comparisons, where model_a was on the left."""
NO_RATER = "unknown"
"""The rater of votes in a file that does not say who gave them."""


@dataclass(frozen=True)
class Judgement:
    """An answer to one question about two videos of a scene."""

    rater: str
    prompt: str
    """The scene's prompts as one text. Votes on the same prompt are not independent."""
    question: str
    model_a: str
    """The arm whose video was on the left."""
    model_b: str
    winner: str
    """model_a, model_b, tie or both_bad."""
    kind: str = "pair"
    milliseconds: int = 0
    video_a: str = ""
    """Digest of the left video."""
    video_b: str = ""


@dataclass(frozen=True)
class Ranking:
    """Videos of one scene, best first."""

    rater: str
    prompt: str
    videos: tuple[str, ...]
    arms: tuple[str | None, ...]
    """The arm of each video; None if the study does not know it, as for branches of a live fork."""
    ranks: tuple[int, ...]
    """The rank of each video, ascending; videos of equal rank were not compared."""


def prompt_of(segments: Sequence[str]) -> str:
    """The prompts of a scene as one text."""
    return " → ".join(segments)


def as_judgements(ranking: Ranking, question: str) -> list[Judgement]:
    """Expand a ranking into one judgement for each ranked pair of known arms, the better one as model_a."""
    placed = list(zip(ranking.arms, ranking.videos, ranking.ranks, strict=True))
    return [
        Judgement(ranking.rater, ranking.prompt, question, one, other, "model_a", "ranking", 0, better, worse)
        for (one, better, above), (other, worse, below) in combinations(placed, 2)
        if above < below and one is not None and other is not None
    ]
