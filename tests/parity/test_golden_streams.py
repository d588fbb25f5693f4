"""Streaming generation against the public implementations' numbers."""

import re

import pytest
import torch

from tests.parity.fixtures import base_model, load, of_kind
from tests.parity.runs import run_stream


def stored_frames(stream, window):
    """The frames that fill the public cache's slots, in slot order."""
    end, sink = stream.start, len(stream.history.sink)
    if window == -1 or end <= window:
        return list(range(end))
    return [*stream.history.sink, *range(end - (window - sink), end)]


def debug_tensors(data, pattern):
    """(name, numbers in it, tensor) of the debug entries whose name matches."""
    found = [(re.fullmatch(pattern, name), tensor) for name, tensor in data.items()]
    return [(match[0], *map(int, match.groups()), tensor) for match, tensor in found if match]


def close(actual, expected):
    difference = (actual.float() - expected.float()).abs().max()
    assert difference <= 1e-4, float(difference)


def check_debug(data, meta, calls, stream, trajectory):
    """Compare what the fixture stored about the block (or re-encoding) that has just ended; yield names."""
    cache, block = stream.history.cache, stream.start // 3 - 1
    first = calls if trajectory is None else calls - 4
    for name, layer, call, expected in debug_tensors(data, r"debug_bank_k_layer(\d+)_after_call(\d+)"):
        # Calls count from 0; within a block the bank changes only before the first.
        if first <= call + 1 <= calls:
            bank = cache.gather(layer, torch.tensor([stream.history.bank[layer]]))[0]
            close(bank, expected[:, : bank.shape[1]])
            assert not expected[:, bank.shape[1] :].any()
            yield name
    if trajectory is None:
        return
    for name, at, expected in debug_tensors(data, r"debug_velocity_block(\d+)"):
        if at == block:
            close(trajectory.velocities_RSFCHW[0], expected)
            yield name
    for kind in (0, 1):
        for name, layer, at, expected in debug_tensors(
            data, rf"debug_{'kv'[kind]}_layer(\d+)_after_block(\d+)"
        ):
            if at == block:
                pages = torch.tensor([stream.history.page_ids(stored_frames(stream, meta["window"]))])
                slots = cache.gather(layer, pages)[kind]
                close(slots, expected[:, : slots.shape[1]])
                yield name


@pytest.mark.parametrize("path", of_kind("stream"), ids=lambda path: path.stem)
def test_golden_stream(path):
    meta, data = load(path)
    exact = meta["dtype"] == "float32"
    checked = set()

    def observe(calls, stream, trajectory):
        if exact:
            checked.update(check_debug(data, meta, calls, stream, trajectory))

    latents = run_stream(meta, data, base_model(meta), observe)
    difference = latents.float() - data["latents"][0].float()
    if exact:
        assert difference.abs().max() <= 1e-4
        assert checked == {name for name in data if re.match("debug_(bank_k|velocity|k|v)_", name)}
    else:
        assert difference.square().mean().sqrt() < 0.03
