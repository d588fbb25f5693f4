"""Pixels, tokens, positions and keys of the rewards on Qwen2-VL."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from tiny_rewards import random_weights, released_qwen_names, save_byte_tokenizer, save_qwen_base, texture
from torch import nn
from transformers import Qwen2VLConfig, Qwen2VLModel

from kvpo.rewards import qwen_reward
from kvpo.rewards.qwen_reward import (
    IMAGE_PAD,
    VIDEO_PAD,
    QwenReward,
    empty_backbone,
    encode_chat,
    load_weights,
    patchify,
    smart_resize,
    tokenizer_with,
)

BOUNDS = {"min_pixels": 100_352, "max_pixels": 200_704}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_qwen_base(tmp_path_factory.mktemp("base"))


@pytest.fixture
def model(base):
    config = Qwen2VLConfig.from_pretrained(base)
    tokenizer = tokenizer_with(base, ("<|Reward|>",))
    empty = QwenReward(empty_backbone(config, len(tokenizer)), nn.Linear(32, 1, bias=False, device="meta"))
    return empty.eval(), tokenizer


def filled_model(model: QwenReward, **types) -> dict[str, torch.Tensor]:
    """Random weights in their released names, loaded into ``model``."""
    released = released_qwen_names(random_weights(model))
    types = {"dtype": torch.float32, "head_dtype": torch.float32} | types
    load_weights(model, released, "test", device="cpu", **types)
    return released


def test_smart_resize_of_a_480p_frame():
    assert smart_resize(480, 832, **BOUNDS) == (336, 588)
    assert smart_resize(480, 832, min_pixels=200_704, max_pixels=200_704) == (336, 588)
    assert smart_resize(256, 256, min_pixels=200_704, max_pixels=200_704) == (448, 448)
    assert smart_resize(336, 336, **BOUNDS) == (336, 336)


@given(st.integers(16, 4000), st.integers(16, 4000))
def test_smart_resize_gives_multiples_near_the_bounds(height, width):
    if max(height, width) > 20 * min(height, width):
        return
    rows, columns = smart_resize(height, width, **BOUNDS)
    assert rows % 28 == columns % 28 == 0
    assert rows * columns <= BOUNDS["max_pixels"] or min(rows, columns) == 28
    assert rows * columns >= BOUNDS["min_pixels"] * 0.9


def test_patches_are_those_of_the_public_image_processor():
    processors = pytest.importorskip("transformers.models.qwen2_vl.image_processing_pil_qwen2_vl")
    picture = (texture(56, 84) * 255).round().to(torch.uint8)
    image = Image.fromarray(picture.movedim(0, -1).numpy())
    processor = processors.Qwen2VLImageProcessorPil(do_resize=False)
    expected = processor(images=[image], return_tensors="pt")
    found = patchify(picture[None].float() / 255)
    assert [list(found.grid)] == expected["image_grid_thw"].tolist()
    assert torch.allclose(found.pixels_PD, expected["pixel_values"], atol=2e-6)


def test_a_pair_of_frames_shares_its_patches():
    video = torch.stack([texture(28, 56, seed=s) for s in range(4)])
    patches = patchify(video)
    assert patches.grid == (2, 2, 4) and patches.num_tokens == 4
    pixels = patches.pixels_PD.reshape(2, 8, 3, 2, 14, 14)
    mean, std = (torch.tensor(v)[:, None, None] for v in (qwen_reward.CLIP_MEAN, qwen_reward.CLIP_STD))
    # second pair, second group of 2 x 2 patches, its lower left patch
    for frame in (0, 1):
        expected = (video[2 + frame][:, 14:28, 28:42] - mean) / std
        assert torch.allclose(pixels[1, 4 + 2, :, frame], expected, atol=1e-6)


def test_an_odd_last_frame_is_repeated():
    video = torch.stack([texture(28, 28, seed=s) for s in range(3)])
    assert torch.equal(patchify(video).pixels_PD, patchify(video[[0, 1, 2, 2]]).pixels_PD)


def test_the_chat_and_where_the_reward_tokens_stand(base):
    tokens = ("<|VQ_reward|>", "<|TA_reward|>")
    tokenizer = tokenizer_with(base, tokens)
    ids, places = encode_chat(tokenizer, "a<|VQ_reward|>\nEND b<|TA_reward|>", VIDEO_PAD, 3, tokens)
    assert tokenizer.decode(ids) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        "<|video_pad|><|video_pad|><|video_pad|><|vision_end|>a<|VQ_reward|>\nEND b<|TA_reward|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert [tokenizer.convert_ids_to_tokens(int(ids[place])) for place in places] == list(tokens)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no token", r"holds <\|Reward\|> 0 times"),
        ("<|Reward|> twice <|Reward|>", r"holds <\|Reward\|> 2 times"),
        ("<|Reward|> and <|image_pad|>", r"contains the token <\|image_pad\|>"),
        ("<|Reward|> and <|video_pad|>", r"contains the token <\|video_pad\|>"),
    ],
)
def test_a_prompt_cannot_move_the_place_that_is_read(base, text, message):
    tokenizer = tokenizer_with(base, ("<|Reward|>",))
    with pytest.raises(ValueError, match=message):
        encode_chat(tokenizer, text, IMAGE_PAD, 2, ("<|Reward|>",))


def test_another_tokenizer_is_refused(tmp_path):
    save_byte_tokenizer(tmp_path / "plain", specials=("<|im_start|>",))
    with pytest.raises(ValueError, match=r"lacks <\|image_pad\|>, <\|video_pad\|>"):
        tokenizer_with(tmp_path / "plain", ())
    with pytest.raises(ValueError, match="holds no tokenizer"):
        tokenizer_with(tmp_path / "nothing", ())


def test_positions_are_sequential_and_hidden_states_final(model):
    """Against transformers' own model, filled by its own loader and called with sequential positions."""
    reward, tokenizer = model
    released = filled_model(reward)
    config = reward.backbone.config
    plain = Qwen2VLModel(config).eval()
    plain.load_state_dict(
        {
            name.replace("model.", "language_model.", 1) if name.startswith("model.") else name: value
            for name, value in released.items()
            if name.startswith(("model.", "visual."))
        }
    )
    patches = patchify(torch.stack([texture(56, 56, seed=s) for s in range(4)]))
    ids, (place,) = encode_chat(
        tokenizer, "a fox <|Reward|>.", VIDEO_PAD, patches.num_tokens, ("<|Reward|>",)
    )
    found = reward(ids[None], [patches], VIDEO_PAD, [place])
    assert found.shape == (1, 1, 1) and found.dtype == torch.float32

    def score(**extra) -> float:
        hidden = plain(
            input_ids=ids[None],
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            pixel_values_videos=patches.pixels_PD,
            video_grid_thw=torch.tensor([patches.grid]),
            **extra,
        ).last_hidden_state.detach()
        return float(hidden[0, place] @ released["rm_head.weight"][0])

    sequential = score(position_ids=torch.arange(len(ids)).expand(3, 1, -1))
    assert float(found) == pytest.approx(sequential, abs=1e-5)
    on_a_grid = score(mm_token_type_ids=2 * (ids[None] == config.video_token_id).int())
    assert abs(on_a_grid - sequential) > 1e-3


