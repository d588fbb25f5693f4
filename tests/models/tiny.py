"""A tiny transformer, an adapter and a context without history, shared by the tests of this directory."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.models.adapter_files import PEFT_PREFIX, AdapterState
from kvpo.models.causal_wan import CausalWan, WanShape

SHAPE = WanShape(
    dim=24,
    num_heads=2,
    num_layers=2,
    ffn_dim=40,
    freq_dim=16,
    text_len=6,
    text_dim=10,
    channels=4,
    patch_size=(1, 2, 2),
    latent_height=4,
    latent_width=6,
)
ADAPTED = ("blocks.0.self_attn.q", "blocks.0.cross_attn.k", "blocks.1.ffn.0", "blocks.1.ffn.2")


@dataclass(frozen=True)
class NoHistory:
    """The call sees its own frames only."""

    start_R: Tensor

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        return k, v, None


def tiny_model(shape: WanShape = SHAPE) -> CausalWan:
    """Random weights everywhere, the modulations and biases included."""
    generator = torch.Generator().manual_seed(3)
    model = CausalWan(shape)
    for value in model.parameters():
        scale = 0.5 / value[0].numel() ** 0.5 if value.dim() > 1 else 0.3
        value.data = torch.randn(value.shape, generator=generator) * scale
    return model.requires_grad_(True)


def inputs(shape: WanShape = SHAPE, frames: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    """Latents [2, F, C, H, W], noise levels [2] and text [2, L, D]."""
    generator = torch.Generator().manual_seed(4)
    size = (2, frames, shape.channels, shape.latent_height, shape.latent_width)
    text = torch.randn(2, shape.text_len, shape.text_dim, generator=generator)
    text[:, -2:] = 0
    return torch.randn(size, generator=generator), torch.tensor([0.9375, 0.25]), text


def velocity(model: CausalWan, frames: int = 3) -> Tensor:
    x, sigma, text = inputs(model.shape, frames)
    out = model(x, sigma, text, NoHistory(torch.zeros(2, dtype=torch.long)))
    assert isinstance(out, Tensor)
    return out


def random_adapter(model: CausalWan, rank: int = 3, alpha: float = 6.0, scale: float = 0.3) -> AdapterState:
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name in ADAPTED:
        out_width, in_width = model.get_submodule(name).weight.shape
        tensors[f"{PEFT_PREFIX}{name}.lora_A.weight"] = scale * torch.randn(
            rank, in_width, generator=generator
        )
        tensors[f"{PEFT_PREFIX}{name}.lora_B.weight"] = scale * torch.randn(
            out_width, rank, generator=generator
        )
    return AdapterState(tensors, rank, alpha, "lora.pt")
