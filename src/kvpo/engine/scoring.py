"""Scoring of branches: decode the frames that can differ, cut clips, score them.

Everything before the fork is identical across branches, so only frames after it are decoded. If the prompt
switches right at the fork, the block before it is decoded too, to show what the video was until then.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo.engine.generator import Codec, pixel_frame, pixels_of
from kvpo.engine.rollout import Group
from kvpo.method.advantage import GLOBAL_WEIGHT
from kvpo.prompts import ClipPrompt, VideoPrompt
from kvpo.rewards.protocol import Scorer, checked, start_scoring


@dataclass(frozen=True)
class Clip:
    """Latent frames [start, stop) of a video and the text they are scored against."""

    start: int
    stop: int
    prompt: ClipPrompt


@dataclass(frozen=True)
class Scores:
    """Component scores of one group's members, the anchor last."""

    components: tuple[str, ...]
    local_KM: Tensor
    """Scores of the routed window."""
    global_KM: Tensor
    """Scores of the video after the fork: the mean over its clips, weighted by ``shared_clips``."""

    @property
    def combined_KM(self) -> Tensor:
        """(local + w global) / (1 + w) for every component and member, with w = ``GLOBAL_WEIGHT``."""
        return (self.local_KM + GLOBAL_WEIGHT * self.global_KM) / (1 + GLOBAL_WEIGHT)

    def totals(self, weights_K: Tensor) -> Tensor:
        """Weighted sum of the combined components of every member, ``[M]``."""
        return weights_K @ self.combined_KM


def segment_clips(prompt: VideoPrompt, first: int, stop: int, *, block: int, lead: int) -> list[Clip]:
    """One clip per prompt segment that is shown in latent frames ``[first, stop)``.

    If a segment begins inside the span, or right at its start, its clip begins up to ``lead`` frames earlier,
    in the previous segment (``ClipPrompt.switch`` holds how many). Switches act at block boundaries.
    """
    starts = [0, *(prompt.acts_at(switch, block) for switch in prompt.switches)]
    ends = [*starts[1:], prompt.num_frames]
    clips = []
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        begin, end = max(start, first), min(end, stop)
        if begin >= end:
            continue
        before = prompt.segments[index - 1] if index and begin == start else ""
        switch = min(lead, begin - starts[index - 1]) if before else 0
        text, earlier = prompt.segments[index], prompt.segments[:index]
        clips.append(Clip(begin - switch, end, ClipPrompt(text, before, switch, earlier=earlier)))
    return clips


def transition_clips(prompt: VideoPrompt, first: int, stop: int, *, block: int, half: int) -> list[Clip]:
    """The clips around the prompt switches at which segments in latent frames ``[first, stop)`` begin.

    Each has up to ``half`` latent frames on either side of the switch. It is scored against the text of the
    new segment, and its ``ClipPrompt`` also holds the previous text.
    """
    return [
        replace(clip, stop=min(clip.stop, clip.start + clip.prompt.switch + half))
        for clip in segment_clips(prompt, first, stop, block=block, lead=half)
        if clip.prompt.switch
    ]


def shared_clips(
    prompt: VideoPrompt, first: int, stop: int, *, block: int, transition_blocks: int = 0
) -> list[tuple[Clip, float]]:
    """The clips of latent frames ``[first, stop)``, each with its share of the signal; shares add up to 1.

    A clip's share is proportional to the frames of its segment. Every switch gets an extra clip with
    ``transition_blocks`` blocks on either side; 0: no such clips.
    """
    found = segment_clips(prompt, first, stop, block=block, lead=block)
    if transition_blocks:
        found += transition_clips(prompt, first, stop, block=block, half=transition_blocks * block)
    counts = [clip.stop - clip.start - clip.prompt.switch for clip in found]
    return [(clip, count / sum(counts)) for clip, count in zip(found, counts, strict=True)]


def in_pixels(clip: Clip, frames_per_latent: int) -> Clip:
    """The same clip, with its switch, counted in pixel frames."""
    start = pixel_frame(clip.start, frames_per_latent)
    switch = pixel_frame(clip.start + clip.prompt.switch, frames_per_latent) - start
    prompt = ClipPrompt(clip.prompt, clip.prompt.before, switch, earlier=clip.prompt.earlier)
    return Clip(start, pixel_frame(clip.stop, frames_per_latent), prompt)


