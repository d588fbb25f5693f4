"""Scorers that watch a run for reward hacking, built from their names as training rewards are."""

import torch

from kvpo.app.named_rewards import NamedReward, named_rewards
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.rewards.cache import ScoreCache
from kvpo.rewards.catalogue import REWARD_IDS
from kvpo.training.evaluation import HeldOutScorer


def held_out_scorers(
    config: Config, frame_rate: float, cache: ScoreCache | None = None
) -> tuple[HeldOutScorer, ...]:
    """The scorers of ``evaluation.held_out``.

    A catalogue reward is one number; "world" and a function of one's own give their weighted sum.

    Raises:
        ConfigurationError: an unknown reward, or two whose numbers have one name.
        ValueError: a part of a reward cannot be found or does not fit.
    """
    names = config.evaluation.held_out
    if not names:
        return ()
    sources = {part: at for part, at in config.rewards.sources.items() if part.rpartition(".")[0] in names}
    rewards = named_rewards(
        names,
        sources,
        field="evaluation.held_out",
        frame_rate=frame_rate,
        top_share=config.rewards.top_share,
        device=config.device,
        prompts=True,
    )
    found = tuple(_watching(reward, cache) for reward in rewards)
    numbers = [name for one in found for name in one.names]
    if twice := [name for name in numbers if numbers.count(name) > 1]:
        raise ConfigurationError(f"evaluation.held_out: two rewards are called {twice[0]!r}; rename one")
    return found


def _watching(reward: NamedReward, cache: ScoreCache | None) -> HeldOutScorer:
    scorer = reward.cached(cache)
    components = reward.scorer.components
    if reward.name in REWARD_IDS:
        return HeldOutScorer(components, scorer, torch.eye(len(components)))
    weights_HK = torch.tensor([[reward.weights[component] for component in components]])
    return HeldOutScorer((reward.name.rpartition(":")[2],), scorer, weights_HK)
