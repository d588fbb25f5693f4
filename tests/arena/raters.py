"""Synthetic raters of known taste, and small studies for them to vote on."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from kvpo.arena.intake import create_study
from kvpo.arena.judgements import WINNERS, Judgement, prompt_of
from kvpo.arena.pairs import Ballot, ballots
from kvpo.arena.store import Study, Vote
from kvpo.arena.study import Design, Scene

KEY = b"a key of the tests"
Say = Callable[[float, np.random.Generator], str]
"""From the left video's lead in quality to an answer: left, right or same."""


def honest(lead: float, generator: np.random.Generator) -> str:
    """Bradley-Terry with a band of indifference."""
    noise = lead + generator.logistic()
    return "same" if abs(noise) < 0.3 else "left" if noise > 0 else "right"


def leftist(lead: float, generator: np.random.Generator) -> str:
    """Always the left one, but for pairs of equal videos now and then."""
    return "left"


def digest_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def scenes_of(count: int, arms: Sequence[str] = ("base", "aligned")) -> list[Scene]:
    return [Scene((f"prompt {n}",), {arm: digest_of(f"{arm} {n}") for arm in arms}) for n in range(count)]


def judged(
    scenes: Sequence[Scene],
    raters: dict[str, Say],
    quality: Callable[[int, str], float],
    seed: int,
    most: int = 1000,
) -> list[Judgement]:
    """All ballots of all raters, voted on by their taste for ``quality`` of (scene, arm)."""
    generator, found = np.random.default_rng(seed), []
    for rater, say in raters.items():
        for ballot in ballots(KEY, rater, scenes, most=most):
            arm_of = {video: arm for arm, video in scenes[ballot.scene].videos.items()}
            left, right = (arm_of[video] for video in ballot.videos)
            same = left == right
            lead = 0.0 if same else quality(ballot.scene, left) - quality(ballot.scene, right)
            answer = "same" if same and say is honest else say(lead, generator)
            prompt = prompt_of(scenes[ballot.scene].segments)
            found.append(
                Judgement(
                    rater, prompt, "overall", left, right, WINNERS[answer], ballot.kind, 4000, *ballot.videos
                )
            )
    return found


def small_study(directory: Path, pairs: int = 6, **changes: object) -> Study:
    """A study of two arms whose videos are text files: nothing below the page looks into them."""
    folder = directory.with_name(f"videos of {directory.name}")
    folder.mkdir()
    videos = {}
    for text in (f"{arm} {n}" for n in range(pairs) for arm in ("base", "aligned")):
        videos[digest_of(text)] = folder / text
        (folder / text).write_text(text)
    design = replace(Design("A study", tuple(scenes_of(pairs)), pairs=1000), **changes)  # type: ignore[arg-type]
    return create_study(directory, design, videos)


def answered(study: Study, ballot: Ballot, answer: str = "left") -> dict[str, str]:
    """The same answer to every question of a ballot."""
    names = study.design.asked_about(study.design.scenes[ballot.scene])
    return dict.fromkeys(names, answer)


def vote_all(study: Study, name: str, answer: Callable[[Ballot], str]) -> None:
    """Vote on every ballot of a rater."""
    rater = study.rater_of(study.invite(name))
    assert rater is not None
    for position, ballot in enumerate(study.ballots_of(rater)):
        study.vote(rater, Vote(position, answered(study, ballot, answer(ballot)), milliseconds=2000))
