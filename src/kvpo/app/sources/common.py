"""What a source of generators is, and what every source needs."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.app.file_prompts import Sets
from kvpo.app.named_rewards import named_rewards
from kvpo.config import Config, ObjectiveConfig
from kvpo.config_checks import ConfigurationError
from kvpo.engine.generator import PageShape, StreamingGenerator
from kvpo.engine.scoring import Scorer
from kvpo.method.flow import STEPS, few_step_sigmas
from kvpo.models.adapters import leave_casts_to_autocast
from kvpo.models.causal_wan import CausalWan
from kvpo.plan.phases import Surroundings
from kvpo.prompts import VideoPrompt
from kvpo.rewards.cache import ScoreCache
from kvpo.rewards.combined import CombinedScorer
from kvpo.training.backbone import Backbone, Weights
from kvpo.training.diversity import ReadOff
from kvpo.training.setup import Setup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Source:
    """Where generators of one ``backbone.kind`` come from: a third kind is a file with one of these."""

    setup: Callable[[Config], Setup]
    """What a run aligns."""
    backbone: Callable[[Config, Sequence[VideoPrompt]], Backbone]
    """What generates, ready for the given prompts."""
    weights: Callable[[Config], Weights]
    """The transformer alone, with what is trained in it."""
    split: Callable[[Config], tuple[list[VideoPrompt], Sets, Sets]]
    """The training prompts that a file lists, validation and test sets."""
    default_frames: Callable[[Config], int]
    """Latent frames of a video whose length is not given."""
    file_digests: Callable[[Config], dict[str, str]]
    """Digests of files that no checkpoint knows of, by the setting that says where they lie."""
    longest_prompt: Callable[[Config], VideoPrompt]
    """A video that needs as much as any of a run: what memory is planned by."""
    surroundings: Callable[[Config], Surroundings]
    """What a run holds in addition to the transformer."""
    read_off: Callable[[], ReadOff] | None = None
    """How to tell from pixels what a video shows; None: not possible."""


def streaming_generator(config: Config, transformer: CausalWan) -> StreamingGenerator:
    """The streaming generator of a configuration around a transformer."""
    stream, shape = config.stream, transformer.shape
    autocast = None if config.optim.autocast == "none" else torch.bfloat16
    if autocast is not None:
        leave_casts_to_autocast(transformer)
    return StreamingGenerator(
        transformer=transformer,
        deployment=stream,
        sigmas=tuple(few_step_sigmas(stream.schedule, stream.shift).tolist()),
        step=STEPS[stream.step_rule],
        latent_shape=(shape.channels, shape.latent_height, shape.latent_width),
        pages=PageShape(shape.num_layers, shape.tokens_per_frame, shape.num_heads, shape.head_dim),
        context_noise=stream.context_noise,
        device=config.device,
        autocast=autocast,
        page_dtype=autocast or torch.float32,
    )


def build_scorer(config: Config, frame_rate: float, cache: ScoreCache | None = None) -> tuple[Scorer, Tensor]:
    """The rewards a configuration names as one scorer, and the weights of its components.

    Raises:
        ConfigurationError: an unknown reward or component, weights that add up to nothing.
        ValueError: a part of a reward cannot be found or does not fit; two components of one name.
    """
    settings = config.rewards
    elsewhere = config.evaluation.held_out
    rewards = named_rewards(
        settings.scorers,
        {part: at for part, at in settings.sources.items() if part.rpartition(".")[0] not in elsewhere},
        field="rewards.scorers",
        frame_rate=frame_rate,
        top_share=settings.top_share,
        device=config.device,
        prompts=True,
    )
    scorers = tuple(reward.cached(cache) for reward in rewards)
    scorer = CombinedScorer(scorers) if len(scorers) > 1 else scorers[0]
    if unknown := sorted(set(settings.weights) - set(scorer.components)):
        raise ConfigurationError(
            f"rewards.weights: {unknown[0]!r} is not a component of {', '.join(settings.scorers)}; "
            f"there are {', '.join(scorer.components)}"
        )
    weights = {name: weight for reward in rewards for name, weight in reward.weights.items()}
    weights |= settings.weights
    if sum(weights.values()) <= 0:
        raise ConfigurationError(f"rewards.weights: must add up to more than 0, got {weights}")
    foreign = [own for own in rewards if own.name.partition("@")[0] != "world"]
    say_what_has_no_floor(config, [name for own in foreign for name in own.weights])
    return scorer, torch.tensor([weights[component] for component in scorer.components])


def say_what_has_no_floor(config: Config, components: Sequence[str]) -> None:
    """Warn where the noise floor that was measured for the embedded world stands in for that of a reward."""
    floor, measured = config.objective.noise_floor, config.rewards.noise_floors
    unmeasured = [name for name in components if name not in measured and config.rewards.weights.get(name, 1)]
    if unmeasured and floor == ObjectiveConfig().noise_floor:
        logger.warning(
            "no noise floor was measured for %s: objective.noise_floor = %g is that of the embedded world's "
            "rewards, on another scale; measure one with `kvpo calibrate` (rewards.noise_files) or set it",
            ", ".join(unmeasured),
            floor,
        )
