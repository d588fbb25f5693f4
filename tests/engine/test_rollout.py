"""Branches and anchors: exact where nothing differs, told apart by history alone, all pages given back."""

from dataclasses import replace

import pytest
import torch

from kvpo.engine.explorers import Member, draw_routes
from kvpo.engine.forks import Fork
from kvpo.engine.noise import keyed_generator
from kvpo.engine.replay import member_row, replay_context
from kvpo.engine.stream import advance, stream_latents
from kvpo.method.flow import Step
from tests.engine.tiny import (
    EXPLORATION,
    generator,
    grown,
    grown_roots,
    prompt,
    rolled_out,
    route,
    tape_of,
    texts,
    visited,
)

DEPLOYMENTS = {
    "window": dict(),
    "no sink": dict(sink=0),
    "bank": dict(bank_size=3),
    "sparse bank": dict(bank_size=3, sparse_activation=True, bank_every_block=True),
    "published bank": dict(bank_size=3, bank_as_published=True),
    "everything": dict(window=-1, sink=0),
    "everything and a sink": dict(window=-1, sink=3),
}
FORK = 18


def collected(one, prompts, exploration=EXPLORATION, fork=FORK, key=("k",)):
    return rolled_out(one, prompts, [Fork(fork, exploration)] * len(prompts), key)


def by_hand(one, prompts, members, exploration=EXPLORATION, fork=FORK):
    """Trajectories of hand-made members in a rollout of their own."""
    rollout = grown_roots(one, prompts, fork, exploration)
    found = visited(rollout, members)
    rollout.release()
    assert rollout.cache.pages_in_use == 0
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
@pytest.mark.parametrize("recent", [0, 3])
def test_the_all_recent_route_is_deployment_bitwise(dtype, deployment, recent):
    """Five routed blocks against five plain ones; the routes name the most recent frames."""
    one = generator(dtype, **deployment, renoise=True)
    plain, routed = (grown(one, FORK, prompts=[prompt(0, 36), prompt(1, 36)]) for _ in range(2))
    past = one.deployment.local_past
    for _ in range(5):
        start = plain[0].start
        first = one.deployment.sink if past is None else max(one.deployment.sink, start - past)
        pages = [stream.history.page_ids(range(first, start - recent)) for stream in routed]
        expected = advance(one, plain)
        found = advance(one, routed, routes=pages, recent=recent)
        assert torch.equal(expected.velocities_RSFCHW, found.velocities_RSFCHW)
        assert torch.equal(expected.clean_RFCHW, found.clean_RFCHW)


def test_the_all_recent_route_of_a_rollout_is_its_anchor_bitwise():
    one = generator(torch.float32)
    recent = Member(0, routes=(route(*range(12, 15)), route(*range(15, 18))))
    found = by_hand(one, [prompt(0)], [recent, Member(0), recent])
    assert torch.equal(found.clean_TCHW[0], found.clean_TCHW[1])
    assert torch.equal(found.clean_TCHW[0], found.clean_TCHW[2])
    assert torch.equal(found.states_PSFCHW[0], found.states_PSFCHW[1])
    assert torch.equal(found.velocities_PSFCHW[0], found.velocities_PSFCHW[1])


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_the_anchor_is_plain_generation(deployment):
    one = generator(**deployment)
    prompts = [prompt(0, 27), prompt(1, 27, (FORK,))]
    expected = stream_latents(one, prompts, texts(), tape_of())
    rollout = collected(one, prompts)
    for row, group in enumerate(rollout.groups):
        latents = torch.cat([*group.root.latents, group.clean_MTCHW[-1]])
        assert (latents - expected[row]).abs().max() <= 1e-10
    rollout.release()


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_branches_do_not_depend_on_their_batch(deployment):
    one = generator(torch.float32, **deployment)
    prompts = [prompt(0), prompt(1, 30, (24,))]
    together, alone, pairs = (collected(one, prompts, replace(EXPLORATION, rows=rows)) for rows in (0, 1, 2))
    for a, b, c in zip(together.groups, alone.groups, pairs.groups, strict=True):
        assert a.routes == b.routes == c.routes
        assert (a.clean_MTCHW - b.clean_MTCHW).abs().max() <= 1e-5
        assert (a.clean_MTCHW - c.clean_MTCHW).abs().max() <= 1e-5
        assert (a.trajectories.velocities_MPSFCHW - b.trajectories.velocities_MPSFCHW).abs().max() <= 1e-5
        assert (a.clean_MTCHW[:-1] - a.clean_MTCHW[-1]).abs().flatten(1).amax(1).min() > 1e-2
    for rollout in (together, alone, pairs):
        rollout.release()
        assert rollout.cache.pages_in_use == 0


