"""Several rewards side by side."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Scorer, begun


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
        return self.begin(video_BTCHW, prompts)()

    def begin(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Callable[[], dict[str, Tensor]]:
        """Those elsewhere work at once, and while those of this process do."""
        answers = [begun(scorer, video_BTCHW, prompts) for scorer in self.scorers]

        def scores() -> dict[str, Tensor]:
            return {name: values for answer in answers for name, values in answer().items()}

        return scores
