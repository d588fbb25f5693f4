"""Test-time selection: the plain video without candidates, and never worse by what chooses."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvpo.app.sources.world import build_backbone
from kvpo.engine.explorers import EXPLORERS
from kvpo.engine.generator import pixels_of
from kvpo.engine.scoring import score_clips, shared_clips
from kvpo.engine.selection import Selection
from kvpo.engine.stream import stream_latents
from kvpo.prompts import VideoPrompt
from tests.tiny_world import tiny_config

PROMPT = VideoPrompt(3, ("a red circle", "a blue square"), (12,), 24)


@dataclass(frozen=True)
class Redness:
    """A number of every frame alone, so that choices of blocks add up."""

    sign: float = 1.0
    components: tuple[str, ...] = ("redness",)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        return {"redness": self.sign * (video_BTCHW[:, :, 0] - video_BTCHW[:, :, 1]).mean((1, 2, 3))}


def selection_of(base: Path, explorer: str, span: int, count: int = 4, sign: float = 1.0) -> Selection:
    config = tiny_config(base)
    backbone = build_backbone(config)
    return Selection(
        backbone.generator, backbone.codec, Redness(sign), torch.ones(1), config.exploration,
        EXPLORERS[explorer], count, span,
    )  # fmt: skip


def plain(base: Path) -> tuple[Tensor, dict[str, Tensor], object]:
    backbone = build_backbone(tiny_config(base))
    texts, tape = backbone.texts([PROMPT]), backbone.tape("generation")
    with torch.no_grad():
        return stream_latents(backbone.generator, [PROMPT], texts, tape)[0], texts, tape


def whole(selection: Selection, latents: Tensor) -> float:
    """The score of a whole video, segment by segment."""
    block, frames = selection.generator.block, selection.codec.frames_per_latent
    clips = shared_clips(PROMPT, 0, PROMPT.num_frames, block=block)
    video = pixels_of(selection.codec, latents[None])
    table = score_clips(selection.scorer, video, [(0, clip) for clip, _ in clips], frames_per_latent=frames)
    return float((table[0] * torch.tensor([share for _, share in clips])).sum())


@pytest.mark.parametrize("explorer", ["routes", "fresh"])
@pytest.mark.parametrize("span", [1, 0])
def test_the_best_of_several_is_chosen_by_the_scores_that_are_told(
    tiny_base: Path, explorer: str, span: int
) -> None:
    video, texts, tape = plain(tiny_base)
    selection = selection_of(tiny_base, explorer, span)
    found = selection.best(PROMPT, texts, tape)  # type: ignore[arg-type]
    assert found.latents_TCHW.shape == video.shape
    blocks = PROMPT.num_frames // selection.generator.block
    assert len(found.scores) == (blocks if span else 1)
    assert max(map(len, found.scores)) == 4
    if span == 0:  # the plain one is first
        assert found.scores[0][0] == pytest.approx(whole(selection, video), abs=1e-5)
        assert max(found.scores[0]) == pytest.approx(whole(selection, found.latents_TCHW), abs=1e-5)
    if explorer == "routes":
        assert torch.equal(found.latents_TCHW[:3], video[:3]), "nothing can be routed yet"
        assert span == 0 or len(found.scores[0]) == 1
    again = selection.best(PROMPT, texts, tape)  # type: ignore[arg-type]
    assert torch.equal(again.latents_TCHW, found.latents_TCHW) and again.scores == found.scores


def test_the_seed_keys_the_candidates(tiny_base: Path) -> None:
    _, texts, tape = plain(tiny_base)
    selection = selection_of(tiny_base, "fresh", 0)
    one, other = (
        replace(selection, key=(seed,)).best(PROMPT, texts, tape)  # type: ignore[arg-type]
        for seed in (0, 1)
    )
    assert one.scores[0][0] == other.scores[0][0] and not set(one.scores[0][1:]) & set(other.scores[0][1:])


def test_all_of_a_long_history_may_be_kept_for_routes(tiny_base: Path) -> None:
    _, texts, tape = plain(tiny_base)
    selection = selection_of(tiny_base, "routes", 1, count=2)
    everything = replace(selection.exploration, resident_frames=0)
    long = replace(PROMPT, num_frames=60)
    found = replace(selection, exploration=everything).best(long, texts, tape)  # type: ignore[arg-type]
    assert len(found.latents_TCHW) == 60


def test_where_no_candidate_is_better_the_plain_video_stays(tiny_base: Path) -> None:
    video, texts, tape = plain(tiny_base)
    selection = selection_of(tiny_base, "fresh", 1, sign=0.0)
    found = selection.best(PROMPT, texts, tape)  # type: ignore[arg-type]
    assert all(own[0] == max(own) for own in found.scores)
    assert torch.allclose(found.latents_TCHW, video, atol=1e-5)
    best, worst = (
        replace(selection, scorer=Redness(sign), span=0).best(PROMPT, texts, tape)  # type: ignore[arg-type]
        for sign in (1.0, -1.0)
    )
    assert sorted(best.scores[0]) == pytest.approx(sorted(-value for value in worst.scores[0]), abs=1e-6)
    with pytest.raises(ValueError, match="num_frames = 25 is not a multiple of the block of 3"):
        selection.best(replace(PROMPT, num_frames=25), texts, tape)  # type: ignore[arg-type]
