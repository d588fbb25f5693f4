"""A source of generators, and the parts that every source needs."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kvpo.app.prompt_sets import Sets, TextLimits
from kvpo.config import Config
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import SeededTape, keyed_generator
from kvpo.engine.stream import stream_latents
from kvpo.method.flow import STEPS, few_step_sigmas
from kvpo.models.cache import PageShape
from kvpo.models.causal_wan import CausalWan
from kvpo.models.quantised import quantised_layers
from kvpo.plan.phases import Surroundings
from kvpo.prompts import VideoPrompt
from kvpo.training.backbone import Backbone, Weights
from kvpo.training.diversity import ReadOff
from kvpo.training.setup import Setup


@dataclass(frozen=True)
class Guide:
    """Knowledge of a source's prompts, for those who direct a stream."""

    story: Callable[[int], list[tuple[str, int]]]
    """Seed -> prompts that tell a story, each with the latent frames that it lasts."""
    shows: Callable[[Tensor, str, str], bool]
    """(pixels ``[T, 3, H, W]``, prompt, prompt before) -> True once some frame shows the prompt rather."""


@dataclass(frozen=True)
class Recall:
    """Stories whose last prompt leaves open who comes back, and a reading of who does."""

    stories: Callable[[int], Iterator[VideoPrompt]]
    """Frames of a block -> stories of four prompts without end, the first three about different actors."""
    actor: Callable[[Tensor], list[str]]
    """Videos ``[B, T, 3, H, W]`` -> the looks of the first actor of each, read off the pixels."""


@dataclass(frozen=True)
class FinalSet:
    """Prompts of a comparison's last test."""

    prompts: Sequence[VideoPrompt]
    first: int = 0
    """Latent frame from which a video is scored."""


@dataclass(frozen=True)
class Source:
    """The builders of one ``backbone.kind``; a further kind is a file with one of these."""

    setup: Callable[[Config], Setup]
    """The generator that a run aligns, with its judges and prompts."""
    backbone: Callable[[Config, Sequence[VideoPrompt]], Backbone]
    """The generator with text encoder and codec, ready for the given prompts."""
    weights: Callable[[Config], Weights]
    """The transformer alone, with its trained parameters."""
    split: Callable[[Config], tuple[list[VideoPrompt], Sets, Sets]]
    """The training prompts that a file lists, validation and test sets."""
    final: Callable[[Config], dict[str, FinalSet]]
    """The prompts that compared methods are tested on, which have no place in any run."""
    frame_rate: float
    """Frames per second at which its videos are shown."""
    reading: Callable[[Config], dict[str, Any]]
    """The settings by which every command reads prompt files, lengths that these leave out among them."""
    text_limits: Callable[[Config], TextLimits]
    """The text encoder's reading of a prompt, without its weights."""
    file_digests: Callable[[Config], dict[str, str]]
    """Digests of files that no checkpoint knows of, by the setting that says where they lie."""
    longest_prompt: Callable[[Config], VideoPrompt]
    """The most demanding video of a run, which memory is planned by."""
    surroundings: Callable[[Config], Surroundings]
    """Memory used by everything but the transformer."""
    read_off: Callable[[], ReadOff] | None = None
    """Reads what a video shows off its pixels; None: not possible."""
    recall: Recall | None = None
    """Stories that show who a routed history brings back; None: there are none."""
    guide: Guide | None = None
    """Help for those who direct a stream; None: there is none."""
    pretraining: Callable[[Setup, int], Tensor] | None = None
    """(setup, step) -> loss of one batch of the base's pretraining; None: its data is elsewhere."""


def as_final(sets: Sets) -> dict[str, FinalSet]:
    """Prompts as final sets that are scored from their first frame on."""
    return {name: FinalSet(own) for name, own in sets.items()}


def frozen_dtype(config: Config) -> torch.dtype:
    """Precision that weights are held in: where an adapter is trained that of the forward pass.

    Those that are trained themselves stay in float32, and autocast narrows them in every pass.
    """
    low = config.optim.lora_rank > 0 and config.optim.autocast == "bfloat16"
    return torch.bfloat16 if low else torch.float32


def streaming_generator(config: Config, transformer: CausalWan) -> StreamingGenerator:
    """The streaming generator of a configuration around a transformer."""
    stream, shape = config.stream, transformer.shape
    first = few_step_sigmas(stream.schedule_first, stream.shift).tolist() if stream.schedule_first else ()
    low, precision = config.optim.autocast == "bfloat16", config.optim.rollout_precision
    return StreamingGenerator(
        transformer=transformer,
        deployment=stream.deployment,
        sigmas=tuple(few_step_sigmas(stream.schedule, stream.shift).tolist()),
        sigmas_first=tuple(first),
        step=STEPS[stream.step_rule],
        latent_shape=(shape.channels, shape.latent_height, shape.latent_width),
        pages=PageShape(shape.num_layers, shape.tokens_per_frame, shape.num_heads, shape.head_dim),
        device=config.device,
        autocast=torch.bfloat16 if low and not config.optim.lora_rank else None,
        page_dtype=torch.bfloat16 if low else torch.float32,
        exploring=nullcontext if precision == "same" else partial(quantised_layers, transformer, precision),
    )


def first_block(config: Config, transformer: CausalWan) -> Tensor:
    """Latents ``[F, C, H, W]`` of the first block that a transformer makes of one noise and one random text.

    They are of the smallest size, so that weights of any size are told apart within seconds.
    """
    shape, key = transformer.shape, "first block"
    text = torch.randn(shape.text_len, shape.text_dim, generator=keyed_generator(key))
    with transformer.smallest_latents():
        generator = streaming_generator(config, transformer)
        prompt = VideoPrompt(0, (key,), (), generator.block)
        tape = SeededTape((key,), generator.block_shape)
        return stream_latents(generator, [prompt], {key: text.to(config.device)}, tape)[0].cpu()
