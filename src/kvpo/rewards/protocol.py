"""What the engine knows of a reward: clips and their prompts in, one number per clip and component out."""

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from kvpo.prompts import ClipPrompt


class Scorer(Protocol):
    """Scores a batch of clips.

    ``components`` names the numbers it returns, in order (one forward pass may give several: VideoAlign's
    visual, motion and text scores). Components are higher-is-better floats.
    """

    components: tuple[str, ...]

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Score ``video_BTCHW`` (float in [0, 1], RGB) against ``prompts`` (length B): component -> [B]."""
        ...
