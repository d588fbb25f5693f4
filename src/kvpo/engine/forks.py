"""Fork frames of videos, and the exploration settings that fit at each."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from kvpo.config import ExplorationConfig
from kvpo.engine.noise import keyed_generator
from kvpo.method.routing import check_routes, route_pool
from kvpo.models.deployment import sink_frames
from kvpo.models.settings import Deployment
from kvpo.prompts import VideoPrompt

SWITCH_SHARE = 1 / 3
"""Probability of forking at a prompt switch, for videos that can fork at one."""


@dataclass(frozen=True)
class Fork:
    """A group's fork frame and the exploration settings that fit there."""

    frame: int
    exploration: ExplorationConfig


@dataclass(frozen=True)
class ForkPlan:
    """The possible forks of one video, or of several that fork together."""

    windows: tuple[tuple[Fork, ...], ...]
    """For every trainable block, in order: of the forks whose windows contain it, those with most room."""
    at_switches: tuple[Fork, ...]
    """Forks at a prompt switch."""

    @property
    def forks(self) -> tuple[Fork, ...]:
        """All distinct forks, in order."""
        found = {fork.frame: fork for window in self.windows for fork in window}
        return tuple(found[frame] for frame in sorted(found))

    @property
    def roomiest(self) -> tuple[Fork, ...]:
        """The forks that fit the most of the requested exploration, in order."""
        best = max(_room(fork) for fork in self.forks)
        return tuple(fork for fork in self.forks if _room(fork) == best)

    def draw(self, generator: torch.Generator) -> Fork:
        """Draw a fork: at a prompt switch with probability ``SWITCH_SHARE``, else around a random block.

        The block is drawn uniformly, so that every block that can be routed is trained; the fork is one of
        those whose windows contain it.
        """
        at_switch = torch.rand((), generator=generator) < SWITCH_SHARE
        block = int(torch.randint(len(self.windows), (), generator=generator))
        among = self.at_switches if at_switch and self.at_switches else self.windows[block]
        return among[int(torch.randint(len(among), (), generator=generator))]


def pool_of(
    deployment: Deployment, prompt: VideoPrompt, frame: int, exploration: ExplorationConfig
) -> tuple[int, ...]:
    """Routable frames of a video at a fork; earlier prompt switches may have moved the sink."""
    sink = sink_frames(deployment, prompt, frame)
    return route_pool(frame, sink=sink, recent=exploration.recent, resident=exploration.resident_frames)


def plan_forks(
    prompts: Sequence[VideoPrompt], exploration: ExplorationConfig, deployment: Deployment
) -> ForkPlan:
    """Find the forks that suit every prompt, each with as much of ``exploration`` as fits there.

    Every branch needs its own set of history frames, so the first blocks of a video are never routed. No
    prompt switch may fall inside the window, except at the fork itself, where history is re-encoded before
    the branches start. The tail shrinks towards the end of the video. Of the windows that can contain a
    block, those with the most blocks, then the most distinct frames, train it; both shrink only if a segment
    or the pool is too short. Raises ValueError if not even one block with one distinct frame per branch fits.
    """
    block, num_frames = deployment.block, min(prompt.num_frames for prompt in prompts)
    forks: list[Fork] = []
    refused = "the video is empty"
    for frame in range(0, num_frames, block):
        try:
            fitted = fit_exploration(
                exploration,
                frame,
                num_frames=num_frames,
                window_end=min(_window_end(prompt, frame, block) for prompt in prompts),
                pool=min(len(pool_of(deployment, prompt, frame, exploration)) for prompt in prompts),
                block=block,
            )
        except ValueError as error:
            refused = str(error)
        else:
            forks.append(Fork(frame, fitted))
    if not forks:
        lengths = sorted({prompt.num_frames for prompt in prompts})
        raise ValueError(
            f"prompts {[prompt.id for prompt in prompts]} of {' and '.join(map(str, lengths))} latent frames "
            f"cannot fork anywhere ({refused}); lengthen the videos or lower exploration.branches"
        )
    windows = []
    for frame in range(forks[0].frame, num_frames - block + 1, block):
        holding = [f for f in forks if f.frame <= frame < f.frame + f.exploration.blocks * block]
        most = max((_room(fork)[:2] for fork in holding), default=None)
        windows.append(tuple(fork for fork in holding if _room(fork)[:2] == most))
    acts = {prompt.acts_at(switch, block) for prompt in prompts for switch in prompt.switches}
    return ForkPlan(tuple(filter(None, windows)), tuple(fork for fork in forks if fork.frame in acts))


