"""A buffer pool: the first access to a page of memory costs more than copying data into it."""

import weakref
from collections import deque

import numpy as np

MIB = 2**20


def new_buffer(size: int) -> memoryview:
    """Allocate ``size`` bytes. NumPy requests huge pages, which cost a tenth as much in page faults."""
    return memoryview(np.empty(size, dtype=np.uint8))


class Buffers:
    """A thread-safe pool of buffers; memory is reused once nothing refers to it.

    Args:
        kept_bytes: maximum number of idle bytes; the longest idle buffers are freed first.
    """

    def __init__(self, kept_bytes: int) -> None:
        self.kept_bytes = kept_bytes
        self._idle: deque[np.ndarray] = deque()

    @property
    def idle_bytes(self) -> int:
        """Bytes kept for reuse and not in use."""
        return sum(memory.nbytes for memory in tuple(self._idle))

    def take(self, size: int) -> memoryview:
        """Lend ``size`` uninitialised bytes, exclusively until the result and all its views are gone."""
        if size < MIB:
            return new_buffer(size)
        capacity = -(-size // MIB) * MIB  # request sizes vary slightly with their prompts
        memory = self._found(capacity)
        if memory is None:
            memory = np.empty(capacity, dtype=np.uint8)
        lent = memory[:size]
        weakref.finalize(lent, self._keep, memory).atexit = False
        return memoryview(lent)

    def _found(self, capacity: int) -> np.ndarray | None:
        # A finalizer may run at any point, even in this thread: use atomic deque operations, no lock.
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
