"""Every value that the fixtures' metadata may take, against the slot-by-slot reference.

The same functions that run the golden fixtures run here, on small random weights.
"""

import pytest
import torch

from tests.parity import synthetic
from tests.parity.fixtures import base_model, load, metadata, of_kind, segments_of
from tests.parity.reference import ReferenceStream, generate
from tests.parity.runs import run_replay, run_routing, run_stream, stream_tape
from tests.parity.synthetic import small_model

SELF_FORCING = dict(model="selfforcing", sink=0)
MEMFLOW = dict(model="memflow", bank_size=3)
STREAMS = {
    "longlive": dict(switches=[6, 27]),
    "longlive, switches off the block grid": dict(switches=[7, 20, 40]),
    "longlive, sink reset": dict(switches=[6, 12, 27, 33], keep_sink_at_switch=False),
    "longlive, small window": dict(window=9, switches=[12, 30]),
    "longlive, no sink": dict(sink=0, switches=[15, 30]),
    "longlive, everything": dict(window=-1, switches=[9, 30]),
    "relative positions": dict(relative_positions=True, switches=[6, 27]),
    "relative positions, sink reset": dict(relative_positions=True, switches=[27], keep_sink_at_switch=False),
    "self-forcing, everything, extended": dict(**SELF_FORCING, window=-1, given=6),
    "self-forcing, rolling": dict(**SELF_FORCING),
    "self-forcing, rolling with sink, extended": dict(model="selfforcing", sink=3, given=15),
    "memflow": dict(**MEMFLOW, switches=[6, 27]),
    "memflow, switch with a full bank": dict(**MEMFLOW, switches=[33, 42]),
    "memflow, sink forgotten": dict(**MEMFLOW, switches=[6, 27], keep_sink_at_switch=False),
    "memflow, sparse": dict(**MEMFLOW, sparse_activation=True, switches=[6, 15, 30]),
    "memflow, every block": dict(**MEMFLOW, bank_every_block=True),
    "memflow, every block, sparse": dict(**MEMFLOW, bank_every_block=True, sparse_activation=True),
    "longlive, bfloat16": dict(dtype="bfloat16", switches=[27]),
    "memflow, sparse, bfloat16": dict(**MEMFLOW, dtype="bfloat16", sparse_activation=True),
}


def agrees(actual, expected, dtype, tolerance=1e-5):
    difference = actual.float() - expected.float()
    if dtype == "float32":
        return difference.abs().max() <= tolerance
    return difference.square().mean().sqrt() < 0.03


@pytest.mark.parametrize("case", STREAMS.values(), ids=STREAMS)
def test_streams_agree_with_the_reference(case):
    case = dict(case)
    given = case.pop("given", 0)
    meta = metadata("stream", **case)
    model = small_model(meta)
    with torch.no_grad():
        data = synthetic.stream_fixture(meta, model, 45, given)
    latents = run_stream(meta, data, model, lambda *seen: None)
    assert data["latents"].float().std() > 0.3
    assert agrees(latents, data["latents"][0], meta["dtype"])


EARLY = [[4, 6, 7, 9, 13], [3, 5, 8, 10, 12]]
LATE = [[12, 15, 20, 21, 30], [13, 14, 18, 27, 31]]
LATER = [[15, 19, 22, 30, 35], [16, 20, 24, 31, 36]]
AT_39 = dict(fork_frame=39, branch_chunk_start=39, used_frames=LATE)
ROUTINGS = {
    "fork at the chunk": dict(),
    "fork inside the chunk": dict(fork_frame=24, used_frames=[[3, 5, 8, 13, 17], [6, 7, 9, 12, 18]]),
    "rolled cache": dict(fork_frame=42, branch_chunk_start=39, used_frames=LATER),
    "switch at the fork": dict(**AT_39, switches=[39]),
    "switch before and after": dict(switches=[15, 36]),
    "sink forgotten": dict(**AT_39, switches=[21, 39], keep_sink_at_switch=False),
    "only the current block is near": dict(
        nearest_counting_current_block=3, used_frames=[[4, 6, 7, 9, 13, 16], [3, 5, 8, 10, 12, 17]]
    ),
    "memflow": dict(**MEMFLOW, switches=[39]),
    "bfloat16": dict(dtype="bfloat16"),
}


@pytest.mark.parametrize("case", ROUTINGS.values(), ids=ROUTINGS)
def test_routing_agrees_with_the_reference(case):
    window = dict(
        fork_frame=21, branch_chunk_start=21, perturbed_blocks=4, resident_frames=33,
        nearest_counting_current_block=4, used_frames=EARLY,
    )  # fmt: skip
    meta = metadata("routing", **{**window, **case})
    model = small_model(meta)
    with torch.no_grad():
        data = synthetic.routing_fixture(meta, model, meta["fork_frame"] + 24)
    *branches, anchor = run_routing(meta, data, model)
    assert agrees(anchor, data["latents_anchor"][0], meta["dtype"])
    for k, branch in enumerate(branches):
        expected = data[f"latents_branch_{k}"][0]
        assert agrees(branch, expected, meta["dtype"])
        assert (expected - data["latents_anchor"][0]).abs().max() > 1e-2


@pytest.mark.parametrize("fork", [9, 24, 42])
def test_replay_agrees_with_the_reference(fork):
    filled = min(fork, 33)
    meta = metadata(
        "replay", fork_frame=fork, history_filled_frames=[filled] * 2, history_end_frame=[fork] * 2
    )
    with torch.no_grad():
        data = synthetic.replay_fixture(meta, small_model(meta), branches=2, blocks=4)
    scores = run_replay(meta, data, lambda: small_model(meta))
    for name, values in scores.items():
        assert (values - data[name]).abs().max() <= 1e-4
    assert (data["log_score_theta"] - data["log_score_old"]).abs().min() > 1e-3


@pytest.mark.parametrize("path", of_kind("stream"), ids=lambda path: path.stem)
def test_golden_stream_of_the_reference(path):
    """The reference reproduces the public numbers that are there."""
    meta, data = load(path)
    model, num_frames = base_model(meta), data["latents"].shape[1]
    slots = meta["window"] if meta["window"] != -1 else num_frames
    stream = ReferenceStream(model.state_dict(), meta, num_heads=model.shape.num_heads, slots=slots)
    given = data.get("initial_latents", data["latents"][:, :0])[0]
    prompts = [embeds[0] for embeds in data["prompt_embeds"]]
    with torch.no_grad():
        for start in range(0, len(given), 3):
            synthetic.context_pass(stream, given[start : start + 3], prompts[0], start)
        segments = segments_of(meta, num_frames, len(given))
        latents = generate(stream, stream_tape(data), prompts, segments, given, num_frames)
    assert agrees(latents, data["latents"][0], meta["dtype"], tolerance=1e-4)
