"""Where videos may fork: everything that was asked for where it fits, the most that fits elsewhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.engine.forks import plan_forks, shrunk
from kvpo.engine.rollout import collect
from tests.engine.tiny import EXPLORATION, generator, prompt, tape_of, texts

EIGHT = replace(EXPLORATION, branches=8, distinct=2)
"""A pool of 5 frames has 10 pairs, one of 4 only 6: forks from frame 12 on."""


def planned(*prompts, exploration=EIGHT):
    return plan_forks(prompts, exploration, block=3, sink=3)


def test_forks_leave_room_for_history_window_and_tail():
    assert planned(prompt(0, 30)).frames == (12, 15, 18, 21)
    assert planned(prompt(0, 30)).exploration == EIGHT
    assert planned(prompt(0, 30), exploration=replace(EIGHT, tail_blocks=0)).frames[-1] == 24


def test_no_fork_has_a_switch_strictly_inside_its_window():
    plan = planned(prompt(0, 39, (20,)), exploration=replace(EXPLORATION, blocks=3))
    # The switch acts at frame 21: windows from 15 and 18 would contain it.
    assert plan.frames == (9, 12, 21, 24, 27)


def test_prompts_of_one_rollout_fork_together():
    """Switches act at frames 12, 15 and 21; what fits one prompt must fit them all."""
    both = [prompt(0, 45, (12, 21)), prompt(1, 45, (15,))]
    assert planned(both[0]).frames == (12, 15, 21, 24, 27, 30, 33, 36)
    assert planned(*both).frames == (15, 21, 24, 27, 30, 33, 36)


@pytest.mark.parametrize(
    ("videos", "changes", "frames", "fitted"),
    [
        pytest.param([prompt(0, 18)], {}, (12,), dict(tail_blocks=0), id="tail"),
        pytest.param([prompt(0, 15)], {}, (12,), dict(blocks=1, tail_blocks=0), id="blocks"),
        pytest.param([prompt(0, 54, (21, 33, 45))], dict(blocks=5), (21, 33), dict(blocks=4), id="segments"),
        pytest.param(
            [prompt(0, 21)], dict(distinct=3, routed=3, branches=6), (12,), {}, id="just enough"
        ),
        pytest.param(
            [prompt(0, 18)], dict(distinct=5, routed=5, branches=7, tail_blocks=0), (12,),
            dict(distinct=4, routed=4), id="no repeats, fewer slots",
        ),
        pytest.param(
            [prompt(0, 18)], dict(distinct=5, routed=6, branches=7, tail_blocks=0), (12,),
            dict(distinct=4), id="repeats fill the slots",
        ),
        pytest.param(
            [prompt(0, 18), prompt(1, 18)], dict(distinct=6, donor=1, routed=6, branches=7, tail_blocks=0),
            (12,), dict(distinct=5, routed=5), id="donors stay",
        ),
        pytest.param([prompt(0, 30), prompt(1, 18)], {}, (12,), dict(tail_blocks=0), id="the shortest"),
    ],
)  # fmt: skip
def test_short_clips_shrink_to_what_fits(videos, changes, frames, fitted):
    asked = replace(EIGHT, **changes)
    plan = planned(*videos, exploration=asked)
    assert plan.frames == frames
    assert plan.exploration == replace(asked, **fitted)
    assert shrunk(asked, plan.exploration) == {name: (vars(asked)[name], fitted[name]) for name in fitted}


@pytest.mark.parametrize(
    ("videos", "exploration", "message"),
    [
        ([prompt(4, 12)], EIGHT, r"prompts \[4\] of 12 latent frames cannot fork anywhere \(branches = 8: a "
                                 r"pool of 3 frames has only 3 .*; lengthen the videos or lower explorat"),
        ([prompt(0, 90)], replace(EIGHT, resident_frames=9), "branches = 8: a pool of 3 frames"),
        ([prompt(0, 2)], EIGHT, "no block of 3 frames follows in a video of 2"),
    ],
)  # fmt: skip
def test_a_clip_that_nothing_fits_is_refused(videos, exploration, message):
    with pytest.raises(ValueError, match=message):
        planned(*videos, exploration=exploration)


@given(
    frames=st.integers(1, 16).map(lambda blocks: 3 * blocks),
    blocks=st.integers(1, 5),
    tail=st.integers(0, 3),
    distinct=st.integers(1, 4),
    switches=st.sets(st.integers(1, 47), max_size=2),
)
def test_where_everything_fits_nothing_shrinks(frames, blocks, tail, distinct, switches):
    """Against the definition: some fork leaves everything room, and exactly those forks are planned."""
    video = prompt(0, frames, tuple(sorted(s for s in switches if s < frames)))
    asked = replace(EXPLORATION, branches=4, blocks=blocks, tail_blocks=tail, distinct=distinct, routed=4)
    roomy = [
        fork
        for fork in range(0, frames, 3)
        if max(0, fork - 6) >= {1: 4, 2: 4, 3: 4, 4: 5}[distinct]
        and fork + 3 * (blocks + tail) <= frames
        and video.segment_at(fork) == video.segment_at(fork + 3 * (blocks - 1))
    ]
    try:
        plan = planned(video, exploration=asked)
    except ValueError:
        assert not roomy
        return
    assert (plan.exploration == asked) == bool(roomy)
    if roomy:
        assert plan.frames == tuple(roomy)


def test_a_shrunken_rollout_has_the_pages_it_needs_and_no_more():
    one = generator()
    plan = planned(prompt(0, 18), exploration=replace(EXPLORATION, branches=4, blocks=9, tail_blocks=9))
    assert plan.frames == (12,) and (plan.exploration.blocks, plan.exploration.tail_blocks) == (2, 0)
    rollout = collect(one, [prompt(0, 18)], 12, texts(), tape_of(), plan.exploration, ("key",))
    fitting = collect(
        one, [prompt(0, 18)], 12, texts(), tape_of(),
        replace(EXPLORATION, branches=4, blocks=2, tail_blocks=0), ("key",),
    )  # fmt: skip
    assert rollout.cache.num_pages == fitting.cache.num_pages
    assert torch.equal(rollout.groups[0].clean_MTCHW, fitting.groups[0].clean_MTCHW)
    for either in (rollout, fitting):
        either.release()
        assert either.cache.pages_in_use == 0
