"""Write a tiny public generator in the public layouts: weights, adapter, text encoder, VAE, prompts."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import geometry_file
from kvpo.app.configuration import preset
from kvpo.config import Config
from kvpo.models.adapter_files import PEFT_PREFIX
from kvpo.models.adapters import LORA_TARGETS
from kvpo.models.settings import WanShape
from kvpo.prompts import ClipPrompt
from tests.models.test_umt5 import tiny_encoder, tiny_tokenizer
from tests.models.test_wan_vae import tiny_model as tiny_vae
from tests.models.tiny import tiny_model

SHAPE = WanShape(
    dim=24,
    num_heads=2,
    num_layers=2,
    ffn_dim=40,
    freq_dim=16,
    text_len=8,
    text_dim=12,
    channels=4,
    patch_size=(1, 2, 2),
)
SETTINGS: dict[str, Any] = {
    "device": "cpu",
    "backbone.geometry": geometry_file(SHAPE),
    "stream.size": (2, 2),
    "exploration.branches": 3,
    "exploration.blocks": 1,
    "exploration.distinct": 2,
    "exploration.tail_blocks": 1,
    "rewards.noise_floors": {"total": 0.0},
    "objective.temperature": None,
    "kvpo.simplex_kl": 0.1,
    "optim.lora_rank": 2,
    "optim.lr": 5e-2,
    "optim.ema_decay": 0.5,
    "optim.updates": 2,
    "optim.prompts_per_update": 1,
    "optim.rollouts_per_refresh": 1,
    "optim.checkpointing": False,
    "optim.autocast": "none",
    "rewards.scorers": ["tests.tiny_wan:brightness"],
    "evaluation.every": 2,
    "evaluation.validation_prompts": 2,
    "evaluation.test_prompts": 2,
    "checkpoint.every": 1,
    "prompts.frames": [18],
}
SWITCHES = {1: [], 2: [9], 3: [6, 12]}
"""Number of segments -> switch frames."""
SENTENCES = [
    "a red ball rolls left",
    "the dog jumps",
    "a ball",
    "the red dog rolls",
    "a dog",
    "the ball jumps",
]


def brightness(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """A reward that is easy to check."""
    return video_BTCHW.mean((1, 2, 3, 4))


@dataclass(frozen=True)
class NetworkReward:
    """A reward computed by a network."""

    network: nn.Module
    components: tuple[str, ...] = ("network",)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]."""
        colours = video_BTCHW.mean((1, 3, 4)).to(self.network.weight.device)
        return {"network": self.network(colours)[:, 0]}


def _colours() -> nn.Linear:
    layer = nn.Linear(3, 1)
    layer.weight.data = torch.tensor([[0.2, -0.5, 0.9]])
    layer.bias.data = torch.zeros(1)
    return layer


network = NetworkReward(_colours())


def write_text_and_pixels(directory: Path) -> None:
    """Write UMT5 with its tokenizer, and the VAE, in diffusers' layout."""
    tiny_encoder().save_pretrained(directory / "text_encoder")
    tiny_tokenizer().save_pretrained(directory / "tokenizer")
    tiny_vae(num_res_blocks=1).save_pretrained(directory / "vae")


def write_prompts(directory: Path, segments: int) -> Path:
    """Write six prompts with this many segments; returns their file."""
    path = directory / ("prompts.txt" if segments == 1 else f"prompts-{segments}.jsonl")
    rolled = [[SENTENCES[(n + k) % 6] for k in range(segments)] for n in range(6)]
    lines = [texts[0] if segments == 1 else json.dumps({"prompts": texts}) for texts in rolled]
    path.write_text("\n".join(lines) + "\n")
    return path


def write_transformer(config: Config, path: Path) -> None:
    """Write random weights in the layout of LongLive and Self-Forcing."""
    weights = tiny_model(config.model).state_dict()
    torch.save({"generator": {f"model.{name}": value for name, value in weights.items()}}, path)


def write_lora(config: Config, path: Path) -> None:
    """Write a random adapter for every target layer in the layout of lora.pt."""
    model, draws = tiny_model(config.model), torch.Generator().manual_seed(9)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith(LORA_TARGETS):
            for half, size in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                key = f"{PEFT_PREFIX}{name}.lora_{half}.weight"
                tensors[key] = 0.2 * torch.randn(size, generator=draws)
    torch.save({"generator_lora": tensors, "critic_lora": {}, "step": 7}, path)


def tiny_settings(name: str, directory: Path, segments: int, changes: Mapping[str, Any]) -> dict[str, Any]:
    """Settings that shrink a preset to a tiny size; writes its files to ``directory`` first."""
    config = preset(name, SETTINGS)
    if not (directory / "vae").exists():
        write_text_and_pixels(directory)
        write_transformer(config, directory / "base.pt")
        write_lora(config, directory / "lora.pt")
    files = {
        "backbone.checkpoint": str(directory / "base.pt"),
        "backbone.encoders": str(directory),
        "prompts.file": str(write_prompts(directory, segments)),
        "prompts.frames": [*SWITCHES[segments], 18],
    }
    return SETTINGS | files | {key.replace("__", "."): value for key, value in changes.items()}


def tiny_wan(name: str, directory: Path, *, segments: int = 1, **changes: Any) -> Config:
    """A preset shrunk to a tiny size."""
    return preset(name, tiny_settings(name, directory, segments, changes))


def tiny_flags(name: str, directory: Path, *, segments: int = 1, **changes: Any) -> list[str]:
    """The same as command-line flags."""
    values = tiny_settings(name, directory, segments, changes)
    return ["--preset", name, *(f"--{path}={_typed(value)}" for path, value in values.items())]


def _typed(value: Any) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(str, value)) + "]"
    if isinstance(value, dict):
        return ",".join(f"{name}={item}" for name, item in value.items())
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
