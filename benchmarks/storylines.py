"""A preference about what happens: when "one of them is back again", it should be the actor seen last.

The stories have three acts: two with different actors, and one whose caption says only that one of them is
back. The demo's base brings back the actor of the first act, whom the sink shows, with any noise; routed
history can change that ("Who comes back" in RESULTS.md). So this preference can be learned only from branches
that differ in what happens. This writes the stories for `kvpo compare` and rates them there.

    python benchmarks/storylines.py stories.jsonl [--stories 1000]
    kvpo compare --prompts.file stories.jsonl --rewards.scorers benchmarks.storylines:last_seen ...
"""

import argparse
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kvpo.engine.noise import keyed_generator
from kvpo.files import write_atomic
from kvpo.prompt_files import written
from kvpo.prompts import ClipPrompt, VideoPrompt
from kvpo.world.reward import DEFAULT_WEIGHTS, WorldScorer, weighted_total
from kvpo.world.stories import OPEN, sample_story, video_prompt

STARTS, FRAMES = (0, 15, 51), 72
"""First latent frame of every act, and their number."""
WORLD = WorldScorer()


def last_seen(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """The world's reward of an open act, judged by the caption before it, [B] in [0, 1]; 1 in other acts."""
    asked = [ClipPrompt(prompt.before or prompt, switch=prompt.switch) for prompt in prompts]
    total = weighted_total(WORLD(video_BTCHW, asked), DEFAULT_WEIGHTS)
    return torch.where(torch.tensor([prompt == OPEN for prompt in prompts]), total, 1.0)


def stories() -> Iterator[VideoPrompt]:
    """Stories of two acts with different actors, in attributes of the training split, and an open one."""
    generator, number = keyed_generator("storylines"), 0
    while True:
        story = sample_story(generator, 2, FRAMES)
        first, second = ({(a.colour, a.shape) for a in act.actors} for act in story.acts)
        if len(first) == len(second) == 1 and not {*first.pop()} & {*second.pop()}:
            captions = video_prompt(story, number).segments
            yield VideoPrompt(number, (*captions, OPEN), STARTS[1:], FRAMES)
            number += 1


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the stories."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="prompt file (.jsonl)")
    parser.add_argument("--stories", type=int, default=1000)
    options = parser.parse_args(arguments)
    write_atomic(options.out, written(list(islice(stories(), options.stories)), options.out))


if __name__ == "__main__":
    main()
