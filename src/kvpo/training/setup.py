"""The parts of a run, built once by the application and handed to the trainer."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from kvpo.config import Config
from kvpo.engine.generator import Codec, StreamingGenerator, TextEncoder
from kvpo.engine.noise import SeededTape
from kvpo.engine.scoring import ClipPlan
from kvpo.engine.stream import TextTable
from kvpo.prompts import VideoPrompt
from kvpo.rewards.cache import Counts
from kvpo.training.credit import Blend, blend_of
from kvpo.training.evaluation import Judges


@dataclass(frozen=True)
class Weights:
    """A transformer with what is trained in it: all that a run's checkpoint has to fit."""

    config: Config
    model: nn.Module
    """The transformer, its adapter injected."""
    base_sha256: str
    """Digest of the base checkpoint: trained parameters fit no other."""


@dataclass(frozen=True)
class Backbone(Weights):
    """A generator: the transformer, its text encoder and its codec."""

    generator: StreamingGenerator
    """Around the same transformer."""
    text_encoder: TextEncoder
    codec: Codec

    def texts(self, prompts: Sequence[VideoPrompt]) -> TextTable:
        """Embeddings of every segment of the prompts."""
        unique = list(dict.fromkeys(text for prompt in prompts for text in prompt.segments))
        return dict(zip(unique, self.text_encoder(unique), strict=True))

    def tape(self, purpose: str) -> SeededTape:
        """Noise for one purpose: training and evaluation never share a tensor."""
        return SeededTape((purpose, self.config.seed), self.generator.block_shape)


@dataclass(frozen=True)
class Setup(Backbone):
    """A generator to align, prompts to align it on, and judges."""

    judges: Judges
    training_prompts: Callable[[int], list[VideoPrompt]]
    """Update -> the prompts of its rollout; a pure function, so that a resumed run sees the same data."""
    validation: Mapping[str, Sequence[VideoPrompt]]
    """Prompt sets (short, long) for choosing the best checkpoint."""
    test: Mapping[str, Sequence[VideoPrompt]]
    """Prompt sets used once, for the summary."""
    scored: Counts = field(default_factory=Counts)
    """Counts of clips that were scored and of clips whose scores were known."""

    def clip_plan(self) -> ClipPlan:
        """The clips of a member that are scored in training."""
        rewards = self.config.rewards
        return ClipPlan(rewards.segment_discount, rewards.transition_blocks)

    def blend(self) -> Blend:
        """The fusion of the reward's components into one advantage. Raises ConfigurationError."""
        judges, config = self.judges, self.config
        components, floor = judges.scorer.components, config.objective.noise_floor
        pool = config.method == "kvpo" and config.kvpo.anchor_share > 0
        return blend_of(components, judges.weights_K, config.rewards, floor, anchor_in_pool=pool)

    def evaluation_tape(self) -> SeededTape:
        """The held-out tape: the same in every run, for every seed, so that runs can be compared."""
        return SeededTape(("evaluation", 0), self.generator.block_shape)
