"""VideoAlign from a release-shaped directory of a tiny model: the same path as the public checkpoint."""

import hashlib
from dataclasses import replace

import pytest
import torch
from tiny_rewards import gliding, random_weights, released_qwen_names, save_qwen_base
from transformers import Qwen2VLConfig, Qwen2VLModel

from kvpo.prompts import ClipPrompt
from kvpo.rewards import videoalign
from kvpo.rewards.catalogue import DECLARATIONS
from kvpo.rewards.qwen_reward import VIDEO_PAD, encode_chat, patchify, tokenizer_with
from kvpo.rewards.service.messages import eight_bit, fractions
from kvpo.rewards.videoalign import COMPONENTS, MEAN, STD, TOKENS, grey, load_videoalign, prepared

TEMPLATE = "\nlook: <|VQ_reward|>\nmove: <|MQ_reward|>\nprompt - {text_prompt}\nfits: <|TA_reward|>\nEND\n"
RANK, ALPHA = 4, 8


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(checkpoint directory, base directory, released weights) of a tiny model."""
    checkpoint, base = tmp_path_factory.mktemp("VideoReward"), tmp_path_factory.mktemp("base")
    save_qwen_base(base)
    tokenizer = tokenizer_with(base, TOKENS)
    step = checkpoint / "checkpoint-11352"
    tokenizer.save_pretrained(step / "tokenizer")
    model = videoalign.empty_model(
        Qwen2VLConfig.from_pretrained(base), len(tokenizer), rank=RANK, alpha=ALPHA
    )
    weights = {
        f"base_model.model.{name}": value
        for name, value in released_qwen_names(random_weights(model)).items()
    }
    torch.save(weights, step / "model.pth")
    (checkpoint / "prompt_template.py").write_text(f'A = """other"""\nB = """{TEMPLATE}"""\n')
    return checkpoint, base, weights


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    monkeypatch.setattr(videoalign, "TEMPLATE_SHA256", hashlib.sha256(TEMPLATE.encode()).hexdigest())
    monkeypatch.setattr(videoalign, "MIN_PIXELS", 28 * 28 * 4)
    monkeypatch.setattr(videoalign, "MAX_PIXELS", 28 * 28 * 8)
    empty_model = videoalign.empty_model
    monkeypatch.setattr(
        videoalign, "empty_model", lambda config, rows: empty_model(config, rows, rank=RANK, alpha=ALPHA)
    )


@pytest.fixture(scope="module")
def clips():
    return torch.stack([gliding(60, 90, 17, 2, 1, seed=s) for s in range(3)])


def load(release, **options):
    scorer = load_videoalign(*release[:2], dtype=torch.float32)
    return replace(scorer, **({"frame_rate": 24.0} | options))


def reference(release, frames_TCHW, prompt) -> list[float]:
    """Logits at the three tokens: merged weights in transformers' own model, positions 0, 1, 2, ..."""
    checkpoint, base, released = release
    weights = {name.removeprefix("base_model.model."): value for name, value in released.items()}
    merged = {}
    for name, value in weights.items():
        if name.startswith(("visual.", "model.")) and "lora_" not in name:
            if ".base_layer.weight" in name:
                stem = name.removesuffix("base_layer.weight")
                a, b = weights[f"{stem}lora_A.default.weight"], weights[f"{stem}lora_B.default.weight"]
                value = value + ALPHA / RANK * b @ a
            merged[name.replace(".base_layer", "").replace("model.", "language_model.", 1)] = value
    tokenizer = tokenizer_with(checkpoint / "checkpoint-11352" / "tokenizer", TOKENS)
    config = Qwen2VLConfig.from_pretrained(base)
    config.text_config.vocab_size = len(tokenizer)
    model = Qwen2VLModel(config).eval()
    model.load_state_dict(merged)
    patches = prepared(frames_TCHW)
    text = TEMPLATE.replace("{text_prompt}", prompt)
    ids, places = encode_chat(tokenizer, text, VIDEO_PAD, patches.num_tokens, TOKENS)
    with torch.no_grad():
        hidden = model(
            input_ids=ids[None],
            position_ids=torch.arange(len(ids)).expand(3, 1, -1),
            pixel_values_videos=patches.pixels_PD,
            video_grid_thw=torch.tensor([patches.grid]),
        ).last_hidden_state[0, places]
    return (hidden @ weights["rm_head.weight"][0]).tolist()


def test_scores_are_the_normalised_head_at_the_three_tokens(release, clips):
    scores = load(release)(clips[:1], ["a red fox"])
    frames = clips[0][[0, 5, 11, 16]]  # 17 frames at 24 per second
    colour, without = reference(release, frames, "a red fox"), reference(release, grey(frames), "a red fox")
    for i, (name, logit) in enumerate(zip(COMPONENTS, (colour[0], without[1], colour[2]), strict=True)):
        assert float(scores[name]) == pytest.approx((logit - MEAN[i]) / STD[i], abs=1e-4), name


