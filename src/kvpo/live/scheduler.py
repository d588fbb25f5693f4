"""Many sessions on one generator: each due one gets its next block, together in one forward pass per arm.

One thread owns the generator and all sessions (``Scheduler.run``); others hand it what to do (``ask``). A
block is never interrupted, so whatever is asked for acts before the next one.
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
"""Seconds by which a block may start before it is due, to share a forward pass."""
FASTEST_SPEED = 16.0
WATCHED_BLOCKS = 40
"""Blocks after a switch in which the observer is asked for the new prompt."""

Side = Callable[[], AbstractContextManager[None]]
"""Inside, the generator has an arm's weights."""
PromptObserver = Callable[[Tensor, str, str], bool]
"""(pixels ``[T, 3, H, W]``, prompt, prompt before) -> whether the pixels show the new prompt rather."""


@dataclass(frozen=True)
class SessionLimits:
    """Bounds of a server's load; what goes beyond is refused."""

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
    """Streams per forward pass. 1: a session's latents do not depend on its company, bit for bit; 0: all."""


@dataclass
class Show:
    """A session that is on, and who follows it."""

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
    """Pages of a cache that holds as many sessions as are allowed, and one fork at a time."""
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
        """Have something done between two blocks; its result or its exception comes back."""
        future: Future[T] = Future()

        def carried_out() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(what())
            except BaseException as error:  # it is raised where somebody waits for it
                future.set_exception(error)

        self._asked.put(carried_out)
        return future

    def stop(self) -> None:
        """Let ``run`` return after the block it is at."""
        self._stopping = True
        self._asked.put(lambda: None)

    # On the thread of ``run`` ------------------------------------------------------------------------------

    def run(self) -> None:
        """Stream until ``stop``; every session is released then."""
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
        """Do what was asked for; where nothing was, wait for it (None: for ever)."""
        try:
            self._asked.get(timeout=wait)() if wait != 0.0 else self._asked.get_nowait()()
            while True:
                self._asked.get_nowait()()
        except queue.Empty:
            return

    def due(self) -> tuple[list[Show], float | None]:
        """Shows whose next block should start now; else the time until one should (None: there is none)."""
        now = self.clock()
        starts = {show.id: self._starts(show) for show in self.shows.values() if show.ready}
        due = [self.shows[id] for id, start in starts.items() if start <= now + GATHER]
        return due, None if due or not starts else min(starts.values()) - now

    def _starts(self, show: Show) -> float:
        """Time at which a show's next block should start: a period before it has to be there."""
        deadline = show.pace.deadline
        return 0.0 if deadline is None or not show.speed else deadline - self.period(show)

    def period(self, show: Show) -> float:
        """Seconds that a block plays; 0: no rate is kept."""
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
        """Put a session on. Raises Refusal where as many as allowed are on."""
        if len(self.shows) >= self.limits.sessions:
            raise Refusal("busy", f"{self.limits.sessions} sessions are on, as many as this server takes")
        show = Show(id, session(), publish, Pace(asked), speed)
        self.shows[show.id] = show
        self._counted()
        return show

    def replace(self, show: Show, session: Callable[[], Session]) -> None:
        """Begin a show again with another session."""
        old, show.session = show.session, session()  # which may be refused: the old one then goes on
        old.release()
        show.pace = Pace(self.clock())
        self._counted()

    def close(self, show: Show, reason: str) -> None:
        """Take a show off; its pages are free afterwards."""
        if self.shows.pop(show.id, None) is None:
            return
        show.session.release()
        self._counted()
        show.publish({"type": "session.done", "session": show.id, "reason": reason})

    def _counted(self) -> None:
        self.metrics.sessions.set(len(self.shows))
        self.metrics.pages.set(self.cache.pages_in_use)

    def switch(self, show: Show, cue: Cue, asked: float) -> None:
        """Show another prompt from the next block on, and measure how long that takes."""
        show.pace.switch = Switch(asked, cue.prompt, show.session.prompt)
        show.waited = 0
        show.session.show(cue)

    def fork(self, show: Show, arm: str, frame: int, branches: int, blocks: int) -> Branches:
        """Run the branches of a fork of one arm, under its weights. Raises Refusal."""
        with torch.no_grad(), self.sides[arm]():
            return show.session.open_fork(arm, frame, branches, blocks)

    def generate(self, shows: Sequence[Show]) -> None:
        """One block of every show. A failure ends the shows that it may have touched."""
        try:
            sent = self._generate(shows)
        except Exception as error:  # the sessions of others, and the thread, must live on
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
        generator = self.stage.generator
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
            header["latent"] = pixel_frame(header["start"], self.stage.codec.frames_per_latent)
            header["block"] = header["start"] // generator.block
            sent.append(packed(header, [one for images in made.values() for one in images]))
        return sent

    def _advance(self, name: str, sessions: Sequence[Session]) -> None:
        """The next block of one arm of every session, in as few forward passes as their shapes allow."""
        streams = [session.arms[name].stream for session in sessions]
        generator, rows = self.stage.generator, self.limits.rows
        switch_prompts(generator, streams, rows=rows)  # before pages are named: it writes new ones
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
            "prompt": session.prompt,
            "segment": len(session.script.segments) - 1,
            "sees": session.sees(),
        }

    def numbers(self, show: Show) -> dict[str, Any]:
        """Numbers of a session and its server, for the page."""
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
        """Note that a block is there: deadlines, intervals, and what became of a prompt switch."""
        pace, now = show.pace, self.clock()
        before = len(pace.intervals), pace.met, pace.missed, pace.first_frame
        late = pace.arrived(now, self.period(show))
        if before[3] is None and pace.first_frame is not None:
            self.metrics.first_frame.observe(pace.first_frame)
        elif pace.intervals:
            self.metrics.interval.observe(pace.intervals[-1])
        self.metrics.deadlines.labels("yes").inc(pace.met - before[1])
        self.metrics.deadlines.labels("no").inc(pace.missed - before[2])
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
