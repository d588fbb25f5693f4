"""A queue of items to send to a connection, bounded however slowly the connection reads."""

import asyncio
from collections import deque
from typing import Any

BLOCKS = 4
"""Most blocks queued for a slow reader; the oldest is dropped to make room for a new one."""
EVENTS_WAITING = 256
"""Most events queued. Events cannot be dropped, so a reader that is further behind is disconnected."""


class Outbox:
    """Events (dict) and blocks (bytes) in order. For one event loop."""

    def __init__(self) -> None:
        self._items: deque[dict[str, Any] | bytes] = deque()
        self._wake = asyncio.Event()
        self.dropped = 0
        """Number of blocks dropped."""
        self.overrun = False

    def put(self, item: dict[str, Any] | bytes) -> None:
        """Add an item; never waits. After an overrun, nothing is added: the writer may be stuck for long."""
        if self.overrun:
            return
        waiting = [other for other in self._items if isinstance(other, type(item))]
        if isinstance(item, dict) and len(waiting) >= EVENTS_WAITING:
            self.overrun = True
        elif isinstance(item, bytes) and len(waiting) >= BLOCKS:
            self._items.remove(waiting[0])
            self.dropped += 1
        self._items.append(item)
        self._wake.set()

    async def get(self) -> dict[str, Any] | bytes | None:
        """Wait for the next item; None means that the reader is too far behind and must be disconnected."""
        while not self._items and not self.overrun:
            self._wake.clear()
            await self._wake.wait()
        return None if self.overrun else self._items.popleft()
