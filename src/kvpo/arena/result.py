"""The complete analysis of a study's votes, as the page shows it and the JSON file holds it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations

from kvpo.arena.analysis import (
    Comparison,
    Interval,
    Reliability,
    agreement,
    compare,
    preferences,
    reliability,
    strengths,
    trusted,
)
from kvpo.arena.judgements import Judgement, Ranking, as_judgements
from kvpo.arena.study import QUESTIONS, Question

MOST_CLIPS = 8
"""Most decided pairs per question."""


@dataclass(frozen=True)
class Pairing:
    """One arm against another."""

    arm: str
    other: str
    counted: Comparison | None
    """From the raters who are not flagged."""
    everyone: Comparison | None
    """From all raters, to show the effect of leaving out the flagged ones."""


@dataclass(frozen=True)
class Decided:
    """A pair of videos on which raters leaned one way."""

    prompt: str
    winner: str
    loser: str
    better: str
    """Digest of the winner's video."""
    worse: str
    votes: tuple[int, int, int]
    """Votes for the winner, for neither, and against it."""


@dataclass(frozen=True)
class Answered:
    """The findings on one question."""

    question: Question
    pairings: tuple[Pairing, ...]
    strengths: Mapping[str, Interval]
    """Bradley-Terry log-strength of each arm; empty for fewer than three or if votes do not link all."""
    agreement: float | None
    decided: tuple[Decided, ...]


@dataclass(frozen=True)
class Result:
    """The findings of a study."""

    title: str
    closed: bool
    arms: tuple[str, ...]
    effect: float
    answers: int
    raters: tuple[Reliability, ...]
    questions: tuple[Answered, ...]


def analyse(
    title: str,
    judgements: Sequence[Judgement],
    rankings: Sequence[Ranking],
    *,
    effect: float,
    questions: Sequence[Question] = (),
    names: Mapping[str, str] | None = None,
    closed: bool = True,
) -> Result:
    """Analyse votes. Raters are flagged for all questions by their answers to the first.

    Args:
        questions: in the order of the page; by default those of the votes.
        names: arm -> displayed name; None shows the arms' own names.
    """
    asked = {one.question: None for one in judgements}
    known = list(questions) or [
        next((one for one in QUESTIONS if one.name == name), Question(name, name)) for name in asked
    ]
    first = known[0].name if known else "overall"
    every = [*judgements, *(one for ranking in rankings for one in as_judgements(ranking, first))]
    if names is not None:
        every = [replace(one, model_a=names[one.model_a], model_b=names[one.model_b]) for one in every]
    arms = tuple(names.values()) if names else tuple(
        dict.fromkeys(arm for one in every for arm in (one.model_a, one.model_b))
    )  # fmt: skip
    raters = tuple(reliability(every, name, first) for name in dict.fromkeys(one.rater for one in every))
    counted = trusted(every, raters)
    return Result(
        title,
        closed,
        arms,
        effect,
        len(every),
        raters,
        tuple(_answered(one, every, counted, arms, effect) for one in known),
    )


def _answered(
    question: Question,
    every: Sequence[Judgement],
    counted: Sequence[Judgement],
    arms: Sequence[str],
    effect: float,
) -> Answered:
    on_it = [one for one in counted if one.question == question.name]
    all_raters = [one for one in trusted(every, ()) if one.question == question.name]
    pairings = tuple(
        Pairing(
            arm,
            other,
            compare(_between(on_it, arm, other), arm, effect),
            compare(_between(all_raters, arm, other), arm, effect),
        )
        for other, arm in combinations(arms, 2)
    )
    return Answered(
        question,
        pairings,
        strengths(on_it, arms),
        agreement(on_it, question.name),
        _decided(on_it),
    )


def _between(judgements: Sequence[Judgement], arm: str, other: str) -> list[Judgement]:
    return [one for one in judgements if {one.model_a, one.model_b} == {arm, other}]


def _decided(judgements: Sequence[Judgement]) -> tuple[Decided, ...]:
    """The pairs with the largest leads in votes."""
    found = []
    for (prompt, _, first, other), raters in preferences(judgements).items():
        values = [value for own in raters.values() for value in own]
        ahead, behind = values.count(1.0), values.count(-1.0)
        if ahead == behind:
            continue
        (winner, better), (loser, worse) = (first, other) if ahead > behind else (other, first)
        votes = (max(ahead, behind), values.count(0.0), min(ahead, behind))
        found.append(Decided(prompt, winner, loser, better, worse, votes))
    found.sort(key=lambda one: (one.votes[2] - one.votes[0], one.prompt))
    return tuple(found[:MOST_CLIPS])
