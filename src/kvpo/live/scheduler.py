"""Streams many sessions on one generator: all sessions that are due share one forward pass per arm.

One thread (``Scheduler.run``) owns the generator and all sessions; other threads hand it work (``ask``). A
block is never interrupted, so requests are carried out before the next one.
"""

import logging
import queue
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvpo.engine.generator import pixel_frame
from kvpo.engine.pages import bank_pages, stream_pages
from kvpo.engine.stream import advance, switch_prompts
from kvpo.live.metrics import ServerMetrics, memory_bytes
from kvpo.live.pictures import pictures
from kvpo.live.protocol import Refusal, packed
from kvpo.live.script import Cue
from kvpo.live.session import Branches, Session, Stage
from kvpo.live.timing import Pace, Switch

logger = logging.getLogger(__name__)
T = TypeVar("T")

GATHER = 0.02
"""Seconds by which a block may start early to share a forward pass."""
FASTEST_SPEED = 16.0
WATCHED_BLOCKS = 40
"""Blocks after a switch in which the observer looks for the new prompt."""

Side = Callable[[], AbstractContextManager[None]]
"""Returns a context manager in which the generator has one arm's weights."""
PromptObserver = Callable[[Tensor, str, str], bool]
"""(pixels ``[T, 3, H, W]``, new prompt, old prompt) -> True if the pixels rather show the new one."""


@dataclass(frozen=True)
class SessionLimits:
    """Limits on a server's load; requests beyond them are refused."""

    sessions: int = 8
    viewers: int = 128
    """Open connections."""
    frames: int = 60_000
    """Latent frames of a session."""
    pins: int = 24
    branches: int = 8
    """Routed branches of a fork."""
    fork_blocks: int = 4
    prompts: int = 64
    """Prompts in a queue."""
    prompt_chars: int = 1000
    route_blocks: int = 64
    transition_blocks: int = 64
    message_bytes: int = 64 * 1024
    rows: int = 0
    """Streams per forward pass; 0: all. With 1, other sessions do not change a session's latents by a bit."""


@dataclass
class Show:
    """A running session and its audience."""

    id: str
    session: Session
    publish: Callable[[Any], None]
    """Takes events (dict) and binary messages (bytes)."""
    pace: Pace
    speed: float = 1.0
    paused: bool = False
    viewers: int = 1
    waited: int = 0
    """Blocks since a switch that the observer has not seen yet."""

    @property
    def ready(self) -> bool:
        return not self.paused and self.session.fork is None


def pages_needed(stage: Stage, limits: SessionLimits, arms: int) -> int:
    """Number of cache pages for as many sessions as are allowed, and one fork at a time."""
    generator, exploration = stage.generator, stage.exploration
    held = limits.pins + exploration.routed
    stream = stream_pages(generator, limits.frames, exploration.resident_frames, switches=True) + held
    own = limits.fork_blocks * generator.block
    reencoded = generator.deployment.reencoded(limits.frames)
    branch = max(own, reencoded) + bank_pages(generator, range(own))
    return limits.sessions * arms * stream + reencoded + (limits.branches + 1) * branch


