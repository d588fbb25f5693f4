"""Transitions under CLIP features: by definition, and on features whose answer is known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards import transition
from kvpo.rewards.transition import TransitionScorer
from tests.rewards import test_clip_family


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch) -> TransitionScorer:
    """An encoder whose features of a frame are its three colours, and of a text those of its colour."""
    colours = {"red": [1.0, 0.0, 0.0], "green": [0.0, 1.0, 0.0], "blue": [0.0, 0.0, 1.0]}

    def images(model: Any, frames: Tensor, fit: Any) -> Tensor:
        return F.normalize(frames.mean((2, 3)), dim=-1)

    monkeypatch.setattr(transition, "image_features", images)
    monkeypatch.setattr(
        transition, "text_features", lambda model, tokens, text, name: torch.tensor(colours[text])
    )
    return TransitionScorer(None, None)  # type: ignore[arg-type]


def clip(*colours: tuple[float, float, float]) -> Tensor:
    """Four frames of each colour."""
    return torch.tensor(colours).repeat_interleave(4, 0)[:, :, None, None].expand(-1, -1, 4, 4)


def test_following_and_keeping_are_told_apart(scorer: TransitionScorer) -> None:
    prompt = ClipPrompt("green", "red", 4)
    right = clip((0.6, 0.0, 0.8), (0.0, 0.6, 0.8))  # red turns green, blue stays
    ignored = clip((0.6, 0.0, 0.8), (0.6, 0.0, 0.8))
    lost = clip((0.6, 0.0, 0.8), (0.0, 1.0, 0.0))  # green, and the blue is gone
    scores = scorer(torch.stack([right, ignored, lost]), [prompt] * 3)
    follow, keep = scores["transition_follow"], scores["transition_keep"]
    assert follow.tolist() == pytest.approx([1.2, 0.0, 1.6], abs=1e-6)
    assert keep[0] > 0.99 and keep[1] == pytest.approx(1.0) and keep[2] < 0.7
    alone = [scorer(one[None], [prompt])["transition_keep"].item() for one in (right, ignored, lost)]
    assert alone == keep.tolist()
    assert list(replace(scorer, components=("transition_keep",))(right[None], [prompt])) == [
        "transition_keep"
    ]


def test_without_a_switch_nothing_is_asked(scorer: TransitionScorer) -> None:
    scores = scorer(clip((0.6, 0.0, 0.8))[None], [ClipPrompt("green")])
    assert scores["transition_follow"].tolist() == [0.0] and scores["transition_keep"].tolist() == [1.0]
    with pytest.raises(ValueError, match="switches at frame 4 of a clip of 4"):
        scorer(clip((0.6, 0.0, 0.8))[None], [ClipPrompt("green", "red", 4)])


clip_directory = test_clip_family.clip_directory


def test_the_reward_comes_from_a_directory_of_clip(clip_directory: Path) -> None:
    scorer = transition.load_transition(clip_directory)
    video = torch.rand(2, 8, 3, 40, 60, generator=torch.Generator().manual_seed(0))
    scores = scorer(video, [ClipPrompt("a fox", "a dog", 3), ClipPrompt("a fox")])
    assert scores["transition_follow"][1] == 0 and -1 <= scores["transition_keep"][0] <= 1
