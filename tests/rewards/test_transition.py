"""Transitions under CLIP features: by definition, and on features whose answer is known."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvpo.app.calibrate import Sample, check_usable, measure
from kvpo.app.cli import main
from kvpo.prompts import ClipPrompt
from kvpo.rewards import transition
from kvpo.rewards.catalogue import DECLARATIONS
from kvpo.rewards.reward import Reward
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


@pytest.mark.parametrize("name", ["transition_follow", "transition_keep"])
def test_calibration_says_which_clips_it_has_none_of(
    clip_directory: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    source = f"{name}.weights={clip_directory}"
    words = ["calibrate", name, "--clips", "2", "--source", source, "--out", str(tmp_path / "noise.json")]
    assert main(words) == 1 and not (tmp_path / "noise.json").exists()
    assert (
        f"{name} is the same for all 2 clips: there is nothing to learn from it (rewards of prompt switches "
        "need clips with one: rewards.transition_blocks of a run makes them)"
    ) in capsys.readouterr().err


def test_calibration_refuses_one_that_varies_on_equal_clips(
    scorer: TransitionScorer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As an encoder with dropout would, on clips that switch in their middle; one without is accepted."""
    plain, draws = transition.image_features, torch.Generator().manual_seed(0)

    class Switching(TransitionScorer):
        def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
            return super().__call__(video_BTCHW, [ClipPrompt("green", "red", 4)] * len(prompts))

    declared = tuple(DECLARATIONS[name] for name in scorer.components)
    reward = Reward("transition_follow", Switching(None, None), declared)  # type: ignore[arg-type]
    samples = [Sample(str(n), torch.rand(8, 3, 16, 16, generator=draws), 8.0, "") for n in range(2)]
    check_usable(measure(reward, samples, 0), 2)

    def wavering(model: Any, frames: Tensor, fit: Any) -> Tensor:
        features = plain(model, frames, fit)
        return features + torch.rand(features.shape, generator=draws)

    monkeypatch.setattr(transition, "image_features", wavering)
    with pytest.raises(ValueError, match="^transition_follow is random: equal clips differ by up to"):
        check_usable(measure(reward, samples, 0), 2)