def draw_forks(
    prompts: Sequence[VideoPrompt],
    exploration: ExplorationConfig,
    deployment: Deployment,
    key: tuple[int | str, ...],
) -> list[Fork]:
    """Draw the fork of every prompt of a rollout, seeded by ``key``.

    Forks are drawn independently. With donor histories, all prompts share one fork, because a donor's frames
    must be as old. Raises ValueError if a prompt, or with donors all prompts together, cannot fork.
    """
    if exploration.donor:
        return [plan_forks(prompts, exploration, deployment).draw(keyed_generator("fork", *key))] * len(
            prompts
        )
    return [
        plan_forks([prompt], exploration, deployment).draw(keyed_generator("fork", *key, index))
        for index, prompt in enumerate(prompts)
    ]


def shrunk_fields(asked: ExplorationConfig, fitted: ExplorationConfig) -> dict[str, tuple[int, int]]:
    """Settings that were shrunk to fit: name -> (requested, fitted)."""
    names = ("blocks", "tail_blocks", "routed", "distinct")
    pairs = {name: (vars(asked)[name], vars(fitted)[name]) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def fork_numbers(
    prompts: Sequence[VideoPrompt], forks: Sequence[Fork], asked: ExplorationConfig, *, block: int
) -> dict[str, Any]:
    """Metrics of a rollout's forks.

    ``forks`` counts groups by frame, and ``switch_forks`` is the share of groups that forked at a prompt
    switch. Every setting that shrank in some group is reported as its mean over all groups.
    """
    frames = Counter(fork.frame for fork in forks)
    at_switch = [
        fork.frame in {prompt.acts_at(switch, block) for switch in prompt.switches}
        for prompt, fork in zip(prompts, forks, strict=True)
    ]
    names = {name: None for fork in forks for name in shrunk_fields(asked, fork.exploration)}
    return {
        "forks": {str(frame): frames[frame] for frame in sorted(frames)},
        "switch_forks": sum(at_switch) / len(forks),
        **{name: sum(vars(fork.exploration)[name] for fork in forks) / len(forks) for name in names},
    }


def check_forks(prompts: Sequence[VideoPrompt], forks: Sequence[Fork], *, block: int) -> None:
    """Raise ValueError unless every fork is a block start and its window and tail fit in its video."""
    for prompt, fork in zip(prompts, forks, strict=True):
        routed, tail = fork.exploration.blocks, fork.exploration.tail_blocks
        last = (prompt.num_frames - (routed + tail) * block) // block * block
        if fork.frame % block or not 0 <= fork.frame <= last:
            raise ValueError(
                f"fork = {fork.frame}: must be a multiple of {block} from 0 to {last}, since {routed} routed "
                f"and {tail} further blocks of {block} frames must fit in video {prompt.id} of "
                f"{prompt.num_frames} frames"
            )


def _room(fork: Fork) -> tuple[int, int, int]:
    exploration = fork.exploration
    return exploration.blocks, exploration.distinct, exploration.tail_blocks


def fit_exploration(
    asked: ExplorationConfig, fork: int, *, num_frames: int, window_end: int, pool: int, block: int
) -> ExplorationConfig:
    """Shrink the routed blocks, the tail after them and the distinct frames to what fits at a fork.

    The routed blocks must end by ``window_end``, the tail by the end of the video. The number of distinct
    frames is lowered until ``pool`` frames give every branch a different set; routes without repeated frames
    lose as many slots. Raises ValueError if no block follows the fork, or the pool has fewer frames than
    branches.
    """
    blocks = min(asked.blocks, (min(window_end, num_frames) - fork) // block)
    if blocks < 1:
        raise ValueError(
            f"fork = {fork}: no block of {block} frames follows in a video of {num_frames}; fork earlier"
        )
    tail = min(asked.tail_blocks, (num_frames - fork) // block - blocks)
    wanted = distinct = max(1, asked.distinct - asked.donor)
    while distinct > 1 and math.comb(pool, distinct) < asked.branches:
        distinct -= 1
    check_routes(pool, asked.branches, distinct, distinct)
    lost = wanted - distinct
    routed = asked.routed - (lost if asked.distinct == asked.routed else 0)
    return replace(asked, blocks=blocks, tail_blocks=tail, distinct=asked.distinct - lost, routed=routed)


def _window_end(prompt: VideoPrompt, fork: int, block: int) -> int:
    """Frame of the first prompt switch after the fork, or the end of the video."""
    following = [switch for switch in prompt.switches if switch > fork]
    return prompt.acts_at(following[0], block) if following else prompt.num_frames
