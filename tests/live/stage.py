"""A stage for tests: a tiny generator with random weights, or one that only takes its time."""

import json
import struct
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine.noise import keyed_normal
from kvpo.live.scheduler import Scheduler, SessionLimits, pages_needed
from kvpo.live.script import Cue
from kvpo.live.session import Session, Stage
from tests.engine.tiny import EXPLORATION, SHAPE, generator

LIMITS = SessionLimits()


@dataclass(frozen=True)
class TinyCodec:
    """Three latent channels as colours."""

    frames_per_latent: int = 1
    frames_per_second: float = 8.0

    def decode(self, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
        return latents_BTCHW.float().sigmoid()

    def decode_next(self, latents_FCHW: Tensor, state: object | None) -> tuple[Tensor, object | None]:
        return self.decode(latents_FCHW[None])[0], None


def embed(texts: Sequence[str]) -> dict[str, Tensor]:
    """An embedding for every text, decided by the text."""
    if refused := [text for text in texts if "unspeakable" in text]:
        raise ValueError(f"prompt: {refused[0]!r} cannot be embedded")
    return {text: 2 * keyed_normal((SHAPE.text_len, SHAPE.text_dim), "text", text) for text in texts}


def stage(exploration: ExplorationConfig = EXPLORATION, **deployment: Any) -> Stage:
    """A stage around the tiny generator."""
    return Stage(generator(torch.float32, **deployment), TinyCodec(), embed, exploration, "tiny")


@dataclass
class Slow:
    """A transformer that takes its time and moves nothing."""

    delay: float

    def __call__(self, x: Tensor, sigma: Tensor, text: Tensor, context: Any, **options: Any) -> Any:
        time.sleep(self.delay)
        if not options.get("encode"):
            return torch.zeros_like(x)
        rows, frames = x.shape[:2]
        shape = (SHAPE.num_layers, rows, frames, SHAPE.tokens_per_frame, SHAPE.num_heads, SHAPE.head_dim)
        return torch.zeros(shape), torch.zeros(shape)

    def text_of(self, text: Tensor, text_rows: Tensor | None) -> Tensor:
        return text

    def text_keys(self, text: Tensor, layer: int) -> Tensor:
        raise AssertionError("it has no memory bank")


def slow_stage(delay: float = 0.0) -> Stage:
    """A stage whose forward passes take ``delay`` seconds: four of them make a block."""
    real = stage()
    return replace(real, generator=replace(real.generator, transformer=Slow(delay)))


def scheduler(
    own: Stage | None = None, limits: SessionLimits = LIMITS, arms: Sequence[str] = ("base",), **options: Any
) -> Scheduler:
    """A scheduler that nobody runs yet; all arms have the same weights."""
    return Scheduler(own or stage(), dict.fromkeys(arms, nullcontext), limits, **options)


def session(own: Stage, cue: str = "a red square", seed: int = 1, arms: Sequence[str] = ("base",)) -> Session:
    """A session in a cache of its own."""
    limits = SessionLimits(sessions=1, frames=600)
    cache = own.generator.new_cache(pages_needed(own, limits, len(arms)))
    return Session(own, cache, arms, Cue(cue), seed)


def unpacked(message: bytes) -> tuple[dict[str, Any], bytes]:
    """The header and the pictures of a binary message."""
    (length,) = struct.unpack(">I", message[:4])
    return json.loads(message[4 : 4 + length]), message[4 + length :]


@contextmanager
def running(own: Scheduler) -> Any:
    """The scheduler's thread."""
    from threading import Thread

    thread = Thread(target=own.run)
    thread.start()
    try:
        yield own
    finally:
        own.stop()
        thread.join(20)
        assert not thread.is_alive()


Check = Callable[[], bool]
