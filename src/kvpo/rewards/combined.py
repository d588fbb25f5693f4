"""Several rewards side by side."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Scorer


@dataclass(frozen=True)
class CombinedScorer:
    """Scorers whose components are returned together, in the order of the scorers.

    Raises ValueError for two components of one name.
    """

    scorers: tuple[Scorer, ...]

    def __post_init__(self) -> None:
        names = self.components
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two rewards have a component called {twice[0]!r}; components are {', '.join(names)}"
            )

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(name for scorer in self.scorers for name in scorer.components)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]."""
        scores: dict[str, Tensor] = {}
        for scorer in self.scorers:
            scores |= scorer(video_BTCHW, prompts)
        return scores
