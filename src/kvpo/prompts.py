"""Prompts of a video: one text per segment, and the latent frames at which segments change."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class VideoPrompt:
    """One video's request.

    ``id`` keys the noise tape (the text never does), so the same id under another policy sees the same noise.
    ``switches[i]`` is the latent frame from which ``segments[i + 1]`` holds; it acts at the first block whose
    first frame is at or after it. ``transitions[i]`` is the number of blocks over which that switch blends;
    None, or no transitions at all: ``stream.transition_blocks``. ``frames`` is the image or video that the
    video begins with; None: noise.
    """

    id: int
    segments: tuple[str, ...]
    switches: tuple[int, ...]
    num_frames: int
    transitions: tuple[int | None, ...] = ()
    frames: Path | None = None

    def __post_init__(self) -> None:
        if not self.segments:
            raise ValueError(f"prompt {self.id}: at least one segment is needed")
        if len(self.switches) != len(self.segments) - 1:
            raise ValueError(
                f"prompt {self.id}: {len(self.segments)} segments need {len(self.segments) - 1} "
                f"switch frames, got {len(self.switches)}: {list(self.switches)}"
            )
        if self.transitions and len(self.transitions) != len(self.switches):
            raise ValueError(
                f"prompt {self.id}: {len(self.switches)} switches need as many transitions, or none, got "
                f"{len(self.transitions)}: {list(self.transitions)}"
            )
        if any(blocks is not None and blocks < 0 for blocks in self.transitions):
            given = list(self.transitions)
            raise ValueError(f"prompt {self.id}: transitions {given}: a switch blends over 0 blocks or more")
        if half := [text for text in self.segments if any("\ud800" <= c <= "\udfff" for c in text)]:
            raise ValueError(f"prompt {self.id}: {half[0]!r} holds half of a character (a lone surrogate)")
        bounds = (0, *self.switches, self.num_frames)
        if any(a >= b for a, b in zip(bounds, bounds[1:], strict=False)):
            raise ValueError(
                f"prompt {self.id}: switch frames {list(self.switches)} must increase strictly inside "
                f"(0, num_frames = {self.num_frames})"
            )

    def segment_at(self, frame: int) -> int:
        """Index of the segment that holds for a block whose first latent frame is ``frame``."""
        return sum(frame >= switch for switch in self.switches)

    @staticmethod
    def acts_at(switch: int, block: int) -> int:
        """First frame of the block at which a switch acts, in blocks of ``block`` frames."""
        return -(-switch // block) * block


def check_shown(prompt: VideoPrompt, block: int) -> None:
    """Raise ValueError for a segment that no block of ``block`` frames shows.

    A switch acts at the first block that starts at or after it. Two switches in one block thus hide the
    segment between them, and a switch inside the last block hides its own segment.
    """
    acts_at = [prompt.acts_at(switch, block) for switch in prompt.switches]
    edges = [0, *acts_at, prompt.num_frames]
    for number, (start, stop) in enumerate(zip(edges, edges[1:], strict=False), 1):
        if start >= stop:
            raise ValueError(
                f"segment {number} of {len(prompt.segments)} is never shown: with blocks of {block} frames "
                f"the switches {list(prompt.switches)} act at {acts_at} of {prompt.num_frames} frames; move "
                "them so that each segment has a block"
            )


def cut_notice(lengths: Mapping[str, int], limit: int, of: int, unit: str = "tokens") -> str:
    """A one-line notice of texts longer than ``limit``: text -> length, among ``of`` texts."""
    longest = max(lengths, key=lambda text: lengths[text])
    return (
        f"{len(lengths)} of {of} prompts are longer than the {limit} {unit} that are read of each; the other "
        f"{sum(lengths.values()) - limit * len(lengths)} {unit} have no effect (the longest prompt has "
        f"{lengths[longest]}: {longest[:60]!r})"
    )


class ClipPrompt(str):
    """The text a clip is scored against; a plain ``str`` to scorers that need no more.

    ``before`` is the text of the previous segment ("" if none). ``switch`` is the index of the first frame of
    the clip that belongs to this segment: frames before it still show ``before``. ``file_rate`` is the frame
    rate of the file that the clip was taken from (0: no file). ``earlier`` holds the texts of all previous
    segments, in order; a reward needs them to judge who comes back.
    """

    before: str
    switch: int
    file_rate: float
    earlier: tuple[str, ...]

    def __new__(
        cls,
        text: str,
        before: str = "",
        switch: int = 0,
        file_rate: float = 0.0,
        earlier: Sequence[str] = (),
    ) -> "ClipPrompt":
        prompt = super().__new__(cls, text)
        prompt.before = before
        prompt.switch = switch
        prompt.file_rate = file_rate
        prompt.earlier = tuple(earlier)
        return prompt
