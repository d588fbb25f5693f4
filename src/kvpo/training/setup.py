"""The parts of a run, built once by the application and handed to the trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from kvpo.config import Config
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import SeededTape
from kvpo.models.causal_wan import CausalWan
from kvpo.prompts import VideoPrompt
from kvpo.rewards.cache import Counts
from kvpo.training.backbone import Backbone
from kvpo.training.credit import Blend, blend_of
from kvpo.training.evaluation import Judges
from kvpo.training.ranks import ALONE, Ranks


@dataclass(frozen=True)
class Setup:
    """A generator to align, prompts to align it on, and judges."""

    backbone: Backbone
    judges: Judges
    training_prompts: Callable[[int], list[VideoPrompt]]
    """Update -> the prompts of its rollout; a pure function, so that a resumed run sees the same data."""
    validation: Mapping[str, Sequence[VideoPrompt]]
    """Prompt sets (short, long) for choosing the best checkpoint."""
    test: Mapping[str, Sequence[VideoPrompt]]
    """Prompt sets used once, for the summary."""
    scored: Counts = field(default_factory=Counts)
    """Counts of clips that were scored, and of clips whose scores were already known."""
    ranks: Ranks = ALONE
    """This process among the ranks of the run."""

    @property
    def config(self) -> Config:
        """Every setting of the run."""
        return self.backbone.weights.config

    @property
    def model(self) -> CausalWan:
        """The transformer that is trained."""
        return self.backbone.weights.model

    @property
    def generator(self) -> StreamingGenerator:
        """The generator that wraps the model."""
        return self.backbone.generator

    def blend(self) -> Blend:
        """The rule that turns scores into one advantage per branch. Raises ConfigurationError."""
        return blend_of(self.judges.scorer.components, self.judges.weights_K, self.config)

    def evaluation_tape(self) -> SeededTape:
        """The held-out tape: the same for every run and every seed, so that runs can be compared."""
        return SeededTape(("evaluation", 0), self.generator.block_shape)

    def final_tape(self, *member: int) -> SeededTape:
        """The tape of the final test, which no run draws from; ``member`` gives further videos their own."""
        return SeededTape(("final evaluation", *member), self.generator.block_shape)
