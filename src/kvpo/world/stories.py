"""Stories: sequences of acts in which actors and scenes appear, change and return, in disjoint splits."""

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Literal

import torch

from kvpo.engine.noise import keyed_generator
from kvpo.prompts import VideoPrompt
from kvpo.world.grammar import DROPPED, describe, parse
from kvpo.world.vocabulary import COLOURS, MOTIONS, SCENES, SHAPES, SIZES, Act, Actor, Story

Split = Literal["train", "validation", "test"]
SHARES: dict[Split, int] = {"test": 20, "validation": 15, "train": 65}
"""Percentage of the combinations (colour, shape, motion, scene) that belong to each split."""
BLOCK = 3
"""Frames per block; acts start on multiples of it."""
MIN_ACT_BLOCKS = 4
EVENTS = ("show", "return", "revisit", "recolour", "turn", "join", "leave")
RECALLS = ("return", "revisit")
"""Events that bring back something that an earlier act has shown."""
TRIES = 60
OPEN = "Then one of them is back again."
"""A caption that leaves open who returns."""


@dataclass(frozen=True)
class Telling:
    """Frequencies of events in stories, and how much of them the captions say."""

    show: float = 0.20
    return_: float = 0.40
    revisit: float = 0.45
    recolour: float = 0.08
    turn: float = 0.07
    join: float = 0.07
    leave: float = 0.04
    """Weights of the events of later acts. Return and revisit need earlier acts that differ, so they are
    drawn more often than they can happen."""
    two_actors: float = 0.35
    """Chance that an opening or a show has two actors."""
    dropped: tuple[int, ...] = DROPPED
    """Choices for the number of attributes that captions of return and leave leave open; 5: who it is."""

    @property
    def events(self) -> dict[str, float]:
        """Weight of every event by its name."""
        return {name: vars(self)[name.replace("return", "return_")] for name in EVENTS}


PLAIN = Telling()
"""Telling of the stories that the generator is aligned and judged on."""


def split_of(colour: str, shape: str, motion: str, scene: str) -> Split:
    """Split that an attribute combination belongs to: a stable hash, the same on every machine."""
    digest = hashlib.sha256(f"{colour}|{shape}|{motion}|{scene}".encode()).digest()
    point = int.from_bytes(digest[:4], "big") % 100
    for split, share in SHARES.items():
        if point < share:
            return split
        point -= share
    raise AssertionError("shares add up to 100")


def named_split(caption: str) -> Split | None:
    """The split of the first combination that the caption names in full, None if it names none."""
    request = parse(caption)
    for actor in request.actors:
        if request.scene and actor.colour and actor.shape and actor.motion:
            return split_of(actor.colour, actor.shape, actor.motion, request.scene)
    return None


@cache
def _combinations(split: Split, scene: str) -> tuple[tuple[str, str, str], ...]:
    every = ((c, s, m) for c in COLOURS for s in SHAPES for m in MOTIONS)
    return tuple(combination for combination in every if split_of(*combination, scene) == split)


def belongs(act: Act, split: Split) -> bool:
    """True if every actor of the act, in its scene, is a combination of the split."""
    return all(split_of(a.colour, a.shape, a.motion, act.scene) == split for a in act.actors)


def _new_actors(
    scene: str, split: Split, count: int, avoid: tuple[Actor, ...], rng: random.Random
) -> tuple[Actor, ...] | None:
    """Draw ``count`` actors, all different from ``avoid`` and each other in colour and shape, or None."""
    actors: list[Actor] = []
    for _ in range(count):
        taken = (*avoid, *actors)
        colour, shape, motion = rng.choice(_combinations(split, scene))
        if any(colour == other.colour or shape == other.shape for other in taken):
            return None
        actors.append(Actor(colour, shape, rng.choice(tuple(SIZES)), motion))
    return tuple(actors)


def _crowd(telling: Telling, rng: random.Random) -> int:
    return 2 if rng.random() < telling.two_actors else 1


def _next(
    event: str, acts: list[Act], split: Split, telling: Telling, rng: random.Random
) -> tuple[str, tuple[Actor, ...] | None]:
    """Scene and actors of the next act, or None if the event is impossible or the draw was unlucky."""
    now = acts[-1]
    scene, actors = now.scene, now.actors
    changed = rng.randrange(len(actors))
    if event == "show":
        scene = scene if rng.random() < 0.35 else rng.choice(tuple(SCENES))
        return scene, _new_actors(scene, split, _crowd(telling, rng), actors, rng)
    if event == "join":
        newcomer = _new_actors(scene, split, 1, actors, rng)
        return scene, (*actors, *newcomer) if newcomer and len(actors) == 1 else None
    if event == "leave":
        return scene, (actors[changed],) if len(actors) == 2 else None
    if event == "return":
        here = {a.shape for a in actors}
        away = [a for act in acts[:-1] for a in act.actors if a.shape not in here]
        return scene, (rng.choice(away),) if away else None
    if event == "revisit":
        earlier = [act for act in acts[:-1] if act.scene != scene]
        if not earlier:
            return scene, None
        act = rng.choice(earlier)
        return act.scene, act.actors if rng.random() < 0.6 else actors
    assert event in ("recolour", "turn"), event
    if event == "recolour":
        free = [c for c in COLOURS if all(c != a.colour for a in actors)]
        new = replace(actors[changed], colour=rng.choice(free))
    else:
        new = replace(actors[changed], motion=rng.choice([m for m in MOTIONS if m != actors[changed].motion]))
    return scene, tuple(new if i == changed else a for i, a in enumerate(actors))


