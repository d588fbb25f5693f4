"""Data of a run's report."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvpo.app import report_data
from kvpo.app.build import build_setup, source_of
from kvpo.app.configuration import resolve
from kvpo.app.report_data import act_routes, causality_groups
from kvpo.app.sources.common import Recall
from kvpo.config import ExplorationConfig
from kvpo.prompts import VideoPrompt
from tests.tiny_world import SETTINGS


def frames_of(switches: tuple[int, ...], counts: tuple[int, ...] = (0, 3)) -> dict[str, list[int]]:
    prompt, exploration = VideoPrompt(0, ("a", "b", "c"), switches, 36), ExplorationConfig(routed=3, recent=3)
    routes = act_routes(prompt, switches[1], exploration, 3, counts)
    return {name: [one.frame for one in route] for name, route in routes.items()}


def test_routes_of_an_act_show_that_act_or_there_are_none() -> None:
    first, second = "act 1 \u00d73", "act 2 \u00d73"
    assert frames_of((12, 24)) == {first: [6, 7, 8], second: [15, 16, 17]}
    assert frames_of((12, 18)) == {first: [6, 7, 8], second: [12, 13, 14]}
    assert frames_of((12, 15)) == {}, "act 2 is among the recent frames"
    assert frames_of((3, 12)) == {}, "act 1 is in the sink"


def test_routes_may_show_both_acts() -> None:
    assert frames_of((12, 24), (1, 2)) == {
        "act 1 \u00d72 + act 2 \u00d71": [6, 7, 16],
        "act 1 \u00d71 + act 2 \u00d72": [7, 15, 16],
    }


@pytest.mark.parametrize("tail", [2, 0])
def test_who_comes_back_is_read_of_every_member_of_a_story_whose_acts_can_be_told_apart(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, tail: int
) -> None:
    given = {name: SETTINGS[name] for name in ("backbone.geometry",)} | {
        "backbone.checkpoint": str(tiny_base)
    }
    setup = build_setup(resolve("demo", None, given | {"exploration.tail_blocks": str(tail)}))
    source, read = source_of(setup.config), []

    def actor(video_BTCHW: torch.Tensor) -> list[str]:
        """The second story's acts are three; the anchor shows the first of them, branches others."""
        read.append(video_BTCHW.shape[:2])
        if len(read) <= 2:
            return ["red ring"] * len(video_BTCHW)
        return ["red ring", "blue cross", "pink square"] if len(video_BTCHW) == 3 else [*"abcd", "red ring"]

    recall = Recall(source.recall.stories, actor)
    monkeypatch.setattr(report_data, "source_of", lambda config: replace(source, recall=recall))
    videos: dict[str, torch.Tensor] = {}
    (entry,) = causality_groups(setup, videos)
    # The ends of three acts, then every member: after its window of two blocks, or in it where that is all.
    assert read == [(3, 6), (5, 3 * tail or 6)] * 2
    assert entry["acts"] == ["red ring", "blue cross", "pink square"]
    names = [
        "anchor",
        "act 1 \u00d76",
        "act 1 \u00d74 + act 2 \u00d72",
        "act 1 \u00d72 + act 2 \u00d74",
        "act 2 \u00d76",
    ]
    assert [(m["name"], m["shows"]) for m in entry["members"]] == list(
        zip(names, ["red ring", *"abcd"], strict=True)
    )
    routes = [member["routed_frames"] for member in entry["members"]]
    assert [sum(frame < 21 for frame in route) for route in routes] == [0, 6, 4, 2, 0]
    assert all(len(set(route)) == 6 and max(route) < 42 for route in routes[1:])
    assert entry["switches"][2] == entry["fork_frame"] and len(videos) == 5
