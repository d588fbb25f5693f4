"""A server's sessions and who sees them: connections, audiences, what reaches whom."""

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
    """One client: what it is to be sent, and what it directs or watches."""

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
    """Facts about the generator that a client may know."""
    story: Callable[[int], list[Cue]] | None = None
    """Random prompts with their lengths, from a seed."""
    notice: Callable[[str], str] = lambda prompt: ""
    """Remark on a prompt, such as words that have no effect; empty: none."""
    rooms: dict[str, list[Connection]] = field(default_factory=dict)
    """Session -> who sees it."""
    exported: dict[str, Path] = field(default_factory=dict)
    connections: int = 0
    loop: asyncio.AbstractEventLoop | None = None

    @property
    def crowded(self) -> bool:
        """True if one connection more is open than may be."""
        return self.connections > self.scheduler.limits.viewers

    @contextmanager
    def connected(self) -> Iterator[Connection]:
        """A connection, counted while it is open."""
        self._count(1)
        try:
            yield Connection()
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self.connections += change
        self.scheduler.metrics.viewers.set(self.connections)

    async def ask(self, what: Callable[[], T]) -> T:
        """Have something done between two blocks."""
        return await asyncio.wrap_future(self.scheduler.ask(what))

    def publish(self, session: str, item: Any) -> None:
        """From the scheduler's thread: to everybody who sees a session."""
        if self.loop is not None and not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self._spread, session, item)

    def put(self, connection: Connection, item: Any) -> None:
        """From any thread: to one connection, behind what was published before."""
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
        """A connection has ended: so does the session that it directed."""
        show = connection.show
        if show is None:
            return
        audience = self.rooms.get(show.id, [])
        if connection in audience:
            audience.remove(connection)
            show.viewers = len(audience)
        if connection.directs:
            await self.ask(lambda: self.scheduler.close(show, "its director left"))
