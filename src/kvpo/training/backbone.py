"""A generator and its parts, built once by the application."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpo.config import Config
from kvpo.engine.generator import Codec, StreamingGenerator, TextEncoder
from kvpo.engine.noise import SeededTape, Tape
from kvpo.engine.stream import TextTable, stream_latents
from kvpo.models.causal_wan import CausalWan
from kvpo.prompts import VideoPrompt


@dataclass(frozen=True)
class Weights:
    """A transformer with what is trained in it: all that a run's checkpoint has to fit."""

    config: Config
    model: CausalWan
    """The transformer, its adapter injected."""
    base_sha256: str
    """Digest of the base checkpoint: trained parameters fit no other."""


@dataclass(frozen=True)
class Backbone:
    """A generator: the transformer, its text encoder and its codec."""

    weights: Weights
    generator: StreamingGenerator
    """Around the same transformer."""
    text_encoder: TextEncoder
    codec: Codec
    given: Mapping[int, Tensor] = field(default_factory=dict)
    """Latents ``[T, C, H, W]`` that videos begin with, by the id of their prompts."""

    def texts(self, prompts: Sequence[VideoPrompt]) -> TextTable:
        """Embeddings of every segment of the prompts."""
        unique = list(dict.fromkeys(text for prompt in prompts for text in prompt.segments))
        return dict(zip(unique, self.text_encoder(unique), strict=True))

    @torch.no_grad()
    def latents(self, prompts: Sequence[VideoPrompt], tape: Tape) -> Tensor:
        """Latents ``[R, T, C, H, W]`` of whole videos (see `stream_latents`), after those that are given."""
        return stream_latents(self.generator, prompts, self.texts(prompts), tape, given=self.given)

    def tape(self, purpose: str) -> SeededTape:
        """Noise for one purpose: training and evaluation never share a tensor."""
        return SeededTape((purpose, self.weights.config.seed), self.generator.block_shape)
