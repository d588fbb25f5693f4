"""A buffer pool: the first touch of a page of memory costs more than the copy that touches it."""

import weakref
from collections import deque

import numpy as np

MIB = 2**20


def new_buffer(size: int) -> memoryview:
    """Memory for ``size`` bytes. NumPy asks for huge pages, whose faults cost a tenth of small ones'."""
    return memoryview(np.empty(size, dtype=np.uint8))


class Buffers:
    """Buffers whose memory is handed out again once nothing refers to it, from any thread.

    Args:
        kept_bytes: most bytes that lie idle at a time; the longest idle go first.
    """

    def __init__(self, kept_bytes: int) -> None:
        self.kept_bytes = kept_bytes
        self._idle: deque[np.ndarray] = deque()

    @property
    def idle_bytes(self) -> int:
        """Bytes that are kept and not in use."""
        return sum(memory.nbytes for memory in tuple(self._idle))

    def take(self, size: int) -> memoryview:
        """``size`` bytes with anything in them, nobody else's as long as this or a view of it lives."""
        if size < MIB:
            return new_buffer(size)
        capacity = -(-size // MIB) * MIB  # requests with prompts of other lengths differ by some bytes
        memory = self._found(capacity)
        if memory is None:
            memory = np.empty(capacity, dtype=np.uint8)
        lent = memory[:size]
        weakref.finalize(lent, self._keep, memory).atexit = False
        return memoryview(lent)

    def _found(self, capacity: int) -> np.ndarray | None:
        # A finalizer may run between any two steps, in this thread too: single deque operations, no lock.
        for _ in range(len(self._idle)):
            try:
                memory = self._idle.pop()
            except IndexError:
                return None
            if memory.nbytes == capacity:
                return memory
            self._idle.appendleft(memory)
        return None

    def _keep(self, memory: np.ndarray) -> None:
        self._idle.append(memory)
        while self.idle_bytes > self.kept_bytes:
            try:
                self._idle.popleft()
            except IndexError:
                return
