"""A generator so small that a whole run takes seconds: random weights with the embedded world's codec."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.shapes import geometry_file
from kvpo.app.configuration import assign, with_method
from kvpo.app.judges import build_watchers
from kvpo.app.sources.world import build_backbone
from kvpo.config import Config
from kvpo.models.settings import WanShape
from kvpo.prompts import ClipPrompt, VideoPrompt
from kvpo.training.backbone import Backbone
from kvpo.training.evaluation import Judges
from kvpo.training.setup import Setup
from kvpo.world.pretrain import PretrainSettings, new_generator, save_generator
from kvpo.world.snippets import SnippetSettings

SETTINGS: dict[str, Any] = {
    "backbone.geometry": geometry_file(
        replace(WanShape(), dim=32, num_heads=2, num_layers=1, ffn_dim=48, freq_dim=16, patch_size=(1, 4, 4))
    ),
    "exploration.branches": 3,
    "exploration.blocks": 2,
    "exploration.distinct": 2,
    "exploration.donor": 0,
    "exploration.tail_blocks": 1,
    "objective.grad_steps": 2,
    "objective.advantages": "group",
    "objective.keep": (0, 0),
    "optim.lora_rank": 2,
    "optim.lr": 5e-2,
    "optim.updates": 3,
    "optim.prompts_per_update": 2,
    "optim.replay_rows": 0,
    "evaluation.every": 2,
    "evaluation.validation_prompts": 2,
    "evaluation.test_prompts": 2,
    "checkpoint.every": 1,
    "rewards.noise_floors": {"total": 0.0},
}
FRAMES = 21


def tiny_config(base: Path, **settings: Any) -> Config:
    """SETTINGS with changes; ``optim__lr=1`` sets ``optim.lr``. A method adds its own defaults."""
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    start = with_method(Config(), changes.get("method", "kvpo"))
    return assign(start, {**SETTINGS, "backbone.checkpoint": str(base), **changes})


def write_base(path: Path, seed: int = 1) -> None:
    """Save random weights, including the output projection, as a base checkpoint."""
    model = assign(Config(), SETTINGS).model
    transformer, text = new_generator(model, seed=seed)
    generator = torch.Generator().manual_seed(2)
    head = transformer.head.head.weight
    with torch.no_grad():
        head.copy_(0.3 * torch.randn(head.shape, generator=generator))
    state = nn.ModuleDict({"transformer": transformer, "text": text}).state_dict()
    save_generator(state, model, PretrainSettings(SnippetSettings(), steps=0), path)


@dataclass(frozen=True)
class ToyScorer:
    """Two numbers that are easy to check: redness, and calm from frame to frame."""

    components: tuple[str, ...] = ("redness", "calm")

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        change = video_BTCHW.diff(dim=1).abs().mean((1, 2, 3, 4))
        red_BTHW, green_BTHW = video_BTCHW[:, :, 0], video_BTCHW[:, :, 1]
        return {"redness": (red_BTHW - green_BTHW).mean((1, 2, 3)), "calm": 1 - change}


toy = ToyScorer()


def opposite(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """Falls exactly as ToyScorer's two numbers rise, as under reward hacking."""
    return -sum(ToyScorer()(video_BTCHW, prompts).values())


@dataclass(frozen=True)
class ToyPrompts:
    """Two-act videos whose switch is at a possible window start."""

    count: int
    first_id: int = 0

    def __call__(self, update: int) -> list[VideoPrompt]:
        first = self.first_id + update * self.count
        return [
            VideoPrompt(first + n, (f"A red circle, take {n}.", f"It turns blue, take {n}."), (12,), FRAMES)
            for n in range(self.count)
        ]


def toy_setup(config: Config, scorer: Any = None) -> Setup:
    """The tiny generator with toy prompts and a toy reward; only the codec is the embedded world's."""
    backbone = build_backbone(config)
    scorer = scorer or ToyScorer()
    weights = torch.ones(len(scorer.components))
    watchers = build_watchers(config, backbone.codec.frames_per_second)
    return Setup(
        backbone=backbone,
        judges=Judges(scorer, weights, None, watchers),
        training_prompts=ToyPrompts(config.optim.prompts_per_update),
        validation={"short": ToyPrompts(config.evaluation.validation_prompts, 1000)(0)},
        test={"short": ToyPrompts(config.evaluation.test_prompts, 2000)(0)},
    )


def with_weights(setup: Setup, **changes: Any) -> Setup:
    """The same setup with other fields of its weights, such as configuration or base digest."""
    weights = replace(setup.backbone.weights, **changes)
    return replace(setup, backbone=replace(setup.backbone, weights=weights))


def in_float64(setup: Setup) -> Setup:
    """The same generator in double precision, including its noise and texts."""
    setup.model.double()
    setup.backbone.codec.double()
    generator = replace(setup.generator, page_dtype=torch.float64)
    return replace(setup, backbone=Float64Backbone(**{**vars(setup.backbone), "generator": generator}))


class Float64Backbone(Backbone):
    """Noise and texts in double precision."""

    def texts(self, prompts: Sequence[VideoPrompt]) -> dict[str, Tensor]:
        return {text: value.double() for text, value in super().texts(prompts).items()}

    def tape(self, purpose: str) -> Any:
        single = super().tape(purpose)
        return lambda video, block, kind: single(video, block, kind).double()
