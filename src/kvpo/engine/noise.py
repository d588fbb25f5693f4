"""Noise as data: every draw is a pure function of what it is for; nothing depends on a global generator."""

import hashlib
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


def keyed_generator(*key: int | str) -> torch.Generator:
    """A CPU generator whose state is a hash of ``key``; equal keys give equal draws on every machine."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


class Tape(Protocol):
    """Noise of one block: (video id, block index, kind) -> [F, C, H, W].

    ``kind`` is ``initial``, ``renoise 1`` to ``renoise S-1``, or ``context``. The key never contains the
    prompt or the branch, so the anchor and all branches share every tensor.
    """

    def __call__(self, video: int, block: int, kind: str) -> Tensor: ...


@dataclass(frozen=True)
class SeededTape:
    """A tape that draws each standard normal tensor from its own key when asked."""

    key: tuple[str | int, ...]
    """What the tape is for, usually a name and a seed."""
    shape: tuple[int, ...]
    """Frames, channels, height and width of a block."""

    def __call__(self, video: int, block: int, kind: str) -> Tensor:
        return torch.randn(self.shape, generator=keyed_generator("tape", *self.key, video, block, kind))
