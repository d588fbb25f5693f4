"""Where videos may fork: everything that was asked for where it fits, the most that fits elsewhere."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.app.build import source_of
from kvpo.app.presets import PRESETS
from kvpo.engine.forks import SWITCH_SHARE, Fork, draw_forks, fork_numbers, plan_forks, shrunk_fields
from kvpo.engine.noise import keyed_generator
from kvpo.models.settings import Deployment
from tests.engine.tiny import EXPLORATION, generator, prompt, rolled_out

EIGHT = replace(EXPLORATION, branches=8, distinct=2)
"""A pool of 5 frames has 10 pairs, one of 4 only 6: forks from frame 12 on."""


DEPLOYMENT = Deployment(block=3, window=12, sink=3)


def planned(*prompts, exploration=EIGHT):
    return plan_forks(prompts, exploration, DEPLOYMENT)


def roomiest(plan):
    """Frames of the forks with most room, and what fits there."""
    return tuple(fork.frame for fork in plan.roomiest), plan.roomiest[0].exploration


def blocks_of(fork):
    """First frames of the blocks that a window holds."""
    return range(fork.frame, fork.frame + 3 * fork.exploration.blocks, 3)


def test_forks_leave_room_for_history_window_and_tail():
    assert roomiest(planned(prompt(0, 30))) == ((12, 15, 18, 21), EIGHT)
    # The last window that fits, whose tail is gone.
    assert planned(prompt(0, 30)).forks[-1] == Fork(24, replace(EIGHT, tail_blocks=0))
    assert roomiest(planned(prompt(0, 30), exploration=replace(EIGHT, tail_blocks=0)))[0][-1] == 24


def test_no_fork_has_a_switch_strictly_inside_its_window():
    plan = planned(prompt(0, 39, (20,)), exploration=replace(EXPLORATION, blocks=3))
    # The switch acts at frame 21: windows from 15 and 18 would contain it.
    assert roomiest(plan)[0] == (9, 12, 21, 24, 27)
    assert [fork.frame for fork in plan.at_switches] == [21]
    # Block 18 is in the window of fork 12; no shorter window is needed for it.
    assert {fork.exploration.blocks for fork in plan.forks} == {3}


def test_prompts_that_fork_together_have_forks_in_common():
    """Switches act at frames 12, 15 and 21; what fits one prompt must fit them all."""
    both = [prompt(0, 45, (12, 21)), prompt(1, 45, (15,))]
    assert roomiest(planned(both[0]))[0] == (12, 15, 21, 24, 27, 30, 33, 36)
    assert roomiest(planned(*both))[0] == (15, 21, 24, 27, 30, 33, 36)


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
    assert roomiest(plan) == (frames, replace(asked, **fitted))
    assert shrunk_fields(asked, roomiest(plan)[1]) == {
        name: (vars(asked)[name], fitted[name]) for name in fitted
    }


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
    assert (roomiest(plan)[1] == asked) == bool(roomy)
    if roomy:
        assert roomiest(plan)[0] == tuple(roomy)


def test_a_shrunken_rollout_has_the_pages_it_needs_and_no_more():
    one = generator()
    plan = planned(prompt(0, 18), exploration=replace(EXPLORATION, branches=4, blocks=9, tail_blocks=9))
    (fork,) = plan.roomiest
    assert fork.frame == 12 and (fork.exploration.blocks, fork.exploration.tail_blocks) == (2, 0)
    rollout = rolled_out(one, [prompt(0, 18)], [fork], ("key",))
    same = Fork(12, replace(EXPLORATION, branches=4, blocks=2, tail_blocks=0))
    fitting = rolled_out(one, [prompt(0, 18)], [same], ("key",))
    assert rollout.cache.num_pages == fitting.cache.num_pages
    assert torch.equal(rollout.groups[0].clean_MTCHW, fitting.groups[0].clean_MTCHW)
    for either in (rollout, fitting):
        either.release()
        assert either.cache.pages_in_use == 0


@given(
    frames=st.integers(5, 16).map(lambda blocks: 3 * blocks),
    blocks=st.integers(1, 5),
    distinct=st.integers(1, 4),
    switches=st.sets(st.integers(1, 47), max_size=4),
    keep_sink=st.booleans(),
)
def test_every_block_that_can_be_routed_is_trained(frames, blocks, distinct, switches, keep_sink):
    """Against the definition: a block can be where its own frame can fork, in a window of one block."""
    deployment = replace(DEPLOYMENT, keep_sink_at_switch=keep_sink)
    video = prompt(0, frames, tuple(sorted(s for s in switches if s < frames))[:3])
    asked = replace(EXPLORATION, branches=4, blocks=blocks, distinct=distinct, routed=4, resident_frames=0)
    plan = plan_forks([video], asked, deployment)
    assert {block for fork in plan.forks for block in blocks_of(fork)} == set(range(12, frames, 3))
    for fork in plan.forks:
        fitted = fork.exploration
        assert fork.frame + 3 * (fitted.blocks + fitted.tail_blocks) <= frames
        assert len({video.segment_at(block) for block in blocks_of(fork)}) == 1
    for window in plan.windows:
        assert len({(fork.exploration.blocks, fork.exploration.distinct) for fork in window}) == 1
    acts = {-(-switch // 3) * 3 for switch in video.switches}
    assert {fork.frame for fork in plan.at_switches} == {at for at in acts if 12 <= at < frames}


def test_the_draw_reaches_every_block_and_favours_switches():
    """Shares of 3,000 draws against the probabilities that the rule gives."""
    video = prompt(0, 60, (21, 39))
    plan = planned(video)
    drawn = [plan.draw(keyed_generator("draw", n)) for n in range(3000)]
    assert set(drawn) == set(plan.forks)
    expected = {fork: 0.0 for fork in plan.forks}
    for window in plan.windows:
        for fork in window:
            expected[fork] += (1 - SWITCH_SHARE) / len(plan.windows) / len(window)
    for fork in plan.at_switches:
        expected[fork] += SWITCH_SHARE / 2
    for fork, share in expected.items():
        assert abs(drawn.count(fork) / 3000 - share) < 4 * (share * (1 - share) / 3000) ** 0.5
    numbers = fork_numbers([video] * 3000, drawn, EIGHT, block=3)
    assert sum(numbers["forks"].values()) == 3000
    assert SWITCH_SHARE < numbers["switch_forks"] < SWITCH_SHARE + 0.15
    assert numbers["tail_blocks"] == sum(fork.exploration.tail_blocks for fork in drawn) / 3000 < 1
    assert "blocks" not in numbers and plan.draw(keyed_generator("draw", 5)) == drawn[5]


@pytest.mark.parametrize("preset", sorted(PRESETS))
def test_the_presets_train_every_block_with_a_history(preset):
    config = PRESETS[preset]()
    video = replace(source_of(config).longest_prompt(config), id=0)
    plan = plan_forks([video], config.exploration, config.stream.deployment)
    trained = {block for fork in plan.forks for block in blocks_of(fork)}
    assert trained == set(range(12 if config.stream.sink else 9, video.num_frames, 3))


def test_each_group_draws_its_own_fork_but_donors_need_a_common_one():
    prompts = [prompt(0, 45, (12, 21)), prompt(1, 45, (15,)), prompt(2, 30)]
    apart = draw_forks(prompts, EIGHT, DEPLOYMENT, (0, 1))
    assert apart == draw_forks(prompts, EIGHT, DEPLOYMENT, (0, 1)) and len({f.frame for f in apart}) > 1
    common = {fork.frame for fork in planned(*prompts).forks}
    for update in range(20):
        first, *others = draw_forks(prompts, replace(EIGHT, donor=1), DEPLOYMENT, (0, update))
        assert others == [first] * 2 and first.frame in common


def test_blocks_count_more_than_distinct_frames_and_those_more_than_the_tail():
    """Six branches: four frames have six pairs and only four triples, seven frames enough of both."""
    asked = replace(EXPLORATION, branches=6, distinct=3, recent=2)
    plan = planned(prompt(0, 30, (15,)), exploration=asked)
    by_block = dict(zip(range(9, 30, 3), plan.windows, strict=True))
    (held,) = by_block[12]  # fork 12 has the frames for three distinct ones, but room for one block
    assert held.frame == 9 and (held.exploration.blocks, held.exploration.distinct) == (2, 2)
    frames, fitted = roomiest(planned(prompt(0, 18), exploration=asked))
    assert frames == (12,) and (fitted.distinct, fitted.tail_blocks) == (3, 0)
