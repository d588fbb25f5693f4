"""What fits at a fork of all that was asked for."""

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.config import ExplorationConfig
from kvpo.engine.forks import fit_exploration
from kvpo.method.routing import dispersed_routes, route_pool


def seeded(seed):
    return torch.Generator().manual_seed(seed)


ASKED = ExplorationConfig(
    branches=8, blocks=5, tail_blocks=2, recent=3, routed=6, distinct=2, resident_frames=33
)
VIDEO = {"num_frames": 60, "window_end": 60, "pool": 27, "block": 3}


def fitted(fork, **changes):
    """Blocks, tail and distinct frames that fit, with changes to what is asked for or to the video."""
    video = {name: changes.pop(name, value) for name, value in VIDEO.items()}
    asked = replace(ASKED, **changes)
    found = fit_exploration(asked, fork, **video)
    assert found.routed == (found.distinct if asked.distinct == asked.routed else asked.routed)
    return found.blocks, found.tail_blocks, found.distinct


def test_nothing_shrinks_where_everything_fits():
    assert fitted(30) == fitted(39) == (5, 2, 2)


@pytest.mark.parametrize(
    ("fork", "changes", "expected"),
    [
        (42, {}, (5, 1, 2)),
        (45, {}, (5, 0, 2)),
        (51, {}, (3, 0, 2)),
        (30, {"window_end": 39}, (3, 2, 2)),
        (30, {"window_end": 39, "num_frames": 42}, (3, 1, 2)),
        (12, {"branches": 7, "distinct": 5, "pool": 6}, (5, 2, 4)),
        (10, {"branches": 6, "distinct": 3, "pool": 4}, (5, 2, 2)),
        (10, {"branches": 4, "distinct": 4, "pool": 4}, (5, 2, 3)),
        (30, {"branches": 4, "distinct": 6, "pool": 5}, (5, 2, 4)),
        (10, {"branches": 2, "distinct": 1, "pool": 2}, (5, 2, 1)),
        (10, {"branches": 2, "distinct": 2, "donor": 1, "pool": 2}, (5, 2, 2)),
    ],
)
def test_a_short_clip_shrinks_blocks_tail_and_distinct_frames(fork, changes, expected):
    assert fitted(fork, **changes) == expected


@pytest.mark.parametrize(
    ("fork", "message"),
    [
        ((58, 27), "fork = 58: no block of 3 frames follows in a video of 60"),
        ((6, 0), "branches = 8: a pool of 0 frames has only 0 different sets of 1"),
        ((9, 3), "branches = 8: a pool of 3 frames has only 3 different sets of 1"),
    ],
)
def test_what_cannot_shrink_to_fit_is_refused(fork, message):
    with pytest.raises(ValueError, match=message):
        fitted(fork[0], pool=fork[1])


@given(
    fork=st.integers(0, 20).map(lambda b: 3 * b),
    length=st.integers(0, 60),
    window_end=st.integers(0, 60),
    distinct=st.integers(1, 6),
    branches=st.integers(1, 10),
)
def test_what_fits_can_be_drawn_and_no_more_would(fork, length, window_end, distinct, branches):
    pool = route_pool(fork, sink=range(3), recent=3, resident=33)
    asked = {"num_frames": length, "distinct": distinct, "branches": branches}
    asked |= {"window_end": window_end, "pool": len(pool), "routed": 6}
    room = (min(window_end, length) - fork) // 3
    try:
        blocks, tail_blocks, few = fitted(fork, **asked)
    except ValueError:
        assert room < 1 or len(pool) < branches
        return
    routes = dispersed_routes(pool, branches=branches, routed=distinct, distinct=few, generator=seeded(0))
    for route in routes.tolist():
        assert set(route) <= set(range(3, fork - 3))
    assert few == distinct or math.comb(len(pool), few + 1) < branches
    assert blocks == min(5, room)
    assert tail_blocks == min(2, (length - fork) // 3 - blocks)
