"""Interface of a reward: clips and their prompts in, one number per clip and component out.

Importing this module is cheap, so that the command line can list rewards and their requirements.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvpo.prompts import ClipPrompt

if TYPE_CHECKING:
    from torch import Tensor


JUDGES = "openai:"
"""Prefix of judge addresses (``kvpo.rewards.service.judge``)."""


class Scorer(Protocol):
    """Scores a batch of clips.

    ``components`` names the returned scores, in order. One forward pass may give several (VideoAlign's
    visual, motion and text scores). Scores are floats; higher is better.
    """

    @property
    def components(self) -> tuple[str, ...]: ...

    def __call__(self, video_BTCHW: "Tensor", prompts: Sequence[ClipPrompt]) -> "dict[str, Tensor]":
        """Score ``video_BTCHW`` (float in [0, 1], RGB) against ``prompts`` (length B): component -> [B]."""
        ...


@runtime_checkable
class AsyncScorer(Protocol):
    """A scorer that works in the background: in another process, or by passing clips on to one that is."""

    def begin(
        self, video_BTCHW: "Tensor", prompts: Sequence[ClipPrompt]
    ) -> "Callable[[], dict[str, Tensor]]":
        """Start scoring clips, which must stay unchanged; the returned function waits for the scores."""
        ...


def start_scoring(
    scorer: Scorer, video_BTCHW: "Tensor", prompts: Sequence[ClipPrompt]
) -> "Callable[[], dict[str, Tensor]]":
    """Start scoring clips; the returned function waits for the scores, or computes them in this process.

    Start all scorers before waiting for any: scorers in other processes then stay busy, while local ones
    still run, and use memory, one at a time.
    """
    if isinstance(scorer, AsyncScorer):
        return scorer.begin(video_BTCHW, prompts)
    return partial(scorer, video_BTCHW, prompts)


@dataclass(frozen=True)
class Sampling:
    """Selection of frames spread evenly over a clip, and the length of a clip of a long video."""

    rate: float
    """Sampled frames per second."""
    least: int
    """Minimum number of sampled frames, unless the clip has fewer."""
    most: int
    """Maximum number of sampled frames."""
    multiple: int = 1
    """The number of sampled frames is a multiple of this."""
    seconds: float | None = 16.0
    """A longer file is scored as several clips of this length; None: as one clip."""
    strides: bool = False
    """True: take every n-th frame from the first on, with n the rounded ratio of the frame rates, instead of
    spreading a number of frames evenly."""


@dataclass(frozen=True)
class Declaration:
    """Properties and requirements of one component of a scorer, known before anything is loaded."""

    name: str
    low: float
    high: float
    """Range of the score; infinite where there is no bound. Higher is better."""
    reads_prompt: bool
    min_frames: int
    """Minimum number of frames in a clip."""
    max_pixels: int
    """Frame area beyond which resolution makes no difference; larger files are shrunk when read."""
    sampling: Sampling | None = None
    """Frames that are scored; None: consecutive frames, all of them."""
    eight_bit: bool = False
    """True if the scorer rounds pixels to 8 bits first, so that clips may be sent to it in 8 bits."""
    weight: float = 1.0
    """Its weight in the sum of its reward's components."""
    unit: str = ""
    """Meaning of a number on its scale, for `kvpo score --explain`; reward servers do not send it."""


LARGEST = 1e15
"""Largest accepted magnitude: squares and sums of larger scores would overflow float32."""


def checked(name: str, scores: "dict[str, Tensor]", count: int) -> "Tensor":
    """Check one component's scores and return them as float32 [count] on the CPU.

    Raises ValueError if they are missing, misshapen, not finite or beyond ``LARGEST``.
    """
    if name not in scores:
        raise ValueError(f"reward component {name!r} is missing from the scorer's result {list(scores)}")
    values = scores[name].detach().to("cpu").float()
    if values.shape != (count,):
        raise ValueError(
            f"reward component {name!r}: expected {count} scores, got shape {list(values.shape)}"
        )
    if not bool(values.isfinite().all()):
        bad = int((~values.isfinite()).nonzero()[0])
        raise ValueError(f"reward component {name!r} is {float(values[bad])} for clip {bad} of {count}")
    if bool((values.abs() > LARGEST).any()):
        bad = int(values.abs().argmax())
        raise ValueError(
            f"reward component {name!r} is {float(values[bad]):g} for clip {bad} of {count}, which sums and "
            f"squares of float32 cannot hold; scores may reach {LARGEST:g}: scale it down"
        )
    return values