def test_members_share_their_noise_and_keep_what_the_solver_visited():
    one = generator(renoise=True)
    rollout = collected(one, [prompt(0)])
    (group,) = rollout.groups
    assert group.branches == 3 and group.blocks == 2 and group.window_frames == 6
    found = group.trajectories
    assert found.states_MPSFCHW.shape[:4] == (4, 2, 3, 3) and group.clean_MTCHW.shape[:2] == (4, 9)
    for block in range(2):
        initial = tape_of()(0, FORK // 3 + block, "initial")
        assert all(torch.equal(state, initial) for state in found.states_MPSFCHW[:, block, 0])
    last = one.sigmas[-1]
    clean = found.states_MPSFCHW[:, :, -1] - last * found.velocities_MPSFCHW[:, :, -1]
    assert torch.allclose(clean.flatten(1, 2), group.clean_MTCHW[:, :6], atol=1e-12)
    assert torch.equal(found.clean_MPFCHW.flatten(1, 2), group.clean_MTCHW[:, :6])
    rollout.release()


def test_a_members_own_step_is_taken_in_its_window_alone():
    one, calls = generator(), []

    def counted(*arguments):
        calls.append(arguments)
        return one.step.rule(*arguments)

    exploration = replace(EXPLORATION, blocks=2, tail_blocks=2)
    own, plain = Member(0, step=Step(counted, draws=False)), Member(0)
    found = by_hand(one, [prompt(0, 36)], [own, plain], exploration)
    assert len(calls) == 2 * (len(one.sigmas) - 1), "two blocks of the window, none of the tail"
    assert torch.equal(found.clean_TCHW[0], found.clean_TCHW[1])


def test_a_fork_copies_no_page_and_everything_comes_back():
    one = generator()
    rollout = grown_roots(one, [prompt(0), prompt(1)], FORK, EXPLORATION)
    before = rollout.cache.pages_in_use
    forks = [root.fork() for root in rollout.roots.values() for _ in range(8)]
    assert rollout.cache.pages_in_use == before
    for stream in forks:
        stream.history.release()
    keys = rollout.cache.keys_LQTND.clone()
    held = [page for root in rollout.roots.values() for page in root.history.pages.values()]
    visited(rollout, [Member(0, routes=(route(4, 5, 6),) * 2), Member(1)])
    assert rollout.cache.pages_in_use == before
    assert torch.equal(keys[:, held], rollout.cache.keys_LQTND[:, held])
    rollout.release()
    assert rollout.cache.pages_in_use == 0


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_a_switch_at_the_fork_is_acted_on_before_the_branches_start(deployment):
    """Text and re-encoded history of every branch are the new prompt's; fails if branches see the old."""
    one = generator(**deployment)
    exploration = replace(EXPLORATION, blocks=1, tail_blocks=2)
    past = one.deployment.local_past
    recent = route(*range(one.deployment.sink if past is None else FORK - past, FORK - 3))
    members = [Member(0, routes=(recent,)), Member(0, routes=(route(4, 6, 7),)), Member(0)]
    new = by_hand(one, [prompt(0, 30, (FORK,))], members, exploration).clean_TCHW
    old = by_hand(one, [prompt(0, 30)], members, exploration).clean_TCHW
    expected = stream_latents(one, [prompt(0, 30, (FORK,))], texts(), tape_of())[0, FORK:27]
    assert (new[0] - expected).abs().max() <= 1e-10
    assert (new[2] - expected).abs().max() <= 1e-10
    assert (new - old)[:, :3].abs().flatten(1).amax(1).min() > 0.02

    # Were history left as it was, and only the text new, the branches would differ from this.
    rollout = grown_roots(one, [prompt(0, 30)], FORK, exploration)
    root = rollout.roots[0]
    root.prompt, root.segment = prompt(0, 30, (FORK,)), 1
    stale = visited(rollout, members).clean_TCHW
    assert (new - stale)[:, :3].abs().flatten(1).amax(1).min() > 1e-3


def test_routed_frames_before_the_window_keep_their_prompt():
    one = generator()
    exploration = replace(EXPLORATION, resident_frames=33)
    pages = {}
    for name, switches in (("old", ()), ("new", (36,))):
        rollout = grown_roots(one, [prompt(0, 60, switches)], 36, exploration)
        history = rollout.roots[0].history
        pages[name] = {f: rollout.cache.keys_LQTND[:, page].clone() for f, page in history.pages.items()}
    assert sorted(pages["new"]) == [0, 1, 2, *range(6, 36)]
    rewritten = [f for f in pages["new"] if not torch.equal(pages["old"][f], pages["new"][f])]
    assert rewritten == list(range(24, 36))


def test_routes_are_drawn_once_per_window():
    once = collected(generator(), [prompt(0), prompt(1)])
    pool = range(3, FORK - 3)
    for group in once.groups:
        assert all(first == second for first, second in group.routes)
        for routes in group.routes:
            assert all(r.group == group.index and r.frame in pool for block in routes for r in block)
    once.release()


def test_the_key_alone_decides_the_routes():
    one = generator()
    first, same, other = (
        collected(one, [prompt(0)], key=key).groups[0].routes for key in ((7, 1), (7, 1), (7, 2))
    )
    assert first == same != other


def test_donor_routes_bring_another_videos_history():
    one = generator()
    exploration = replace(EXPLORATION, donor=1)
    groups = [range(3, 15)] * 3
    draws = keyed_generator("donors")
    routes = [draw_routes(groups, index, exploration, draws) for index in range(3)]
    for index, own in enumerate(routes):
        for slots in own:
            assert len(slots) == 3
            assert {r.group for r in slots} - {index} and len({r for r in slots if r.group != index}) == 1
    # The donor's frames matter, and matter only where they are routed.
    donors = (prompt(1, 30), replace(prompt(2, 30), segments=("a green ring",)))
    members = [Member(0, routes=(route(4, 5) + route(6, group=1),) * 2), Member(0)]
    one_donor, other = (by_hand(one, [prompt(0), donor], members).clean_TCHW for donor in donors)
    assert (one_donor[0] - other[0]).abs().max() > 1e-2
    assert (one_donor[1] - other[1]).abs().max() <= 1e-12


def test_donors_need_a_second_prompt():
    with pytest.raises(ValueError, match="exploration.donor = 1"):
        collected(generator(), [prompt(0)], replace(EXPLORATION, donor=1))


def test_all_slots_may_be_a_donors():
    rollout = collected(generator(), [prompt(0), prompt(1)], replace(EXPLORATION, donor=2))
    assert {r.group for routes in rollout.groups[0].routes for block in routes for r in block} == {1}
    rollout.release()


def test_a_routed_frame_that_is_not_resident_is_an_error_and_leaks_nothing():
    one = generator()
    exploration = replace(EXPLORATION, resident_frames=15)
    rollout = grown_roots(one, [prompt(0, 60)], 36, exploration)
    before = rollout.cache.pages_in_use
    with pytest.raises(KeyError):
        visited(rollout, [Member(0, routes=(route(12, 30, 31),) * 2)])
    assert rollout.cache.pages_in_use == before


def test_rows_may_ask_for_their_own_noise():
    one = generator()

    def tape(video, block, kind):
        return tape_of()(9, block, kind)

    clean = by_hand(one, [prompt(0)], [Member(0), Member(0), Member(0, tape=tape)]).clean_TCHW
    assert torch.equal(clean[0], clean[1])
    assert (clean[0] - clean[2]).abs().max() > 0.1


READINGS = {
    "as deployed": dict(routed=3, recent=3, distinct=2),
    "six and three past": dict(routed=6, recent=3, distinct=6),
    "four counting the block": dict(routed=5, recent=1, distinct=5),
    "three counting the block": dict(routed=6, recent=0, distinct=4),
}


@pytest.mark.parametrize("reading", READINGS.values(), ids=READINGS)
@pytest.mark.parametrize("deployment", [dict(), dict(window=-1, sink=0)], ids=["window", "everything"])
def test_every_reading_of_the_paper_is_a_pair_of_integers(reading, deployment):
    """Also where a branch sees more or fewer frames than its anchor."""
    rollout = collected(generator(**deployment), [prompt(0, 33)], replace(EXPLORATION, **reading), fork=21)
    (group,) = rollout.groups
    assert all(len(block) == reading["routed"] for routes in group.routes for block in routes)
    assert (group.clean_MTCHW[:-1] - group.clean_MTCHW[-1]).abs().flatten(1).amax(1).min() > 1e-2
    rollout.release()
    assert rollout.cache.pages_in_use == 0


@pytest.mark.parametrize("rows", [0, 1])
@pytest.mark.parametrize("blocks", [1, 2, 4])
@pytest.mark.parametrize("name", ["window", "no sink", "published bank", "everything"])
def test_the_pages_set_aside_suffice(rows, blocks, name):
    """Switches before, at and after the fork; many branches; then the replay of all members of a group."""
    one = generator(torch.float32, **DEPLOYMENTS[name], keep_sink_at_switch=False)
    exploration = replace(
        EXPLORATION, branches=5, blocks=blocks, tail_blocks=3, rows=rows, routed=3, distinct=2
    )
    after = FORK + 3 * blocks
    prompts = [
        prompt(0, 60, (15, after, after + 3)),
        prompt(1, 60, (9, FORK, after + 6)),
    ]
    rollout = collected(one, prompts, exploration)
    for group in rollout.groups:
        rows = [member_row(group, n) for n in range(6)]
        with torch.no_grad(), replay_context(one, rows):
            assert rollout.cache.pages_in_use <= rollout.cache.num_pages
    rollout.release()
    assert rollout.cache.pages_in_use == 0


def test_a_long_tail_costs_no_pages():
    one = generator()
    sizes = [
        grown_roots(one, [prompt(0, 120)], FORK, replace(EXPLORATION, tail_blocks=tail)).cache.num_pages
        for tail in (4, 30)
    ]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("fork", [-3, 20, 24, 60])
def test_a_fork_beyond_the_video_is_refused(fork):
    with pytest.raises(ValueError, match=f"fork = {fork}: must be a multiple of 3 from 0 to 21, .*video 0"):
        collected(generator(), [prompt(0), prompt(1)], fork=fork)


MANY = [prompt(0, 33, (15,)), prompt(1, 33), prompt(2, 33, (21,))]


@pytest.mark.parametrize("rows", range(1, 14))
@pytest.mark.parametrize(("groups", "donor"), [(1, 0), (2, 0), (2, 1), (3, 0), (3, 1), (3, 2)])
def test_a_row_limit_changes_nothing_with_or_without_donors(rows, groups, donor):
    """Up to three groups of four members; pages that a later group routes are held until it has."""
    one = generator()
    exploration = replace(EXPLORATION, donor=donor)
    told = []
    free = collected(one, MANY[:groups], exploration)
    forks = [Fork(FORK, replace(exploration, rows=rows))] * groups
    limited = rolled_out(one, MANY[:groups], forks, ("k",), finished=lambda g: told.append(g.index))
    assert told == list(range(groups))
    for expected, found in zip(free.groups, limited.groups, strict=True):
        assert expected.routes == found.routes and expected.root.prompt == found.root.prompt
        # A batch of another shape may sum in another order.
        assert (expected.clean_MTCHW - found.clean_MTCHW).abs().max() <= 1e-10
        for name in ("states_MPSFCHW", "velocities_MPSFCHW"):
            free_one, limited_one = (vars(group.trajectories)[name] for group in (expected, found))
            assert (free_one - limited_one).abs().max() <= 1e-10
    for rollout in (free, limited):
        rollout.release()
        assert rollout.cache.pages_in_use == 0


@pytest.mark.parametrize("rows", [0, 3, 5])
@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_groups_may_fork_at_different_frames(deployment, rows):
    """Against a rollout of each group alone: the same branches, with windows and tails of several lengths."""
    one = generator(**deployment, renoise=True, context_noise=0.005)
    shorter = replace(EXPLORATION, blocks=1, tail_blocks=0)
    # Two switch at their forks, one of them within reach of the start; two in the same step of the tail.
    prompts = [prompt(0, 33, (15, 21)), prompt(1, 33, (24,)), prompt(2, 33), prompt(3, 33, (12,))]
    forks = [Fork(15, EXPLORATION), Fork(18, EXPLORATION), Fork(30, shorter), Fork(12, EXPLORATION)]
    limited = [Fork(f.frame, replace(f.exploration, rows=rows)) for f in forks]
    together = rolled_out(one, prompts, limited)
    assert [group.fork for group in together.groups] == [15, 18, 30, 12]
    for group, own, fork in zip(together.groups, prompts, forks, strict=True):
        alone = grown_roots(one, [own], fork.frame, fork.exploration)
        routes = [tuple(route(*(r.frame for r in block)) for block in b) for b in group.routes]
        found = visited(alone, [*(Member(0, routes=own) for own in routes), Member(0)])
        clean = found.clean_TCHW
        assert (group.trajectories.states_MPSFCHW - found.states_PSFCHW).abs().max() <= 1e-10
        assert (group.trajectories.velocities_MPSFCHW - found.velocities_PSFCHW).abs().max() <= 1e-10
        assert group.clean_MTCHW.shape == clean.shape and (group.clean_MTCHW - clean).abs().max() <= 1e-10
        alone.release()
    together.release()
    assert together.cache.pages_in_use == 0


@pytest.mark.parametrize("resident", [0, 21])
def test_no_route_names_a_frame_of_a_sink_that_a_switch_has_moved(resident):
    one = generator(keep_sink_at_switch=False)
    exploration = replace(EXPLORATION, resident_frames=resident, blocks=3)
    rollout = collected(one, [prompt(0, 60, (15, 20)), prompt(1, 60, (24,))], exploration, fork=24)
    sinks = []
    for group in rollout.groups:
        sinks.append(group.root.history.sink)
        routed = {slot.frame for routes in group.routes for block in routes for slot in block}
        assert not routed & set(sinks[-1])
        assert routed <= set(range(24 - (resident - 3) if resident else 0, 21))
    assert sinks == [(9, 10, 11), (12, 13, 14)]
    rollout.release()


@pytest.mark.parametrize("rows", [1, 2, 0])
def test_a_row_limit_holds_where_prompts_switch(rows, monkeypatch):
    one, seen = generator(), []
    encode = type(one).encode

    def watched(self, clean, text, context):
        seen.append(len(clean))
        return encode(self, clean, text, context)

    monkeypatch.setattr(type(one), "encode", watched)
    prompts = [prompt(n, 30, (9, FORK)) for n in range(3)]
    grown_roots(one, prompts, FORK, replace(EXPLORATION, rows=rows)).release()
    assert max(seen) == (rows or 3)


def test_more_recent_frames_than_the_window_sees_stay_until_the_last_routed_block():
    exploration = replace(EXPLORATION, recent=9, blocks=3)
    rollout = collected(generator(), [prompt(0, 45)], exploration)
    alone = collected(generator(), [prompt(0, 45)], replace(exploration, rows=1))
    for one, other in zip(rollout.groups, alone.groups, strict=True):
        torch.testing.assert_close(one.clean_MTCHW, other.clean_MTCHW, rtol=0, atol=1e-10)
