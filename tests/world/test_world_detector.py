"""The detector reads exact renders rightly, also through the codec, and is not sure of what is no world."""

import pytest
import torch

from kvpo.world.calibration import detector_accuracy, draw_stories, round_trip
from kvpo.world.codec import load_codec
from kvpo.world.detector import attributes, detect
from kvpo.world.imperfect import CLEAN, observe
from kvpo.world.render import render
from kvpo.world.vocabulary import FRAME_SIZE, SCENES, WIDTH, Act, Actor, Story


@pytest.fixture(scope="module")
def stories():
    return draw_stories("test", 60, 1, 15, seed=11)


@pytest.fixture(scope="module")
def video(stories):
    return observe(stories, torch.Generator().manual_seed(12), CLEAN)


def show(scene: str, *actors: Actor, frames: int = 12) -> torch.Tensor:
    story = Story((Act(scene, actors, "", 0, "open"),), frames)
    return render(story)[None]


def test_every_attribute_is_read_rightly_on_exact_renders_and_after_the_codec(stories, video):
    for clips in (video, round_trip(load_codec(), video)):
        accuracy = detector_accuracy(clips, stories)
        assert min(accuracy.values()) >= 0.97, accuracy
        assert (~detect(clips).broken).float().mean() >= 0.95


def test_attributes_name_scene_and_actors_from_top_to_bottom():
    actors = (Actor("white", "ring", "large", "left"), Actor("red", "cross", "small", "bob"))
    assert attributes(detect(show("cave", *actors))) == [
        ("cave", ("white", "ring", "large", "left"), ("red", "cross", "small", "bob"))
    ]


def test_attributes_of_the_frames_after_a_switch_ignore_what_came_before():
    actor = Actor("blue", "square", "large", "right")
    clip = torch.cat([show("night", Actor("pink", "circle", "small", "still")), show("sea", actor)], 1)
    assert attributes(detect(clip[:, 12:])) == [("sea", ("blue", "square", "large", "right"))]


def test_positions_follow_the_actor_around_the_torus():
    seen = detect(show("meadow", Actor("red", "triangle", "small", "right"), frames=30))
    x_T = seen.centre_BTL2[0, :, 0, 0]
    steps = (x_T.diff() + WIDTH / 2).remainder(WIDTH) - WIDTH / 2
    assert (steps - 1.25).abs().max() < 0.2
    assert (seen.centre_BTL2[0, :, 0, 1] - WIDTH / 2).abs().max() < 0.3


def test_memberships_stay_in_the_unit_interval_on_anything():
    generator = torch.Generator().manual_seed(0)
    for clip in (
        torch.rand(1, 3, 3, FRAME_SIZE, FRAME_SIZE, generator=generator),
        torch.zeros(1, 3, 3, FRAME_SIZE, FRAME_SIZE),
    ):
        seen = detect(clip)
        for name, value in vars(seen).items():
            if name == "size":
                continue
            assert value.isfinite().all(), name
            if name != "centre_BTL2":
                assert value.min() >= 0 and value.max() <= 1 + 1e-5, name
        assert (seen.count_BT2.sum(2) <= 1 + 1e-5).all()


@pytest.mark.parametrize("kind", ["empty", "red", "checkerboard", "noise", "grey", "two worlds"])
def test_confidence_falls_below_the_threshold_on_what_is_no_world(kind, video):
    generator = torch.Generator().manual_seed(0)
    pixel = torch.arange(FRAME_SIZE) // 4
    checkers = (pixel[:, None] + pixel) % 2
    clips = {
        "empty": show("night"),
        "red": torch.tensor([0.93, 0.16, 0.18])[:, None, None].expand(1, 4, 3, FRAME_SIZE, FRAME_SIZE),
        "checkerboard": checkers.float().expand(1, 4, 3, FRAME_SIZE, FRAME_SIZE),
        "noise": torch.rand(1, 4, 3, FRAME_SIZE, FRAME_SIZE, generator=generator),
        "grey": torch.full((1, 4, 3, FRAME_SIZE, FRAME_SIZE), 0.5),
        "two worlds": (video[:20] + video[20:40]) / 2,
    }
    assert (detect(clips[kind]).broken).float().mean() >= 0.9
    assert (~detect(video).broken).float().mean() >= 0.95


def test_scenes_are_told_apart_without_an_actor_in_the_way():
    for index, scene in enumerate(SCENES):
        member_S = detect(show(scene)).scene_BTS[0, 0]
        assert member_S.argmax() == index and member_S[index] > 3 * member_S.sum().sub(member_S[index])


def test_another_shape_is_refused():
    with pytest.raises(ValueError, match=str(FRAME_SIZE)):
        detect(torch.zeros(2, 3, 3, 64, 64))
