"""ImageReward from a release-shaped file of a tiny model."""

from dataclasses import replace

import pytest
import torch
from tiny_rewards import gliding, random_weights, save_byte_tokenizer
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig

from kvpo.rewards import image_reward
from kvpo.rewards.image_reward import MEAN, STD, BlipRating, load_image_reward

VISION = BlipVisionConfig(
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    image_size=32,
    patch_size=16,
)
TEXT = BlipTextConfig(
    vocab_size=260,
    hidden_size=12,
    encoder_hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    max_position_embeddings=40,
    is_decoder=True,
)


def released_names(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A BlipRating's weights as ImageReward.pt names them."""
    renames = (
        ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
        ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
        ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
        ("vision.post_layernorm.", "blip.visual_encoder.norm."),
        ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
        ("layer_norm", "norm"),
        ("self_attn.projection", "attn.proj"),
        ("self_attn.qkv", "attn.qkv"),
        ("text.", "blip.text_encoder."),
        ("head.", "mlp.layers."),
    )
    released = {}
    for name, value in weights.items():
        for ours, theirs in renames:
            if name.startswith(ours) or (name.startswith("blip.visual") and ours in name):
                name = name.replace(ours, theirs, 1)
        released[name] = value
    return released | {"blip.text_encoder.embeddings.position_ids": torch.arange(40)[None]}


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ImageReward")
    save_byte_tokenizer(directory, ("[PAD]",))
    weights = random_weights(BlipRating(VISION, TEXT))
    torch.save(released_names(weights), directory / "ImageReward.pt")
    return directory / "ImageReward.pt", directory, weights


def load(release):
    return load_image_reward(release[0], release[1], vision=VISION, text=TEXT)


def test_every_released_name_finds_its_place(release):
    names = torch.load(release[0], weights_only=True)
    assert "blip.visual_encoder.blocks.1.norm2.weight" in names and "mlp.layers.7.bias" in names
    assert "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight" in names
    found = load(release).model.state_dict()
    assert found.keys() == release[2].keys()
    assert all(torch.equal(found[name], value) for name, value in release[2].items())


def test_the_score_is_the_normalised_rating_of_image_and_text(release):
    scorer, clips = load(release), torch.stack([gliding(40, 40, 3, 1, 0, seed=s) for s in range(2)])
    scores = scorer(clips, ["a fox", "b"])["image_reward"]
    direct = BlipRating(VISION, TEXT).eval()
    direct.load_state_dict(release[2])
    text = scorer.tokenizer("a fox", padding="max_length", max_length=35, return_tensors="pt")
    assert text["attention_mask"].sum() == 5 and text["input_ids"].shape == (1, 35)
    pixels = image_reward.standardised(
        image_reward.fit_and_crop(clips[0], 32), image_reward.CLIP_MEAN, image_reward.CLIP_STD
    )
    with torch.no_grad():
        rating = direct(pixels, text["input_ids"].expand(3, -1), text["attention_mask"].expand(3, -1))
    assert scores[0].item() == pytest.approx((rating.mean().item() - MEAN) / STD, abs=1e-5)
    assert torch.equal(scores[1:], scorer(clips[1:], ["b"])["image_reward"])
    assert not torch.equal(scorer(clips[:1], ["b"])["image_reward"], scores[:1])
    assert not torch.equal(scorer(clips[1:], ["a fox"])["image_reward"], scores[:1])


def test_the_best_frames_are_averaged(release):
    clip = gliding(40, 40, 4, 3, 1)[None]
    each = torch.cat([load(release)(clip[:, n : n + 1], ["a"])["image_reward"] for n in range(4)])
    best = replace(load(release), top_share=0.5)(clip, ["a"])["image_reward"].item()
    assert best == pytest.approx(each.sort().values[-2:].mean().item(), abs=1e-5)


def test_gradients_reach_the_pixels_as_declared(release):
    video = gliding(40, 40, 2, 1, 0)[None].clone().requires_grad_()
    load(release)(video, ["a"])["image_reward"].sum().backward()
    assert video.grad is not None and video.grad.abs().sum() > 0


def test_keys_are_demanded_exactly(release, tmp_path):
    weights = torch.load(release[0], weights_only=True)
    del weights["blip.visual_encoder.blocks.0.attn.qkv.weight"]
    torch.save(weights, tmp_path / "cut.pt")
    with pytest.raises(ValueError, match=r"missing \(1\): vision.encoder.layers.0.self_attn.qkv.weight"):
        load_image_reward(tmp_path / "cut.pt", release[1], vision=VISION, text=TEXT)


def test_prompts_that_are_cut_are_reported(release, caplog):
    load(release)(gliding(40, 40, 1, 1, 0)[None], ["a fox " * 40])
    (said,) = caplog.messages
    assert "image_reward reads 35 tokens of a prompt and ignores the rest" in said
