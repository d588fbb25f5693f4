"""Messages between a reward server and its clients: clips as safetensors, everything else as JSON.

Axes: B clips, T frames, C colours, H height, W width.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf, isfinite, prod
from typing import Any

import torch
from torch import Tensor

from kvpo.files import parse_json
from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Declaration, Sampling
from kvpo.rewards.service.buffers import new_buffer

PROTOCOL = 4
"""Version of this protocol; a client refuses a server of another version."""
TOKEN_VARIABLE = "KVPO_REWARD_TOKEN"
"""Environment variable that holds the bearer token, on both sides."""
PIXEL_TYPES = {torch.uint8: "U8", torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32"}
"""Precisions of pixels, and what safetensors calls them."""
LENGTH_BYTES = 8
"""A safetensors file begins with the length of its header, a little-endian integer of this many bytes."""
LARGEST_HEADER = 16 * 2**20
"""Most bytes of a question's header; as Python objects, JSON takes up to thirty times its size in memory."""


Offers = Mapping[str, tuple[Declaration, ...]]
"""Rewards of a server: name that clients request -> declarations of the reward's components."""


@dataclass(frozen=True)
class ScoreRequest:
    """Clips of one shape, their prompts, and the requested components."""

    video_BTCHW: Tensor
    """Floats in [0, 1], or uint8."""
    prompts: tuple[ClipPrompt, ...]
    components: tuple[str, ...]


@dataclass(frozen=True)
class Body:
    """A question as a safetensors file, in two parts so that the pixels are not copied."""

    head: bytes
    pixels: memoryview

    def __len__(self) -> int:
        return len(self.head) + len(self.pixels)

    def parts(self, size: int) -> Iterator[bytes | memoryview]:
        """Yield the head, then the pixels in pieces of at most ``size`` bytes."""
        yield self.head
        for at in range(0, len(self.pixels), size):
            yield self.pixels[at : at + size]


def encode_question(question: ScoreRequest) -> Body:
    """Encode a question as a safetensors file: the tensor ``video`` unchanged, the rest as metadata."""
    video = question.video_BTCHW.contiguous()
    prompts = [[str(p), p.before, p.switch, p.file_rate, p.earlier] for p in question.prompts]
    pixels = memoryview(video.view(torch.uint8).flatten().numpy())
    header = json.dumps(
        {
            "__metadata__": {"prompts": json.dumps(prompts), "components": json.dumps(question.components)},
            "video": {
                "dtype": PIXEL_TYPES[video.dtype],
                "shape": list(video.shape),
                "data_offsets": [0, len(pixels)],
            },
        }
    ).encode()
    header += b" " * (-len(header) % LENGTH_BYTES)  # tensors begin at multiples of eight
    return Body(len(header).to_bytes(LENGTH_BYTES, "little") + header, pixels)


def one_batch(videos_BTCHW: Sequence[Tensor]) -> Tensor:
    """Concatenate clips of one shape and dtype; copies only if there are several tensors."""
    first = videos_BTCHW[0]
    if len(videos_BTCHW) == 1:
        return first
    clips = sum(len(video) for video in videos_BTCHW)
    return torch.cat(list(videos_BTCHW), out=_empty((clips, *first.shape[1:]), first.dtype, new_buffer))


def eight_bit(video_BTCHW: Tensor) -> Tensor:
    """Round floats in [0, 1] to uint8; uint8 is returned unchanged."""
    if video_BTCHW.dtype == torch.uint8:
        return video_BTCHW
    out = torch.empty(video_BTCHW.shape, dtype=torch.uint8, device=video_BTCHW.device)
    for frame, rounded in zip(_frames(video_BTCHW), _frames(out), strict=True):
        # via int16: torch's direct conversion to uint8 takes three times as long
        rounded.copy_(frame.float().clamp(0, 1).mul_(255).round_().to(torch.int16))
    return out


def fractions(video_BTCHW: Tensor, memory: Callable[[int], memoryview] = new_buffer) -> Tensor:
    """Convert uint8 to floats in [0, 1], in a buffer from ``memory``; floats are returned unchanged."""
    if video_BTCHW.dtype != torch.uint8:
        return video_BTCHW
    out = _empty(video_BTCHW.shape, torch.float32, memory)
    for frame, divided in zip(_frames(video_BTCHW), _frames(out), strict=True):
        divided.copy_(frame).div_(255)
    return out


def growth(question: ScoreRequest) -> int:
    """Bytes that ``with_fractions`` needs in addition to the question's."""
    video = question.video_BTCHW
    return 4 * video.numel() if video.dtype == torch.uint8 else 0


