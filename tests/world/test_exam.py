"""Demands of captions, counted as met or not, on renders of known content."""

from dataclasses import replace

import pytest
import torch

from kvpo.prompts import ClipPrompt
from kvpo.world.calibration import draw_stories
from kvpo.world.exam import ABOUT, JUDGED, SUBJECTS, WorldExam
from kvpo.world.grammar import event_of
from kvpo.world.imperfect import CLEAN, observe
from kvpo.world.vocabulary import Act, Actor, Story

RING, BLOCK = Actor("red", "ring", "large", "right"), Actor("blue", "square", "small", "still")


def shown(*acts: Act) -> torch.Tensor:
    stories = [Story((replace(act, start=0),), 12) for act in acts]
    return observe(stories, torch.Generator().manual_seed(1), CLEAN)


def counts(actors: tuple[Actor, ...], caption: str) -> dict[str, tuple[float, float]]:
    """(met, asked) of the subjects that a caption asks about a clip by the sea."""
    found = WorldExam()(shown(Act("sea", actors, "", 0, "show")), [ClipPrompt(caption)])
    pairs = {name: (float(found[name]), float(found[f"asked {name}"])) for name in SUBJECTS}
    return {name: pair for name, pair in pairs.items() if pair[1]}


def test_a_caption_tells_the_event_of_its_act():
    for story in draw_stories("train", 150, 4, 48, seed=1):
        for act in story.acts[1:]:
            assert event_of(act.caption) == (act.event if act.event in ABOUT else ""), act


def test_exact_renders_meet_what_their_captions_ask_and_not_what_others_do():
    acts = [act for story in draw_stories("test", 60, 3, 36, seed=2) for act in story.acts]
    video = shown(*acts)
    captions = [ClipPrompt(act.caption) for act in acts]
    own, other = WorldExam()(video, captions), WorldExam()(video, captions[7:] + captions[:7])
    for name in SUBJECTS:
        asked = float(own[f"asked {name}"].sum())
        assert asked > 0 and asked == float(other[f"asked {name}"].sum())
        assert float(own[name].sum()) / asked > 0.9, name
        assert float(other[name].sum()) / asked < 0.75, name


def test_each_demand_counts_by_itself_and_open_ones_do_not():
    told = "A large red ring drifts right and a small blue square rests by the sea."
    assert counts((RING, BLOCK), told) == {"colour": (2, 2), "shape": (2, 2), "motion": (2, 2),
                                           "count": (1, 1), "scene": (1, 1)}  # fmt: skip
    wrong = "A green ring drifts right and something rests in a cave."
    assert counts((RING, BLOCK), wrong) == {"colour": (0, 1), "shape": (1, 1), "motion": (2, 2),
                                            "count": (1, 1), "scene": (0, 1)}  # fmt: skip
    assert counts((RING,), told)["count"] == (0, 1)
    assert counts((RING,), told)["colour"] == (1, 2), "nobody plays the second actor"


@pytest.mark.parametrize(
    ("caption", "event", "met"),
    [
        ("The red ring comes back.", "return", 1),
        ("The blue ring comes back.", "return", 0),
        ("We are back by the sea, where one of them drifts right.", "revisit", 1),
        ("The view returns in a cave, where one of them drifts right.", "revisit", 0),
        ("The blue ring turns red drifting right.", "recolour", 1),
        ("The red ring turns blue drifting right.", "recolour", 0),
        ("One of them leaves and the red ring drifts right.", "leave", 1),
        ("One of them leaves and the blue square rests.", "leave", 0),
    ],
)
def test_an_event_is_met_if_all_that_is_said_of_it_is(caption, event, met):
    found = counts((RING,), caption)
    assert found[event] == (met, 1)
    assert not set(found) - {*JUDGED, event}


def test_a_return_of_somebody_is_not_judged():
    assert "return" not in counts((RING,), "One of them comes back.")
