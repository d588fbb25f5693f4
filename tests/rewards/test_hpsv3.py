"""HPSv3 from a release-shaped file of a tiny model: the same path as the public checkpoint."""

import hashlib
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from tiny_rewards import gliding, random_weights, released_qwen_names, save_qwen_base
from transformers import Qwen2VLConfig

from kvpo.prompts import ClipPrompt
from kvpo.rewards import hpsv3
from kvpo.rewards.catalogue import DECLARATIONS
from kvpo.rewards.hpsv3 import TOKEN, HPSv3Scorer, load_hpsv3, prepared
from kvpo.rewards.qwen_reward import IMAGE_PAD, encode_chat, tokenizer_with
from kvpo.rewards.service.messages import eight_bit, fractions

INSTRUCTION, ENDING = "\nrate this.\nprompt - {text_prompt}\n", "\nrating: <|Reward|>"
HIDDEN = (12, 6)


@pytest.fixture(scope="module")
def release(tmp_path_factory):
    """(weights file, base directory) of a tiny model."""
    directory, base = tmp_path_factory.mktemp("HPSv3"), tmp_path_factory.mktemp("base")
    save_qwen_base(base)
    rows = len(tokenizer_with(base, (TOKEN,)))
    model = hpsv3.empty_model(Qwen2VLConfig.from_pretrained(base), rows, HIDDEN)
    weights = released_qwen_names(random_weights(model))
    save_file({name: value.clone() for name, value in weights.items()}, directory / "HPSv3.safetensors")
    torch.save({"model": weights}, directory / "nested.pth")
    (directory / "data_collator_qwen.py").write_text(
        f'INSTRUCTION = """{INSTRUCTION}"""\nother = "x"\nending = """{ENDING}"""\n'
    )
    return directory / "HPSv3.safetensors", base


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    digest = hashlib.sha256((INSTRUCTION + ENDING).encode()).hexdigest()
    monkeypatch.setattr(hpsv3, "TEMPLATE_SHA256", digest)
    monkeypatch.setattr(hpsv3, "FRAME_PIXELS", 28 * 28 * 6)
    empty_model = hpsv3.empty_model
    monkeypatch.setattr(hpsv3, "empty_model", lambda config, rows: empty_model(config, rows, HIDDEN))


@pytest.fixture(scope="module")
def clips():
    return torch.stack([gliding(60, 90, 10, 2, 1, seed=s) for s in range(2)])


def load(release, template=None, **options) -> HPSv3Scorer:
    return replace(load_hpsv3(*release, template, dtype=torch.float32), **options)


def test_the_score_is_the_first_output_at_the_reward_token(release, clips):
    scorer = load(release)
    assert scorer.template == INSTRUCTION + ENDING
    frame = clips[0, 3]
    media = prepared(frame)
    text = (INSTRUCTION + ENDING).replace("{text_prompt}", "a fox")
    ids, places = encode_chat(scorer.tokenizer, text, IMAGE_PAD, media.num_tokens, (TOKEN,))
    assert ids[places[0]] == scorer.tokenizer.convert_tokens_to_ids(TOKEN)
    hidden = {}
    handle = scorer.model.head.register_forward_pre_hook(lambda _, inputs: hidden.update(h=inputs[0]))
    found = scorer.frame_scores(frame[None], "a fox")
    handle.remove()
    h = hidden["h"][0, 0]
    head = scorer.model.head
    for layer in (0, 3, 5):
        h = head[layer].weight @ h + head[layer].bias
        h = h.relu() if layer != 5 else h
    assert h.shape == (2,) and float(found) == pytest.approx(float(h[0]), abs=1e-5)


def test_frames_are_averaged_or_the_best_of_them(release, clips):
    each = load(release).frame_scores(clips[0], "a fox")
    assert each.shape == (10,) and each.unique().numel() > 5
    assert load(release)(clips[:1], ["a fox"])["hpsv3"].item() == pytest.approx(each.mean().item(), abs=1e-5)
    best = load(release, top_share=0.3)(clips[:1], ["a fox"])["hpsv3"].item()
    assert best == pytest.approx(each.sort().values[-3:].mean().item(), abs=1e-5)
    with pytest.raises(ValueError, match="top_share"):
        load(release, top_share=0.0)(clips[:1], ["a fox"])


def test_a_clip_scores_alone_as_in_company(release, clips):
    scorer, prompts = load(release), ["a", "a longer prompt"]
    together = scorer(clips, prompts)["hpsv3"]
    alone = torch.cat([scorer(clips[i : i + 1], [prompts[i]])["hpsv3"] for i in range(2)])
    assert torch.equal(together, alone)


def test_frames_before_a_switch_are_not_judged(release, clips):
    scorer = load(release)
    straddling = scorer(clips[:1], [ClipPrompt("now", "before", 4)])["hpsv3"]
    assert torch.equal(straddling, scorer(clips[:1, 4:], ["now"])["hpsv3"])


def test_weights_under_model_and_the_types(release, clips):
    nested = load_hpsv3(release[0].with_name("nested.pth"), release[1], dtype=torch.float32)
    assert torch.equal(nested(clips[:1], ["x"])["hpsv3"], load(release)(clips[:1], ["x"])["hpsv3"])
    low = load_hpsv3(*release)
    assert {p.dtype for p in low.model.backbone.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in low.model.head.parameters()} == {torch.float32}
    assert torch.equal(low.model.head[5].bias, nested.model.head[5].bias)


def test_size_and_values_of_a_frame():
    grey = torch.full((3, 60, 90), 100 / 255)
    patches = prepared(grey)
    assert patches.grid == (1, 4, 6) and patches.num_tokens == 6
    pair = patches.pixels_PD.reshape(-1, 3, 2, 196)
    assert torch.equal(pair[:, :, 0], pair[:, :, 1])
    assert float(pair[0, 0, 0, 0]) == pytest.approx((100 / 255 - 0.48145466) / 0.26862954, abs=1e-5)


def test_clips_may_arrive_in_eight_bits(release, clips):
    scorer = load(release)
    assert DECLARATIONS["hpsv3"].eight_bit
    rounded = fractions(eight_bit(clips[:, :3]))
    assert not torch.equal(rounded, clips[:, :3])
    found, expected = scorer(rounded, ["a", "b"]), scorer(clips[:, :3], ["a", "b"])
    assert torch.equal(found["hpsv3"], expected["hpsv3"])


def test_the_template_must_be_the_trained_one(release, tmp_path):
    with pytest.raises(ValueError, match="no such prompt template"):
        load_hpsv3(release[0], release[1], tmp_path / "data_collator_qwen.py")
    plain = tmp_path / "template.txt"
    plain.write_bytes((INSTRUCTION + ENDING).encode())
    assert load(release, template=plain).template == INSTRUCTION + ENDING
    (tmp_path / "changed.py").write_text(f'a = """{INSTRUCTION}"""\nb = """{ENDING}."""\n')
    with pytest.raises(ValueError, match="SHA-256"):
        load(release, template=tmp_path / "changed.py")
    (tmp_path / "broken.py").write_text("a = '")
    with pytest.raises(ValueError, match="not a Python file"):
        load(release, template=tmp_path / "broken.py")
