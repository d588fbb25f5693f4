"""The wish that one of three actors comes back: what returns.py asks for, and of which stories."""

import importlib
from types import ModuleType

import pytest
import torch

from kvpo.app.configuration import preset
from kvpo.engine.scoring import segment_clips
from kvpo.prompts import ClipPrompt
from kvpo.world.grammar import parse
from kvpo.world.render import render
from kvpo.world.stories import OPEN
from kvpo.world.vocabulary import Act, Actor, Story

LOOKS = (("red", "ring"), ("blue", "cross"), ("green", "square"))
TOLD = tuple(f"By the sea, a large {colour} {shape} stays in place." for colour, shape in LOOKS)


@pytest.fixture
def returns() -> ModuleType:
    """The script, which imports what it shares with others by plain name."""
    return importlib.import_module("returns")


def clip_of(look: tuple[str, str]) -> torch.Tensor:
    """Twelve frames of one actor."""
    return render(Story((Act("sea", (Actor(*look, "large", "still"),), "", 0, "show"),), 12))


def test_of_three_actors_the_second_is_wanted_back(returns: ModuleType) -> None:
    clips = torch.stack([clip_of(look) for look in LOOKS])
    found = returns.wish(clips, [ClipPrompt(OPEN, earlier=TOLD)] * 3)
    first, second, third = found["second_returns"].tolist()
    assert second > 0.8 and max(first, third) < 0.3 and found["told"].tolist() == [0.5] * 3
    found = returns.wish(clips, [ClipPrompt(text) for text in TOLD])
    assert bool((found["told"] > 0.8).all()) and found["second_returns"].tolist() == [0.5] * 3


def test_stories_show_three_actors_and_leave_open_who_is_back(returns: ModuleType) -> None:
    stream = preset("demo").stream
    own = returns.stories(6, stream.block)
    assert len({story.segments for story in own}) == 6
    for story in own:
        assert story.segments[3] == OPEN and story.num_frames % stream.block == 0
        (first,), (second,), (third,) = (parse(text).actors for text in story.segments[:3])
        assert len({(actor.colour, actor.shape) for actor in (first, second, third)}) == 3
        # The window of the last act still shows the second one, and the first only as the sink.
        seen = story.switches[2] - stream.deployment.local_past
        assert story.switches[0] < seen < story.switches[1] and stream.sink <= story.switches[0]
        last = segment_clips(story, story.switches[2], story.num_frames, block=stream.block, lead=0)[0]
        assert last.prompt == OPEN and last.prompt.earlier[-2] == story.segments[1]
