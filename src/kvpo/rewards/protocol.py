"""Interface of a reward: clips and their prompts in, one number per clip and component out.

Importing this module imports nothing heavy, so that a command line can list rewards and their needs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from kvpo.prompts import ClipPrompt

if TYPE_CHECKING:
    from torch import Tensor


JUDGES = "openai:"
"""Beginning of the addresses of judges (``kvpo.rewards.service.judge``)."""


class Scorer(Protocol):
    """Scores a batch of clips.

    ``components`` names the numbers it returns, in order (one forward pass may give several: VideoAlign's
    visual, motion and text scores). Components are higher-is-better floats.
    """

    @property
    def components(self) -> tuple[str, ...]: ...

    def __call__(self, video_BTCHW: "Tensor", prompts: Sequence[ClipPrompt]) -> "dict[str, Tensor]":
        """Score ``video_BTCHW`` (float in [0, 1], RGB) against ``prompts`` (length B): component -> [B]."""
        ...


@runtime_checkable
class AsyncScorer(Protocol):
    """A scorer that works in the background: elsewhere, or by passing clips on to one that does."""

    def begin(
        self, video_BTCHW: "Tensor", prompts: Sequence[ClipPrompt]
    ) -> "Callable[[], dict[str, Tensor]]":
        """Start scoring clips, which must not change meanwhile; the returned call waits for the scores."""
        ...


def start_scoring(
    scorer: Scorer, video_BTCHW: "Tensor", prompts: Sequence[ClipPrompt]
) -> "Callable[[], dict[str, Tensor]]":
    """Start scoring clips; the returned call waits for the scores, or computes them in this process.

    Starting everything before waiting for anything keeps scorers elsewhere busy, while those of this process
    still use their memory one after the other.
    """
    if isinstance(scorer, AsyncScorer):
        return scorer.begin(video_BTCHW, prompts)
    return partial(scorer, video_BTCHW, prompts)


@dataclass(frozen=True)
class Sampling:
    """Frames spread evenly over a clip, and how much of a long video one clip covers."""

    rate: float
    """Frames per second that are looked at."""
    least: int
    """Fewest frames taken, unless the clip has fewer."""
    most: int
    """Most frames taken."""
    multiple: int = 1
    """The number of frames taken is a multiple of this."""
    seconds: float | None = 16.0
    """A longer file is scored as several clips of this length; None takes it whole."""
    strides: bool = False
    """True: every n-th frame from the first one is taken, n the rounded ratio of the rates, and not a number
    that is spread evenly."""


@dataclass(frozen=True)
class Declaration:
    """Properties and needs of one component of a scorer, known before anything is loaded."""

    name: str
    low: float
    high: float
    """Range of the score; infinite where there is no bound. Higher is better."""
    reads_prompt: bool
    min_frames: int
    """Fewest frames of a clip that can be scored."""
    max_pixels: int
    """Pixels of a frame beyond which more resolution is not looked at; larger files are shrunk on reading."""
    sampling: Sampling | None = None
    """Frames that are looked at; None: neighbouring frames, all of them."""
    eight_bit: bool = False
    """True if it first rounds pixels to 8 bits, so that they may reach it rounded."""
    weight: float = 1.0
    """Its share in the sum of its reward's components."""


LARGEST = 1e15
"""Larger scores are refused: their squares and sums would not fit float32."""


def checked(name: str, scores: "dict[str, Tensor]", count: int) -> "Tensor":
    """One component's scores as float32 on the CPU.

    Raises ValueError where they are missing, misshapen, not finite or beyond ``LARGEST``.
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
