"""Streaming generation: many streams in lockstep, prompt switches, routed contexts."""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from kvpo.engine.generator import StreamingGenerator, TextRows, Trajectory
from kvpo.engine.noise import Tape
from kvpo.engine.pages import stream_pages
from kvpo.method.flow import Step, add_noise, clean_of
from kvpo.models.cache import FrameCache, History
from kvpo.models.context import PageContext
from kvpo.models.deployment import (
    adopt_reencoded,
    commit_bank,
    context_size,
    deployment_context,
    reachable_frames,
    record_block,
    reencoding_context,
    routed_context,
)
from kvpo.models.settings import Deployment
from kvpo.prompts import VideoPrompt

TextTable = Mapping[str, Tensor]
"""Prompt text -> embedding [text_len, text_dim], computed once."""


@dataclass
class Stream:
    """One video being generated: its prompt, its noise and the frames so far."""

    prompt: VideoPrompt
    texts: TextTable
    """Embeddings of the prompt's segments."""
    tape: Tape
    history: History
    latents: list[Tensor] = field(default_factory=list)
    """Clean blocks so far, each [F, C, H, W]."""
    segment: int = 0
    """Prompt segment that the stored history is encoded under."""
    fresh_prompt: bool = False
    """True if no block was generated since the last prompt switch."""
    step: Step | None = None
    """Solver step of the next blocks; None: the generator's."""
    pinned: frozenset[int] = frozenset()
    """Frames that stay resident in addition to what ``advance`` keeps."""
    deployment: Deployment = field(default_factory=Deployment)
    """Deployment of the generator, which also sets how one prompt blends into the next."""
    end: int | None = None
    """Total number of frames; None: open-ended."""

    @property
    def start(self) -> int:
        """First frame of the next block."""
        return self.history.end

    @property
    def ending(self) -> bool:
        """True if the next block is the last one."""
        return self.start + self.deployment.block == self.end

    def fork(self, tape: Tape | None = None, step: Step | None = None) -> "Stream":
        """A second stream with the same past; noise and solver step may differ from here on.

        Shares pages and latents.
        """
        return replace(
            self, history=self.history.fork(), latents=list(self.latents), tape=tape or self.tape, step=step
        )


def open_stream(
    generator: StreamingGenerator, cache: FrameCache, prompt: VideoPrompt, texts: TextTable, tape: Tape
) -> Stream:
    """A stream before its first block."""
    deployment = generator.deployment
    return Stream(prompt, texts, tape, History(cache, deployment.sink), deployment=deployment)


Shares = tuple[tuple[str, float], ...]
"""Prompt texts, each with its share in a block's text embedding."""