def test_the_prompt_reaches_alignment_alone(release, clips):
    """In the template the prompt stands behind the first two tokens, and attention is causal."""
    one, two = (load(release)(clips[:1], [prompt]) for prompt in ("a red fox", "a green car"))
    assert torch.equal(one["videoalign_vq"], two["videoalign_vq"])
    assert torch.equal(one["videoalign_mq"], two["videoalign_mq"])
    assert not torch.equal(one["videoalign_ta"], two["videoalign_ta"])


def test_motion_quality_does_not_see_colour(release, clips):
    scorer = load(release)
    colour, without = scorer(clips[:1], ["x"]), scorer(grey(clips[0])[None], ["x"])
    assert torch.allclose(colour["videoalign_mq"], without["videoalign_mq"], atol=5e-4)
    assert (colour["videoalign_vq"] - without["videoalign_vq"]).abs() > 2e-3


def test_a_clip_scores_alone_as_in_company(release, clips):
    scorer, prompts = load(release), ["a", "a much longer prompt than the first", "b"]
    together = scorer(clips, prompts)
    for i, prompt in enumerate(prompts):
        alone = scorer(clips[i : i + 1], [prompt])
        assert all(torch.equal(together[name][i : i + 1], alone[name]) for name in COMPONENTS)


def test_parts_of_the_scores(release, clips):
    whole = load(release)(clips[:1], ["x"])
    for chosen in (("videoalign_mq",), ("videoalign_vq",), ("videoalign_mq", "videoalign_ta")):
        part = load(release, components=chosen)
        assert tuple(part(clips[:1], ["x"])) == chosen
        for name, value in part(clips[:1], ["x"]).items():
            assert torch.allclose(value, whole[name], atol=1e-5)


def test_frames_before_a_switch_are_not_judged(release, clips):
    scorer = load(release)
    straddling = scorer(clips[:1], [ClipPrompt("now", "before", 5)])
    after = scorer(clips[:1, 5:], ["now"])
    assert all(torch.equal(straddling[name], after[name]) for name in COMPONENTS)


def test_the_released_types(release, clips):
    scorer = load_videoalign(*release[:2])
    assert {p.dtype for p in scorer.model.parameters()} == {torch.bfloat16}
    low, exact = scorer(clips[:1], ["x"]), load(release, frame_rate=16.0)(clips[:1], ["x"])
    assert all(torch.allclose(low[name], exact[name], atol=0.1) for name in COMPONENTS)


def test_pixels_are_eight_bits_before_and_after_resizing():
    video = torch.rand(2, 3, 100, 100, generator=torch.Generator().manual_seed(0))
    patches = prepared(video)
    assert patches.grid == (1, 4, 4)
    std, mean = torch.tensor(0.26862954), torch.tensor(0.48145466)
    red = patches.pixels_PD.reshape(-1, 3, 2, 14, 14)[:, 0] * std + mean
    assert torch.allclose(red * 255, (red * 255).round(), atol=1e-3)
    assert torch.equal(prepared((video * 255).round() / 255).pixels_PD, patches.pixels_PD)
    assert patchify(video[:, :, :84, :84]).grid == (1, 6, 6)


def test_clips_may_arrive_in_eight_bits(release, clips):
    scorer = load(release)
    assert all(DECLARATIONS[name].eight_bit for name in scorer.components)
    rounded = fractions(eight_bit(clips[:1]))
    assert not torch.equal(rounded, clips[:1])
    found, expected = scorer(rounded, ["a"]), scorer(clips[:1], ["a"])
    assert all(torch.equal(found[name], expected[name]) for name in COMPONENTS)


def test_what_is_absent_or_different_is_named(release, tmp_path, monkeypatch):
    checkpoint, base, weights = release
    with pytest.raises(ValueError, match="no checkpoint-.*model.pth"):
        load_videoalign(tmp_path, base)
    with pytest.raises(ValueError, match="no such prompt template"):
        load_videoalign(checkpoint, base, tmp_path / "prompt_template.py")
    changed = tmp_path / "prompt_template.py"
    changed.write_text(f'B = """{TEMPLATE} """\n')
    with pytest.raises(ValueError, match="holds no prompt template with SHA-256"):
        load_videoalign(checkpoint, base, changed)
    partial = tmp_path / "partial"
    (partial / "checkpoint-1").mkdir(parents=True)
    lost = "base_model.model.model.layers.1.mlp.up_proj.lora_B.default.weight"
    torch.save({k: v for k, v in weights.items() if k != lost}, partial / "checkpoint-1" / "model.pth")
    tokenizer_with(base, TOKENS).save_pretrained(partial / "checkpoint-1" / "tokenizer")
    with pytest.raises(
        ValueError, match=r"missing \(1\): backbone.language_model.layers.1.mlp.up_proj.lora_B"
    ):
        load_videoalign(partial, base, checkpoint / "prompt_template.py")


def test_the_constants_of_the_release():
    """A logit equal to its mean scores 0, one standard deviation above it 1."""
    assert (MEAN, STD) == ((3.6757, 1.1646, 2.8105), (2.2476, 1.3811, 2.5121))
    assert (videoalign.LORA_RANK, videoalign.LORA_ALPHA) == (64, 128)
