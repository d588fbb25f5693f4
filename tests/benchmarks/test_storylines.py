"""storylines.py: the stories, the reward for who comes back, and the count of who does."""

import json
import shutil
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import storylines
from kvpo.app.align import align
from kvpo.prompt_files import examine
from kvpo.prompts import ClipPrompt
from kvpo.world.reward import DEFAULT_WEIGHTS, WorldScorer
from kvpo.world.stories import OPEN
from kvpo.world.vocabulary import FRAME_SIZE
from tests.app.finished import QUICK
from tests.tiny_world import FRAMES, tiny_config


def test_the_stories_have_different_actors_and_an_open_end(tmp_path: Path) -> None:
    storylines.main(["write", str(tmp_path / "stories.jsonl"), "--stories", "20"])
    written = examine(tmp_path / "stories.jsonl", num_frames=storylines.FRAMES).sound().prompts
    assert [one.segments for one in written] == [one.segments for one in islice(storylines.stories(), 20)]
    assert len({one.segments for one in written}) == 20
    for one in written:
        assert one.segments[2] == OPEN and one.switches == storylines.STARTS[1:]
        assert one.segments[0] != one.segments[1] and one.num_frames == storylines.FRAMES


def test_an_open_act_is_judged_by_the_caption_before_it() -> None:
    video = torch.rand(2, 8, 3, FRAME_SIZE, FRAME_SIZE, generator=torch.Generator().manual_seed(0))
    first, second = (one.segments[1] for one in islice(storylines.stories(), 2))
    open_clip = ClipPrompt(OPEN, before=first, switch=3)
    found = storylines.last_seen(video, [open_clip, ClipPrompt(second, before=first, switch=3)])
    scores = WorldScorer()(video[:1], [ClipPrompt(first, switch=3)])
    expected = sum(weight * float(scores[name]) for name, weight in DEFAULT_WEIGHTS.items())
    assert float(found[0]) == pytest.approx(expected, abs=1e-6) and 0 < expected < 1
    assert float(found[1]) == 1


def test_who_comes_back_is_counted_in_every_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storylines, "STARTS", (0, 6, 9))
    monkeypatch.setattr(storylines, "FRAMES", FRAMES)
    shown: list[list[tuple[str, str]]] = []

    def looks(video: Any) -> list[tuple[str, str]]:
        """Acts of two colours; every open act shows the second one, and every third look is an open act's."""
        shown.append([(("red", "blue", "blue")[len(shown) % 3], "ring")] * len(video))
        return shown[-1]

    monkeypatch.setattr(storylines, "looks", looks)
    runs = tmp_path / "comparison" / "runs"
    assert align(tiny_config(tiny_base, **QUICK), runs / "run-kvpo-0") is not None
    shutil.copytree(runs / "run-kvpo-0", runs / "run-kvpo-1")
    storylines.main(["count", str(tmp_path / "comparison"), "--json", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["stories"] == len(shown[0]) == 2 and len(shown) == 9
    assert {arm: len(own) for arm, own in found["arms"].items()} == {"base": 1, "kvpo": 2}
    for one, other in pairwise([*found["arms"]["base"], *found["arms"]["kvpo"]]):
        assert one["last"] == other["last"] == 1 and one["first"] == other["first"] == 0
    assert found["arms"]["kvpo"][0] == found["arms"]["kvpo"][1]