def _draw_acts(
    plan: list[str], starts: list[int], split: Split, telling: Telling, rng: random.Random
) -> list[Act] | None:
    scene = rng.choice(tuple(SCENES))
    actors = _new_actors(scene, split, _crowd(telling, rng), (), rng)
    if actors is None:
        return None
    acts = [Act(scene, actors, "", starts[0], "open")]
    for event, start in zip(plan, starts[1:], strict=True):
        scene, following = _next(event, acts, split, telling, rng)
        act = Act(scene, following or (), "", start, event)
        if following is None or not belongs(act, split):
            return None
        acts.append(act)
    return acts


def _plan(num_acts: int, telling: Telling, rng: random.Random) -> list[str]:
    first = [event for event in EVENTS if event not in RECALLS]
    names = [first if k == 0 else list(EVENTS) for k in range(num_acts - 1)]
    return [rng.choices(options, [telling.events[e] for e in options])[0] for options in names]


def _starts(num_acts: int, num_blocks: int, rng: random.Random) -> list[int]:
    """Draw act starts in frames: each act gets MIN_ACT_BLOCKS blocks, and the rest is split at random."""
    spare = num_blocks - num_acts * MIN_ACT_BLOCKS
    cuts = sorted(rng.randint(0, spare) for _ in range(num_acts - 1))
    return [0, *((MIN_ACT_BLOCKS * (k + 1) + cut) * BLOCK for k, cut in enumerate(cuts))]


def sample_story(
    generator: torch.Generator,
    num_acts: int,
    num_frames: int,
    split: Split = "train",
    telling: Telling = PLAIN,
) -> Story:
    """Draw a captioned story of ``num_acts`` acts over ``num_frames`` latent frames.

    Acts start on multiples of BLOCK and last at least MIN_ACT_BLOCKS blocks; every actor of every act is
    an attribute combination of ``split``. Raises ValueError if the acts do not fit.
    """
    if num_acts < 1 or num_frames < num_acts * MIN_ACT_BLOCKS * BLOCK or num_frames % BLOCK:
        raise ValueError(
            f"num_frames = {num_frames}: {num_acts} acts of {MIN_ACT_BLOCKS} blocks of {BLOCK} frames or "
            f"more need a multiple of {BLOCK} that is at least {max(num_acts, 1) * MIN_ACT_BLOCKS * BLOCK}"
        )
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    starts = _starts(num_acts, num_frames // BLOCK, rng)
    while True:
        # Each plan gets many draws before a new one, so small splits tell the same kinds of story.
        plan = _plan(num_acts, telling, rng)
        for _ in range(TRIES):
            acts = _draw_acts(plan, starts, split, telling, rng)
            if acts is not None:
                return Story(_tell(acts, telling, rng), num_frames)


def _tell(acts: list[Act], telling: Telling, rng: random.Random) -> tuple[Act, ...]:
    """Caption the acts; at least one names a full combination, so splits share no caption sequence."""
    while True:
        before = [None, *acts[:-1]]
        told = tuple(
            replace(act, caption=describe(act, previous, rng, telling.dropped))
            for act, previous in zip(acts, before, strict=True)
        )
        if any(named_split(act.caption) for act in told):
            return told


def video_prompt(story: Story, id: int) -> VideoPrompt:
    """The story as a request to a generator: captions and switch frames only."""
    return VideoPrompt(
        id=id,
        segments=tuple(act.caption for act in story.acts),
        switches=tuple(act.start for act in story.acts[1:]),
        num_frames=story.num_frames,
    )


def distinct_stories(split: Split, count: int, num_acts: int, num_frames: int, seed: int) -> list[Story]:
    """Draw ``count`` stories of one split with different caption sequences. Raises ValueError."""
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[str, ...], Story] = {}
    for _ in range(50 * count + 1000):
        if len(found) == count:
            return list(found.values())
        story = sample_story(generator, num_acts, num_frames, split=split)
        found.setdefault(tuple(act.caption for act in story.acts), story)
    raise ValueError(
        f"count = {count}: only {len(found)} distinct {split} stories of {num_acts} acts found; ask for fewer"
    )


def distinct_prompts(
    split: Split, count: int, num_acts: int, num_frames: int, seed: int, first_id: int = 0
) -> list[VideoPrompt]:
    """Prompts of distinct_stories with ids from ``first_id`` on."""
    stories = distinct_stories(split, count, num_acts, num_frames, seed)
    return [video_prompt(story, first_id + index) for index, story in enumerate(stories)]


def open_prompts(num_frames: int, block: int) -> Iterator[VideoPrompt]:
    """Yield test prompts of four acts of equal length: three with different actors, then ``OPEN``."""
    starts = [num_frames // (4 * block) * block * n for n in range(4)]
    generator = keyed_generator("open stories")
    number = 30_000_000
    while True:
        story = sample_story(generator, 4, num_frames, split="test")
        looks = [{(a.colour, a.shape) for a in act.actors} for act in story.acts[:3]]
        if any(a & b for a, b in combinations(looks, 2)):
            continue
        acts = tuple(replace(act, start=start) for act, start in zip(story.acts, starts, strict=True))
        prompt = video_prompt(replace(story, acts=acts), number)
        yield replace(prompt, segments=(*prompt.segments[:3], OPEN))
        number += 1
