"""A server's sessions, their audiences, and the delivery of events and blocks to connections."""

import asyncio
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from kvpo.live.outbox import Outbox
from kvpo.live.scheduler import Scheduler, Show
from kvpo.live.script import Cue

T = TypeVar("T")


@dataclass
class Connection:
    """One client: its outbox, and the session that it directs or watches."""

    outbox: Outbox = field(default_factory=Outbox)
    show: Show | None = None
    directs: bool = False


@dataclass
class Theatre:
    """A server's sessions and their audiences. For one event loop."""

    scheduler: Scheduler
    out: Path
    """Directory of snapshots, exports and choices."""
    info: Mapping[str, Any]
    """Facts about the generator that clients may see."""
    story: Callable[[int], list[Cue]] | None = None
    """Draws random prompts with their lengths from a seed."""
    notice: Callable[[str], str] = lambda prompt: ""
    """Returns a remark on a prompt, such as words that have no effect; empty: none."""
    rooms: dict[str, list[Connection]] = field(default_factory=dict)
    """Session id -> the connections that see it."""
    exported: dict[str, Path] = field(default_factory=dict)
    connections: int = 0
    loop: asyncio.AbstractEventLoop | None = None

    @property
    def crowded(self) -> bool:
        """True if more connections are open than allowed."""
        return self.connections > self.scheduler.limits.viewers

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """Yield a new connection, which counts as open until the block ends."""
        self._count(1)
        try:
            yield Connection()
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self.connections += change
        self.scheduler.metrics.viewers.set(self.connections)

    async def ask(self, what: Callable[[], T]) -> T:
        """Run ``what`` between two blocks and return its result."""
        return await asyncio.wrap_future(self.scheduler.ask(what))

    def publish(self, session: str, item: Any) -> None:
        """Send an item to everyone who sees a session. Called on the scheduler's thread."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._spread, session, item)

    def put(self, connection: Connection, item: Any) -> None:
        """Send an item to one connection, after everything published before. Safe from any thread."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(connection.outbox.put, item)

    def _spread(self, session: str, item: Any) -> None:
        for connection in self.rooms.get(session, ()):
            before = connection.outbox.dropped
            connection.outbox.put(item)
            self.scheduler.metrics.dropped.inc(connection.outbox.dropped - before)
        if isinstance(item, dict) and item["type"] == "session.done":
            for connection in self.rooms.pop(session, ()):
                connection.show, connection.directs = None, False

    async def left(self, connection: Connection) -> None:
        """Clean up after a closed connection; the session that it directed ends."""
        show = connection.show
        if show is None:
            return
        audience = self.rooms.get(show.id, [])
        if connection in audience:
            audience.remove(connection)
            show.viewers = len(audience)
        if connection.directs:
            await self.ask(lambda: self.scheduler.close(show, "its director left"))
