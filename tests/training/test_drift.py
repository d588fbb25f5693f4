"""Drift of long streams: equal to what whole videos show, span by span, in memory that stays flat."""

from pathlib import Path
from typing import Any

import pytest
import torch

from kvpo.engine.generator import pixels_of
from kvpo.engine.stream import stream_latents
from kvpo.prompts import VideoPrompt
from kvpo.rewards.pixel_statistics import LOOKS, looks
from kvpo.training import drift
from kvpo.training.diversity import ReadOff
from kvpo.training.drift import MEMORY, chained, drift_curves
from kvpo.training.evaluation import segment_scores
from tests.tiny_world import tiny_config, toy_setup

SPAN = 12
STORY = [VideoPrompt(0, ("a", "b"), (6,), 15), VideoPrompt(1, ("c",), (), 9)]


def test_prompts_follow_one_another_until_the_video_ends() -> None:
    one = chained(STORY, 45, 7)
    assert one == VideoPrompt(7, ("a", "b", "c", "a", "b", "c"), (6, 15, 24, 30, 39), 45)
    assert chained(STORY, 6, 0) == VideoPrompt(0, ("a",), (), 6)


def test_spans_are_measured_as_in_the_whole_video(tiny_base: Path) -> None:
    setup = toy_setup(tiny_config(tiny_base))
    backbone, block, frames = setup.backbone, setup.generator.block, setup.backbone.codec.frames_per_latent
    prompts = [chained(STORY, 4 * SPAN, 0), chained(STORY[::-1], 4 * SPAN, 1)]
    tape, read_off = backbone.tape("test"), ReadOff(lambda video: ([], video.mean((1, 2, 3, 4))), 1.0)
    found = drift_curves(backbone, prompts, tape, setup.judges, SPAN, read_off)
    latents = stream_latents(setup.generator, prompts, backbone.texts(prompts), tape)
    pixels = pixels_of(backbone.codec, latents)
    for n, first in enumerate(range(0, 4 * SPAN, SPAN)):
        own = pixels[:, first : first + SPAN]
        assert found["confidence"][n] == pytest.approx(own.mean((1, 2, 3, 4)).tolist())
        assert found["motion"][n] == pytest.approx(looks(own)[list(LOOKS).index("motion")].tolist())
        place: Any = {"first": first, "stop": first + SPAN}
        scored = segment_scores(setup.judges.scorer, pixels, prompts, frames, block, block, **place)
        assert found["reward"][n] == pytest.approx(scored.sum(0).tolist(), abs=1e-6)
        for name, scores in zip(setup.judges.scorer.components, scored, strict=True):
            assert found[f"reward/{name}"][n] == pytest.approx(scores.tolist(), abs=1e-6)
    assert {len(values) for values in found.values()} == {4} and MEMORY in found


def test_memory_does_not_grow_with_the_stream(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    setup = toy_setup(tiny_config(tiny_base))
    held: list[tuple[int, int]] = []
    forget = drift._forget

    def counted(stream: Any, window: int) -> None:
        forget(stream, window)
        held.append((len(stream.latents), stream.history.cache.pages_in_use))

    monkeypatch.setattr(drift, "_forget", counted)
    prompts = [chained(STORY, 8 * SPAN, 0)]
    drift_curves(setup.backbone, prompts, setup.backbone.tape("test"), setup.judges, SPAN)
    assert max(held[:10]) == max(held) and len(held) == 8 * SPAN // setup.generator.block


def test_a_window_without_end_keeps_everything_that_it_sees(tiny_base: Path) -> None:
    """Nothing can be let go of there, and a switch encodes everything anew."""
    config: Any = tiny_config(tiny_base, stream__window=-1, stream__sink=0)
    setup = toy_setup(config)
    prompts, tape = [chained(STORY, 2 * SPAN, 0)], setup.backbone.tape("test")
    found = drift_curves(setup.backbone, prompts, tape, setup.judges, SPAN)
    latents = stream_latents(setup.generator, prompts, setup.backbone.texts(prompts), tape)
    expected = looks(pixels_of(setup.backbone.codec, latents)[:, SPAN:])
    assert found["brightness"][1] == pytest.approx(expected[list(LOOKS).index("brightness")].tolist())
    assert torch.isfinite(torch.tensor(found["reward"])).all()
