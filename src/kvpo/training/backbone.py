"""A generator and its parts, built once by the application."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from safetensors.torch import save
from torch import Tensor

from kvpo.config import Config
from kvpo.engine.generator import Codec, StreamingGenerator, TextEncoder
from kvpo.engine.noise import SeededTape, Tape
from kvpo.engine.stream import TextTable, stream_latents
from kvpo.models.causal_wan import CausalWan
from kvpo.models.tensor_files import storable
from kvpo.prompts import VideoPrompt


@dataclass(frozen=True)
class Weights:
    """A transformer and its trainable parameters: everything that a checkpoint of the run must fit."""

    config: Config
    model: CausalWan
    """The transformer, with its adapter injected."""
    base_sha256: str
    """SHA-256 of the base checkpoint; trained parameters fit no other base."""


@dataclass(frozen=True)
class Backbone:
    """A generator: the transformer, its text encoder and its codec."""

    weights: Weights
    generator: StreamingGenerator
    """Wraps the same transformer."""
    text_encoder: TextEncoder
    codec: Codec
    given: Mapping[int, Tensor] = field(default_factory=dict)
    """Latents ``[T, C, H, W]`` that videos begin with, by prompt id."""

    @property
    def given_digest(self) -> str:
        """Digest of every value of the ``given`` latents: an edit of a few pixels changes few of them."""
        tensors = storable({str(id): latents for id, latents in self.given.items()})
        return hashlib.sha256(save(tensors)).hexdigest()

    def texts(self, prompts: Sequence[VideoPrompt]) -> TextTable:
        """Embed every segment of the prompts."""
        unique = list(dict.fromkeys(text for prompt in prompts for text in prompt.segments))
        return dict(zip(unique, self.text_encoder(unique), strict=True))

    @torch.no_grad()
    def latents(self, prompts: Sequence[VideoPrompt], tape: Tape) -> Tensor:
        """Latents ``[R, T, C, H, W]`` of whole videos, given latents first (see `stream_latents`)."""
        return stream_latents(self.generator, prompts, self.texts(prompts), tape, given=self.given)

    def tape(self, purpose: str) -> SeededTape:
        """The noise tape for one purpose, so that training and evaluation never share a tensor."""
        return SeededTape((purpose, self.weights.config.seed), self.generator.block_shape)
