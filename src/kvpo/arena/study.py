"""The design of a study: its questions, its scenes, and the arms that made their videos."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from kvpo.arena.judgements import WINNERS, prompt_of
from kvpo.files import read_text

ANSWERS = tuple(WINNERS)
MOST_TEXT = 4000
"""Most characters of a question, its hint or the instructions."""


@dataclass(frozen=True)
class Question:
    """One question about a pair."""

    name: str
    text: str
    hint: str = ""
    """An example of what should decide the answer."""
    stories: bool = False
    """Asked only about videos of several prompts."""


QUESTIONS = (
    Question(
        "overall",
        "Which video is better, all in all?",
        "Ask yourself which one you would keep.",
    ),
    Question(
        "visual",
        "Which one looks better?",
        "Sharp outlines and steady colours beat blur, noise and flicker; do not judge the movement here.",
    ),
    Question(
        "motion",
        "Which one moves better?",
        "A smooth glide beats a jump or a shake; standing still where movement is asked for is a fault.",
    ),
    Question(
        "text",
        "Which one shows more of what the prompt says?",
        "Two blue squares that roll beat one, if the prompt asks for two; look at number, colour and action.",
    ),
    Question(
        "consistency",
        "Which one holds together better when the prompt changes?",
        "Whoever was there should still look the same after the change, unless the prompt says otherwise.",
        stories=True,
    ),
)
OF_PAIRS = (
    "You will see two videos at a time, made from the same prompt. They play in step; watch them to the end "
    "once, then again as often as you like, slowly or frame by frame. Judge what you see, not what you guess "
    "about how it was made. Say 'same' when you see no difference worth naming, 'both bad' when neither is "
    "acceptable. Some pairs come twice, and some are the same video twice: this checks the study."
)
OF_RANKINGS = (
    "You will see several videos at a time, made from the same prompt. They play in step; watch them to the "
    "end once, then again as often as you like, slowly or frame by frame. Judge what you see, not what you "
    "guess about how it was made. Drag them into order, the best first; then continue with the next."
)


@dataclass(frozen=True)
class Scene:
    """Videos of one prompt and one noise tape. Raters compare two of them or rank them all."""

    segments: tuple[str, ...]
    """The prompts, one after the other."""
    videos: Mapping[str, str]
    """Arm -> digest of its video."""
    starts: tuple[float, ...] = ()
    """The start of each segment as a share of the video's length; empty: unknown."""
    rate: float = 24.0
    """Frames per second."""

    @property
    def prompt(self) -> str:
        """The prompts as one text."""
        return prompt_of(self.segments)


@dataclass(frozen=True)
class Design:
    """Everything in a study except its votes."""

    title: str
    scenes: tuple[Scene, ...] = ()
    questions: tuple[Question, ...] = QUESTIONS
    instructions: str = ""
    """Text that raters read before they begin; empty: the default for pairs or for rankings."""
    pairs: int = 20
    """Most pairs, or rankings, for one rater; repeats and attention pairs come on top."""
    ranked: bool = False
    """True if raters rank whole scenes instead of comparing pairs."""
    sources: str = ""
    """The origin of the videos, as given when the study was created."""

    def __post_init__(self) -> None:
        if not self.instructions:
            object.__setattr__(self, "instructions", OF_RANKINGS if self.ranked else OF_PAIRS)

    @property
    def arms(self) -> tuple[str, ...]:
        """All arms, in the order in which the scenes name them."""
        return tuple(dict.fromkeys(arm for scene in self.scenes for arm in scene.videos))

    @property
    def asked(self) -> tuple[Question, ...]:
        """The questions that raters are asked; for rankings, only the first."""
        return self.questions[: 1 if self.ranked else None]

    def asked_about(self, scene: Scene) -> list[str]:
        """Names of the questions that a ballot on ``scene`` asks; a ranking asks the first of any scene."""
        about = self.ranked or len(scene.segments) > 1
        return [one.name for one in self.asked if about or not one.stories]


def read_questions(path: Path) -> dict[str, Any]:
    """Read the ``title``, ``instructions`` and ``questions`` that a YAML file sets, as fields of ``Design``.

    Raises:
        ValueError: not YAML, an unknown field, an invalid question, or two questions of one name.
    """
    try:
        given = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not YAML: {' '.join(str(error).split())}") from error
    known = ("title", "instructions", "questions")
    if not isinstance(given, dict) or not given or set(given) - set(known):
        raise ValueError(f"{path}: expected some of the fields {', '.join(known)}, got {str(given)[:60]}")
    found: dict[str, Any] = {}
    for name in ("title", "instructions"):
        if name in given:
            found[name] = _text(f"{path}: {name}", given[name])
    if "questions" in given:
        if not isinstance(given["questions"], list) or not given["questions"]:
            raise ValueError(f"{path}: questions: expected a list of questions")
        questions = tuple(_question(path, number, one) for number, one in enumerate(given["questions"], 1))
        names = [one.name for one in questions]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(f"{path}: two questions are called {twice[0]!r}")
        if questions[0].stories:
            raise ValueError(f"{path}: question 1 is asked about every pair: leave its 'stories' out")
        found["questions"] = questions
    return found


def _question(path: Path, number: int, given: Any) -> Question:
    where = f"{path}: question {number}"
    known = [field.name for field in fields(Question)]
    if not isinstance(given, dict) or not {"name", "text"} <= set(given) <= set(known):
        raise ValueError(
            f"{where}: expected a name, a text and perhaps hint and stories, got {str(given)[:60]}"
        )
    if not isinstance(stories := given.get("stories", False), bool):
        raise ValueError(f"{where}: stories: expected true or false, got {stories!r}")
    texts = {
        name: _text(f"{where}: {name}", given[name]) for name in ("name", "text", "hint") if name in given
    }
    return Question(**texts, stories=stories)


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or len(value) > MOST_TEXT:
        raise ValueError(
            f"{where}: expected a text of at most {MOST_TEXT} characters, got {str(value)[:60]!r}"
        )
    return value.strip()
