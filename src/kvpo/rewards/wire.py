"""What a reward server and its clients say to each other: clips as safetensors, all else as JSON.

Letters: B clips, T frames, C colours, H height, W width.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Declaration, Sampling

PROTOCOL = 1
"""Version of what is described here; a client refuses a server of another one."""
TOKEN_VARIABLE = "KVPO_REWARD_TOKEN"
"""Environment variable that holds the bearer token, on both sides."""
PIXELS = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
"""Precisions of pixels, and what safetensors calls them."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header in this many bytes, least significant first."""


@dataclass(frozen=True)
class Offer:
    """A reward of a server: the name a client asks for it by, its components, and how they add up."""

    name: str
    declarations: tuple[Declaration, ...]
    weights: Mapping[str, float]


@dataclass(frozen=True)
class Question:
    """Clips of one shape, their prompts, and the components that are asked for."""

    video_BTCHW: Tensor
    """Floats in [0, 1], or whole numbers from 0 to 255."""
    prompts: tuple[ClipPrompt, ...]
    components: tuple[str, ...]


@dataclass(frozen=True)
class Body:
    """A question as a safetensors file, in two parts so that the pixels are not copied."""

    head: bytes
    pixels: memoryview

    def __len__(self) -> int:
        return len(self.head) + len(self.pixels)

    def parts(self, size: int) -> Iterator[bytes]:
        """The file in pieces of at most ``size`` bytes after its head."""
        yield self.head
        for at in range(0, len(self.pixels), size):
            yield bytes(self.pixels[at : at + size])


def encode_question(question: Question) -> Body:
    """A question as a safetensors file: the tensor ``video`` as it is, all else in the metadata."""
    video = question.video_BTCHW.contiguous()
    prompts = [[str(prompt), prompt.before, prompt.switch] for prompt in question.prompts]
    pixels = memoryview(video.view(torch.uint8).flatten().numpy())
    header = json.dumps(
        {
            "__metadata__": {"prompts": json.dumps(prompts), "components": json.dumps(question.components)},
            "video": {
                "dtype": PIXELS[video.dtype],
                "shape": list(video.shape),
                "data_offsets": [0, len(pixels)],
            },
        }
    ).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)  # tensors begin at multiples of eight
    return Body(len(header).to_bytes(LENGTH_BYTES, "little") + header, pixels)


def decode_question(body: bytes) -> Question:
    """Undo ``encode_question``.

    Raises:
        ValueError: the body is no such file, or its clips and prompts do not go together.
    """
    try:
        header = int.from_bytes(body[:LENGTH_BYTES], "little")
        metadata = json.loads(body[LENGTH_BYTES : LENGTH_BYTES + header])["__metadata__"]
        tensors = load(body)
        prompts = tuple(ClipPrompt(*_prompt(item)) for item in json.loads(metadata["prompts"]))
        components = tuple(str(name) for name in json.loads(metadata["components"]))
    except (SafetensorError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise ValueError(
            "the body must be a safetensors file with a tensor 'video' and the metadata 'prompts' (a JSON "
            f"list of [text, before, switch]) and 'components' (a JSON list): {error!r}"
        ) from error
    if list(tensors) != ["video"]:
        raise ValueError(f"the body must hold one tensor, 'video', got {', '.join(tensors) or 'none'}")
    video = tensors["video"]
    shape = list(video.shape)
    if video.ndim != 5 or video.shape[2] != 3 or not video.numel() or video.dtype not in PIXELS:
        raise ValueError(
            "video must be [clips, frames, 3, height, width] of uint8, float16, bfloat16 or float32, "
            f"got {shape} of {video.dtype}"
        )
    if len(prompts) != len(video):
        raise ValueError(f"{len(prompts)} prompts for {len(video)} clips")
    return Question(video, prompts, components)


def _prompt(item: Any) -> tuple[str, str, int]:
    text, before, switch = item
    if not (isinstance(text, str) and isinstance(before, str) and type(switch) is int):
        raise ValueError(f"a prompt is [text, before, switch], got {item!r}")
    return text, before, switch


def encode_offers(offers: Sequence[Offer]) -> list[dict[str, Any]]:
    """Offers as JSON; an infinite bound is null."""
    return [
        {
            "name": offer.name,
            "components": [
                {
                    **asdict(one),
                    "low": None if one.low == -inf else one.low,
                    "high": None if one.high == inf else one.high,
                }
                for one in offer.declarations
            ],
            "weights": dict(offer.weights),
        }
        for offer in offers
    ]


def decode_offers(listed: Any) -> tuple[Offer, ...]:
    """Undo ``encode_offers``. Raises ValueError, KeyError or TypeError for anything else."""
    return tuple(
        Offer(item["name"], tuple(map(_declaration, item["components"])), item["weights"]) for item in listed
    )


def _declaration(fields: Mapping[str, Any]) -> Declaration:
    low, high, sampling = fields["low"], fields["high"], fields["sampling"]
    bounds = {"low": -inf if low is None else low, "high": inf if high is None else high}
    return Declaration(**{**fields, **bounds, "sampling": sampling and Sampling(**sampling)})
