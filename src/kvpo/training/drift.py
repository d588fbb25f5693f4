"""Drift of long streams: looks and rewards, a few seconds at a time, in constant memory."""

import resource
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpo.engine.noise import Tape
from kvpo.engine.pages import stream_pages
from kvpo.engine.stream import Stream, advance, open_stream
from kvpo.prompts import VideoPrompt
from kvpo.rewards.pixel_statistics import LOOKS, looks
from kvpo.training.backbone import Backbone
from kvpo.training.diversity import ReadOff
from kvpo.training.evaluation import Judges, segment_scores

MEMORY = "peak_rss_mb"
"""Peak memory of the process up to the end of a span: the same for all videos."""


def chained(prompts: Sequence[VideoPrompt], num_frames: int, id: int) -> VideoPrompt:
    """One video of ``num_frames`` latent frames that cycles through the prompts."""
    segments: list[str] = []
    starts: list[int] = []
    at = 0
    while at < num_frames:
        for prompt in prompts:
            segments += prompt.segments
            starts += [at, *(at + switch for switch in prompt.switches)]
            at += prompt.num_frames
    count = sum(start < num_frames for start in starts)
    return VideoPrompt(id, tuple(segments[:count]), tuple(starts[1:count]), num_frames)


def drift_curves(
    backbone: Backbone,
    prompts: Sequence[VideoPrompt],
    tape: Tape,
    judges: Judges,
    span: int,
    read_off: ReadOff | None = None,
    show: Callable[[int, int], None] = lambda done, total: None,
) -> dict[str, list[list[float]]]:
    """Stream videos of one length and measure every ``span`` latent frames: measure -> ``[spans][videos]``.

    ``span`` and the length are multiples of the block; frames after the last whole span are not streamed.
    Measures are the reward, its components as ``reward/NAME``, the unseen scorer, the looks, the confidence
    of ``read_off`` (1 is its bound), and ``MEMORY``. Only the pixels of one span and one block are kept.
    """
    generator, codec, block = backbone.generator, backbone.codec, backbone.generator.block
    frames = min(prompt.num_frames for prompt in prompts) // span * span
    cache = generator.new_cache(len(prompts) * stream_pages(generator, frames, switches=True))
    texts, window = backbone.texts(prompts), generator.deployment.window
    streams = [open_stream(generator, cache, prompt, texts, tape) for prompt in prompts]
    decoding: list[object | None] = [None] * len(streams)
    pixels: list[list[Tensor]] = [[] for _ in streams]
    found: dict[str, list[list[float]]] = {}
    for start in range(0, frames, block):
        advance(generator, streams, resident=generator.deployment.resident)
        for n, stream in enumerate(streams):
            with torch.no_grad():
                decoded, decoding[n] = codec.decode_next(stream.latents[-1], decoding[n])
            pixels[n].append(decoded)
            if window != -1:
                _forget(stream, window)
        if (start + block) % span == 0:
            first = start + block - span
            video = torch.stack([torch.cat(chunks) for chunks in pixels])
            measured = _measured(backbone, prompts, video, first, span, judges, read_off)
            for name, values in measured.items():
                found.setdefault(name, []).append(values)
            pixels = [chunks[-1:] for chunks in pixels]  # the lead-in of a segment that starts now
            show(start + block, frames)
    for stream in streams:
        stream.history.release()
    return found


def _forget(stream: Stream, window: int) -> None:
    """Drop latents that no prompt switch will re-encode."""
    del stream.latents[: -max(1, window // len(stream.latents[-1]))]


def _measured(
    backbone: Backbone,
    prompts: Sequence[VideoPrompt],
    video_NTCHW: Tensor,
    first: int,
    span: int,
    judges: Judges,
    read_off: ReadOff | None,
) -> dict[str, list[float]]:
    """All measures of one span; the pixels start one block before it, unless it is the first."""
    block, per_latent = backbone.generator.block, backbone.codec.frames_per_latent
    place = {"first": first, "stop": first + span, "offset": max(0, first - block)}
    components_KN = segment_scores(judges.scorer, video_NTCHW, prompts, per_latent, block, block, **place)
    found = {"reward": judges.weights_K @ components_KN}
    parts = (f"reward/{name}" for name in judges.scorer.components)  # a look may have a component's name
    found |= dict(zip(parts, components_KN, strict=True))
    if judges.unseen:
        found["unseen"] = segment_scores(judges.unseen, video_NTCHW, prompts, per_latent, block, 0, **place)[
            0
        ]
    own_NTCHW = video_NTCHW[:, per_latent * block if first else 0 :]
    found |= dict(zip(LOOKS, looks(own_NTCHW), strict=True))
    if read_off:
        found["confidence"] = read_off.observe(own_NTCHW)[1]
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {name: values.tolist() for name, values in found.items()} | {MEMORY: [used] * len(prompts)}