def score_clips(
    scorer: Scorer,
    videos_NTCHW: Tensor,
    clips: Sequence[tuple[int, Clip]],
    *,
    offset: int = 0,
    frames_per_latent: int,
) -> Tensor:
    """Score clips, each given with the index of its video, in batches of equal length: ``[K, clips]``.

    ``videos_NTCHW`` are in [0, 1] and start at latent frame ``offset``. All batches are submitted before any
    score is awaited. Raises ValueError if a score is missing, misshapen or not finite.
    """
    first = pixel_frame(offset, frames_per_latent)
    pieces = [(video, in_pixels(clip, frames_per_latent)) for video, clip in clips]
    by_length: dict[int, list[int]] = {}
    for index, (_, clip) in enumerate(pieces):
        by_length.setdefault(clip.stop - clip.start, []).append(index)
    table = torch.empty(len(scorer.components), len(clips))
    with torch.no_grad():
        answers = deque(
            start_scoring(
                scorer,
                _batch(videos_NTCHW, [pieces[n] for n in indices], first),
                [pieces[n][1].prompt for n in indices],
            )
            for indices in by_length.values()
        )
        for indices in by_length.values():
            scores = answers.popleft()()
            for row, name in enumerate(scorer.components):
                table[row, indices] = checked(name, scores, len(indices))
    return table


def _batch(videos_NTCHW: Tensor, pieces: Sequence[tuple[int, Clip]], first: int) -> Tensor:
    """A batch of clips of one length, in pixel frames; a view if it has the same frames of every video."""
    spans = {(clip.start - first, clip.stop - first) for _, clip in pieces}
    if len(spans) == 1 and [video for video, _ in pieces] == list(range(len(videos_NTCHW))):
        start, stop = spans.pop()
        return videos_NTCHW[:, start:stop]
    return torch.stack([videos_NTCHW[n, clip.start - first : clip.stop - first] for n, clip in pieces])


def score_group(
    group: Group,
    codec: Codec,
    scorer: Scorer,
    *,
    block: int,
    transition_blocks: int = 0,
    timed: Callable[[str], AbstractContextManager[None]] = lambda phase: nullcontext(),
) -> Scores:
    """Local and global scores of one group's members; there may be none.

    The decoded pixels are freed on return. ``timed`` wraps each phase and is given its name, decode or score.
    """
    if not len(group.clean_MTCHW):
        return Scores(tuple(scorer.components), *torch.zeros(2, len(scorer.components), 0))
    prompt, fork = group.root.prompt, group.fork
    stop = fork + group.clean_MTCHW.shape[1]
    local = shared_clips(prompt, fork, fork + group.window_frames, block=block)
    whole = shared_clips(prompt, fork, stop, block=block, transition_blocks=transition_blocks)
    offset = min(clip.start for clip, _ in local + whole)
    with timed("decode"):
        pixels_MTCHW = decode_members(group, codec, lead=fork - offset)
    members = range(len(pixels_MTCHW))
    parts = [(signal, share) for signal, pieces in enumerate((local, whole)) for _, share in pieces]
    clips = [(member, clip) for clip, _ in local + whole for member in members]
    frames = codec.frames_per_latent
    with timed("score"):
        table = score_clips(scorer, pixels_MTCHW, clips, offset=offset, frames_per_latent=frames)
    sums = torch.zeros(2, len(scorer.components), len(members))
    for (signal, share), scores_KM in zip(parts, table.split(len(members), 1), strict=True):
        sums[signal] += share * scores_KM
    return Scores(tuple(scorer.components), sums[0], sums[1])


def decode_members(group: Group, codec: Codec, *, lead: int) -> Tensor:
    """Decode every member from ``lead`` latent frames before the fork on: ``[M, T, 3, H, W]``."""
    latents = group.clean_MTCHW
    past = torch.cat(group.root.latents)
    first = group.fork - lead
    if lead:
        latents = torch.cat([past[first:].expand(len(latents), lead, *past.shape[1:]), latents], 1)
    return pixels_of(codec, latents, past[:first] if first else None)
