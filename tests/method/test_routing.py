import math
from collections import Counter
from itertools import combinations

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvpo.method.routing import (
    dispersed_routes,
    route_pool,
    visible_frames,
)
from kvpo.models.settings import Deployment

LONGLIVE = {"sink": 3, "window": 12, "block": 3}


def deployment_frames(start: int, *, sink: int, window: int, block: int) -> tuple[int, ...]:
    """Past frames of a deployed block."""
    first, local = visible_frames(start, range(sink), Deployment(block, window, sink).local_past)
    return (*first, *local)


def exploration_frames(start: int, routed, *, sink: int, recent: int) -> tuple[int, ...]:
    """Past frames of a routed block."""
    first, local = visible_frames(start, range(sink), recent)
    return (*first, *routed, *local)


def independent_routes(pool, *, branches: int, routed: int, distinct: int, generator) -> torch.Tensor:
    """Routes drawn independently for each branch: what dispersed routes are compared with.

    Two branches share distinct^2 / len(pool) frames on average.
    """
    draws = [torch.randperm(len(pool), generator=generator)[:distinct] for _ in range(branches)]
    slots = torch.arange(routed) % distinct
    return torch.tensor(pool)[torch.stack(draws)[:, slots]].sort(dim=1).values


def mean_pairwise_overlap(routes: torch.Tensor) -> float:
    """Distinct frames that two branches share, averaged over all pairs of branches of routes [G, R]."""
    sets = [frozenset(route) for route in routes.tolist()]
    shared = [len(one & other) for one, other in combinations(sets, 2)]
    return sum(shared) / len(shared)


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def draws(draw):
    """Arguments of a route draw that is possible."""
    size = draw(st.integers(1, 14))
    distinct = draw(st.integers(1, size))
    branches = draw(st.integers(2, 10))
    assume(math.comb(size, distinct) >= branches)
    start = draw(st.integers(0, 40))
    return {
        "pool": range(start, start + size),
        "branches": branches,
        "routed": distinct + draw(st.integers(0, 4)),
        "distinct": distinct,
    }


# ---- deployment and exploration contexts -----------------------------------------------------------------


def test_longlive_sees_its_sink_and_six_past_frames():
    assert Deployment(block=3, window=12, sink=3).local_past == 6
    assert deployment_frames(30, **LONGLIVE) == (0, 1, 2, 24, 25, 26, 27, 28, 29)


@pytest.mark.parametrize(
    ("start", "frames"),
    [(0, ()), (3, (0, 1, 2)), (9, tuple(range(9))), (12, (0, 1, 2, *range(6, 12)))],
)
def test_deployment_while_the_window_fills(start, frames):
    assert deployment_frames(start, **LONGLIVE) == frames


def test_deployment_without_a_sink_and_without_a_limit():
    assert deployment_frames(30, sink=0, window=12, block=3) == tuple(range(21, 30))
    assert deployment_frames(30, sink=3, window=-1, block=3) == tuple(range(30))


def test_a_window_too_small_for_sink_and_block_is_refused():
    with pytest.raises(ValueError, match=r"stream.window: must be .* stream.sink \+ stream.block = 6, got 5"):
        Deployment(block=3, window=5, sink=3).check()


@pytest.mark.parametrize(
    ("routed", "recent", "keys"),
    [
        pytest.param((5, 9, 20), 3, 12, id="3+3: as many keys as in deployment"),
        pytest.param((3, 4, 5, 6, 7, 8), 3, 15, id="the paper's nine slots: 6 routed + 3 recent"),
        pytest.param((4, 6, 11, 12, 19), 1, 12, id="public code m=4: 5 routed + 1 past"),
        pytest.param((4, 6, 11, 12, 19, 22), 0, 12, id="public code m=3: 6 routed + 0 past"),
    ],
)
def test_every_reading_of_the_window_is_two_integers(routed, recent, keys):
    frames = exploration_frames(30, routed, sink=3, recent=recent)
    assert frames == (0, 1, 2, *routed, *range(30 - recent, 30))
    assert len(frames) + LONGLIVE["block"] == keys


def test_routed_frames_come_between_and_may_repeat():
    assert exploration_frames(30, (5, 9, 9), sink=3, recent=1) == (0, 1, 2, 5, 9, 9, 29)
    assert exploration_frames(30, (5, 9), sink=0, recent=2) == (5, 9, 28, 29)


@pytest.mark.parametrize("frame", [2, 27, 30])
def test_sink_recent_and_future_frames_are_never_routed(frame):
    assert frame not in route_pool(30, sink=range(3), recent=3, resident=0)


@given(start=st.integers(0, 60), sink=st.integers(0, 4), routed=st.integers(0, 6), recent=st.integers(0, 6))
def test_the_all_recent_route_is_the_deployment_context(start, sink, routed, recent):
    window, block = sink + routed + recent + 3, 3
    most_recent = range(max(sink, start - routed - recent), max(sink, start - recent))
    frames = exploration_frames(start, most_recent, sink=sink, recent=recent)
    assert frames == deployment_frames(start, sink=sink, window=window, block=block)


