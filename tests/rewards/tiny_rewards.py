"""Tiny random models of the public architectures, and clips with known motion."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast, Qwen2VLConfig

from kvpo.rewards import qwen_reward
from kvpo.rewards.catalogue import load_rewards
from kvpo.rewards.protocol import Scorer

MEDIA = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def save_byte_tokenizer(directory: Path, specials: tuple[str, ...] = MEDIA) -> Path:
    """A tokenizer with one token per byte, and ``specials``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<|endoftext|>")
    fast.add_tokens(list(specials), special_tokens=True)
    fast.save_pretrained(directory)
    return directory


def save_qwen_base(directory: Path) -> Path:
    """Configuration and tokenizer of a tiny Qwen2-VL."""
    tokenizer = qwen_reward.tokenizer_with(save_byte_tokenizer(directory), ())
    special = tokenizer.convert_tokens_to_ids
    config = Qwen2VLConfig(
        text_config={
            "vocab_size": len(tokenizer) + 50,  # the public vocabulary has rows to spare, too
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2},
        image_token_id=special("<|image_pad|>"),
        video_token_id=special("<|video_pad|>"),
        vision_start_token_id=special("<|vision_start|>"),
        vision_end_token_id=special("<|vision_end|>"),
    )
    config.save_pretrained(directory)
    return directory


def random_weights(module: nn.Module, seed: int = 0) -> dict[str, Tensor]:
    """Random values for every weight of a module, norms near one."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in module.state_dict().items():
        noise = torch.randn(value.shape, generator=generator)
        scale = 0.1 if value.ndim < 2 else 0.5 / value.shape[-1] ** 0.5
        weights[name] = scale * noise + (1.0 if "norm" in name and name.endswith("weight") else 0.0)
    return weights


def released_qwen_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The names of ``QwenReward`` as transformers before 4.52 wrote them, with a vocabulary head."""
    released = {}
    for name, value in weights.items():
        name = name.replace("backbone.visual.", "visual.").replace("backbone.language_model.", "model.")
        released[name.replace("head.", "rm_head.", 1) if name.startswith("head.") else name] = value
    released["lm_head.weight"] = released["model.embed_tokens.weight"]
    return released


def texture(height: int, width: int, seed: int = 0, scale: int = 6) -> Tensor:
    """A smooth random picture [3, H, W] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(1, 3, height // scale + 1, width // scale + 1, generator=generator)
    return F.interpolate(rough, (height, width), mode="bicubic", align_corners=False).clamp(0, 1)[0]


def gliding(height: int, width: int, frames: int, dx: int, dy: int, seed: int = 0) -> Tensor:
    """A texture that moves by (dx, dy) pixels per frame, [T, 3, H, W]."""
    margin_x, margin_y = abs(dx) * frames, abs(dy) * frames
    large = texture(height + 2 * margin_y, width + 2 * margin_x, seed)
    return torch.stack(
        [
            large[:, margin_y - dy * t : margin_y - dy * t + height, margin_x - dx * t :][..., :width]
            for t in range(frames)
        ]
    )


def build_rewards(ids: Sequence[str], sources: Mapping[str, str] | None = None, **how: Any) -> list[Scorer]:
    """The scorers that give rewards ``ids``; see ``load_rewards``."""
    return [reward.scorer for reward in load_rewards(ids, sources, **how)]
