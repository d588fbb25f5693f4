"""Builds what a configuration names: the only place that knows concrete models, codecs and rewards."""

import importlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.engine.generator import PageShape, StreamingGenerator
from kvpo.engine.noise import keyed_generator
from kvpo.engine.scoring import Scorer
from kvpo.method.flow import few_step_sigmas
from kvpo.models.adapters import add_adapter
from kvpo.models.causal_wan import CausalWan, WanShape
from kvpo.models.deployment import Deployment
from kvpo.prompts import ClipPrompt, VideoPrompt
from kvpo.training.evaluation import Judges
from kvpo.training.setup import Setup

BASE = "generator.safetensors"
SHORT_FRAMES, LONG_FRAMES = 30, 60
"""Held-out videos: one prompt over 10 blocks, three prompts over 20."""


def streaming_generator(config: Config, transformer: CausalWan) -> StreamingGenerator:
    """The streaming generator of a configuration around a transformer."""
    stream, shape = config.stream, transformer.shape
    autocast = None if config.optim.autocast == "none" else torch.bfloat16
    return StreamingGenerator(
        transformer=transformer,
        deployment=Deployment(
            block=stream.block,
            window=stream.window,
            sink=stream.sink,
            keep_sink_at_switch=stream.keep_sink_at_switch,
            bank_size=stream.bank_size,
            sparse_activation=stream.sparse_activation,
            bank_every_block=stream.bank_every_block,
        ),
        sigmas=tuple(few_step_sigmas(stream.schedule, stream.shift).tolist()),
        renoise=stream.step_rule == "renoise",
        latent_shape=(shape.channels, shape.latent_height, shape.latent_width),
        pages=PageShape(shape.num_layers, shape.tokens_per_frame, shape.num_heads, shape.head_dim),
        context_noise=stream.context_noise,
        device=config.device,
        autocast=autocast,
        page_dtype=autocast or torch.float32,
    )


@dataclass(frozen=True)
class UserReward:
    """A user's own function, clips and prompts to one score each, as a scorer with one component."""

    components: tuple[str, ...]
    function: object

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        result = self.function(video_BTCHW, prompts)  # type: ignore[operator]
        if not isinstance(result, Tensor):
            raise ValueError(
                f"reward {self.components[0]!r} returned {type(result).__name__}, expected a tensor of "
                f"{len(prompts)} scores"
            )
        return {self.components[0]: result}


def build_scorer(config: Config) -> tuple[Scorer, Tensor]:
    """The reward a configuration names and the weights of its components."""
    from kvpo.rewards.world_pixels import DEFAULT_WEIGHTS, WorldScorer

    name = config.rewards.scorer
    if name == "world":
        scorer: Scorer = WorldScorer()
        weights = config.rewards.weights or DEFAULT_WEIGHTS
    else:
        scorer = _user_scorer(name)
        weights = config.rewards.weights or dict.fromkeys(scorer.components, 1.0)
    unknown = sorted(set(weights) - set(scorer.components))
    if unknown:
        raise ConfigurationError(
            f"rewards.weights: {unknown[0]!r} is not a component of {name!r}; "
            f"it has {', '.join(scorer.components)}"
        )
    return scorer, torch.tensor([weights.get(component, 0.0) for component in scorer.components])


def _user_scorer(name: str) -> Scorer:
    """Import ``package.module:attribute``; a scorer object is used as it is, a plain function is wrapped."""
    module, _, attribute = name.partition(":")
    if not attribute:
        raise ConfigurationError(
            f"rewards.scorer: {name!r} is neither 'world' nor of the form package.module:function"
        )
    try:
        found = vars(importlib.import_module(module))[attribute]
    except (ImportError, KeyError) as error:
        raise ConfigurationError(f"rewards.scorer: cannot import {name!r} ({error})") from error
    if not callable(found):
        raise ConfigurationError(f"rewards.scorer: {name!r} is not callable")
    return found if hasattr(found, "components") else UserReward((attribute,), found)


@dataclass(frozen=True)
class UnseenComponent:
    """The unseen scorer in the shape of a scorer with one component."""

    scorer: object
    components: tuple[str, ...] = ("unseen",)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        return {"unseen": self.scorer(video_BTCHW, prompts)}  # type: ignore[operator]


def world_prompts(split: str, count: int, seed: int, first_id: int) -> dict[str, list[VideoPrompt]]:
    """Held-out prompt sets of the embedded world: short and long, all distinct."""
    from kvpo.world.stories import distinct_prompts

    return {
        "short": distinct_prompts(split, count, 1, SHORT_FRAMES, seed, first_id),
        "long": distinct_prompts(split, count, 3, LONG_FRAMES, seed + 1, first_id + count),
    }


@dataclass(frozen=True)
class WorldTrainingPrompts:
    """Training prompts of each update, a pure function of (seed, update): stories of one to three acts."""

    seed: int
    count: int

    def __call__(self, update: int) -> list[VideoPrompt]:
        from kvpo.world.stories import sample_story, video_prompt

        generator = keyed_generator("training prompts", self.seed, update)
        prompts = []
        for index in range(self.count):
            acts = 1 + index % 3
            story = sample_story(generator, acts, LONG_FRAMES, split="train")
            prompts.append(video_prompt(story, update * self.count + index))
        return prompts


def base_path() -> Path:
    """The embedded generator that ships with the package."""
    return Path(str(files("kvpo.world").joinpath("assets", BASE)))


def build_world(config: Config, base: Path | None = None) -> Setup:
    """The embedded world: its generator with a fresh adapter, its codec, prompts and judges."""
    from kvpo.world.codec import load_codec
    from kvpo.world.pretrain import load_generator
    from kvpo.world.unseen import load_unseen

    transformer, text = load_generator(config.model, base or base_path())
    transformer.checkpointing = config.optim.checkpointing
    if config.optim.train == "lora":
        add_adapter(
            transformer,
            config.optim.lora_rank,
            config.optim.lora_alpha,
            config.optim.lora_targets,
            generator=keyed_generator("adapter", config.seed),
        )
    else:
        transformer.requires_grad_(True)
    scorer, weights = build_scorer(config)
    evaluation = config.evaluation
    return Setup(
        config=config,
        model=transformer,
        generator=streaming_generator(config, transformer),
        text_encoder=text,
        judges=Judges(load_codec(), scorer, weights, UnseenComponent(load_unseen())),
        training_prompts=WorldTrainingPrompts(config.seed, config.optim.prompts_per_update),
        validation=world_prompts("validation", evaluation.validation_prompts, 101, 10_000_000),
        test=world_prompts("test", evaluation.test_prompts, 202, 20_000_000),
    )


def wan_shape(config: Config) -> WanShape:
    """Geometry of a configuration's transformer."""
    return WanShape(**asdict(config.model))
