"""Metadata drawn at random, the package against the slot-by-slot reference: no corner left to imagination."""

import random
from collections.abc import Iterable

import pytest
import torch

from tests.parity import synthetic
from tests.parity.fixtures import CHUNKS, metadata
from tests.parity.runs import run_routing, run_stream


def seeds(few: Iterable[int], many: Iterable[int]):
    """A few draws in every run of the tests, many among the slow ones."""
    return [*few, *(pytest.param(seed, marks=pytest.mark.slow) for seed in many)]


def drawn_stream(draw: random.Random) -> tuple[dict, int, int]:
    """Metadata, generated frames and given frames of a stream."""
    model = draw.choice(["longlive", "longlive", "memflow", "memflow", "selfforcing"])
    sink = draw.choice([0, 3, 3, 3, 1, 2, 5, 6])
    window = draw.choice([-1, 12, 12, sink + 3, sink + 4, 10, 15, 21])
    frames = draw.choice([24, 30, 39])
    case = dict(model=model, sink=sink, window=max(window, sink + 3) if window != -1 else -1)
    if model != "selfforcing":
        switches = sorted(draw.randrange(frames + 6) for _ in range(draw.choice([0, 1, 2, 3])))
        case |= dict(switches=switches, keep_sink_at_switch=draw.random() < 0.6)
    if model == "memflow":
        case |= dict(
            bank_size=draw.choice([1, 2, 3, 3, 4, 5]),
            sparse_activation=draw.random() < 0.5,
            bank_every_block=draw.random() < 0.4,
        )
    if model == "longlive":
        # The published variant fails where the sink is longer than a block.
        case["relative_positions"] = sink <= 3 and draw.random() < 0.4
    return case, frames, draw.choice([0, 3, 6, 15]) if model == "selfforcing" else 0


def drawn_routing(draw: random.Random) -> tuple[dict, int]:
    """Metadata and frames of a routing: forks before and after the cache has rolled, switches anywhere."""
    model = draw.choice(["longlive", "longlive", "memflow"])
    chunk = draw.choice([0, 21, 39, 57])
    end = CHUNKS[CHUNKS.index(chunk) + 1]
    fork = max(15, chunk + 3 * draw.choice([0, 0, 1, 2, 3]))
    blocks = min(draw.choice([1, 2, 3, 5]), (end - fork) // 3)
    resident, nearest = draw.choice([33, 33, 24]), draw.choice([3, 4, 6])
    sink = 3 if model == "memflow" else draw.choice([3, 3, 3, 0, 2])
    frames = fork + 3 * blocks + draw.choice([0, 3, 12])
    pool = [*range(max(sink, fork + 3 - (resident - sink)), fork + 3 - nearest)]
    slots = 12 - nearest
    if model == "memflow":
        pool = [*range(sink), *pool]
    else:
        slots -= sink
    used = [sorted(draw.sample(pool, min(slots, len(pool)))) for _ in range(2)]
    # The planner may drop frames, or all of them.
    used[1] = used[1][: draw.choice([len(used[1]), 2, 0])]
    case = dict(
        model=model, sink=sink, fork_frame=fork, branch_chunk_start=chunk, perturbed_blocks=blocks,
        resident_frames=resident, nearest_counting_current_block=nearest, used_frames=used,
        switches=sorted(draw.randrange(frames) for _ in range(draw.choice([0, 1, 2, 3]))),
        keep_sink_at_switch=draw.random() < 0.6,
    )  # fmt: skip
    if model == "memflow":
        case |= dict(bank_size=draw.choice([2, 3, 3]), sparse_activation=draw.random() < 0.3)
    return case, frames


@pytest.mark.parametrize("seed", seeds(range(5), range(5, 160)))
def test_streams_with_random_metadata(seed):
    case, frames, given = drawn_stream(random.Random(seed))
    meta = metadata("stream", **case)
    model = synthetic.small_model(meta)
    with torch.no_grad():
        data = synthetic.stream_fixture(meta, model, frames, given)
    latents = run_stream(meta, data, model, lambda *seen: None)
    assert (latents - data["latents"][0]).abs().max() <= 1e-5, case


@pytest.mark.parametrize("seed", seeds((0, 1, 23), (n for n in range(2, 80) if n != 23)))
def test_routings_with_random_metadata(seed):
    case, frames = drawn_routing(random.Random(seed))
    meta = metadata("routing", **case)
    model = synthetic.small_model(meta)
    with torch.no_grad():
        data = synthetic.routing_fixture(meta, model, frames)
    names = [f"latents_branch_{k}" for k in range(2)] + ["latents_anchor"]
    for name, latents in zip(names, run_routing(meta, data, model), strict=True):
        assert (latents - data[name][0]).abs().max() <= 1e-5, (name, case)