@pytest.mark.parametrize(
    ("fork", "resident", "pool"),
    [
        (60, 33, range(30, 57)),
        (21, 33, range(3, 18)),
        (60, 0, range(3, 57)),
        (6, 33, range(3, 3)),
        (60, 6, range(57, 57)),
    ],
)
def test_the_pool_is_what_is_resident_and_old(fork, resident, pool):
    assert route_pool(fork, sink=range(3), recent=3, resident=resident) == tuple(pool)


def test_the_pool_has_no_frame_of_a_sink_that_has_moved():
    """The first frames are then as good as any other, where they are resident."""
    assert route_pool(24, sink=range(6, 9), recent=3, resident=0) == (*range(6), *range(9, 21))
    assert route_pool(24, sink=range(6, 9), recent=3, resident=21) == (*range(9, 21),)


# ---- drawing routes ----------------------------------------------------------------------------------------


@given(arguments=draws(), seed=st.integers(0, 2**31))
def test_dispersed_routes_hold_their_invariants(arguments, seed):
    routes = dispersed_routes(**arguments, generator=seeded(seed))
    assert routes.shape == (arguments["branches"], arguments["routed"])
    assert routes.dtype == torch.int64
    assert torch.equal(routes, routes.sort(dim=1).values)
    assert set(routes.flatten().tolist()) <= set(arguments["pool"])

    sets = [frozenset(route) for route in routes.tolist()]
    assert len(set(sets)) == len(sets), "no two branches have the same set"
    assert all(len(members) == arguments["distinct"] for members in sets)
    slots = [Counter(route).values() for route in routes.tolist()]
    assert all(max(counts) - min(counts) <= 1 for counts in slots), "slots are shared out evenly"
    usage = Counter(frame for members in sets for frame in members)
    counts = [usage[frame] for frame in arguments["pool"]]
    assert max(counts) - min(counts) <= 1, "frames are used evenly"


@given(arguments=draws(), seed=st.integers(0, 2**31))
def test_dispersed_routes_reach_the_least_possible_overlap(arguments, seed):
    routes = dispersed_routes(**arguments, generator=seeded(seed))
    branches, size = arguments["branches"], len(arguments["pool"])
    often, extra = divmod(branches * arguments["distinct"], size)
    least = (size - extra) * math.comb(often, 2) + extra * math.comb(often + 1, 2)
    assert mean_pairwise_overlap(routes) == pytest.approx(least / math.comb(branches, 2))
    independent = independent_routes(**arguments, generator=seeded(seed))
    assert mean_pairwise_overlap(routes) <= mean_pairwise_overlap(independent) + 1e-12


def test_overlap_of_the_public_setting():
    """Pool 14, 5 routed, 8 branches: the public shifted window shares 2.14 frames, independent draws 1.79."""
    arguments = {"pool": range(3, 17), "branches": 8, "routed": 5, "distinct": 5}
    independent = [
        mean_pairwise_overlap(independent_routes(**arguments, generator=seeded(s))) for s in range(300)
    ]
    assert sum(independent) / 300 == pytest.approx(25 / 14, abs=0.05)
    assert mean_pairwise_overlap(dispersed_routes(**arguments, generator=seeded(0))) == pytest.approx(38 / 28)


@pytest.mark.parametrize("draw", [dispersed_routes, independent_routes])
def test_every_pool_frame_is_equally_likely(draw):
    repeats, pool = 600, range(5, 12)
    arguments = {"pool": pool, "branches": 4, "routed": 3, "distinct": 2}
    slots = Counter(
        frame
        for seed in range(repeats)
        for frame in draw(**arguments, generator=seeded(seed)).flatten().tolist()
    )
    expected = repeats * 4 * 3 / len(pool)
    assert all(abs(slots[frame] - expected) < 5 * expected**0.5 for frame in pool), slots


def test_as_many_branches_as_there_are_sets():
    routes = dispersed_routes(range(8), branches=70, routed=4, distinct=4, generator=seeded(0))
    assert len({tuple(route) for route in routes.tolist()}) == math.comb(8, 4)


def test_the_generator_alone_decides():
    arguments = {"pool": range(3, 30), "branches": 8, "routed": 3, "distinct": 2}
    torch.manual_seed(0)
    first = dispersed_routes(**arguments, generator=seeded(7))
    torch.manual_seed(1)
    assert torch.equal(first, dispersed_routes(**arguments, generator=seeded(7)))
    assert not torch.equal(first, dispersed_routes(**arguments, generator=seeded(8)))


def test_a_pool_too_small_for_the_branches_is_refused():
    message = "branches = 8: a pool of 4 frames has only 6 different sets of 2; fork later"
    with pytest.raises(ValueError, match=message):
        dispersed_routes(range(4), branches=8, routed=3, distinct=2, generator=seeded(0))


@pytest.mark.parametrize("distinct", [0, 4])
def test_distinct_frames_that_do_not_fit_the_slots_are_refused(distinct):
    with pytest.raises(ValueError, match=f"distinct = {distinct}: must be between 1 and routed = 3"):
        dispersed_routes(range(9), branches=4, routed=3, distinct=distinct, generator=seeded(0))


def test_overlap_counts_distinct_frames():
    assert mean_pairwise_overlap(torch.tensor([[1, 1, 2], [1, 2, 2], [3, 3, 4]])) == pytest.approx(2 / 3)
