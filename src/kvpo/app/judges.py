"""The judges of a run: the rewards that train it, those that watch it, and their components' weights."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvpo.app.named_rewards import WORLD, named_rewards, sources_of
from kvpo.config import TOTAL, WORLD_NOISE_FLOOR, Config
from kvpo.config_checks import ConfigurationError
from kvpo.rewards.cache import ScoreCache
from kvpo.rewards.protocol import Scorer
from kvpo.rewards.reward import CombinedScorer, Reward
from kvpo.training.evaluation import Judges

logger = logging.getLogger(__name__)


def build_judges(
    config: Config,
    frame_rate: float,
    cache: ScoreCache,
    unseen: Scorer | None = None,
    exam: Scorer | None = None,
) -> Judges:
    """Build all scorers of a run's videos. Raises the errors of ``build_scorer`` and ``build_watchers``."""
    rewards = _trained(config, frame_rate, cache)
    scorer, weights_K = _combined(config, rewards)
    _warn_without_floor(config, rewards)
    return Judges(scorer, weights_K, unseen, build_watchers(config, frame_rate, cache), exam)


def build_scorer(config: Config, frame_rate: float, cache: ScoreCache | None = None) -> tuple[Scorer, Tensor]:
    """Combine a configuration's rewards into one scorer; also returns the weights of its components.

    Raises:
        ConfigurationError: an unknown reward or component, or weights that do not add up to more than 0.
        ValueError: a part of a reward cannot be found or does not fit; two components share a name.
    """
    return _combined(config, _trained(config, frame_rate, cache))


def _trained(config: Config, frame_rate: float, cache: ScoreCache | None) -> tuple[Reward, ...]:
    """The rewards of ``rewards.scorers``."""
    settings = config.rewards
    elsewhere = sources_of(config.evaluation.watchers, settings.sources)
    sources = {part: at for part, at in settings.sources.items() if part not in elsewhere}
    return _rewards(config, settings.scorers, "rewards.scorers", sources, frame_rate, cache)


def _combined(config: Config, rewards: tuple[Reward, ...]) -> tuple[Scorer, Tensor]:
    """Rewards as one scorer, and the weights of its components. Raises as `build_scorer` does."""
    settings = config.rewards
    scorer = CombinedScorer(rewards) if len(rewards) > 1 else rewards[0]
    if unknown := sorted(set(settings.weights) - set(scorer.components)):
        raise ConfigurationError(
            f"rewards.weights: {unknown[0]!r} is not a component of {', '.join(settings.scorers)}; "
            f"there are {', '.join(scorer.components)}"
        )
    weights = {name: weight for reward in rewards for name, weight in reward.weights.items()}
    weights |= settings.weights
    if sum(weights.values()) <= 0:
        raise ConfigurationError(f"rewards.weights: must add up to more than 0, got {weights}")
    return scorer, torch.tensor([weights[component] for component in scorer.components])


def build_watchers(config: Config, frame_rate: float, cache: ScoreCache | None = None) -> tuple[Reward, ...]:
    """The rewards of ``evaluation.watchers``, which watch a run for reward hacking.

    Raises:
        ConfigurationError: an unknown reward, or two rewards with numbers of the same name.
        ValueError: a part of a reward cannot be found or does not fit.
    """
    names = config.evaluation.watchers
    if not names:
        return ()
    sources = sources_of(names, config.rewards.sources)
    rewards = _rewards(config, names, "evaluation.watchers", sources, frame_rate, cache)
    numbers = [name for reward in rewards for name in reward.numbers()]
    if twice := [name for name in numbers if numbers.count(name) > 1]:
        raise ConfigurationError(f"evaluation.watchers: two rewards are called {twice[0]!r}; rename one")
    return rewards


def _rewards(
    config: Config,
    names: Sequence[str],
    field: str,
    sources: Mapping[str, str],
    frame_rate: float,
    cache: ScoreCache | None,
) -> tuple[Reward, ...]:
    """Rewards by name as a run uses them: cached, and kept in host memory if the run offloads."""
    rewards = named_rewards(
        names,
        sources,
        field=field,
        frame_rate=frame_rate,
        top_share=config.rewards.top_share,
        device=config.device,
        prompts=True,
    )
    cached = (replace(reward, cache=cache) for reward in rewards)
    return tuple(reward.offloaded(config.device) if config.backbone.offload else reward for reward in cached)


def _warn_without_floor(config: Config, rewards: Sequence[Reward]) -> None:
    """Warn if a reward has no measured noise floor, so that the embedded world's is used instead."""
    measured = config.rewards.noise_floors
    components = [name for reward in rewards if reward.name != WORLD for name in reward.weights]
    unmeasured = [name for name in components if name not in measured and config.rewards.weights.get(name, 1)]
    if unmeasured and TOTAL not in measured:
        logger.warning(
            "no noise floor was measured for %s: %g is that of the embedded world's rewards, on another "
            "scale; measure one with `kvpo calibrate` and set rewards.noise_floors",
            ", ".join(unmeasured),
            WORLD_NOISE_FLOOR,
        )
