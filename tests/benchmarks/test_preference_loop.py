"""The preference loop runs from votes to a fresh round; its raters like what they are said to like."""

from pathlib import Path

import numpy as np
import pytest

from kvpo.arena.pairs import Ballot
from kvpo.prompts import ClipPrompt
from kvpo.report.video import write_video
from kvpo.world.render import render
from kvpo.world.reward import WorldScorer
from kvpo.world.stories import distinct_stories, video_prompt

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def script():
    import preference_loop

    return preference_loop


def test_raters_choose_by_their_taste_and_call_equal_videos_the_same(script):
    utility = {"good": 3.0, "bad": 0.0}.__getitem__
    generator = np.random.default_rng(0)
    said = [script.answer(Ballot("pair", 0, ("bad", "good")), utility, generator) for _ in range(400)]
    assert said.count("right") / (400 - said.count("same")) == pytest.approx(0.953, abs=0.03)
    assert script.answer(Ballot("attention", 0, ("bad", "bad")), utility, generator) == "same"


def test_the_taste_of_a_file_is_that_of_its_frames(script, tmp_path):
    (story,) = distinct_stories("validation", 1, 1, script.FRAMES, 3)
    prompt = video_prompt(story, 0)
    video_BTCHW = render(story)[None]
    frames = (video_BTCHW[0].movedim(1, -1) * 255).round().byte().numpy()
    write_video(tmp_path / "one.mp4", frames, 8, scale=4)
    scores = WorldScorer()(video_BTCHW, [ClipPrompt(prompt.segments[0])])
    expected = sum(weight * float(scores[name]) for name, weight in script.TASTE.items())
    assert script.calm(tmp_path / "one.mp4", prompt.segments[0]) == pytest.approx(expected, abs=0.5)
    assert expected > 5


def test_a_finished_loop_is_read_and_one_of_other_sizes_refused(script, tmp_path, monkeypatch):
    ran = []
    monkeypatch.setattr(script, "loop", lambda out, seed, sizes, changes: ran.append(seed) or {"votes": 300})
    kept = script.kept_loop(tmp_path / "7", 7, script.Sizes())
    assert kept == script.kept_loop(tmp_path / "7", 7, script.Sizes()) and ran == [7]
    assert kept["votes"] == 300 and kept["commit"]
    with pytest.raises(ValueError, match="'updates': 24}, not .*'updates': 2}; choose another --out"):
        script.kept_loop(tmp_path / "7", 7, script.Sizes(updates=2))


@pytest.mark.slow
def test_the_loop_closes_at_a_tiny_size(script, tiny_base, tmp_path):
    from tests.tiny_world import SETTINGS

    small = SETTINGS | {
        "backbone.checkpoint": str(tiny_base),
        "evaluation.validation_prompts": 2,
        "evaluation.test_prompts": 2,
    }
    numbers = script.loop(tmp_path, 0, script.Sizes(6, 2, 2, 2), small)
    assert numbers["votes"] == 12 and numbers["worth"]["prompts"] == 6
    assert numbers["fresh"]["prompts"] == 2 and "radar" in numbers
    assert "| 0 | 12 |" in script.loops({"loops": {"0": numbers}})
