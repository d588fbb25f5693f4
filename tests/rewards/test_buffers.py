"""Memory of a reward server that is used again."""

import threading

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.rewards.service.buffers import MIB, Buffers


def place(buffer: memoryview) -> int:
    return np.frombuffer(buffer, dtype=np.uint8).ctypes.data


def test_memory_is_used_again_once_it_is_let_go_of() -> None:
    buffers = Buffers(64 * MIB)
    first = buffers.take(3 * MIB + 5)
    where = place(first)
    second = buffers.take(3 * MIB + 5)
    assert place(second) != where
    del first
    assert buffers.idle_bytes == 4 * MIB
    again = buffers.take(3 * MIB + 77)
    assert place(again) == where and len(again) == 3 * MIB + 77 and buffers.idle_bytes == 0


@pytest.mark.parametrize("view", ["slice", "tensor", "part of a tensor"])
def test_whatever_looks_at_memory_keeps_it(view: str) -> None:
    buffers = Buffers(64 * MIB)
    buffer = buffers.take(2 * MIB)
    buffer[:] = bytes(2 * MIB)
    tensor = torch.frombuffer(buffer[MIB:], dtype=torch.uint8)
    kept = {"slice": buffer[5:], "tensor": tensor, "part of a tensor": tensor.view(2, -1)[1]}[view]
    del buffer, tensor
    assert buffers.idle_bytes == 0
    buffers.take(2 * MIB)[:] = b"\x01" * (2 * MIB)
    assert not np.asarray(kept).any()
    del kept
    assert buffers.idle_bytes == 4 * MIB


def test_small_buffers_are_not_kept() -> None:
    buffers = Buffers(64 * MIB)
    assert len(buffers.take(1000)) == 1000
    assert buffers.idle_bytes == 0


def test_longest_idle_memory_goes_first() -> None:
    buffers = Buffers(4 * MIB)
    one, two = buffers.take(2 * MIB), buffers.take(3 * MIB)
    del one, two
    assert buffers.idle_bytes == 3 * MIB
    too_large = buffers.take(5 * MIB)
    del too_large
    assert buffers.idle_bytes == 0


@given(st.lists(st.tuples(st.integers(1, 4), st.booleans()), max_size=30))
def test_no_two_buffers_in_use_share_memory(steps: list[tuple[int, bool]]) -> None:
    buffers, held = Buffers(6 * MIB), []
    for number, (size, release) in enumerate(steps):
        buffer = buffers.take(size * MIB)
        buffer[:8] = buffer[-8:] = number.to_bytes(8, "little")
        held.append((number, buffer))
        del buffer
        if release:
            held.pop(0)
        for own, kept in held:
            assert bytes(kept[:8]) == bytes(kept[-8:]) == own.to_bytes(8, "little")
        assert buffers.idle_bytes <= 6 * MIB


def test_threads_share_the_memory() -> None:
    buffers, wrong = Buffers(8 * MIB), []

    def work(own: int) -> None:
        for _ in range(200):
            buffer = buffers.take(MIB)
            buffer[:4] = buffer[-4:] = own.to_bytes(4, "little")
            if bytes(buffer[:4]) != own.to_bytes(4, "little") or buffer[:4] != buffer[-4:]:
                wrong.append(own)

    threads = [threading.Thread(target=work, args=(own,)) for own in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and MIB <= buffers.idle_bytes <= 4 * MIB
