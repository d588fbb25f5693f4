"""Rewards as a command line names them: ids of the catalogue, "world", or package.module:function."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor

from kvpo.config_checks import ConfigurationError
from kvpo.engine.scoring import Scorer, checked
from kvpo.prompts import ClipPrompt
from kvpo.rewards.catalogue import REWARD_IDS, build_rewards
from kvpo.rewards.declarations import DECLARATIONS, SD, VIDEOALIGN_SAMPLING
from kvpo.rewards.protocol import Declaration

WORLD = "world"
FILE_RATE = VIDEOALIGN_SAMPLING.rate
"""Frames per second of what reaches scorers that sample by themselves: files are sampled on reading."""


@dataclass(frozen=True)
class NamedReward:
    """A scorer, what its components declare, and how they add up to one number."""

    name: str
    scorer: Scorer
    declarations: tuple[Declaration, ...]
    weights: Mapping[str, float]

    def score(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B] on the CPU; ValueError for missing, misshapen or non-finite scores."""
        with torch.no_grad():
            scores = self.scorer(video_BTCHW, prompts)
        return {name: checked(name, scores, len(prompts)) for name in self.scorer.components}


def named_rewards(
    names: Sequence[str], sources: Mapping[str, str] | None = None, *, device: str = "cpu", prompts: bool
) -> list[NamedReward]:
    """The rewards of ``names``; catalogue ids that share a model come out of one scorer.

    Args:
        sources: where parts of catalogue rewards are, by ``id.part``.
        prompts: whether prompts were given; rewards that read them are refused otherwise.

    Raises:
        ConfigurationError: unknown or repeated names, prompts that are needed and absent.
        ValueError: a part of a reward cannot be found or does not fit.
    """
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"--reward: name every reward once, got {', '.join(names) or 'none'}")
    for name in names:
        if name not in REWARD_IDS and name != WORLD and ":" not in name:
            raise ConfigurationError(
                f"--reward: unknown reward {name!r}; there are {', '.join(REWARD_IDS)}, {WORLD}, "
                "and your own as package.module:function"
            )
    if not prompts and (readers := [n for n in names if n in DECLARATIONS and DECLARATIONS[n].reads_prompt]):
        raise ConfigurationError(f"--reward: {', '.join(readers)} read the prompt: give --prompts FILE")
    found = {
        component: NamedReward(
            component,
            scorer,
            tuple(DECLARATIONS[c] for c in scorer.components),
            dict.fromkeys(scorer.components, 1.0),
        )
        for scorer in build_rewards(
            [name for name in names if name in REWARD_IDS], sources, frame_rate=FILE_RATE, device=device
        )
        for component in scorer.components
    }
    rewards: list[NamedReward] = []
    for name in names:
        if name == WORLD:
            rewards.append(_world(prompts))
        elif name not in found:
            rewards.append(_users_own(name))
        elif all(found[name].scorer is not reward.scorer for reward in rewards):
            rewards.append(found[name])
    return rewards


def _world(prompts: bool) -> NamedReward:
    from kvpo.rewards.world_pixels import DEFAULT_WEIGHTS, WorldScorer
    from kvpo.world.vocabulary import FRAME_SIZE

    if not prompts:
        raise ConfigurationError(f"--reward: {WORLD} reads the prompt: give --prompts FILE")
    scorer = WorldScorer()
    declarations = tuple(
        Declaration(name, 0.0, 1.0, True, False, 3, FRAME_SIZE**2) for name in scorer.components
    )
    return NamedReward(WORLD, scorer, declarations, DEFAULT_WEIGHTS)


def _users_own(name: str) -> NamedReward:
    from kvpo.app.build import user_reward

    scorer = user_reward(name)
    declarations = tuple(Declaration(c, -inf, inf, False, False, 1, SD) for c in scorer.components)
    return NamedReward(name, scorer, declarations, dict.fromkeys(scorer.components, 1.0))
