"""The frames at which videos fork, and the exploration that fits there."""

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
"""Share of the groups that fork at a prompt switch, where their video has one to fork at."""


@dataclass(frozen=True)
class Fork:
    """A group's fork frame and the exploration that fits there."""

    frame: int
    exploration: ExplorationConfig


@dataclass(frozen=True)
class ForkPlan:
    """The forks at which videos are trained, together or one by one."""

    windows: tuple[tuple[Fork, ...], ...]
    """For every block that a window can hold, in order, the forks whose windows hold it."""
    at_switches: tuple[Fork, ...]
    """Forks at which the prompt switches."""

    @property
    def forks(self) -> tuple[Fork, ...]:
        """All of them, in order."""
        found = {fork.frame: fork for window in self.windows for fork in window}
        return tuple(found[frame] for frame in sorted(found))

    @property
    def roomiest(self) -> tuple[Fork, ...]:
        """The forks at which most of what was asked for fits, in order."""
        best = max(_room(fork) for fork in self.forks)
        return tuple(fork for fork in self.forks if _room(fork) == best)

    def draw(self, generator: torch.Generator) -> Fork:
        """One fork: at a switch in ``SWITCH_SHARE`` of the cases; else one whose window holds a drawn block.

        Every block is as likely to be the drawn one, so that all that can be routed is trained.
        """
        at_switch = torch.rand((), generator=generator) < SWITCH_SHARE
        block = int(torch.randint(len(self.windows), (), generator=generator))
        among = self.at_switches if at_switch and self.at_switches else self.windows[block]
        return among[int(torch.randint(len(among), (), generator=generator))]


def pool_of(
    deployment: Deployment, prompt: VideoPrompt, frame: int, exploration: ExplorationConfig
) -> tuple[int, ...]:
    """Frames of a video that may be routed at a fork; its switches up to there may have moved the sink."""
    sink = sink_frames(deployment, prompt, frame)
    return route_pool(frame, sink=sink, recent=exploration.recent, resident=exploration.resident_frames)


def plan_forks(
    prompts: Sequence[VideoPrompt], exploration: ExplorationConfig, deployment: Deployment
) -> ForkPlan:
    """The forks that suit every prompt, each with as much of ``exploration`` as fits there.

    Every branch needs a set of frames of its own, so the first blocks of a video, which have no such history,
    are never routed. No prompt switch may fall strictly inside the window (at the fork itself one may:
    history is re-encoded before the branches start). The tail shrinks towards the end of the video. A block
    is trained by the windows with most blocks, then most distinct frames, of those that can hold it; only
    where a segment or the pool is too short for all of both do they shrink. Raises ValueError where not even
    one block with one distinct frame per branch fits.
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
    """The fork of every prompt of a rollout, drawn by ``key``.

    Each is drawn for itself, but with donor histories one is drawn for all: a donor's frames must be as old.
    Raises ValueError where a prompt, or with donors all of them together, cannot fork.
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
    """The settings that were shrunk to fit: name -> (asked for, fits)."""
    names = ("blocks", "tail_blocks", "routed", "distinct")
    pairs = {name: (vars(asked)[name], vars(fitted)[name]) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def fork_numbers(
    prompts: Sequence[VideoPrompt], forks: Sequence[Fork], asked: ExplorationConfig, *, block: int
) -> dict[str, Any]:
    """Metrics of a rollout's forks.

    ``forks`` counts groups by frame, ``switch_forks`` is the share of groups that forked at a prompt switch;
    what shrank in any group comes as the mean over all of them.
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
    """Raise ValueError unless every fork is a block start after which window and tail fit in its video."""
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
    """Shrink the routed blocks, the tail after them and the distinct frames to what a fork offers.

    Routed blocks end by ``window_end``, the tail with the video; distinct frames fall until ``pool`` frames
    have a different set for every branch. Routes that repeat no frame get fewer slots with them. Raises
    ValueError when no block follows the fork, or the pool has not even one frame for every branch.
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
    """The frame at which the prompt next switches after the fork, or the video's end."""
    following = [switch for switch in prompt.switches if switch > fork]
    return prompt.acts_at(following[0], block) if following else prompt.num_frames
