"""Pretraining of the embedded generator: contexts as deployed, a loss that falls, the shipped settings."""

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from kvpo.app.configuration import preset
from kvpo.config import StreamConfig
from kvpo.engine.noise import keyed_generator
from kvpo.models.causal_wan import CausalWan
from kvpo.models.settings import WanShape
from kvpo.world.pretrain import (
    PretrainSettings,
    TrainingVideos,
    block_contexts,
    learning_rate,
    load_generator,
    new_generator,
    noise_levels,
    pretrain,
    snippet_blocks,
    training_loss,
)
from kvpo.world.text import LearnedTextEncoder
from tests.method.test_routing import deployment_frames
from tests.tiny_world import SETTINGS

ASSETS = Path(__file__).parents[2] / "src" / "kvpo" / "world" / "assets"
TINY = PretrainSettings(steps=30, videos=2, num_frames=30, snippet_blocks=3, lr=1e-2, warmup=3)


def tiny() -> tuple[WanShape, StreamConfig]:
    config = preset("demo", {name: value for name, value in SETTINGS.items() if name == "backbone.geometry"})
    return config.model, config.stream


def test_the_shipped_base_has_the_settings_of_the_command() -> None:
    with safe_open(ASSETS / "generator.safetensors", "pt") as file:
        header = json.loads(file.metadata()["generator"])
    expected = {"model": asdict(preset("demo").model), "settings": asdict(PretrainSettings())}
    assert header == json.loads(json.dumps(expected))


def trained(out: Path, **changes: Any) -> list[float]:
    """The losses of a tiny run."""
    losses: list[float] = []
    pretrain(*tiny(), replace(TINY, **changes), out, lambda step, loss: losses.append(loss))
    return losses


def test_the_loss_falls(tmp_path: Path) -> None:
    """On one batch that was not trained on, and one draw of noise."""
    model, stream = tiny()
    losses = trained(tmp_path / "base", steps=80, videos=4)
    assert len(losses) == 80 and not list(tmp_path.glob("*.partial"))
    settings = replace(TINY, steps=2000, videos=4)
    batch = TrainingVideos(stream, settings)[1999]

    def loss(transformer: CausalWan, text: LearnedTextEncoder) -> float:
        with torch.no_grad():
            return float(training_loss(transformer, text, batch, stream, settings, keyed_generator("x", 0)))

    loaded = load_generator(model, tmp_path / "base")
    assert not any(p.requires_grad for part in loaded for p in part.parameters())
    assert loss(*loaded) < 0.9 * loss(*new_generator(model, 0))


def test_a_run_repeats_to_the_bit(tmp_path: Path) -> None:
    first, second = (trained(tmp_path / name, steps=4) for name in ("one", "two"))
    assert first == second and (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert trained(tmp_path / "other", steps=4, seed=1)[0] != first[0]


def test_a_batch_is_a_function_of_its_number() -> None:
    stream = preset("demo").stream
    one, two = TrainingVideos(stream, TINY)[7], TrainingVideos(stream, TINY)[7]
    assert torch.equal(one.latents_BKFCHW, two.latents_BKFCHW) and one.captions == two.captions
    assert one.latents_BKFCHW.shape[:3] == (2, 4, stream.block)
    assert not torch.equal(one.latents_BKFCHW, TrainingVideos(stream, TINY)[8].latents_BKFCHW)


@pytest.mark.parametrize("switches", [[], [12], [9, 30]])
def test_snippets_are_the_first_block_and_a_run(switches: list[int]) -> None:
    stream, settings = preset("demo").stream, PretrainSettings()
    starts = set()
    for draw in range(200):
        chosen = snippet_blocks(switches, 20, stream, settings, keyed_generator("test", draw))
        assert chosen[0] == 0 and chosen[1:] == list(range(chosen[1], chosen[1] + 6)) and chosen[-1] < 20
        starts.add(chosen[1])
    assert {1, 14} <= starts


def test_contexts_of_rows_that_are_not_routed_are_those_of_deployment() -> None:
    stream, settings = preset("demo").stream, replace(PretrainSettings(), routed_share=0.0)
    chosen = [[0, 1, 2, 3, 4, 5, 6], [0, 9, 10, 11, 12, 13, 14]]
    table = block_contexts(chosen, stream, settings, keyed_generator("test", 0)).unflatten(0, (2, 7))
    for video, blocks in enumerate(chosen):
        places = [b * stream.block + f for b in blocks for f in range(stream.block)]
        for n, block in enumerate(blocks):
            frames = deployment_frames(
                block * stream.block, sink=stream.sink, window=stream.window, block=stream.block
            )
            found = [places[i - video * len(places)] for i in table[video, n].tolist() if i >= 0]
            assert found == [frame for frame in frames if frame in places], (video, n)


@pytest.mark.parametrize("donor_share", [0.0, 1.0])
def test_routed_contexts_keep_sink_and_recent_frames(donor_share: float) -> None:
    stream = preset("demo").stream
    settings = replace(PretrainSettings(), routed_share=1.0, donor_share=donor_share)
    plain = replace(settings, routed_share=0.0)
    chosen = [[0, 1, 2, 3, 4, 5, 6]] * 3
    length = 7 * stream.block
    changed = 0
    for draw in range(20):
        table = block_contexts(chosen, stream, settings, keyed_generator("test", draw)).unflatten(0, (3, 7))
        usual = block_contexts(chosen, stream, plain, keyed_generator("test", draw)).unflatten(0, (3, 7))
        full = (usual >= 0).all(-1)
        assert torch.equal(table[~full], usual[~full])
        assert torch.equal(table[..., : stream.sink], usual[..., : stream.sink])
        assert torch.equal(table[..., -3:], usual[..., -3:])
        for video in range(3):
            source = (video + 1) % 3 if donor_share else video
            for n in range(7):
                routed = table[video, n, stream.sink : -3]
                if full[video, n] and not torch.equal(routed, usual[video, n, stream.sink : -3]):
                    changed += 1
                    assert len(routed.unique()) <= 3 and set((routed // length).tolist()) == {source}
                    if not donor_share:
                        within = routed - video * length
                        assert int(within.min()) >= stream.sink and int(within.max()) < n * stream.block - 3
    assert changed > 50


def test_noise_levels_are_mostly_those_of_the_solver() -> None:
    stream, settings = preset("demo").stream, PretrainSettings()
    levels = noise_levels(4000, stream, settings, keyed_generator("test", 0))
    solver = torch.tensor([1.0, 0.9, 0.75, 0.5])  # 3 u / (1 + 2 u)
    share = (levels[:, None] - solver).abs().lt(1e-6).any(1).float().mean()
    assert float(share) == pytest.approx(settings.solver_share, abs=0.03)
    assert float(levels.min()) >= 0 and float(levels.max()) <= 1


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    settings = replace(PretrainSettings(), steps=1000, warmup=10, lr=1.0, decay_from=0.5)
    rates = [learning_rate(step, settings) for step in (0, 4, 10, 500, 750, 999)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.002])