def test_rows_do_not_see_each_other(model):
    reward, tokenizer = model
    filled_model(reward)
    media = [patchify(texture(56, 56, seed=s)[None]) for s in range(3)]
    ids, (place,) = encode_chat(tokenizer, "x <|Reward|>", IMAGE_PAD, media[0].num_tokens, ("<|Reward|>",))
    together = reward(ids.expand(3, -1), media, IMAGE_PAD, [place])
    alone = torch.cat([reward(ids[None], [m], IMAGE_PAD, [place]) for m in media])
    assert torch.allclose(together, alone, atol=1e-6)
    assert together[:, 0, 0].unique().numel() == 3


def test_types_of_backbone_head_and_rotary_frequencies(model):
    reward, _ = model
    filled_model(reward, dtype=torch.bfloat16)
    assert {p.dtype for p in reward.backbone.parameters()} == {torch.bfloat16}
    assert reward.head.weight.dtype == torch.float32
    assert {b.dtype for _, b in reward.named_buffers()} == {torch.float32}
    assert not any(t.is_meta for t in (*reward.parameters(), *reward.buffers()))
    assert not any(p.requires_grad for p in reward.parameters())


def test_keys_are_demanded_exactly(model):
    reward, _ = model
    released = released_qwen_names(random_weights(reward))

    def load(weights):
        load_weights(reward, weights, "x.pth", device="cpu", dtype=torch.float32, head_dtype=torch.float32)

    with pytest.raises(ValueError, match=r"missing \(1\): backbone.language_model.norm.weight"):
        load({k: v for k, v in released.items() if k != "model.norm.weight"})
    with pytest.raises(ValueError, match=r"unexpected \(1\): backbone.visual.extra"):
        load(released | {"visual.extra": torch.zeros(1)})
    with pytest.raises(ValueError, match="x.pth: keys that belong to no part of the model: transformer.x"):
        load(released | {"transformer.x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"misshapen \(1\): head.weight \(file \[2, 32\], model \[1, 32\]\)"):
        load(released | {"rm_head.weight": torch.zeros(2, 32)})
    # names as transformers 4.52 and later write them do not pass silently
    with pytest.raises(ValueError, match="missing"):
        load({k.replace("model.", "model.language_model."): v for k, v in released.items()})
