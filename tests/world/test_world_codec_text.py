"""The shipped codec's quality and contract; tokenizer and text encoder."""

from functools import partial

import pytest
import torch

from kvpo.world import codec, grammar
from kvpo.world.codec import PixelCodec, load_codec, save_codec, train_codec
from kvpo.world.imperfect import CLEAN, Faults, observe
from kvpo.world.stories import distinct_stories
from kvpo.world.text import (
    PAD,
    TEXT_DIM,
    TEXT_LENGTH,
    UNKNOWN,
    LearnedTextEncoder,
    WordTokenizer,
)


def psnr(video: torch.Tensor, reference: torch.Tensor) -> float:
    return float(-10 * torch.log10((video - reference).square().mean()))


def held_out(faults: Faults) -> torch.Tensor:
    stories = distinct_stories("test", 10, 2, 30, seed=0)
    return observe(stories, torch.Generator().manual_seed(0), faults)


def test_shipped_codec_reconstructs_held_out_frames_and_forgives_small_latent_errors():
    codec = load_codec()
    video = held_out(CLEAN)
    latents = codec.encode(video)
    assert latents.shape == (10, 30, 8, 8, 8)
    assert psnr(codec.decode(latents), video) >= 30
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    assert psnr(codec.decode(latents + 0.1 * noise), video) >= 29
    assert psnr(codec.decode(latents + 0.4 * noise), video) >= 27
    faulty = held_out(Faults())
    assert psnr(codec.decode(codec.encode(faulty)), faulty) >= 29


def test_latents_are_normalised_and_decoded_values_are_pixels():
    codec = load_codec()
    latents = codec.encode(held_out(Faults()))
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.5
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 0.4
    wild = codec.decode(20 * torch.randn(1, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0)))
    assert 0 <= float(wild.min()) and float(wild.max()) <= 1


def test_frames_are_coded_one_by_one():
    codec = load_codec()
    video = held_out(CLEAN)[:2]
    whole = codec.decode(codec.encode(video))
    single = codec.decode(codec.encode(video[1:, 7:8]))
    assert torch.allclose(whole[1, 7], single[0, 0], atol=1e-5)


@pytest.mark.slow
def test_training_is_deterministic_and_survives_saving(tmp_path):
    first, second = (train_codec(steps=6, seed=3, batch=4) for _ in range(2))
    assert all(
        torch.equal(a, b)
        for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )
    save_codec(first, tmp_path / "codec.safetensors")
    loaded = load_codec(tmp_path / "codec.safetensors")
    video = held_out(CLEAN)[:1, :2]
    assert torch.allclose(loaded.encode(video), first.encode(video), atol=0.05)
    assert isinstance(loaded, PixelCodec) and not any(p.requires_grad for p in loaded.parameters())


def test_the_command_trains_a_decoder_and_keeps_the_latents(tmp_path, monkeypatch):
    target, shipped = tmp_path / "codec.safetensors", load_codec()
    monkeypatch.setattr(codec, "load_codec", lambda: shipped)
    monkeypatch.setattr(codec, "asset", lambda name: target)
    monkeypatch.setattr(codec, "train_codec", partial(train_codec, steps=2, batch=2))
    codec.main()
    video = held_out(CLEAN)[:1, :2]
    assert torch.allclose(load_codec(target).encode(video), shipped.encode(video), atol=0.05)


def test_a_decoder_may_be_trained_for_the_latents_of_another_codec():
    shipped, video = load_codec(), held_out(CLEAN)[:1, :2]
    codec = train_codec(steps=6, batch=4, encoding=shipped)
    assert torch.equal(codec.encode(video), shipped.encode(video))
    assert not torch.allclose(
        codec.decode(codec.encode(video)), shipped.decode(shipped.encode(video)), atol=0.1
    )


def test_the_committed_vocabulary_is_the_grammar_s():
    every = sorted({word for phrase in grammar._LEXICON for word in phrase})
    assert WordTokenizer().vocabulary == ("<pad>", "<unk>", *every)


def test_no_caption_has_unknown_words_or_is_cut():
    tokenizer = WordTokenizer()
    captions = [act.caption for story in distinct_stories("train", 200, 3, 60, seed=1) for act in story.acts]
    ids = tokenizer(captions)
    assert ids.shape == (len(captions), TEXT_LENGTH)
    assert not (ids == UNKNOWN).any() and (ids[:, -2:] == PAD).all()
    decoded = " ".join(tokenizer.vocabulary[i] for i in ids[0] if i != PAD)
    assert decoded == captions[0].lower().replace(",", "").rstrip(".")


def test_text_encoder_zeroes_padding_ignores_it_and_reads_order():
    torch.manual_seed(0)
    encoder = LearnedTextEncoder()
    out = encoder(["A small red circle drifts left at night.", "", "zebra"])
    assert out.shape == (3, TEXT_LENGTH, TEXT_DIM)
    assert (out[0, 8:] == 0).all() and (out[0, :8].abs().sum(-1) > 0).all() and (out[1] == 0).all()
    alone = encoder(["A small red circle drifts left at night."])
    assert torch.allclose(out[:1], alone, atol=1e-6)
    swapped = encoder(["A small red drifts circle left at night."])
    assert not torch.allclose(alone[0, 7], swapped[0, 7], atol=1e-4)
    out.sum().backward()
    assert all(p.grad is not None and torch.isfinite(p.grad).all() for p in encoder.parameters())