def shares_of(prompt: VideoPrompt, segment: int, start: int, deployment: Deployment) -> Shares:
    """Shares of a prompt's texts in the block at frame ``start``, which shows ``segment``.

    In block k after a switch that blends over n blocks, the new text has share k / (n + 1), and the mixture
    of the block before the switch has the rest.
    """
    block = deployment.block
    first = [prompt.acts_at(switch, block) for switch in prompt.switches[:segment]]
    until = [*first[1:], start + block]
    shares: Shares = ((prompt.segments[0], 1.0),)
    for n, text in enumerate(prompt.segments[1 : segment + 1]):
        own = prompt.transitions[n] if prompt.transitions else None
        blocks = deployment.transition_blocks if own is None else own
        done = min(1.0, (until[n] - first[n]) // block / (blocks + 1))
        rest = tuple((old, share * (1 - done)) for old, share in shares if done < 1)
        shares = (*rest, (text, done))
    return shares


def told(stream: Stream) -> Shares:
    """Shares of a stream's texts in its next block."""
    return shares_of(stream.prompt, stream.segment, stream.start, stream.deployment)


def text_of(streams: Sequence[Stream]) -> TextRows:
    """Text embeddings for the streams' next blocks; equal mixtures share one."""
    mixtures = [told(stream) for stream in streams]
    unique = {}
    for stream, mixture in zip(streams, mixtures, strict=True):
        unique[mixture] = torch.stack([share * stream.texts[text] for text, share in mixture]).sum(0)
    embeddings = torch.stack(list(unique.values()))
    rows = torch.tensor([list(unique).index(mixture) for mixture in mixtures], device=embeddings.device)
    return TextRows(embeddings, rows)


def denoise_block(
    generator: StreamingGenerator,
    draw: Callable[[str], Tensor],
    text: TextRows,
    context: PageContext,
    step: Step,
    sigmas: Sequence[float],
) -> Trajectory:
    """Run all solver steps of a block, at the noise levels ``sigmas``; no pages are written.

    ``draw`` returns the noise ``initial`` and, if ``step`` draws, ``renoise 1`` ..., each [R, F, C, H, W].
    """
    x = draw("initial")
    states, velocities = [], []
    for number, (sigma, sigma_next) in enumerate(pairwise((*sigmas, 0.0)), 1):
        level = torch.full((len(x),), sigma, dtype=torch.float32, device=x.device)
        velocity = generator.velocity(x, level, text, context)
        states.append(x)
        velocities.append(velocity)
        if sigma_next == 0.0:
            x = clean_of(velocity, x, sigma)
        else:
            noise = draw(f"renoise {number}") if step.draws else None
            x = step.rule(x, velocity, sigma, sigma_next, noise)
    return Trajectory(torch.stack(states, 1), torch.stack(velocities, 1), x)


def switch_prompts(generator: StreamingGenerator, streams: Sequence[Stream], *, rows: int = 0) -> None:
    """Re-encode the recent history of every stream whose prompt switches before its next block.

    ``rows`` streams at a time (0: all).
    """
    deployment = generator.deployment
    due = [s for s in streams if s.start and s.prompt.segment_at(s.start) != s.segment]
    for stream in due:
        stream.segment = stream.prompt.segment_at(stream.start)
        stream.fresh_prompt = True
    if due:
        commit_banks(generator, due, text_of(due))
    alike = []
    for stream in due:
        frames = deployment.reencoded(stream.start)
        alike.append((*seen_alike(generator, stream), frames, frames == stream.start))
    for index in lockstep_batches(alike, rows):
        batch = [due[n] for n in index]
        text = text_of(batch)
        context, frames = reencoding_context(deployment, [s.history for s in batch])
        clean = torch.stack([torch.cat(s.latents)[-frames:] for s in batch])
        keys_LRFTND, values_LRFTND = generator.encode(clean, text, context)
        for row, stream in enumerate(batch):
            adopt_reencoded(deployment, stream.history, keys_LRFTND[:, row], values_LRFTND[:, row])


def seen_alike(
    generator: StreamingGenerator, stream: Stream, route: Sequence[int] | None = None, recent: int = 0
) -> tuple[int, int]:
    """Batching key: the number of frames that the next block sees, and how many are from the memory bank."""
    size = context_size(generator.deployment, stream.history, route, recent)
    return size, stream.history.bank_frames


def lockstep_batches(alike: Sequence[Hashable], rows: int) -> Iterator[list[int]]:
    """Indices in batches of at most ``rows`` (0: no limit), each with equal values in ``alike``."""
    groups: dict[Hashable, list[int]] = {}
    for n, kind in enumerate(alike):
        groups.setdefault(kind, []).append(n)
    for group in groups.values():
        size = rows or len(group)
        for at in range(0, len(group), size):
            yield group[at : at + size]


def commit_banks(generator: StreamingGenerator, streams: Sequence[Stream], text: TextRows) -> None:
    """Add the recorded frames to every stream's memory bank before its next block."""
    if not generator.deployment.bank_size:
        return
    for row, stream in enumerate(streams):
        own = text.embeddings_ULD[text.rows_R[row : row + 1]]

        def keys(layer: int, own: Tensor = own) -> Tensor:
            with torch.no_grad():
                return generator.transformer.text_keys(own, layer)

        unscored = stream.fresh_prompt and generator.deployment.bank_as_published
        commit_bank(generator.deployment, stream.history, None if unscored else keys)


def advance(
    generator: StreamingGenerator,
    streams: Sequence[Stream],
    *,
    routes: Sequence[Sequence[int] | None] | None = None,
    recent: int = 0,
    rows: int = 0,
    resident: int = 0,
) -> Trajectory:
    """Generate the next block of every stream: switch prompts, denoise, write pages in the clean pass.

    Streams may be at different blocks; those that see equally many frames share a forward pass. A stream's
    last block has no clean pass, since nothing will see it, and the stream releases its pages. The trajectory
    has one row per stream, in order; if first blocks take a different number of solver steps, it is cut to
    the steps that all rows took. Raises NonFiniteError if a block is not finite.

    Args:
        routes: page ids for each stream's routed slots, None for its deployment context.
        recent: most recent past frames that routed streams see.
        rows: streams per forward pass; 0 means all.
        resident: history frames to keep for later, counting the sink (0: all); older pages are released.
    """
    switch_prompts(generator, streams, rows=rows)
    commit_banks(generator, streams, text_of(streams))
    alike = [
        (
            *seen_alike(generator, stream, None if routes is None else routes[n], recent),
            stream.step,
            generator.levels(stream.start),
            stream.ending,
        )
        for n, stream in enumerate(streams)
    ]
    pieces: list[Trajectory] = []
    places: list[int] = []
    for index in lockstep_batches(alike, rows):
        batch = [streams[n] for n in index]
        context = routed_context(
            generator.deployment,
            [stream.history for stream in batch],
            [None if routes is None else routes[n] for n in index],
            recent,
        )
        pieces.append(_generate_block(generator, batch, context, resident))
        places += index
    inverse = torch.tensor(places).argsort()
    steps = min(piece.states_RSFCHW.shape[1] for piece in pieces)
    return Trajectory(
        torch.cat([piece.states_RSFCHW[:, :steps] for piece in pieces])[inverse],
        torch.cat([piece.velocities_RSFCHW[:, :steps] for piece in pieces])[inverse],
        torch.cat([piece.clean_RFCHW for piece in pieces])[inverse],
    )


def _generate_block(
    generator: StreamingGenerator, streams: Sequence[Stream], context: PageContext, resident: int
) -> Trajectory:
    """Denoise the streams' next blocks in one batch and append them. Raises NonFiniteError."""
    step, levels = streams[0].step or generator.step, generator.levels(streams[0].start)
    draw = partial(_drawn, generator, streams)
    if generator.keeps_contexts:
        context = replace(context, gathered={})
    with torch.no_grad(), generator.held():
        text = generator.known(text_of(streams))
        trajectory = denoise_block(generator, draw, text, context, step, levels)
        videos = ", ".join(str(stream.prompt.id) for stream in streams)
        place = f"block {streams[0].start // generator.block + 1} of prompt {videos}"
        generator.require_finite(trajectory, levels, text, context, place)
        if streams[0].ending:
            for stream, clean in zip(streams, trajectory.clean_RFCHW, strict=True):
                stream.latents.append(clean)
                stream.history.release()
                stream.history.end += generator.block
        else:
            append_block(generator, streams, trajectory.clean_RFCHW, text, context, resident=resident)
    return trajectory


def _drawn(generator: StreamingGenerator, streams: Sequence[Stream], kind: str) -> Tensor:
    """Noise of one kind from the tapes, for the streams' next blocks, [R, F, C, H, W]."""
    own = [stream.tape(stream.prompt.id, stream.start // generator.block, kind) for stream in streams]
    return torch.stack(own).to(generator.device)


def append_block(
    generator: StreamingGenerator,
    streams: Sequence[Stream],
    clean_RFCHW: Tensor,
    text: TextRows,
    context: PageContext,
    *,
    resident: int = 0,
) -> None:
    """The clean pass: encode the block in the context it was generated in and append its pages.

    Pages that no later block will see are released first; see ``advance`` for ``resident``.
    """
    seen = clean_RFCHW
    if generator.context_noise:
        noise = _drawn(generator, streams, "context").to(clean_RFCHW)
        seen = add_noise(clean_RFCHW, noise, generator.context_noise)
    keys_values = generator.encode(seen, text, context)
    for stream in streams:
        reachable = reachable_frames(generator.deployment, stream.start + generator.block, resident)
        stream.history.keep(stream.pinned.union(reachable))
    pages = streams[0].history.cache.write(*keys_values)
    for stream, ids, clean in zip(streams, pages, clean_RFCHW, strict=True):
        stream.history.append(ids)
        stream.latents.append(clean)
        stream.fresh_prompt = False
        record_block(generator.deployment, stream.history)


def give_frames(
    generator: StreamingGenerator,
    streams: Sequence[Stream],
    latents_RTCHW: Tensor,
    *,
    resident: int = 0,
) -> None:
    """Begin streams with given latents, encoded block by block as if they had been generated.

    ``resident`` history frames are kept, counting the sink (0: all). Raises ValueError if the number of
    frames is not a multiple of the block.
    """
    if latents_RTCHW.shape[1] % generator.block:
        raise ValueError(
            f"{latents_RTCHW.shape[1]} given latent frames do not fill blocks of {generator.block}"
        )
    for clean in latents_RTCHW.split(generator.block, dim=1):
        switch_prompts(generator, streams)
        text = text_of(streams)
        commit_banks(generator, streams, text)
        context = deployment_context(generator.deployment, [stream.history for stream in streams])
        append_block(generator, streams, clean, text, context, resident=resident)


def stream_latents(
    generator: StreamingGenerator,
    prompts: Sequence[VideoPrompt],
    texts: TextTable,
    tape: Tape,
    *,
    given: Mapping[int, Tensor] | None = None,
) -> Tensor:
    """Generate whole videos of equal length in the deployment context: latents [R, T, C, H, W].

    Pages out of the window's reach are released, so memory does not grow with length. ``given`` maps prompt
    ids to latents [T', C, H, W], in whole blocks, that their videos begin with; the noise of all other blocks
    stays the same. Raises ValueError if the lengths differ.
    """
    lengths = {prompt.num_frames for prompt in prompts}
    if len(lengths) != 1:
        raise ValueError(f"prompts generated together must have one length, got {sorted(lengths)} frames")
    num_frames = lengths.pop()
    resident = generator.deployment.resident
    switches = any(prompt.switches for prompt in prompts)
    cache = generator.new_cache(len(prompts) * stream_pages(generator, num_frames, switches=switches))
    streams = [
        replace(open_stream(generator, cache, prompt, texts, tape), end=num_frames) for prompt in prompts
    ]
    with generator.held():
        for stream in streams:
            if given and stream.prompt.id in given:
                give_frames(generator, [stream], given[stream.prompt.id][None], resident=resident)
        while growing := [stream for stream in streams if stream.start < num_frames]:
            advance(generator, growing, resident=resident)
    return torch.stack([torch.cat(stream.latents) for stream in streams])
