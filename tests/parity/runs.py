"""The package run the way each kind of golden fixture was made: metadata and tensors in, numbers out."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from unittest.mock import patch

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine import stream as engine_stream
from kvpo.engine.generator import StreamingGenerator, TextRows
from kvpo.engine.rollout import RoutedFrame, grow_roots, run_members
from kvpo.engine.stream import (
    Stream,
    Trajectory,
    advance,
    append_block,
    give_frames,
    open_stream,
    stream_pages,
    switch_prompts,
)
from kvpo.method.flow import clean_of
from kvpo.models.adapters import merge_adapter
from kvpo.models.cache import FrameCache, History
from kvpo.models.causal_wan import CausalWan
from kvpo.models.deployment import deployment_context, reencoding_context
from kvpo.prompts import VideoPrompt
from tests.parity.fixtures import CONTEXT_NOISE, adapter_of, forgets_at_switch, generator_of

CHUNKS = (0, *range(21, 1024, 18))
"""Frames at which the public sampler looks for a prompt switch."""
Observer = Callable[[int, Stream, Trajectory | None], None]
BlockTape = Callable[[int, str], Tensor]
"""(block, kind) -> noise [3, C, H, W]."""


def stream_tape(data: dict[str, Tensor]) -> BlockTape:
    """The noise of a stream fixture; it counts generated blocks only."""
    given = data["initial_latents"].shape[1] // 3 if "initial_latents" in data else 0

    def tape(block: int, kind: str) -> Tensor:
        at = block - given
        if kind == "initial":
            return data["noise"][0, 3 * at : 3 * at + 3]
        return data["renoise"][3 * at + int(kind.split()[1]) - 1]

    return tape


def routing_tape(meta: dict, data: dict[str, Tensor]) -> BlockTape:
    """The noise of a routing fixture: per block three re-noise tensors, then the one of the clean pass."""

    def tape(block: int, kind: str) -> Tensor:
        if kind == "initial":
            return data["noise"][0, 3 * block : 3 * block + 3]
        before = 3 * block < meta["branch_chunk_start"]
        noises = data["prefix_noises"] if before else data["branch_noises"]
        at = block if before else block - meta["branch_chunk_start"] // 3
        return noises[4 * at + (3 if kind == "context" else int(kind.split()[1]) - 1)]

    return tape


def of_video(tape: BlockTape) -> Callable[[int, int, str], Tensor]:
    """The tape as the engine asks for it."""
    return lambda video, block, kind: tape(block, kind)


def chunk_switches(meta: dict) -> list[int]:
    """Switch frames as the public sampler acts on them: at the next start of a chunk."""
    return [min(chunk for chunk in CHUNKS if chunk >= switch) for switch in meta["switches"]]


def video(
    data: dict[str, Tensor], switches: Sequence[int], num_frames: int
) -> tuple[VideoPrompt, dict[str, Tensor]]:
    """The prompt of a fixture, and the embeddings of its segments."""
    switches = [switch for switch in switches if switch < num_frames]
    segments = tuple(f"prompt {n}" for n in range(len(switches) + 1))
    texts = {name: embeds[0] for name, embeds in zip(segments, data["prompt_embeds"], strict=False)}
    return VideoPrompt(0, segments, tuple(switches), num_frames), texts


@contextmanager
def published_switch(meta: dict) -> Iterator[None]:
    """Inside, a prompt switch forgets what the public code forgets (``forgets_at_switch``)."""
    if not forgets_at_switch(meta):
        yield
        return

    def forgetting(deployment, histories):
        for history in histories:
            forget(history, before=history.end - deployment.reencoded(history.end))
        return reencoding_context(deployment, histories)

    with patch.object(engine_stream, "reencoding_context", forgetting):
        yield


def forget(history: History, before: int) -> None:
    """Replace the pages of the frames ``before`` by zeros."""
    frames = [frame for frame in history.pages if frame < before]
    if frames:
        cache = history.cache
        zeros = torch.zeros_like(cache.keys_LQTND[:, :1])[:, :, None]
        ((page,),) = cache.write(zeros, zeros)
        for frame in frames:
            cache.share([page])
            history.replace(frame, [page])
        cache.release([page])


def run_stream(meta: dict, data: dict[str, Tensor], model: CausalWan, observe: Observer) -> Tensor:
    """All latents ``[T, C, H, W]``; ``observe`` sees every block with the number of public calls so far."""
    generator = generator_of(meta, model)
    given, tape = data.get("initial_latents"), stream_tape(data)
    offset = 0 if given is None else given.shape[1]
    steps = len(generator.sigmas) - 1
    num_frames = offset + data["noise"].shape[1]
    prompt, texts = video(data, meta["switches"], num_frames)
    cache = generator.new_cache(stream_pages(generator, num_frames))
    stream = open_stream(generator, cache, prompt)
    calls = offset // generator.block
    if given is not None:
        give_frames(generator, [stream], given, texts, resident=meta["window"])
    with published_switch(meta):
        while stream.start < num_frames:
            segment = stream.segment
            switch_prompts(generator, [stream], texts)
            if stream.segment != segment:
                calls += 1
                observe(calls, stream, None)
            trajectory = advance(generator, [stream], texts, of_video(tape), resident=meta["window"])
            calls += steps + 2
            observe(calls, stream, trajectory)
    stream.history.release()
    assert cache.pages_in_use == 0
    return torch.cat(stream.latents)


def run_routing(meta: dict, data: dict[str, Tensor], model: CausalWan) -> list[Tensor]:
    """Latents ``[T, C, H, W]`` of every branch and, last, of the anchor."""
    generator = generator_of(meta, model, CONTEXT_NOISE)
    num_frames, tape = data["noise"].shape[1], routing_tape(meta, data)
    prompt, texts = video(data, chunk_switches(meta), num_frames)
    fork, blocks = meta["fork_frame"], meta["perturbed_blocks"]
    exploration = ExplorationConfig(
        branches=len(meta["used_frames"]),
        blocks=blocks,
        recent=meta["nearest_counting_current_block"] - generator.block,
        routed=len(meta["used_frames"][0]),
        resident_frames=meta["resident_frames"],
        tail_blocks=(num_frames - fork) // generator.block - blocks,
    )
    with published_switch(meta):
        rollout = grow_roots(generator, [prompt], fork, texts, of_video(tape), exploration)
        members = [(0, [[RoutedFrame(0, frame) for frame in used]] * blocks) for used in meta["used_frames"]]
        members.append((0, None))
        _, _, clean = run_members(generator, rollout, members, texts, of_video(tape), exploration)
    before = torch.cat(rollout.groups[0].root.latents)
    rollout.release()
    assert rollout.cache.pages_in_use == 0
    return [torch.cat([before, own]) for own in clean]


def history_of(meta: dict, data: dict[str, Tensor], cache: FrameCache) -> History:
    """The stored history at the fork as pages: the sink and the frames before the fork."""
    (filled,), (end,) = set(meta["history_filled_frames"]), set(meta["history_end_frame"])
    sink = meta["sink"]
    frames = [*range(sink), *range(end - (filled - sink), end)] if end > filled else list(range(end))
    layers, _, tokens, heads, width = cache.keys_LQTND.shape

    def slots(name: str) -> Tensor:
        stacked = torch.stack([data[f"history_{name}_layer{n}"][0] for n in range(layers)])
        return stacked.view(layers, 1, -1, tokens, heads, width)[:, :, :filled]

    (pages,) = cache.write(slots("k"), slots("v"))
    history = History(cache, sink)
    history.pages = dict(zip(frames, pages, strict=True))
    history.end = end
    return history


def public_scores(meta: dict, data: dict[str, Tensor], generator: StreamingGenerator) -> Tensor:
    """The public trainer's log-score of every branch ``[G]`` under one policy."""
    states, targets = data["noisy_inputs"], data["clean_predictions"]
    branches, blocks, steps = states.shape[:3]
    block = generator.block
    prompt, texts = video(data, meta["switches"], meta["fork_frame"] + block * blocks)
    embeds = texts[prompt.segments[prompt.segment_at(meta["fork_frame"])]]
    text = TextRows(embeds[None], torch.zeros(branches, dtype=torch.long))
    # Every branch holds the stored history and its own blocks.
    stored = meta["history_filled_frames"][0]
    cache = generator.new_cache(stored + branches * block * blocks)
    root = Stream(prompt, history_of(meta, data, cache))
    streams = [root.fork() for _ in range(branches)]
    scores = torch.zeros(branches)
    for n in range(blocks):
        context = deployment_context(generator.deployment, [stream.history for stream in streams])
        for step in range(steps):
            sigma = generator.sigmas[step]
            velocity = generator.velocity(states[:, n, step], torch.full((branches,), sigma), text, context)
            clean = clean_of(velocity, states[:, n, step], sigma)
            scores -= (targets[:, n, step] - clean).float().square().mean((1, 2, 3, 4)) / 2
        if n < blocks - 1:
            noise = data["context_noise"].unflatten(0, (branches, blocks - 1))[:, n]
            append_block(generator, streams, clean, text, context, noise)
    return scores


@torch.no_grad()
def run_replay(meta: dict, data: dict[str, Tensor], base: Callable[[], CausalWan]) -> dict[str, Tensor]:
    """The three log-scores of a replay fixture; ``base`` makes the model without adapter."""
    policies = {}
    for name in ("old", "theta"):
        policies[name] = base()
        merge_adapter(policies[name], adapter_of(data, f"{name}."))
    # The public trainer reuses the text keys and values that the old policy cached.
    for old, theta in zip(policies["old"].blocks, policies["theta"].blocks, strict=True):
        theta.cross_attn.k, theta.cross_attn.v = old.cross_attn.k, old.cross_attn.v
    scores = {
        name: public_scores(meta, data, generator_of(meta, model, CONTEXT_NOISE))
        for name, model in policies.items()
    }
    return {
        "log_score_old": scores["old"],
        "log_score_at_old": scores["old"],
        "log_score_theta": scores["theta"],
    }
