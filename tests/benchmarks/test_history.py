"""What causality.py, exploration.py and bases.py count: who comes back, valid differences, what is right."""

from dataclasses import replace
from itertools import islice

import pytest

from kvpo.app.build import build_setup
from kvpo.app.configuration import preset, resolve
from kvpo.world.grammar import parse
from kvpo.world.stories import OPEN, open_prompts
from tests.tiny_world import SETTINGS

RED, BLUE, PINK, GREEN = ("red", "ring"), ("blue", "cross"), ("pink", "circle"), ("green", "square")


def members(**looks):
    """Two members for every history: routed to n frames of act 2, from another story, or the anchor."""
    from causality import Shown

    return [Shown(history.removeprefix("n"), look, False) for history, pair in looks.items() for look in pair]


def test_shares_count_stories_that_tell_their_acts_apart():
    from causality import Observed, summary

    routed = {f"n{n}": (RED, BLUE) for n in range(1, 6)}
    one = members(n0=(RED, RED), **routed, n6=(BLUE, BLUE), donor=(GREEN, RED), anchor=(RED, RED))
    two = members(n0=(RED, PINK), **routed, n6=(BLUE, RED), donor=(BLUE, RED), anchor=(RED, BLUE))
    acts = [{RED}, {BLUE}, {PINK}]
    same = Observed([{RED}, {RED}, {PINK}], {GREEN}, two)
    numbers = summary([Observed(acts, {GREEN}, one), Observed(acts, {GREEN}, two), same])
    assert (numbers["stories"], numbers["stories_shown"]) == (2, 3)
    assert numbers["act1_when_routed_to_act1"] == 0.75
    assert numbers["act2_when_routed_to_act2"] == 0.75
    assert numbers["act2_when_not_routed"] == 0.25
    assert numbers["donor_when_routed_to_donor"] == 0.25
    assert numbers["act2_by_routed_frames"] == [0, 0.5, 0.5, 0.5, 0.5, 0.5, 0.75]
    # Of 1 and 0.5: the deviation 0.354 over the square root of two stories.
    assert numbers["act2_when_routed_to_act2_se"] == pytest.approx(0.25)
    assert numbers["act2_by_routed_frames_se"][1] == 0


def test_bases_are_measured_on_the_same_stories(tiny_base):
    from bases import compared, of_base

    given = {"backbone.geometry": SETTINGS["backbone.geometry"]}
    one, two = (of_base(str(tiny_base), 2, given) for _ in range(2))
    assert one == two and {"reward", "unseen", "broken", "right"} == one["long"].keys() == one["short"].keys()
    assert all(0 <= one["long"][key] <= 1 for key in ("reward", "broken"))
    assert "motion" in one["long"]["right"] and "| 4 acts: broken |" in compared({"one": one, "two": two})


def test_routes_of_every_kind_are_run_for_as_many_draws_as_asked(tiny_base):
    """Three are the default, and more branches than training explores."""
    from causality import observed

    given = {"backbone.geometry": SETTINGS["backbone.geometry"], "backbone.checkpoint": str(tiny_base)}
    config = resolve("demo", None, given)
    evaluation = replace(config.evaluation, validation_prompts=2, test_prompts=2)
    setup = build_setup(replace(config, evaluation=evaluation))
    for one in observed(setup, list(islice(open_prompts(84, setup.generator.block), 2)), 3):
        histories = [member.history for member in one.members]
        assert [histories.count(kind) for kind in ("0", "6", "donor", "anchor")] == [3, 3, 3, 1]


def test_open_stories_leave_only_the_last_act_open_and_tell_the_others_apart():
    stories = list(islice(open_prompts(84, preset("demo").stream.block), 3))
    assert len({story.segments for story in stories}) == 3
    for story in stories:
        assert story.switches == (21, 42, 63) and story.segments[3] == OPEN
    (actor,) = parse(OPEN).actors
    assert (actor.colour, actor.shape) == (None, None)


def test_routes_mix_the_two_acts_in_every_proportion():
    from causality import DONOR, drawn_routes

    stories = list(islice(open_prompts(84, preset("demo").stream.block), 2))
    routes = drawn_routes(stories, 0, 2, sink=3)
    assert len(routes) == 2 * 8
    for history, route in routes:
        frames = [r.frame for r in route]
        assert len(set(frames)) == 6 and min(frames) >= 3
        if history == DONOR:
            assert all(r.group == 1 and 21 <= r.frame < 42 for r in route)
        else:
            assert all(r.group == 0 for r in route)
            assert sum(21 <= frame < 42 for frame in frames) == int(history)
            assert sum(frame < 21 for frame in frames) == 6 - int(history)


def test_differences_are_valid_between_two_possible_continuations():
    from exploration import counted

    shown = [(RED, False), (BLUE, False), (BLUE, True), (GREEN, False)]
    found = counted(shown, possible={RED, BLUE})
    assert found == {"valid_differences": 1 / 6, "valid_share": 0.5, "broken_share": 0.25}