def with_fractions(question: ScoreRequest, memory: Callable[[int], memoryview]) -> ScoreRequest:
    """The question with its clips as floats, in a buffer from ``memory``."""
    return replace(question, video_BTCHW=fractions(question.video_BTCHW, memory))


def _frames(video_BTCHW: Tensor) -> Iterator[Tensor]:
    """Iterate over single frames: their floats fit the CPU cache, a whole clip's do not."""
    return (frame for clip in video_BTCHW for frame in clip)


def _empty(shape: Sequence[int], dtype: torch.dtype, memory: Callable[[int], memoryview]) -> Tensor:
    return torch.frombuffer(memory(prod(shape) * dtype.itemsize), dtype=dtype).view(*shape)


def decode_question(body: memoryview) -> ScoreRequest:
    """Undo ``encode_question``; the clips are a view of ``body``, because copies are expensive.

    Raises:
        ValueError: the body is not such a file, or its clips and prompts do not match.
    """
    try:
        start = LENGTH_BYTES + int.from_bytes(body[:LENGTH_BYTES], "little")
        if start - LENGTH_BYTES > LARGEST_HEADER:
            raise ValueError(f"its header may have {LARGEST_HEADER:,} bytes, got {start - LENGTH_BYTES:,}")
        header = parse_json(bytes(body[LENGTH_BYTES:start]).decode())
        metadata = header.pop("__metadata__")
        prompts = tuple(ClipPrompt(*_prompt(item)) for item in parse_json(metadata["prompts"]))
        components = tuple(str(name) for name in parse_json(metadata["components"]))
        if list(header) != ["video"]:
            raise ValueError(f"it must hold one tensor, 'video', got {', '.join(header) or 'none'}")
        dtype, shape, offsets = (header["video"][field] for field in ("dtype", "shape", "data_offsets"))
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(
            "the body must be a safetensors file with a tensor 'video' and the metadata 'prompts' (a JSON "
            f"list of [text, before, switch, file_rate, earlier]) and 'components' (a JSON list): {error!r}"
        ) from error
    precision = next((known for known, name in PIXEL_TYPES.items() if name == dtype), None)
    if precision is None or not _is_clips(shape):
        raise ValueError(
            "video must be [clips, frames, 3, height, width] of uint8, float16, bfloat16 or float32, "
            f"got {shape} of {dtype}"
        )
    count = prod(shape)
    if offsets != [0, len(body) - start] or count * precision.itemsize != len(body) - start:
        raise ValueError(f"{len(body) - start:,} bytes at {offsets} are not a video of {shape} in {dtype}")
    if len(prompts) != shape[0]:
        raise ValueError(f"{len(prompts)} prompts for {shape[0]} clips")
    video = torch.frombuffer(body, dtype=precision, offset=start, count=count)
    return ScoreRequest(video.view(shape), prompts, components)


def _is_clips(shape: Any) -> bool:
    whole = isinstance(shape, list) and all(type(size) is int and size > 0 for size in shape)
    return whole and len(shape) == 5 and shape[2] == 3


def _prompt(item: Any) -> tuple[str, str, int, float, list[str]]:
    text, before, switch, file_rate, earlier = item
    texts = isinstance(earlier, list) and all(isinstance(one, str) for one in (text, before, *earlier))
    if not (texts and type(switch) is int and type(file_rate) in (int, float)):
        raise ValueError(f"a prompt is [text, before, switch, file_rate, [earlier texts]], got {item!r}")
    return text, before, switch, file_rate, earlier


def encode_offers(offers: Offers) -> dict[str, list[dict[str, Any]]]:
    """Offers as JSON; an infinite bound is null."""
    return {name: [_fields(declaration) for declaration in own] for name, own in offers.items()}


def decode_offers(listed: Any) -> dict[str, tuple[Declaration, ...]]:
    """Undo ``encode_offers``. Raises AttributeError, KeyError, TypeError or ValueError for anything else."""
    return {str(name): tuple(map(_declaration, own)) for name, own in listed.items()}


def _fields(declaration: Declaration) -> dict[str, Any]:
    low, high = (bound if isfinite(bound) else None for bound in (declaration.low, declaration.high))
    fields = {**asdict(declaration), "low": low, "high": high}
    del fields["unit"]  # clients before it would refuse the server
    return fields


def _declaration(fields: Mapping[str, Any]) -> Declaration:
    low, high, sampling = fields["low"], fields["high"], fields["sampling"]
    bounds = {"low": -inf if low is None else low, "high": inf if high is None else high}
    return Declaration(**{**fields, **bounds, "sampling": sampling and Sampling(**sampling)})
