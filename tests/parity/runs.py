"""The package run the way each kind of golden fixture was made: metadata and tensors in, numbers out."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine.explorers import Member, RoutedFrame
from kvpo.engine.forks import Fork
from kvpo.engine.generator import StreamingGenerator, Trajectory
from kvpo.engine.noise import Tape
from kvpo.engine.pages import PlannedRollout, cache_pages, stream_pages
from kvpo.engine.rollout import Rollout
from kvpo.engine.stream import (
    Stream,
    TextTable,
    advance,
    append_block,
    give_frames,
    open_stream,
    switch_prompts,
    text_of,
)
from kvpo.method.flow import clean_of
from kvpo.models.adapters import merge_adapter
from kvpo.models.cache import FrameCache, History
from kvpo.models.causal_wan import CausalWan
from kvpo.models.deployment import deployment_context
from kvpo.prompts import VideoPrompt
from tests.parity.fixtures import (
    BLOCK,
    CHUNKS,
    CONTEXT_NOISE,
    adapter_of,
    generator_of,
    segments_of,
)
from tests.parity.published import published

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


def clean_pass_tape(noises: Tensor | None, first: int) -> BlockTape:
    """The tape of a replay, whose states are stored; ``noises`` are those of clean passes from a block on."""

    def tape(block: int, kind: str) -> Tensor:
        assert kind == "context" and noises is not None, f"{kind} noise of block {block} was asked for"
        return noises[block - first]

    return tape


def of_video(tape: BlockTape) -> Callable[[int, int, str], Tensor]:
    """The tape as the engine asks for it."""
    return lambda video, block, kind: tape(block, kind)


def video(data: dict[str, Tensor], segments: Sequence[int]) -> tuple[VideoPrompt, dict[str, Tensor]]:
    """The prompt of a fixture from the segment of every block, and the embeddings of its texts."""
    starts = [n for n in range(len(segments)) if n == 0 or segments[n] != segments[n - 1]]
    names = tuple(f"prompt {segments[n]}" for n in starts)
    texts = {name: data["prompt_embeds"][segments[n]][0] for name, n in zip(names, starts, strict=True)}
    switches = tuple(BLOCK * n for n in starts[1:])
    return VideoPrompt(0, names, switches, BLOCK * len(segments)), texts


def run_stream(meta: dict, data: dict[str, Tensor], model: CausalWan, observe: Observer) -> Tensor:
    """All latents ``[T, C, H, W]``; ``observe`` sees every block with the number of public calls so far."""
    generator = generator_of(meta, model)
    given, tape = data.get("initial_latents"), stream_tape(data)
    offset = 0 if given is None else given.shape[1]
    steps = len(generator.sigmas) - 1
    num_frames = offset + data["noise"].shape[1]
    prompt, texts = video(data, segments_of(meta, num_frames, offset))
    # One page more than a stream needs: a page of zeros.
    cache = generator.new_cache(stream_pages(generator, num_frames, meta["window"], switches=True) + 1)
    stream = open_stream(generator, cache, prompt, texts, of_video(tape))
    calls = offset // generator.block
    if given is not None:
        give_frames(generator, [stream], given, resident=meta["window"])
    with published(meta):
        while stream.start < num_frames:
            segment = stream.segment
            switch_prompts(generator, [stream])
            if stream.segment != segment:
                calls += 1
                observe(calls, stream, None)
            trajectory = advance(generator, [stream], resident=meta["window"])
            calls += steps + 2
            observe(calls, stream, trajectory)
    stream.history.release()
    assert cache.pages_in_use == 0
    return torch.cat(stream.latents)


def run_routing(meta: dict, data: dict[str, Tensor], model: CausalWan) -> list[Tensor]:
    """Latents ``[T, C, H, W]`` of every branch and, last, of the anchor."""
    generator = generator_of(meta, model, CONTEXT_NOISE)
    num_frames, tape = data["noise"].shape[1], of_video(routing_tape(meta, data))
    prompt, texts = video(data, segments_of(meta, num_frames))
    with published(meta):
        if meta["model"] == "memflow":
            return routed_by_slot(meta, generator, prompt, texts, tape)
        fork, blocks = meta["fork_frame"], meta["perturbed_blocks"]
        exploration = ExplorationConfig(
            branches=len(meta["used_frames"]),
            blocks=blocks,
            recent=recent_past(meta),
            routed=max(1, *map(len, meta["used_frames"])),
            resident_frames=meta["resident_frames"],
            tail_blocks=(num_frames - fork) // generator.block - blocks,
        )
        planned = PlannedRollout([prompt], [Fork(fork, exploration)], keep_pool=True)
        # A page of zeros for every member, and for the root.
        cache = generator.new_cache(cache_pages(generator, [planned]) + exploration.branches + 2)
        rollout = Rollout(generator, planned, texts, tape, cache)
        rollout.grow_roots(range(1))
        routes = [tuple(RoutedFrame(0, frame) for frame in used) for used in meta["used_frames"]]
        members = [*(Member(0, routes=(route,) * blocks) for route in routes), Member(0)]
        clean = [ran.clean_TCHW for ran in rollout.run(members)]
    before = torch.cat(rollout.roots[0].latents)
    rollout.release()
    assert rollout.cache.pages_in_use == 0
    return [torch.cat([before, own]) for own in clean]


def recent_past(meta: dict) -> int:
    """Past frames that a routed block keeps; the window limits them."""
    return min(meta["nearest_counting_current_block"], meta["window"] - meta["sink"]) - BLOCK


def routed_by_slot(
    meta: dict, generator: StreamingGenerator, prompt: VideoPrompt, texts: TextTable, tape: Tape
) -> list[Tensor]:
    """The public MemFlow sampler: routed are cache slots, read again at every block.

    ``used_frames`` are what the slots hold at the first routed block; once the cache has rolled, the same
    slots hold later frames at every further block, at last frames that the branch itself has made.
    """
    resident, fork, sink = meta["resident_frames"], meta["fork_frame"], meta["sink"]
    cache = generator.new_cache(2 * prompt.num_frames + resident + generator.deployment.window)
    root = open_stream(generator, cache, prompt, texts, tape)
    while root.start < fork:
        advance(generator, [root], resident=resident)
    latents = []
    for used in [*meta["used_frames"], None]:
        stream = root.fork()
        while stream.start < prompt.num_frames:
            # At a switch pages are rewritten before they are routed.
            switch_prompts(generator, [stream])
            routes = None
            if used is not None and stream.start < fork + BLOCK * meta["perturbed_blocks"]:
                evicted = [max(0, start + BLOCK - resident) for start in (fork, stream.start)]
                frames = [f if f < sink else f - evicted[0] + evicted[1] for f in used]
                routes = [stream.history.page_ids(frames)]
            advance(generator, [stream], routes=routes, recent=recent_past(meta), resident=resident)
        latents.append(torch.cat(stream.latents))
        stream.history.release()
    root.history.release()
    assert cache.pages_in_use == 0
    return latents


def history_of(meta: dict, data: dict[str, Tensor], cache: FrameCache) -> History:
    """The stored history at the fork as pages: the sink and the frames before the fork."""
    filled, end = meta["history_filled_frames"][0], meta["history_end_frame"][0]
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


def cached_segment(meta: dict) -> int:
    """The prompt whose text keys the public trainer has cached at the fork.

    It goes on with the prompt of the chunk before, also where the forked chunk begins with a switch.
    """
    fork = max(chunk for chunk in CHUNKS if chunk <= meta["fork_frame"])
    before = max((chunk for chunk in CHUNKS if chunk < fork), default=-1)
    return sum(before >= switch for switch in meta["switches"])


def public_scores(
    meta: dict,
    data: dict[str, Tensor],
    generator: StreamingGenerator,
    *,
    rows: int = 0,
    scored: Callable[[Tensor, Tensor], None] = lambda branches, scores: None,
) -> Tensor:
    """The public trainer's log-score of every branch ``[G]`` under one policy.

    ``rows`` branches are replayed together (0: all); ``scored`` gets each batch's branches and scores while
    their pages are held.
    """
    branches, blocks = data["noisy_inputs"].shape[:2]
    # Every branch holds the stored history and its own blocks.
    stored = meta["history_filled_frames"][0]
    cache = generator.new_cache(stored + branches * generator.block * blocks)
    text_LD = data["prompt_embeds"][cached_segment(meta)][0]
    prompt = VideoPrompt(0, ("",), (), meta["history_end_frame"][0] + generator.block * blocks)
    noises = data["context_noise"].unflatten(0, (branches, blocks - 1)) if blocks > 1 else [None] * branches
    history = history_of(meta, data, cache)
    first = history.end // generator.block
    root = Stream(prompt, {"": text_LD}, of_video(clean_pass_tape(None, first)), history)
    scores = []
    for batch in torch.arange(branches).split(rows or branches):
        streams = [root.fork(of_video(clean_pass_tape(noises[branch], first))) for branch in batch]
        text = text_of(streams)
        score = torch.zeros(len(batch))
        for n in range(blocks):
            context = deployment_context(generator.deployment, [stream.history for stream in streams])
            for step, sigma in enumerate(generator.sigmas[: data["noisy_inputs"].shape[2]]):
                state = data["noisy_inputs"][batch, n, step]
                velocity = generator.velocity(state, torch.full((len(batch),), sigma), text, context)
                clean = clean_of(velocity, state, sigma)
                target = data["clean_predictions"][batch, n, step]
                score = score - (target - clean).float().square().mean((1, 2, 3, 4)) / 2
            if n < blocks - 1:
                append_block(generator, streams, clean.detach(), text, context)
        scored(batch, score)
        for stream in streams:
            stream.history.release()
        scores.append(score.detach())
    return torch.cat(scores)


def replay_policies(data: dict[str, Tensor], base: Callable[[], CausalWan]) -> dict[str, CausalWan]:
    """The old and the evaluated policy of a replay fixture; ``base`` makes the model without adapter."""
    policies = {}
    for name in ("old", "theta"):
        policies[name] = base()
        merge_adapter(policies[name], adapter_of(data, f"{name}."))
    # The public trainer reuses the text keys and values that the old policy cached.
    for old, theta in zip(policies["old"].blocks, policies["theta"].blocks, strict=True):
        theta.cross_attn.k, theta.cross_attn.v = old.cross_attn.k, old.cross_attn.v
    return policies


@torch.no_grad()
def run_replay(
    meta: dict, data: dict[str, Tensor], base: Callable[[], CausalWan], rows: int = 0
) -> dict[str, Tensor]:
    """The three log-scores of a replay fixture, ``rows`` branches at a time (0: all)."""
    scores = {
        name: public_scores(meta, data, generator_of(meta, model, CONTEXT_NOISE), rows=rows)
        for name, model in replay_policies(data, base).items()
    }
    return {
        "log_score_old": scores["old"],
        "log_score_at_old": scores["old"],
        "log_score_theta": scores["theta"],
    }
