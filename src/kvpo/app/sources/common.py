"""The interface of a generator source, and the parts that every source needs."""

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
    """Helpers for directing a stream with prompts of a source."""

    story: Callable[[int], list[tuple[str, int]]]
    """Seed -> prompts that tell a story, each with its length in latent frames."""
    shows: Callable[[Tensor, str, str], bool]
    """(pixels ``[T, 3, H, W]``, prompt, previous prompt) -> True once a frame fits the new prompt better."""


@dataclass(frozen=True)
class Recall:
    """Stories with a last prompt that leaves open who comes back, and a way to tell who does."""

    stories: Callable[[int], Iterator[VideoPrompt]]
    """Frames per block -> endless stories of four prompts, the first three about different actors."""
    actor: Callable[[Tensor], list[str]]
    """Videos ``[B, T, 3, H, W]`` -> the look of the first actor in each, read off the pixels."""


@dataclass(frozen=True)
class FinalSet:
    """Prompts of a comparison's final test."""

    prompts: Sequence[VideoPrompt]
    first: int = 0
    """Latent frame from which a video is scored."""


@dataclass(frozen=True)
class Source:
    """The builders for one ``backbone.kind``; a new kind is a file that defines one of these."""

    setup: Callable[[Config], Setup]
    """The generator that a run aligns, with its judges and prompts."""
    backbone: Callable[[Config, Sequence[VideoPrompt]], Backbone]
    """The generator with text encoder and codec, ready for the given prompts."""
    weights: Callable[[Config], Weights]
    """The transformer alone, with its trained parameters."""
    split: Callable[[Config], tuple[list[VideoPrompt], Sets, Sets]]
    """Training prompts, if a file lists them; validation and test sets."""
    final: Callable[[Config], dict[str, FinalSet]]
    """Prompts for the final test of compared methods; no run uses them."""
    frame_rate: float
    """Frames per second at which its videos are shown."""
    reading: Callable[[Config], dict[str, Any]]
    """The arguments with which every command reads prompt files, including lengths that the files omit."""
    text_limits: Callable[[Config], TextLimits]
    """Limits on what the text encoder reads of a prompt; does not load its weights."""
    file_digests: Callable[[Config], dict[str, str]]
    """Digests of files that checkpoints do not cover, by the setting that locates them."""
    longest_prompt: Callable[[Config], VideoPrompt]
    """The most demanding video of a run, used to plan memory."""
    surroundings: Callable[[Config], Surroundings]
    """Memory used by everything but the transformer."""
    read_off: Callable[[], ReadOff] | None = None
    """Reads what a video shows off its pixels; None: not possible."""
    recall: Recall | None = None
    """Stories that show who a routed history brings back; None: there are none."""
    guide: Guide | None = None
    """Helpers for directing a stream; None: there are none."""
    pretraining: Callable[[Setup, int], Tensor] | None = None
    """(setup, step) -> loss of one batch of the base's pretraining; None: its data is not available."""


def as_final(sets: Sets) -> dict[str, FinalSet]:
    """Prompts as final sets that are scored from their first frame."""
    return {name: FinalSet(own) for name, own in sets.items()}


def frozen_dtype(config: Config) -> torch.dtype:
    """Precision that weights are stored in: that of the forward pass if an adapter is trained, else float32.

    Weights that are trained themselves stay in float32; autocast casts them in every pass.
    """
    low = config.optim.lora_rank > 0 and config.optim.autocast == "bfloat16"
    return torch.bfloat16 if low else torch.float32


def streaming_generator(config: Config, transformer: CausalWan) -> StreamingGenerator:
    """Build the streaming generator of a configuration around a transformer."""
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
    """Latents ``[F, C, H, W]`` of the first block that a transformer generates from fixed noise and text.

    It uses the smallest latent size, so that weights of any model size can be compared within seconds.
    """
    shape, key = transformer.shape, "first block"
    text = torch.randn(shape.text_len, shape.text_dim, generator=keyed_generator(key))
    with transformer.smallest_latents():
        generator = streaming_generator(config, transformer)
        prompt = VideoPrompt(0, (key,), (), generator.block)
        tape = SeededTape((key,), generator.block_shape)
        return stream_latents(generator, [prompt], {key: text.to(config.device)}, tape)[0].cpu()
