"""A wish that only history can fulfil: of three actors, the second one is to come back.

Stories of the embedded world show three different actors in turn and end in a caption that leaves open who of
them is back. The sink shows the first one, who returns unless history says otherwise; the second one is seen
in the last frames of the window. The reward asks for the second: colour and shape as his caption told them.
In every other act it asks for those of its own caption.

    python benchmarks/returns.py runs/returns.jsonl
    PYTHONPATH=benchmarks kvpo compare --preset demo --prompts runs/returns.jsonl \\
        --rewards.scorers returns:wish --methods kvpo,latent-distance,null --out DIR
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from kvpo.app.configuration import preset
from kvpo.app.sources.world import open_ended
from kvpo.files import write_atomic
from kvpo.prompt_files import written
from kvpo.prompts import ClipPrompt, VideoPrompt
from kvpo.world.reward import WorldScorer
from kvpo.world.stories import OPEN

SWITCHES, FRAMES = (21, 36, 39), 60
"""The third act is so short that the window of the last one still shows the second."""


def wish(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
    """Mean of colour and shape, ``[B]`` in [0, 1]: those that were told, and where it is left open who is
    back, those of the second actor. Each is 0.5 where the other one judges.
    """
    open_B = torch.tensor([prompt == OPEN for prompt in prompts])
    asked = [
        ClipPrompt(prompt.earlier[-2], prompt.before, prompt.switch) if prompt == OPEN else prompt
        for prompt in prompts
    ]
    scores = WorldScorer(("colour", "shape"))(video_BTCHW, asked)
    shown_B = torch.stack([*scores.values()]).mean(0)
    return {"told": shown_B.where(~open_B, 0.5), "second_returns": shown_B.where(open_B, 0.5)}


wish.components = ("told", "second_returns")  # type: ignore[attr-defined]


def stories(count: int, block: int) -> list[VideoPrompt]:
    """Distinct stories that leave open who is back."""
    found: dict[tuple[str, ...], VideoPrompt] = {}
    for prompt in islice(open_ended(block), 2 * count):
        found.setdefault(prompt.segments, replace(prompt, switches=SWITCHES, num_frames=FRAMES))
    return list(found.values())[:count]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="the prompt file (.jsonl) to write")
    parser.add_argument("--stories", type=int, default=512)
    arguments = parser.parse_args()
    own = stories(arguments.stories, preset("demo").stream.block)
    write_atomic(arguments.file, written(own, arguments.file))
    print(f"{arguments.file}: {len(own)} stories")


if __name__ == "__main__":
    main()
