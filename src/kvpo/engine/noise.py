"""Deterministic noise: every draw is a pure function of its key; nothing depends on a global generator."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor


def _bits(key: tuple[int | str, ...]) -> np.random.Philox:
    """Counter-based random bits under a 128-bit hash of ``key``."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(digest, "little"))


def keyed_normal(shape: tuple[int, ...], *key: int | str) -> Tensor:
    """Standard normal float32 values that depend on ``key`` alone, not on the processor's vector width."""
    return torch.from_numpy(np.random.Generator(_bits(key)).standard_normal(shape, dtype=np.float32))


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator with its state drawn from a hash of ``key``.

    A seed would not do: torch's Mersenne Twister uses only its lower 32 bits, so tens of thousands of keys
    are enough for a collision.
    """
    generator = torch.Generator().manual_seed(0)
    state = generator.get_state()
    # Torch's layout: seed, counters, then 624 32-bit words in 64 bits each. The counters stay as seeded.
    words = _bits(key).random_raw(624) >> np.uint64(32)
    state.numpy()[24 : 24 + 8 * len(words)] = words.astype("<u8").view(np.uint8)
    return generator.set_state(state)


class Tape(Protocol):
    """Noise of one block: (video id, block index, kind) -> [F, C, H, W].

    ``kind`` is ``initial``, ``renoise 1`` to ``renoise S-1``, or ``context``. The key never contains the
    prompt or the branch, so the anchor and all branches share every tensor.
    """

    def __call__(self, video: int, block: int, kind: str) -> Tensor: ...


@dataclass(frozen=True)
class SeededTape:
    """A tape that draws each standard normal tensor from its own key, on demand."""

    key: tuple[str | int, ...]
    """Purpose of the tape, usually a name and a seed."""
    shape: tuple[int, ...]
    """Frames, channels, height and width of a block."""

    def __call__(self, video: int, block: int, kind: str) -> Tensor:
        return keyed_normal(self.shape, "tape", *self.key, video, block, kind)


@dataclass(frozen=True)
class BranchTape:
    """A tape with a branch's own noise in some blocks: sqrt(1 - s^2) eps + s delta."""

    shared: Tape
    key: tuple[str | int, ...]
    """Identifies the branch."""
    blocks: range
    """Blocks with the branch's own noise."""
    strength: float = 1.0
    """s in [0, 1]: the share of the branch's own noise; 1 is fresh noise."""
    kinds: tuple[str, ...] = ("initial", "renoise")
    """Prefixes of the kinds of noise that are the branch's own."""

    def __call__(self, video: int, block: int, kind: str) -> Tensor:
        noise = self.shared(video, block, kind)
        if block not in self.blocks or not kind.startswith(self.kinds):
            return noise
        own = keyed_normal(tuple(noise.shape), "branch", *self.key, video, block, kind).to(noise)
        return (1 - self.strength**2) ** 0.5 * noise + self.strength * own
