"""Rendering: what is drawn is what the story says, positions move as they should, faults are per act."""

import math
import time
from dataclasses import replace

import pytest
import torch

from kvpo.world.imperfect import CLEAN, Faults, film, imperfect_story, observe, training_stories
from kvpo.world.render import FrameStates, backgrounds, casts, paint, render, stage
from kvpo.world.stories import RECALLS, sample_story
from kvpo.world.vocabulary import (
    COLOURS,
    FRAME_SIZE,
    SCENES,
    SHAPES,
    SIZES,
    SPEED,
    WIDTH,
    Act,
    Actor,
    Story,
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def one(shape: str, x: float, size: str = "large", colour: str = "white") -> torch.Tensor:
    """One frame with one actor, x units from the left."""
    return paint(
        FrameStates(
            scene_N=torch.tensor([0]),
            colour_NA=torch.tensor([[list(COLOURS).index(colour), 0]]),
            shape_NA=torch.tensor([[SHAPES.index(shape), -1]]),
            extent_NA=torch.tensor([[SIZES[size], 1.0]]),
            centre_NA2=torch.tensor([[[x, 16.0], [0.0, 0.0]]]),
        )
    )[0]


def story_of(*acts: tuple[str, tuple[Actor, ...], str], frames: int = 36) -> Story:
    step = frames // len(acts)
    return Story(tuple(Act(s, a, "", i * step, e) for i, (s, a, e) in enumerate(acts)), frames)


@pytest.mark.parametrize(
    ("shape", "area"),
    [
        ("circle", torch.pi * 5.75**2),
        ("square", (2 * 0.86 * 5.75) ** 2),
        ("ring", torch.pi * (1.02**2 - 0.48**2) * 5.75**2),
        ("cross", 4 * (2 * 0.33 - 0.33**2) * 5.75**2),
        ("triangle", 1.8 * 1.04 * 5.75**2),
    ],
)
def test_covered_area_is_the_shape_s_area_at_any_sub_pixel_position(shape, area):
    for x in (16.0, 16.3, 15.5):
        background, white = backgrounds()[0], torch.tensor(COLOURS["white"])[:, None, None]
        cover = ((one(shape, x) - background) / (white - background)).mean(0).sum()
        assert float(cover) * (WIDTH / FRAME_SIZE) ** 2 == pytest.approx(area, rel=0.04)


def test_the_torus_wraps_and_sub_pixel_motion_changes_the_frame():
    assert torch.allclose(one("cross", 1.25), one("cross", 33.25), atol=1e-5)
    assert (one("circle", 16.0) - one("circle", 16.25)).abs().max() > 0.05


def test_shapes_colours_sizes_and_scenes_are_far_apart():
    shapes = torch.stack([one(shape, 16.0, size="small") for shape in SHAPES])
    colours = torch.stack([one("circle", 16.0, colour=colour) for colour in COLOURS])
    for group in (shapes, colours, backgrounds()):
        distance = torch.cdist(group.flatten(1), group.flatten(1)) + 100 * torch.eye(len(group))
        assert distance.min() > 1.0
    assert one("circle", 16.0, size="large").sum() > one("circle", 16.0, size="small").sum() + 50
    # Scenes stay darker than any actor.
    assert backgrounds().amax((1, 2, 3)).max() < 0.6 and len(backgrounds()) == len(SCENES)


def test_positions_are_continuous_across_switches_while_an_actor_stays():
    walker = Actor("red", "circle", "large", "right")
    bobber = Actor("red", "circle", "large", "bob")
    other = Actor("blue", "square", "small", "left")
    story = story_of(
        ("night", (walker,), "open"), ("night", (walker, other), "join"), ("sea", (bobber,), "revisit")
    )
    people = casts(story)
    assert people[0][0] == people[1][0] == people[2][0] and people[1][1] != people[1][0]
    centre = stage(story, people).centre_NA2[:, 0]
    step = centre[1:] - centre[:-1]
    assert torch.allclose(step[:23, 0], torch.full((23,), SPEED), atol=1e-4)
    assert step.abs().max() < 4.1, "no jumps, only glides"
    assert centre[24:, 1].std() > 1 and centre[24:, 0].std() < 1e-4


def test_recoloured_actors_go_on_and_strangers_enter_in_the_middle():
    red, blue = Actor("red", "circle", "large", "left"), Actor("blue", "circle", "large", "left")
    recoloured = story_of(("cave", (red,), "open"), ("cave", (blue,), "recolour"))
    stranger = story_of(("cave", (red,), "open"), ("cave", (blue,), "show"))
    assert casts(recoloured) == [(0,), (0,)] and casts(stranger) == [(0,), (1,)]
    moved, entered = (stage(story, casts(story)).centre_NA2[:, 0, 0] for story in (recoloured, stranger))
    start = stranger.acts[1].start
    assert float(entered[0]) == float(entered[start]) == WIDTH / 2
    assert float(moved[start]) == pytest.approx(WIDTH / 2 - SPEED * start)


def test_render_is_deterministic_and_clean_observation_is_render():
    story = sample_story(generator(1), 3, 60)
    assert torch.equal(render(story), render(story))
    video = observe([story, story], generator(2), CLEAN)
    assert video.shape == (2, 60, 3, FRAME_SIZE, FRAME_SIZE)
    assert 0 <= float(video.min()) and float(video.max()) <= 1
    assert torch.equal(video[0], render(story)) and torch.equal(video[1], render(story))


def test_fault_frequencies():
    rng = generator(5)
    stories = [sample_story(rng, 4, 60) for _ in range(500)]
    showings = [(s, imperfect_story(s, Faults(), rng)) for s in stories]
    later = [
        (act, shown, before)
        for story, showing in showings
        for act, shown, before in zip(
            story.acts[1:], showing.story.acts[1:], showing.story.acts[:-1], strict=True
        )
    ]
    ignored = [x for x in later if (x[1].scene, x[1].actors) == (x[2].scene, x[2].actors)]
    late = [x for x in later if x[1].start > x[0].start]
    wrong = [s.acts[0] for s, showing in showings if showing.story.acts[0].actors != s.acts[0].actors]
    faults = Faults()
    assert len(ignored) / len(later) == pytest.approx(faults.ignored_switch, abs=0.04)
    assert len(late) / len(later) == pytest.approx(faults.late_switch, abs=0.05)
    assert all(3 <= shown.start - act.start <= 9 for act, shown, _ in late)
    assert len(wrong) / len(showings) == pytest.approx(faults.wrong_attribute, abs=0.06)
    assert all(
        s.caption == a.caption
        for story, showing in showings
        for s, a in zip(showing.story.acts, story.acts, strict=True)
    )
    for name in ("flicker", "jitter"):
        values = [value for _, showing in showings for value in getattr(showing, name)]
        assert sum(v > 0 for v in values) / len(values) == pytest.approx(getattr(faults, name), abs=0.05)
        low, high = getattr(Faults(), f"{name}_range")
        assert all(v == 0 or low <= v <= high for v in values)


def test_flicker_and_jitter_are_traits_of_an_act():
    still = story_of(("sea", (Actor("red", "square", "large", "still"),), "open"))
    quiet = observe([still], generator(), CLEAN)[0]
    flickering = observe([still], generator(), Faults(0, 0, (3, 9), 0, 1.0, (0.2, 0.2), 0))[0]
    shaking = observe([still], generator(), Faults(0, 0, (3, 9), 0, 0, (0.2, 0.2), 1.0, (1.0, 1.0)))[0]
    corner = (slice(None), slice(None), 0, 0)
    assert (quiet[1:] - quiet[:-1]).abs().max() == 0
    assert float((flickering[corner][:, 1] / quiet[corner][:, 1]).std()) == pytest.approx(0.2, abs=0.08)
    assert torch.equal(shaking[corner], quiet[corner]) and not torch.equal(shaking, quiet)


def test_movement_dies_away_where_an_act_tires():
    walk = Actor("red", "square", "large", "right")
    story = story_of(("sea", (walk,), "open"), ("sea", (walk,), "turn"))
    frames, tires = story.acts[1].start, 6.0
    tired, lively = (stage(story, casts(story), pace).centre_NA2[:, 0, 0] for pace in ([tires, 0.0], ()))
    step, fresh = tired.diff(), lively.diff()
    assert float(step[0]) == pytest.approx(SPEED * tires * (1 - math.exp(-1 / tires)), rel=1e-4)
    assert float(step[6] / step[0]) == pytest.approx(math.exp(-1), rel=1e-3)
    # The next act goes on from where the actor stopped, at full speed.
    assert torch.allclose(step[frames:], fresh[frames:], atol=1e-4)
    assert float(step[frames - 1]) < 0.2 * SPEED

    film_of = [observe([story], generator(), replace(CLEAN, tiring=share)) for share in (1.0, 0.0)]
    assert torch.equal(film_of[0][:, 0], film_of[1][:, 0]) and not torch.equal(*film_of)


def test_who_comes_back_looks_as_it_was_shown():
    """Whatever was wrong with an actor's look when it left is what history knows of it."""
    rng = generator(6)
    faults = Faults(wrong_attribute=1.0, late_switch=0, ignored_switch=0, flicker=0, jitter=0)
    recalled = 0
    for _ in range(60):
        story = sample_story(rng, 4, 84)
        shown = imperfect_story(story, faults, rng).story
        worn = {}
        for told, act in zip(story.acts, shown.acts, strict=True):
            if told.event in RECALLS:
                known = [(a, b) for a, b in zip(told.actors, act.actors, strict=True) if a in worn]
                recalled += len(known)
                assert all(b == worn[a] for a, b in known)
            else:
                assert act.actors != told.actors
            worn |= zip(told.actors, act.actors, strict=True)
    assert recalled > 30


def test_filming_some_frames_shows_what_they_show_in_the_whole_video():
    stories = [sample_story(generator(n), 2, 30) for n in range(2)]
    showings = [imperfect_story(story, Faults(), generator(8)) for story in stories]
    whole = film(showings, [torch.arange(30)] * 2, generator(9)).unflatten(0, (2, 30))
    some = [torch.tensor([3, 4, 5]), torch.tensor([29, 0])]
    found = film(showings, some, generator(9))
    assert torch.equal(found, torch.cat([whole[0][some[0]], whole[1][some[1]]]))


def test_training_stories_have_all_numbers_of_acts_and_are_painted_fast():
    stories = training_stories(generator(7), 64, 60)
    assert {len(story.acts) for story in stories} == {1, 2, 3, 4}
    assert training_stories(generator(7), 64, 60) == stories
    assert all(len(story.acts) == 1 for story in training_stories(generator(7), 4, 12))
    start = time.process_time()
    observe(stories[:16], generator(7))
    assert (time.process_time() - start) / 16 < 0.03
