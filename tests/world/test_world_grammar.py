"""Captions are read back as they were written, and bad ones say what is wrong."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpo.world.grammar import full_request, parse, phrase, words
from kvpo.world.stories import sample_story
from kvpo.world.text import TEXT_LENGTH
from kvpo.world.vocabulary import ActorRequest, Request


def story(seed: int, num_acts: int = 4):
    return sample_story(torch.Generator().manual_seed(seed), num_acts, 60)


def agrees(request: ActorRequest, truth: ActorRequest) -> bool:
    return all(
        getattr(request, name) in (None, getattr(truth, name))
        for name in ("colour", "shape", "size", "motion")
    )


@settings(max_examples=150, deadline=None)
@given(seed=st.integers(0, 10**6), mask=st.lists(st.booleans(), min_size=10, max_size=10))
def test_parse_inverts_phrase_for_any_open_attributes(seed, mask):
    told = story(seed)
    for previous, act in zip((None, *told.acts), told.acts, strict=False):
        truth = full_request(act)
        actors = tuple(
            ActorRequest(
                *(
                    value if keep else None
                    for value, keep in zip((a.colour, a.shape, a.size, a.motion), mask[4 * i :], strict=False)
                )
            )
            for i, a in enumerate(truth.actors)
        )
        request = Request(truth.scene if mask[8] else None, actors)
        text = phrase(request, act, previous, random.Random(seed))
        assert parse(text) == request, text


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_captions_tell_the_truth_and_fit_the_text_length(seed):
    for act in story(seed).acts:
        request, truth = parse(act.caption), full_request(act)
        assert len(words(act.caption)) <= TEXT_LENGTH - 2
        assert request.scene in (None, truth.scene)
        assert len(request.actors) == len(truth.actors)
        assert all(map(agrees, request.actors, truth.actors))


def test_three_quarters_of_openings_name_everything_and_returns_are_often_vague():
    acts = [act for seed in range(400) for act in story(seed).acts]
    share = {
        event: sum(parse(a.caption) == full_request(a) for a in acts if a.event == event)
        / sum(a.event == event for a in acts)
        for event in ("open", "show", "return")
    }
    assert share["open"] == pytest.approx(0.75, abs=0.07)
    assert share["show"] == pytest.approx(0.75, abs=0.07)
    assert 0.3 < share["return"] < 0.6


def test_known_sentences():
    red = ActorRequest("red", "circle", "small", "left")
    assert parse("A small red circle drifts left at night.") == Request("night", (red,))
    assert parse("Now one of them comes back.") == Request(None, (ActorRequest(),))
    left_alone = parse("Then the red ring disappears and the blue square rests.")
    assert left_alone == Request(None, (ActorRequest("blue", "square", None, "still"),))
    turned = parse("The red circle turns blue drifting left by the sea")
    assert turned == Request("sea", (ActorRequest("blue", "circle", None, "left"),))


@pytest.mark.parametrize(
    ("caption", "message"),
    [
        ("a red circle dances at night", "'dances' is not known"),
        ("at night in a cave, a red circle rests", "second scene, 'cave'"),
        ("a red blue circle rests", "colour is given twice"),
        ("drifts left at night", "describes nobody"),
        ("at night", "0 actors"),
        ("", "0 actors"),
        ("a ring rests and a circle rests and a cross rests", "3 actors"),
    ],
)
def test_unreadable_captions_are_refused_with_the_caption_and_the_reason(caption, message):
    with pytest.raises(ValueError, match=message) as error:
        parse(caption)
    assert repr(caption) in str(error.value)
    assert "Say for example" in str(error.value)
