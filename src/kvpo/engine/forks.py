"""Where videos may fork, and what of the requested exploration fits there (METHOD section 2)."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from kvpo.config import ExplorationConfig
from kvpo.method.routing import FittedExploration, fit_exploration
from kvpo.prompts import VideoPrompt


@dataclass(frozen=True)
class ForkPlan:
    """Frames at which some videos may fork together, and the exploration that fits at each of them."""

    frames: tuple[int, ...]
    exploration: ExplorationConfig


def plan_forks(
    prompts: Sequence[VideoPrompt], exploration: ExplorationConfig, *, block: int, sink: int
) -> ForkPlan:
    """The forks that suit every prompt and at which most of ``exploration`` fits.

    Every branch needs a set of frames of its own, window and tail must fit, and no prompt switch may fall
    strictly inside the window (at the fork itself one may: history is re-encoded before the branches start).
    Short clips shrink first the tail, then the distinct frames, then the routed blocks; ``shrunk`` says what.
    Routes that repeat no frame get fewer slots with fewer distinct frames.

    Raises:
        ValueError: not even one block with one distinct frame per branch fits.
    """
    fits: dict[int, FittedExploration] = {}
    refused = "the video is empty"
    for fork in range(0, min(prompt.num_frames for prompt in prompts), block):
        try:
            fits[fork] = fit_exploration(
                fork,
                num_frames=min(prompt.num_frames for prompt in prompts),
                window_end=min(_window_end(prompt, fork, block) for prompt in prompts),
                blocks=exploration.blocks,
                tail_blocks=exploration.tail_blocks,
                distinct=max(1, exploration.distinct - exploration.donor),
                branches=exploration.branches,
                recent=exploration.recent,
                sink=sink,
                block=block,
                resident=exploration.resident_frames,
            )
        except ValueError as error:
            refused = str(error)
    if not fits:
        lengths = sorted({prompt.num_frames for prompt in prompts})
        raise ValueError(
            f"prompts {[prompt.id for prompt in prompts]} of {' and '.join(map(str, lengths))} latent frames "
            f"cannot fork anywhere ({refused}); lengthen the videos or lower exploration.branches"
        )
    best = max(fits.values(), key=lambda fit: (fit.blocks, fit.distinct, fit.tail_blocks))
    lost = max(1, exploration.distinct - exploration.donor) - best.distinct
    fitted = replace(
        exploration,
        blocks=best.blocks,
        tail_blocks=best.tail_blocks,
        distinct=exploration.distinct - lost,
        routed=exploration.routed - (lost if exploration.distinct == exploration.routed else 0),
    )
    return ForkPlan(tuple(fork for fork, fit in fits.items() if fit == best), fitted)


def shrunk(asked: ExplorationConfig, fitted: ExplorationConfig) -> dict[str, tuple[int, int]]:
    """What was shrunk to fit: name -> (asked for, fits)."""
    names = ("blocks", "tail_blocks", "routed", "distinct")
    pairs = {name: (vars(asked)[name], vars(fitted)[name]) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_fork(
    prompts: Sequence[VideoPrompt], fork: int, exploration: ExplorationConfig, *, block: int
) -> None:
    """Raise ValueError unless ``fork`` is a block start after which window and tail fit in every video."""
    span = (exploration.blocks + exploration.tail_blocks) * block
    for prompt in prompts:
        last = (prompt.num_frames - span) // block * block
        if fork % block or not 0 <= fork <= last:
            raise ValueError(
                f"fork = {fork}: must be a multiple of {block} from 0 to {last}, since {exploration.blocks} "
                f"routed and {exploration.tail_blocks} further blocks of {block} frames must fit in video "
                f"{prompt.id} of {prompt.num_frames} frames"
            )


def _window_end(prompt: VideoPrompt, fork: int, block: int) -> int:
    """The first frame, counted in blocks from the fork, of the next prompt segment, or the video's end."""
    following = [switch for switch in prompt.switches if switch > fork]
    if not following:
        return prompt.num_frames
    return fork + -(-(following[0] - fork) // block) * block
