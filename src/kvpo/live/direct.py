"""Handles client messages: checks each, hands it to the scheduler's thread, and answers it."""

import asyncio
import logging
import secrets
import sqlite3
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from kvpo.live import protocol as p
from kvpo.live.keep import export_session, record_choice
from kvpo.live.pictures import pictures
from kvpo.live.protocol import Refusal, packed
from kvpo.live.scheduler import FASTEST_SPEED, Show
from kvpo.live.script import Cue
from kvpo.live.session import Branches, Session
from kvpo.live.snapshots import load_snapshot, restored, save_snapshot, snapshot_of
from kvpo.live.theatre import Connection, Theatre

logger = logging.getLogger(__name__)
T = TypeVar("T")


class Direction:
    """Handles the messages of one connection."""

    def __init__(self, theatre: Theatre, connection: Connection) -> None:
        self.theatre, self.connection = theatre, connection
        self.scheduler = theatre.scheduler
        self.limits = theatre.scheduler.limits
        self._name = ""
        self._carried_out: dict[type, Callable[[Any], Any]] = {
            p.Start: self.start,
            p.Watch: self.watch,
            p.PromptUpdate: self.prompt_update,
            p.Queue: self.line_up,
            p.Route: self.route,
            p.Pin: self.pin,
            p.ForkRequest: self.fork,
            p.Choose: self.choose,
            p.Pause: self.pause,
            p.Speed: self.speed,
            p.Reset: self.reset,
            p.Snapshot: self.snapshot,
            p.Export: self.export,
            p.Stop: self.stop,
        }

    async def carry_out(self, name: str, message: Any) -> None:
        """Carry out a message and answer it. Raises Refusal if it is invalid or fails."""
        self._name = name
        try:
            await self._carried_out[type(message)](message)
        except ValueError as error:
            raise Refusal("out_of_range", str(error)) from error
        except (MemoryError, OSError, RuntimeError, sqlite3.Error) as error:
            logger.exception("%s failed", name)
            raise Refusal("failed", str(error)) from error

    def answer(self, **values: Any) -> None:
        """Acknowledge the current message, in order with the blocks. Safe from any thread."""
        self.theatre.put(self.connection, {"type": f"{self._name}.accepted", **values})

    def directed(self) -> Show:
        """The session that this connection directs. Raises Refusal if there is none."""
        if self.connection.show is None or not self.connection.directs:
            raise Refusal("out_of_order", "this connection directs no session; send session.start first")
        return self.connection.show

    def cue(self, prompt: str, frames: int, transition_blocks: int | None = None) -> Cue:
        """Check a prompt and its lengths, and return them as a cue. Raises Refusal."""
        text = prompt.strip()
        if not text:
            raise Refusal("out_of_range", "prompt: empty; say what to show")
        if len(text) > self.limits.prompt_chars:
            most = self.limits.prompt_chars
            raise Refusal("out_of_range", f"prompt: at most {most} characters, got {len(text)}")
        if not 0 <= frames <= self.limits.frames:
            raise Refusal("out_of_range", f"frames: must be 0..{self.limits.frames}, got {frames}")
        self.within("transition_blocks", transition_blocks or 0, 0, self.limits.transition_blocks)
        return Cue(text, frames, transition_blocks)

    def within(self, name: str, value: float, low: float, high: float) -> None:
        """Raise Refusal unless ``low <= value <= high``."""
        if not low <= value <= high:
            raise Refusal("out_of_range", f"{name}: must be {low}..{high}, got {value}")

    def pace(self, speed: float) -> None:
        """Raise Refusal for an invalid speed; 0 (as fast as possible) is valid."""
        if speed:
            self.within("speed", speed, 0.05, FASTEST_SPEED)

    async def ask(self, what: Callable[[], T]) -> T:
        """Run ``what`` between two blocks. Raises Refusal if the session has ended by then."""
        show = self.connection.show

        def done() -> T:
            if show is not None and show.id not in self.scheduler.shows:
                raise Refusal("out_of_order", "this session has ended")
            return what()

        return await self.theatre.ask(done)

    # Sessions --------------------------------------------------------------------------------------------

    async def start(self, message: p.Start) -> None:
        if self.connection.show is not None:
            raise Refusal("out_of_order", "this connection has a session; stop it, or send session.reset")
        asked = self.scheduler.clock()
        self.pace(message.speed)
        if message.snapshot:
            make = await self._restored(message.snapshot)
        else:
            self.within("seed", message.seed, 0, 2**53)
            arms, cue = self._arms(message.arms), self.cue(message.prompt, message.frames)
            stage, cache = self.scheduler.stage, self.scheduler.cache
            make = partial(Session, stage, cache, arms, cue, message.seed)
        id = secrets.token_hex(6)
        self.theatre.rooms[id] = [self.connection]  # before the first block arrives

        def open_session() -> Show:
            publish = partial(self.theatre.publish, id)
            show = self.scheduler.open(id, make, publish, asked, message.speed)
            publish(self._video_start(show, directs=True))
            return show

        try:
            show = await self.ask(open_session)
        except BaseException:
            self.theatre.rooms.pop(id, None)
            raise
        if id in self.theatre.rooms:  # otherwise it has already ended
            self.connection.show, self.connection.directs = show, True

    def _arms(self, wanted: str) -> list[str]:
        there = list(self.scheduler.sides)
        arms = {"": there, "both": ["base", "aligned"]}.get(wanted, [wanted])
        if missing := [arm for arm in arms if arm not in there]:
            raise Refusal("unavailable", f"arms: this server has no {missing[0]} model; it has {there[0]}")
        return arms

    async def _restored(self, name: str) -> Callable[[], Session]:
        tensors, record = await asyncio.to_thread(load_snapshot, self.theatre.out, name)
        if unknown := sorted(set(record.get("arms", ())) - self.scheduler.sides.keys()):
            raise Refusal("unavailable", f"snapshot: this server has no {unknown[0]} model")
        return partial(restored, self.scheduler.stage, self.scheduler.cache, tensors, record)

    def _video_start(self, show: Show, *, directs: bool) -> dict[str, Any]:
        session = show.session
        return {
            **self.theatre.info,
            "type": "video.start",
            "session": show.id,
            "arms": list(session.arms),
            "seed": session.script.seed,
            "frame": session.start,
            "prompt": session.prompt,
            "notice": self.theatre.notice(session.prompt),
            "speed": show.speed,
            "directs": directs,
        }

    async def watch(self, message: p.Watch) -> None:
        if self.connection.show is not None:
            raise Refusal("out_of_order", "this connection has a session")
        show = self.scheduler.shows.get(message.session)
        if show is None or show.id not in self.theatre.rooms:
            raise Refusal("not_found", f"session: {message.session[:60]!r} is not running")
        audience = self.theatre.rooms[show.id]
        audience.append(self.connection)
        self.connection.show, show.viewers = show, len(audience)
        self.connection.outbox.put(self._video_start(show, directs=False))

    async def stop(self, message: p.Stop) -> None:
        show = self.directed()
        await self.ask(lambda: self.scheduler.close(show, "stopped"))

    async def reset(self, message: p.Reset) -> None:
        show = self.directed()
        old = show.session
        self.within("seed", message.seed, -1, 2**53)
        seed = old.script.seed if message.seed == -1 else message.seed
        cue = self.cue(message.prompt or old.prompt, 0)
        make = partial(Session, old.stage, self.scheduler.cache, list(old.arms), cue, seed)

        def reset() -> None:
            self.scheduler.replace(show, make)
            self.answer(seed=seed, prompt=cue.prompt, frame=0)

        await self.ask(reset)

    # Directing -------------------------------------------------------------------------------------------

    async def prompt_update(self, message: p.PromptUpdate) -> None:
        show, asked = self.directed(), self.scheduler.clock()
        cue = self.cue(message.prompt, message.frames, message.transition_blocks)
        notice = self.theatre.notice(cue.prompt)
        deployed = self.scheduler.stage.generator.deployment.transition_blocks
        blocks = deployed if cue.transition_blocks is None else cue.transition_blocks

        def switch() -> None:
            self.scheduler.switch(show, cue, asked)
            frame = show.session.start
            self.answer(prompt=cue.prompt, frame=frame, transition_blocks=blocks, notice=notice)

        await self.ask(switch)

    async def line_up(self, message: p.Queue) -> None:
        show = self.directed()
        if len(message.prompts) > self.limits.prompts:
            most = self.limits.prompts
            raise Refusal("out_of_range", f"prompts: at most {most}, got {len(message.prompts)}")
        cues = [self.cue(one.prompt, one.frames, one.transition_blocks) for one in message.prompts]

        def line_up() -> None:
            show.session.line_up(cues)
            self.answer(queued=len(cues))

        await self.ask(line_up)

    async def route(self, message: p.Route) -> None:
        show = self.directed()
        self.within("blocks", message.blocks, 1, self.limits.route_blocks)

        def route() -> None:
            show.session.route(message.frames, message.blocks)
            frames = sorted(set(message.frames))
            self.answer(frames=frames, blocks=message.blocks, frame=show.session.start)

        await self.ask(route)

    async def pin(self, message: p.Pin) -> None:
        show = self.directed()

        def pin() -> None:
            show.session.pin(message.frames, message.pinned, self.limits.pins)
            self.answer(pinned=sorted(show.session.pins))

        await self.ask(pin)

    async def pause(self, message: p.Pause) -> None:
        show = self.directed()

        def pause() -> None:
            show.paused = message.paused
            show.pace.restart()
            self.answer(paused=message.paused)

        await self.ask(pause)

    async def speed(self, message: p.Speed) -> None:
        show = self.directed()
        self.pace(message.speed)

        def change() -> None:
            show.speed = message.speed
            show.pace.restart()
            self.answer(speed=message.speed)

        await self.ask(change)

    # Forks -----------------------------------------------------------------------------------------------

    async def fork(self, message: p.ForkRequest) -> None:
        show = self.directed()
        self.within("branches", message.branches, 1, self.limits.branches)
        self.within("blocks", message.blocks, 1, self.limits.fork_blocks)
        self.within("frame", message.frame, -1, self.limits.frames)
        names = list(show.session.arms)
        arm = message.arm or names[-1]
        if arm not in names:
            raise Refusal("unavailable", f"arm: this session has no {arm} arm")

        def fork() -> None:
            frame = show.session.start if message.frame == -1 else message.frame
            fork = self.scheduler.fork(show, arm, frame, message.branches, message.blocks)
            images = [pictures(pixels) for pixels in fork.pixels]
            header = {
                "type": "session.fork.accepted",
                "arm": arm,
                "frame": fork.frame,
                "blocks": fork.blocks,
                "prompt": fork.prompt,
                "routes": [sorted(set(route or ())) for route in fork.routes],
                "frames": [[len(one) for one in branch] for branch in images],
            }
            parts = [one for branch in images for one in branch]
            self.theatre.put(self.connection, packed(header, parts))

        await self.ask(fork)

    async def choose(self, message: p.Choose) -> None:
        show = self.directed()
        branch = None if message.branch == -1 else message.branch

        def choose() -> Branches:
            fork = show.session.choose(branch, message.ranking)
            show.pace.restart()
            self.answer(branch=message.branch, frame=show.session.start)
            return fork

        fork = await self.ask(choose)
        if branch is not None:
            rate = self.scheduler.stage.codec.frames_per_second
            best_first = message.ranking or (branch,)
            await asyncio.to_thread(record_choice, self.theatre.out, fork, best_first, rate=rate)

    # Keeping ---------------------------------------------------------------------------------------------

    async def snapshot(self, message: p.Snapshot) -> None:
        show = self.directed()
        tensors, record = await self.ask(lambda: snapshot_of(show.session))
        name = f"{secrets.token_hex(6)}-{record['start']}"  # a session may reach a frame twice
        await asyncio.to_thread(save_snapshot, self.theatre.out, name, tensors, record)
        self.answer(snapshot=name, frame=record["start"])

    async def export(self, message: p.Export) -> None:
        show = self.directed()
        stage = self.scheduler.stage

        def copied() -> tuple[Any, dict[str, Any]]:
            session = show.session
            if not session.start:
                raise Refusal("out_of_order", "there is nothing to export before the first block")
            latents = {name: arm.spool.read(0, session.start) for name, arm in session.arms.items()}
            return session.script.shown(session.start), latents if message.what == "mp4" else {}

        prompt, latents = await self.ask(copied)
        path = await asyncio.to_thread(
            export_session,
            self.theatre.out,
            f"{secrets.token_hex(6)}-{prompt.num_frames}",
            message.what,
            prompt,
            latents,
            stage.codec,
        )
        self.theatre.exported[path.name] = path
        self.answer(what=message.what, file=path.name, url=f"/v1/files/{path.name}")
