"""The training prompts of a file, update by update, in passes that use every prompt once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.engine.noise import keyed_generator
from kvpo.prompts import VideoPrompt

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FilePrompts:
    """Training prompts of each update, a function of (seed, update) alone: each pass in another order.

    A pass shows every prompt once. Prompts of one update share their switches and length, so that they have
    forks in common; where their number is no multiple of ``count``, some updates have fewer.
    """

    prompts: tuple[VideoPrompt, ...]
    seed: int
    count: int
    """Most prompts of one update."""

    @cached_property
    def alike(self) -> list[list[VideoPrompt]]:
        """Prompts by switches and length, in a fixed order of both."""
        found: dict[tuple[int, tuple[int, ...]], list[VideoPrompt]] = {}
        for prompt in self.prompts:
            found.setdefault((prompt.num_frames, prompt.switches), []).append(prompt)
        return [found[shape] for shape in sorted(found)]

    def updates(self, turn: int) -> list[list[VideoPrompt]]:
        """The prompts of each update of a pass; sizes of like prompts differ by one at most."""
        draws = keyed_generator("prompt order", self.seed, turn)
        updates = [
            [own[n] for n in part.tolist()]
            for own in self.alike
            for part in torch.randperm(len(own), generator=draws).tensor_split(-(-len(own) // self.count))
        ]
        return [updates[n] for n in torch.randperm(len(updates), generator=draws).tolist()]

    def __call__(self, update: int) -> list[VideoPrompt]:
        turn, place = divmod(update, sum(-(-len(own) // self.count) for own in self.alike))
        chosen = self.updates(turn)[place]
        return [replace(prompt, id=update * self.count + n) for n, prompt in enumerate(chosen)]


def updates_prompts(config: Config, training: Sequence[VideoPrompt]) -> FilePrompts:
    """The prompts of every update; warns where there are too few to fill one.

    Raises ConfigurationError where a prompt would have no other to take donor histories from.
    """
    asked = config.optim.prompts_per_update
    prompts = FilePrompts(tuple(training), config.seed, asked)
    sizes = [len(update) for update in prompts.updates(0)]
    if config.exploration.donor and min(sizes) < 2:
        raise ConfigurationError(
            f"exploration.donor: an update would have a single prompt and no donor; change the number of "
            f"prompts in {config.prompts.file}, or optim.prompts_per_update = {asked}"
        )
    if max(sizes) < asked:
        logger.warning(
            "optim.prompts_per_update = %d, but %s has at most %d training prompts of one length with "
            "the same switches; updates have no more than that",
            asked,
            config.prompts.file,
            max(sizes),
        )
    return prompts
