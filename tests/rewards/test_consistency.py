"""Steadiness of light, and of what is shown."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from tiny_rewards import gliding, random_weights, texture
from transformers import CLIPConfig, CLIPModel, Dinov2Config, Dinov2Model

from kvpo.rewards.consistency import FLICKER_WIDTH, FlickerScorer, load_subject_consistency


def flicker(video: torch.Tensor) -> float:
    return FlickerScorer()(video[None], [""])["flicker"].item()


def test_steady_fading_and_moving_clips_do_not_flicker():
    still = texture(64, 96)[None].expand(9, -1, -1, -1)
    fade = still * torch.linspace(1, 0.3, 9)[:, None, None, None]
    assert flicker(still) == pytest.approx(1, abs=1e-5) and flicker(fade) == pytest.approx(1, abs=1e-4)
    assert flicker(gliding(128, 128, 9, 2, 1)) > 0.8


def test_flicker_grows_with_its_amplitude_as_declared():
    still = torch.full((9, 3, 32, 32), 0.5)
    sign = torch.tensor([1.0, -1.0] * 5)[:9, None, None, None]
    # alternating by +-a deviates from the neighbours' mean by 2a
    for amplitude in (0.002, 0.01, 0.05):
        expected = torch.tensor(-2 * amplitude / FLICKER_WIDTH).exp().item()
        assert flicker(still + amplitude * sign) == pytest.approx(expected, rel=1e-3)


def test_local_flicker_counts_and_company_does_not():
    still = texture(64, 64)[None].repeat(9, 1, 1, 1)
    local = still.clone()
    local[::2, :, :16, :16] = 0
    assert flicker(local) < flicker(still) - 0.05
    scores = FlickerScorer()(torch.stack([still, local]), ["", ""])["flicker"]
    assert scores.tolist() == pytest.approx([flicker(still), flicker(local)], abs=1e-7)
    with pytest.raises(ValueError, match=r"2 frames, at least 3"):
        FlickerScorer()(still[None, :2], [""])


@pytest.fixture(scope="module")
def dino_directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("dino")
    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=224, patch_size=56, mlp_ratio=2
    )
    model = Dinov2Model(config)
    model.load_state_dict(random_weights(model))
    model.save_pretrained(directory)
    return directory


def test_subject_consistency_compares_with_first_and_previous_frame(dino_directory):
    scorer = replace(load_subject_consistency(dino_directory), frame_rate=2.0)
    video = torch.stack([texture(80, 100, seed=s) for s in (0, 1, 1, 2)])
    with torch.no_grad():
        found = scorer(video[None], [""])["subject_consistency"].item()
        frames = F.interpolate(video, (224, 280), mode="bicubic", antialias=True).clamp(0, 1)[..., 28:252]
        mean, std = (torch.tensor(v)[:, None, None] for v in (scorer.mean, scorer.std))
        f = F.normalize(scorer.encoder(pixel_values=(frames - mean) / std).pooler_output, dim=-1)
    pairs = [(f[0] @ f[t] + f[t - 1] @ f[t]) / 2 for t in (1, 2, 3)]
    assert found == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-5)
    still = video[:1].expand(4, -1, -1, -1)
    assert scorer(still[None], [""])["subject_consistency"].item() == pytest.approx(1, abs=1e-5)
    both = scorer(torch.stack([still, video]), ["", ""])["subject_consistency"]
    assert both[1].item() == pytest.approx(found, abs=1e-6)


def test_clip_serves_as_well_and_others_are_refused(dino_directory, tmp_path):
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config=small | {"vocab_size": 60, "bos_token_id": 0, "eos_token_id": 1},
        vision_config=small | {"image_size": 28, "patch_size": 14},
    )
    CLIPModel(config).save_pretrained(tmp_path / "clip")
    video = torch.rand(1, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0), requires_grad=True)
    score = load_subject_consistency(tmp_path / "clip")(video, [""])["subject_consistency"]
    score.sum().backward()
    assert -1 <= score.item() < 1 and video.grad is not None and video.grad.abs().sum() > 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="type 'bert'; subject_consistency takes dinov2 or clip"):
        load_subject_consistency(tmp_path / "other")
    state = Dinov2Model.from_pretrained(dino_directory).state_dict()
    lost = next(name for name in state if name.endswith("norm1.bias"))
    Dinov2Model.from_pretrained(dino_directory).save_pretrained(
        tmp_path / "cut", state_dict={n: v for n, v in state.items() if n != lost}
    )
    with pytest.raises(ValueError, match=r"missing \(1\)"):
        load_subject_consistency(tmp_path / "cut")
