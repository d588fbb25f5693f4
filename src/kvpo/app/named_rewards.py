"""Rewards by name, for every command: ids of the catalogue, "world", or package.module:function."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

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


@dataclass(frozen=True)
class UserReward:
    """A user's own reward: clips and prompts to one score each, or to named components of one score each."""

    name: str
    components: tuple[str, ...]
    function: Callable[[Tensor, Sequence[ClipPrompt]], Any]

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> scores as tensors. Raises ValueError for whatever goes wrong inside the function."""
        try:
            result = self.function(video_BTCHW, prompts)
            scores = result if isinstance(result, Mapping) else {self.components[0]: result}
            return {component: torch.as_tensor(values) for component, values in scores.items()}
        except Exception as error:  # somebody else's code may raise anything
            raise ValueError(f"reward {self.name!r} failed: {type(error).__name__}: {error}") from error


def named_rewards(
    names: Sequence[str],
    sources: Mapping[str, str] | None = None,
    *,
    prompts: bool,
    field: str = "--reward",
    frame_rate: float = FILE_RATE,
    device: str = "cpu",
) -> list[NamedReward]:
    """The rewards of ``names`` in their order; catalogue ids that share a model come out of one scorer.

    Args:
        sources: where parts of catalogue rewards are, by ``id.part``.
        prompts: whether prompts were given; rewards that read them are refused otherwise.
        field: where the names come from, for messages.
        frame_rate: frames per second of the clips that will be scored.

    Raises:
        ConfigurationError: unknown or repeated names, prompts that are needed and absent.
        ValueError: a part of a reward cannot be found or does not fit.
    """
    if not names or len(set(names)) < len(names):
        raise ConfigurationError(f"{field}: name every reward once, got {', '.join(names) or 'none'}")
    for name in names:
        if name not in REWARD_IDS and name != WORLD and ":" not in name:
            raise ConfigurationError(
                f"{field}: unknown reward {name!r}; there are {', '.join(REWARD_IDS)}, {WORLD}, "
                "and your own as package.module:function"
            )
    readers = [n for n in names if n == WORLD or n in DECLARATIONS and DECLARATIONS[n].reads_prompt]
    if readers and not prompts:
        verb = "reads" if len(readers) == 1 else "read"
        raise ConfigurationError(f"{field}: {', '.join(readers)} {verb} the prompt: give --prompts FILE")
    found = {
        component: NamedReward(
            component,
            scorer,
            tuple(DECLARATIONS[c] for c in scorer.components),
            dict.fromkeys(scorer.components, 1.0),
        )
        for scorer in build_rewards(
            [name for name in names if name in REWARD_IDS], sources, frame_rate=frame_rate, device=device
        )
        for component in scorer.components
    }
    rewards: list[NamedReward] = []
    for name in names:
        if name == WORLD:
            rewards.append(_world())
        elif name not in found:
            rewards.append(_users_own(name, field))
        elif all(found[name].scorer is not reward.scorer for reward in rewards):
            rewards.append(found[name])
    return rewards


def _world() -> NamedReward:
    from kvpo.rewards.world_pixels import DEFAULT_WEIGHTS, WorldScorer
    from kvpo.world.vocabulary import FRAME_SIZE

    scorer = WorldScorer()
    declarations = tuple(
        Declaration(name, 0.0, 1.0, True, False, 3, FRAME_SIZE**2) for name in scorer.components
    )
    return NamedReward(WORLD, scorer, declarations, DEFAULT_WEIGHTS)


def _users_own(name: str, field: str) -> NamedReward:
    scorer = user_reward(name, field)
    declarations = tuple(Declaration(c, -inf, inf, False, False, 1, SD) for c in scorer.components)
    return NamedReward(name, scorer, declarations, dict.fromkeys(scorer.components, 1.0))


def user_reward(name: str, field: str) -> UserReward:
    """Import ``package.module:attribute``, from the working directory too: a function, or a scorer object.

    Raises ConfigurationError, beginning with ``field``, when there is no such thing or it cannot be called.
    """
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found = vars(importlib.import_module(module))[attribute]
    except KeyError as error:
        raise ConfigurationError(f"{field}: module {module!r} has no {attribute!r}") from error
    except Exception as error:  # importing runs somebody else's code
        raise ConfigurationError(
            f"{field}: cannot import {module!r}: {type(error).__name__}: {error}"
        ) from error
    if not callable(found):
        raise ConfigurationError(f"{field}: {name!r} is not callable")
    components = tuple(found.components) if hasattr(found, "components") else (attribute,)
    return UserReward(name, components, found)
