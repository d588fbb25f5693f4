"""Test-time selection: of several continuations of a stream, keep the one that a scorer prefers.

Nothing is trained. The result is the best that a reward can get from a generator as it is, and alignment is
measured against it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine.explorers import Explorer, Member, Site, routes
from kvpo.engine.forks import Fork, fit_exploration, pool_of
from kvpo.engine.generator import Codec, StreamingGenerator
from kvpo.engine.noise import Tape
from kvpo.engine.pages import PlannedRollout, stream_pages
from kvpo.engine.scoring import score_clips, shared_clips
from kvpo.engine.stream import Stream, TextTable, advance, give_frames, open_stream
from kvpo.prompts import VideoPrompt
from kvpo.rewards.protocol import Scorer


@dataclass(frozen=True)
class Selected:
    """A video made of chosen continuations, and the scores behind the choices."""

    latents_TCHW: Tensor
    scores: tuple[tuple[float, ...], ...]
    """Per choice, the score of every candidate; the first is the generator's plain continuation."""


@dataclass(frozen=True)
class Selection:
    """A generator, and the settings by which continuations are made and chosen."""

    generator: StreamingGenerator
    codec: Codec
    scorer: Scorer
    weights_K: Tensor
    exploration: ExplorationConfig
    explorer: Explorer
    count: int
    """Candidates per choice, including the plain continuation."""
    span: int
    """Blocks between two choices; 0: one choice per video."""
    key: tuple[str | int, ...] = ()
    """Keys the candidates' draws, together with prompt id and frame; usually holds a seed."""

    def best(
        self, prompt: VideoPrompt, texts: TextTable, tape: Tape, given_TCHW: Tensor | None = None
    ) -> Selected:
        """Generate the video of a prompt choice by choice, beginning with ``given_TCHW`` if there is any.

        Raises ValueError if the length is not a multiple of the block, and the scorer's errors.
        """
        generator, block = self.generator, self.generator.block
        if prompt.num_frames % block:
            raise ValueError(
                f"num_frames = {prompt.num_frames} is not a multiple of the block of {block} frames"
            )
        resident = self._resident or prompt.num_frames  # 0 means all here, and the window alone there
        pages = stream_pages(generator, prompt.num_frames, resident, switches=bool(prompt.switches))
        root = open_stream(generator, generator.new_cache((self.count + 1) * pages), prompt, texts, tape)
        root.end = prompt.num_frames
        span = (self.span or prompt.num_frames) * block
        state: object | None = None
        before_TCHW: Tensor | None = None
        scores: list[tuple[float, ...]] = []
        if given_TCHW is not None:
            give_frames(generator, [root], given_TCHW[None], resident=self._resident)
            with torch.no_grad():
                pixels, state = self.codec.decode_next(given_TCHW, None)
            before_TCHW = pixels[-block * self.codec.frames_per_latent :]
        for start in range(root.start, prompt.num_frames, span):
            stop = min(start + span, prompt.num_frames)
            streams = self._continued(root, tape, stop)
            new = [torch.cat(stream.latents[start // block :]) for stream in streams]
            with torch.no_grad():
                decoded = [self.codec.decode_next(latents, state) for latents in new]
            new_NTCHW = torch.stack([pixels for pixels, _ in decoded])
            own = self._scores(prompt, start, stop, new_NTCHW, before_TCHW)
            scores.append(own)
            best = own.index(max(own))
            for n, stream in enumerate((root, *streams)):
                if n != best + 1:
                    stream.history.release()
            root = replace(streams[best], tape=tape, step=None)
            pixels, state = decoded[best]
            before_TCHW = pixels[-block * self.codec.frames_per_latent :]
        root.history.release()
        return Selected(torch.cat(root.latents), tuple(scores))

    @property
    def _resident(self) -> int:
        """History frames to keep: for routing, or no more than the window needs."""
        if self.explorer is routes:
            return self.exploration.resident_frames
        return self.generator.deployment.resident

    def _continued(self, root: Stream, tape: Tape, stop: int) -> list[Stream]:
        """Candidates from the root to ``stop``, the plain one first; it alone if none can differ."""
        streams = [root.fork()]
        while streams[0].start < stop:
            members = self._members(root.prompt, streams[0].start, tape)
            if len(members) > len(streams):  # until now nothing could differ
                streams += [streams[0].fork() for _ in members[len(streams) :]]
            pages: list[Sequence[int] | None] = []
            for stream, member in zip(streams, members, strict=False):
                stream.tape, stream.step = member.tape or tape, member.step
                held = stream.history.pages
                pages.append(None if not member.routes else [held[slot.frame] for slot in member.routes[0]])
            pages += [None] * (len(streams) - len(pages))
            advance(
                self.generator,
                streams,
                routes=pages,
                recent=self.exploration.recent,
                resident=self._resident,
            )
        return streams

    def _members(self, prompt: VideoPrompt, frame: int, tape: Tape) -> list[Member]:
        """The plain continuation of a block, then the explorer's branches."""
        block, exploration = self.generator.block, self.exploration
        wanted = replace(exploration, branches=self.count - 1, blocks=1, tail_blocks=0, donor=0)
        if self.explorer is routes:
            pool = pool_of(self.generator.deployment, prompt, frame, exploration)
            try:
                end = frame + block
                wanted = fit_exploration(
                    wanted, frame, num_frames=end, window_end=end, pool=len(pool), block=block
                )
            except ValueError:  # too little history for routes that differ
                return [Member(0)]
        key = ("selection", *self.key, prompt.id, frame)
        steps = len(self.generator.sigmas)
        site = Site(self.generator, PlannedRollout([prompt], [Fork(frame, wanted)]), tape, key, steps)
        return [Member(0), *self.explorer(site, 0)]

    def _scores(
        self, prompt: VideoPrompt, start: int, stop: int, new_NTCHW: Tensor, before_TCHW: Tensor | None
    ) -> tuple[float, ...]:
        """Score of every candidate's frames [start, stop), segment by segment."""
        block = self.generator.block
        clips = shared_clips(prompt, start, stop, block=block)
        offset = min(clip.start for clip, _ in clips)
        if offset < start and before_TCHW is not None:
            new_NTCHW = torch.cat([before_TCHW.expand(len(new_NTCHW), *before_TCHW.shape), new_NTCHW], 1)
        rows = range(len(new_NTCHW))
        table_KN = score_clips(
            self.scorer,
            new_NTCHW,
            [(row, clip) for clip, _ in clips for row in rows],
            offset=offset,
            frames_per_latent=self.codec.frames_per_latent,
        )
        shares = torch.tensor([share for _, share in clips]).repeat_interleave(len(rows))
        totals = (self.weights_K @ table_KN * shares).reshape(len(clips), len(rows)).sum(0)
        return tuple(totals.tolist())
