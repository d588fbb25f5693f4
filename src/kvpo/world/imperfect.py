"""Training videos with deliberate faults: captions stay true to the story, pixels do not always."""

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo.world.render import Cast, FrameStates, casts, concatenate, paint, stage
from kvpo.world.stories import PLAIN, RECALLS, Telling, sample_story
from kvpo.world.vocabulary import COLOURS, MOTIONS, SHAPES, Act, Actor, Story


@dataclass(frozen=True)
class Faults:
    """Frequency and strength of the faults in training videos, which are drawn once per act."""

    wrong_attribute: float = 0.2
    """Chance that one actor has a wrong colour, shape or motion throughout the act."""
    late_switch: float = 0.25
    """Chance that the visible change comes late."""
    late_frames: tuple[int, int] = (3, 9)
    """Frames of delay, inclusive."""
    ignored_switch: float = 0.12
    """Chance that the previous act simply continues."""
    flicker: float = 0.4
    """Chance that an act flickers."""
    flicker_range: tuple[float, float] = (0.08, 0.22)
    """Standard deviation of the brightness factor, per frame."""
    jitter: float = 0.4
    """Chance that an act's actors shake."""
    jitter_range: tuple[float, float] = (0.7, 1.8)
    """Standard deviation of the position noise in units, per frame."""
    tiring: float = 0.0
    """Chance that an act's movement dies away."""
    tiring_range: tuple[float, float] = (6.0, 15.0)
    """Frames in which the speed falls to 1/e."""


CLEAN = Faults(wrong_attribute=0.0, late_switch=0.0, ignored_switch=0.0, flicker=0.0, jitter=0.0)


@dataclass(frozen=True)
class Showing:
    """Contents of a faulty video: the story really shown, its actors, and the disturbances of each act."""

    story: Story
    casts: tuple[Cast, ...]
    flicker: tuple[float, ...]
    jitter: tuple[float, ...]
    tiring: tuple[float, ...]


def imperfect_story(story: Story, faults: Faults, generator: torch.Generator) -> Showing:
    """Draw the faults of one video; captions and the number of acts are unchanged.

    A returning actor looks as it was shown before, so history correctly tells which actor it is.
    """
    rng = random.Random(int(torch.randint(2**62, (), generator=generator)))
    shown: list[Act] = []
    shown_casts: list[Cast] = []
    looks: dict[Actor, Actor] = {}
    for act, cast in zip(story.acts, casts(story), strict=True):
        fate = rng.random()
        if shown and fate < faults.ignored_switch:
            before = shown[-1]
            shown.append(replace(act, scene=before.scene, actors=before.actors))
            shown_casts.append(shown_casts[-1])
            continue
        late = shown and fate < faults.ignored_switch + faults.late_switch
        start = act.start + (rng.randint(*faults.late_frames) if late else 0)
        wrong = rng.randrange(len(act.actors)) if rng.random() < faults.wrong_attribute else -1
        if act.event in RECALLS:
            actors = tuple(looks.get(actor, actor) for actor in act.actors)
        else:
            actors = tuple(_spoil(a, rng) if i == wrong else a for i, a in enumerate(act.actors))
        looks |= zip(act.actors, actors, strict=True)
        shown.append(replace(act, start=start, actors=actors))
        shown_casts.append(cast)
    return Showing(
        story=Story(tuple(shown), story.num_frames),
        casts=tuple(shown_casts),
        flicker=tuple(_amplitude(faults.flicker, faults.flicker_range, rng) for _ in shown),
        jitter=tuple(_amplitude(faults.jitter, faults.jitter_range, rng) for _ in shown),
        tiring=tuple(_amplitude(faults.tiring, faults.tiring_range, rng) for _ in shown),
    )


def _spoil(actor: Actor, rng: random.Random) -> Actor:
    name, values = rng.choice((("colour", tuple(COLOURS)), ("shape", SHAPES), ("motion", MOTIONS)))
    now = {"colour": actor.colour, "shape": actor.shape, "motion": actor.motion}[name]
    return replace(actor, **{name: rng.choice([value for value in values if value != now])})


def _amplitude(chance: float, bounds: tuple[float, float], rng: random.Random) -> float:
    return rng.uniform(*bounds) if rng.random() < chance else 0.0


def _stage(showing: Showing, generator: torch.Generator) -> tuple[FrameStates, Tensor]:
    """States with jitter, and the brightness factor of every frame [T]."""
    story = showing.story
    states = stage(story, showing.casts, showing.tiring)
    starts = [act.start for act in story.acts]
    ends = [*starts[1:], story.num_frames]
    lengths = torch.tensor([end - start for start, end in zip(starts, ends, strict=True)])
    flicker_T = torch.tensor(showing.flicker).repeat_interleave(lengths)
    jitter_T = torch.tensor(showing.jitter).repeat_interleave(lengths)
    shake = torch.randn(states.centre_NA2.shape, generator=generator) * jitter_T[:, None, None]
    brightness_T = (1 + flicker_T * torch.randn(story.num_frames, generator=generator)).clamp(min=0.3)
    return replace(states, centre_NA2=states.centre_NA2 + shake), brightness_T


def film(
    showings: Sequence[Showing],
    frames: Sequence[Tensor],
    generator: torch.Generator,
) -> Tensor:
    """Render ``frames`` of each faulty video, in any order: [N, 3, H, W] in [0, 1]."""
    states, brightness = [], []
    for showing, chosen in zip(showings, frames, strict=True):
        staged, brightness_T = _stage(showing, generator)
        states.append(staged.at(chosen))
        brightness.append(brightness_T[chosen])
    return (paint(concatenate(states)) * torch.cat(brightness)[:, None, None, None]).clamp(0, 1)


def observe(
    stories: Sequence[Story],
    generator: torch.Generator,
    faults: Faults = Faults(),
) -> Tensor:
    """Render stories of equal length as faulty videos [B, T, 3, H, W] in [0, 1], or exactly with CLEAN."""
    showings = [imperfect_story(story, faults, generator) for story in stories]
    whole = [torch.arange(story.num_frames) for story in stories]
    return film(showings, whole, generator).unflatten(0, (len(stories), -1))


def training_stories(
    generator: torch.Generator, count: int, num_frames: int, telling: Telling = PLAIN
) -> list[Story]:
    """Draw training stories of one to four acts each, or fewer if ``num_frames`` is too short for four."""
    most = max(1, min(4, num_frames // 12))
    # More acts give more to remember: their number is drawn in proportion to its square.
    weights = torch.arange(1.0, most + 1).square()
    counts = (1 + torch.multinomial(weights, count, replacement=True, generator=generator)).tolist()
    return [sample_story(generator, num_acts, num_frames, telling=telling) for num_acts in counts]