class Scheduler:
    """Streams the sessions of a server."""

    def __init__(
        self,
        stage: Stage,
        sides: Mapping[str, Side],
        limits: SessionLimits = SessionLimits(),
        *,
        observer: PromptObserver | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.stage, self.sides, self.limits = stage, sides, limits
        self.observer, self.clock = observer, clock
        self.cache = stage.generator.new_cache(pages_needed(stage, limits, len(sides)))
        self.shows: dict[str, Show] = {}
        self.metrics = ServerMetrics()
        self.metrics.capacity.set(self.cache.num_pages)
        self._asked: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._stopping = False

    # From other threads ----------------------------------------------------------------------------------

    def ask(self, what: Callable[[], T]) -> Future[T]:
        """Run ``what`` between two blocks; the future gets its result or its exception."""
        future: Future[T] = Future()

        def carried_out() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(what())
            except BaseException as error:  # raised where the result is awaited
                future.set_exception(error)

        self._asked.put(carried_out)
        return future

    def stop(self) -> None:
        """Make ``run`` return after the current block."""
        self._stopping = True
        self._asked.put(lambda: None)

    # On the thread of ``run`` ------------------------------------------------------------------------------

    def run(self) -> None:
        """Stream until ``stop`` is called, then close every session."""
        while not self._stopping:
            self._carry_out()
            due, wait = self.due()
            if due:
                self.generate(due)
            elif not self._stopping:
                self._carry_out(wait)
        for show in list(self.shows.values()):
            self.close(show, "server stopped")

    def _carry_out(self, wait: float | None = 0.0) -> None:
        """Run all pending requests; if there are none, wait ``wait`` seconds for one (None: forever)."""
        try:
            self._asked.get(timeout=wait)() if wait != 0.0 else self._asked.get_nowait()()
            while True:
                self._asked.get_nowait()()
        except queue.Empty:
            return

    def due(self) -> tuple[list[Show], float | None]:
        """Shows whose next block should start now; if none, the seconds until one should (None: never)."""
        now = self.clock()
        starts = {show.id: self._starts(show) for show in self.shows.values() if show.ready}
        due = [self.shows[id] for id, start in starts.items() if start <= now + GATHER]
        return due, None if due or not starts else min(starts.values()) - now

    def _starts(self, show: Show) -> float:
        """Time at which a show's next block should start: one period before its deadline."""
        deadline = show.pace.deadline
        return 0.0 if deadline is None or not show.speed else deadline - self.period(show)

    def period(self, show: Show) -> float:
        """Seconds that a block plays; 0 if the show runs as fast as possible."""
        if not show.speed:
            return 0.0
        codec = self.stage.codec
        frames = self.stage.generator.block * codec.frames_per_latent
        return frames / (codec.frames_per_second * show.speed)

    def open(
        self,
        id: str,
        session: Callable[[], Session],
        publish: Callable[[Any], None],
        asked: float,
        speed: float,
    ) -> Show:
        """Start a session that was requested at time ``asked``. Raises Refusal if the server is full."""
        if len(self.shows) >= self.limits.sessions:
            raise Refusal("busy", f"{self.limits.sessions} sessions are running, the most this server takes")
        show = Show(id, session(), publish, Pace(asked), speed)
        self.shows[show.id] = show
        self._counted()
        return show

    def replace(self, show: Show, session: Callable[[], Session]) -> None:
        """Restart a show with another session."""
        old, show.session = show.session, session()  # may raise Refusal; the old session then continues
        old.release()
        show.pace = Pace(self.clock())
        self._counted()

    def close(self, show: Show, reason: str) -> None:
        """End a show and free its pages."""
        if self.shows.pop(show.id, None) is None:
            return
        show.session.release()
        self._counted()
        show.publish({"type": "session.done", "session": show.id, "reason": reason})

    def _counted(self) -> None:
        self.metrics.sessions.set(len(self.shows))
        self.metrics.pages.set(self.cache.pages_in_use)

    def switch(self, show: Show, cue: Cue, asked: float) -> None:
        """Switch to another prompt at the next block, and measure how long it takes to show."""
        show.pace.switch = Switch(asked, cue.prompt, show.session.prompt)
        show.waited = 0
        show.session.show(cue)

    def fork(self, show: Show, arm: str, frame: int, branches: int, blocks: int) -> Branches:
        """Fork one arm and run the branches under its weights. Raises Refusal."""
        with torch.no_grad(), self.sides[arm]():
            return show.session.open_fork(arm, frame, branches, blocks)

    def generate(self, shows: Sequence[Show]) -> None:
        """Generate one block of every show in ``shows``. A failure ends all of them."""
        try:
            sent = self._generate(shows)
        except Exception as error:  # other sessions and this thread must survive
            logger.exception("a block failed")
            for show in shows:
                show.publish(Refusal("failed", f"this stream had to end: {error}").event())
                self.close(show, "failed")
            return
        for show, message in zip(shows, sent, strict=True):
            show.publish(message)
            if show.session.start + self.stage.generator.block > self.limits.frames:
                self.close(show, "length")
        self._counted()

    def _generate(self, shows: Sequence[Show]) -> list[bytes]:
        for show in shows:
            show.session.begin_block()
        headers = [self._header(show) for show in shows]
        with torch.no_grad():
            for name, side in self.sides.items():
                own = [show.session for show in shows if name in show.session.arms]
                if own:
                    with side():
                        self._advance(name, own)
                    self.metrics.blocks.labels(name).inc(len(own))
            parts = []
            for show in shows:
                show.session.end_block()
                frames = {name: self._decoded(show, name) for name in show.session.arms}
                self._timed(show, frames)
                parts.append({name: pictures(pixels) for name, pixels in frames.items()})
        sent = []
        for show, header, made in zip(shows, headers, parts, strict=True):
            header["frames"] = {name: [len(one) for one in images] for name, images in made.items()}
            header["numbers"] = self.numbers(show)
            sent.append(packed(header, [one for images in made.values() for one in images]))
        return sent

    def _advance(self, name: str, sessions: Sequence[Session]) -> None:
        """Generate one arm's next block for every session, in as few forward passes as their shapes allow."""
        streams = [session.arms[name].stream for session in sessions]
        generator, rows = self.stage.generator, self.limits.rows
        switch_prompts(generator, streams, rows=rows)  # writes pages, so it precedes the look-up of ids
        advance(
            generator,
            streams,
            routes=[session.pages(name) for session in sessions],
            recent=self.stage.exploration.recent,
            rows=rows,
            resident=self.stage.exploration.resident_frames,
        )

    def _decoded(self, show: Show, name: str) -> Tensor:
        arm = show.session.arms[name]
        pixels, arm.decoding = self.stage.codec.decode_next(arm.stream.latents[-1], arm.decoding)
        return pixels

    def _header(self, show: Show) -> dict[str, Any]:
        session = show.session
        return {
            "type": "video.block",
            "session": show.id,
            "start": session.start,
            "block": session.block,
            "latent": pixel_frame(session.start, self.stage.codec.frames_per_latent),
            "prompt": session.prompt,
            "segment": len(session.script.segments) - 1,
            "sees": session.sees(),
        }

    def numbers(self, show: Show) -> dict[str, Any]:
        """Statistics of a session and its server, for the page."""
        held = sorted(show.session.history.pages)
        return {
            **show.pace.numbers(),
            "resident": held,
            "pinned": sorted(show.session.pins),
            "queued": len(show.session.queue),
            "pages_in_use": self.cache.pages_in_use,
            "pages_total": self.cache.num_pages,
            "memory_bytes": memory_bytes(),
            "sessions": len(self.shows),
            "viewers": show.viewers,
        }

    def _timed(self, show: Show, frames: Mapping[str, Tensor]) -> None:
        """Record the arrival of a block: deadlines, intervals, and the progress of a prompt switch."""
        pace, now = show.pace, self.clock()
        met, missed, first = pace.met, pace.missed, pace.first_frame
        late = pace.arrived(now, self.period(show))
        if first is None and pace.first_frame is not None:
            self.metrics.first_frame.observe(pace.first_frame)
        elif pace.intervals:
            self.metrics.interval.observe(pace.intervals[-1])
        self.metrics.deadlines.labels("yes").inc(pace.met - met)
        self.metrics.deadlines.labels("no").inc(pace.missed - missed)
        self.metrics.stalled.inc(late)
        switch = pace.switch
        if switch is None or show.session.prompt != switch.prompt:
            return
        if not switch.shown:
            switch.shown = True
            pace.switch_shown, pace.switch_seen = now - switch.asked, None
            self.metrics.switch_shown.observe(pace.switch_shown)
        pixels = frames.get("aligned", next(iter(frames.values())))
        if self.observer is None or show.waited >= WATCHED_BLOCKS:
            pace.switch = None
        elif self.observer(pixels, switch.prompt, switch.before):
            pace.switch_seen, pace.switch = self.clock() - switch.asked, None
            self.metrics.switch_seen.observe(pace.switch_seen)
        show.waited += 1
