"""A stream that is directed while it runs: prompts, routed history, pins and forks. No networking here.

A session's ``Script`` is plain data and determines every latent. Commands edit the script between blocks and
act at the next block. Base and aligned are *arms*: streams of the same script on the same noise tape.
"""

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo.config import ExplorationConfig
from kvpo.engine.generator import Codec, StreamingGenerator
from kvpo.engine.noise import SeededTape, keyed_generator
from kvpo.engine.stream import Stream, TextTable, advance, open_stream, shares_of, switch_prompts
from kvpo.live.protocol import Refusal
from kvpo.live.script import OPEN_END, Cue, Script
from kvpo.live.spool import Spool
from kvpo.method.routing import dispersed_routes, visible_frames
from kvpo.models.cache import FrameCache, History


@dataclass(frozen=True)
class Stage:
    """The generator and everything else that all sessions of a server share."""

    generator: StreamingGenerator
    codec: Codec
    embed: Callable[[Sequence[str]], TextTable]
    """Embeds prompt texts. Raises ValueError for a text that cannot be embedded."""
    exploration: ExplorationConfig
    """Routed slots, recent frames and resident frames, as in training."""
    identity: str
    """Identifies weights and deployment; a snapshot cannot be continued under others."""

    @property
    def local_frames(self) -> int:
        """Number of past frames whose latents a block may need, for example to re-encode them."""
        window = self.generator.deployment.window
        return OPEN_END if window == -1 else window


@dataclass
class Arm:
    """One policy's stream of a session, and everything it has generated."""

    stream: Stream
    spool: Spool
    decoding: object | None = None
    """The codec's state after the last decoded frame."""


@dataclass(frozen=True)
class Branches:
    """An open fork: continuations of one arm from ``frame``. The first is not routed."""

    arm: str
    frame: int
    routes: tuple[tuple[int, ...] | None, ...]
    pixels: tuple[Tensor, ...]
    """RGB ``[T', 3, H', W']`` of every branch."""
    blocks: int
    prompt: str
    """The prompt of all branches."""


class Session:
    """A directed stream. Not thread-safe: a single thread must direct and advance it."""

    def __init__(self, stage: Stage, cache: FrameCache, arms: Sequence[str], cue: Cue, seed: int) -> None:
        self.stage = stage
        self.script = Script(seed, (cue.prompt,))
        self.cue, self.cue_start = cue, 0
        self.coming: Cue | None = None
        self.queue: deque[Cue] = deque()
        self.pins: frozenset[int] = frozenset()
        self.fork: Branches | None = None
        self.texts, tape = dict(stage.embed([cue.prompt])), self.tape
        self.arms = {
            name: Arm(open_stream(stage.generator, cache, self.script.shown(), self.texts, tape), Spool())
            for name in arms
        }

    @property
    def tape(self) -> SeededTape:
        """The noise tape that all arms share."""
        return SeededTape(("live", self.script.seed), self.stage.generator.block_shape)

    @property
    def start(self) -> int:
        """First latent frame of the next block."""
        return next(iter(self.arms.values())).stream.start

    @property
    def block(self) -> int:
        """Index of the next block."""
        return self.start // self.stage.generator.block

    @property
    def history(self) -> History:
        """The history of the first arm; all arms hold the same frames."""
        return next(iter(self.arms.values())).stream.history

    @property
    def prompt(self) -> str:
        """The current prompt."""
        return self.script.segments[-1]

    def show(self, cue: Cue) -> None:
        """Switch to another prompt at the next block. Raises ValueError if it cannot be embedded."""
        self._embed([cue])
        self.coming = cue

    def line_up(self, cues: Iterable[Cue]) -> None:
        """Replace the queue; its first prompt follows once the current one has lasted its length.

        Raises ValueError if a prompt cannot be embedded.
        """
        cues = list(cues)
        self._embed(cues)
        self.queue = deque(cues)

    def _embed(self, cues: Sequence[Cue]) -> None:
        """Embed ``cues``, and drop embeddings that neither the next block nor a later prompt needs."""
        new = [prompt for prompt in {cue.prompt: None for cue in cues} if prompt not in self.texts]
        self.texts |= self.stage.embed(new) if new else {}
        told = self._told(self.script, self.start)
        kept = {cue.prompt for cue in (*cues, *told, *self.queue, self.coming) if cue is not None}
        for prompt in self.texts.keys() - kept:
            del self.texts[prompt]  # in place: all arms read this table

    def route(self, frames: Sequence[int], blocks: int) -> None:
        """Fill the routed slots of the next blocks with past frames, repeated evenly.

        Without frames, the next blocks see the deployment context. Raises Refusal for frames that are not
        resident, or for more frames than slots.
        """
        self.demand_resident(frames)
        slots = self.stage.exploration.routed
        if len(set(frames)) > slots:
            raise Refusal("out_of_range", f"frames: {len(set(frames))} frames for {slots} routed slots")
        distinct = sorted(set(frames))
        filled = tuple(sorted(distinct[n % len(distinct)] for n in range(slots))) if distinct else ()
        coming = {self.block + n: filled for n in range(blocks)} if filled else {}
        self.script = self.script.routed(coming, self.block)
        self.hold()

    def pin(self, frames: Sequence[int], pinned: bool, most: int) -> None:
        """Keep frames resident, or release them. Raises Refusal if a frame is gone or there are too many."""
        if not pinned:
            self.pins -= set(frames)
        else:
            self.demand_resident(frames)
            if len(self.pins.union(frames)) > most:
                raise Refusal("out_of_range", f"frames: at most {most} frames can be pinned")
            self.pins |= set(frames)
        self.hold()

    def demand_resident(self, frames: Sequence[int]) -> None:
        """Raise Refusal unless every frame has a page in the history."""
        if gone := sorted(set(frames) - set(self.history.pages)):
            raise Refusal(
                "not_resident",
                f"frames: frame {gone[0]} is not resident; pin frames that you want to keep",
            )

    def begin_block(self) -> None:
        """Switch to the prompt that is due at the next block, if any."""
        cue, self.coming = self.coming, None
        over = self.cue.frames and self.start >= self.cue_start + self.cue.frames
        if cue is None and over and self.queue:
            cue = self.queue.popleft()
        if cue is not None:
            self._switch(cue)
        self._embed(self._told(self.script, self.start))

    def _switch(self, cue: Cue) -> None:
        self.cue, self.cue_start = cue, self.start
        self.script = self.script.switched(self.start, cue)
        for arm in self.arms.values():
            arm.stream.prompt = self.script.shown()
            # After going back to a switch, the window may be encoded for the prompt that is replaced now.
            arm.stream.segment = min(arm.stream.segment, max(0, len(self.script.segments) - 2))

    def _told(self, script: Script, frame: int) -> list[Cue]:
        """The prompts that condition the block at a frame; in a transition, earlier ones too."""
        deployment = self.stage.generator.deployment
        mixture = shares_of(script.shown(), len(script.segments) - 1, frame, deployment)
        return [Cue(text) for text, _ in mixture]

    def pages(self, name: str) -> list[int] | None:
        """Page ids for an arm's routed slots in the next block; None: the deployment context."""
        stream = self.arms[name].stream  # the arms advance one after another
        route = self.script.routes.get(stream.start // self.stage.generator.block)
        return None if route is None else stream.history.page_ids(route)

    def sees(self) -> dict[str, list[int]]:
        """Past frames that the next block attends to, by kind of slot: sink, routed, local."""
        route = self.script.routes.get(self.block, ())
        recent = self.stage.exploration.recent if route else self.stage.generator.deployment.local_past
        sink, local = visible_frames(self.start, self.history.sink, recent)
        return {"sink": sink, "routed": sorted(set(route)), "local": local}

    def end_block(self) -> None:
        """Spool the latents of the finished block; keep only those in memory that a switch may re-encode."""
        for arm in self.arms.values():
            arm.spool.append(arm.stream.latents[-1])
            del arm.stream.latents[: -max(1, self.stage.local_frames // self.stage.generator.block)]
        self.hold()

    def hold(self) -> None:
        """Make every arm keep pinned frames and frames routed to coming blocks."""
        coming = [route for block, route in self.script.routes.items() if block >= self.block]
        held = self.pins.union(*coming)
        for arm in self.arms.values():
            arm.stream.pinned = held

    # Going back ------------------------------------------------------------------------------------------

    def back_to(self, frame: int) -> None:
        """Continue from an earlier frame under the current prompt; everything after it is discarded."""
        again = self._encodes_again(frame)
        script = self._script_from(frame, again)
        for arm in self.arms.values():
            self._take_back(arm.stream, arm.spool, script, frame, again)
            arm.spool.cut(frame)
            arm.decoding = self.decoding_at(arm, frame)
        self.script, self.fork = script, None
        self.cue_start = min(self.cue_start, frame)
        self.pins = frozenset(pin for pin in self.pins if pin < frame)
        self.hold()

    def _encodes_again(self, frame: int) -> bool:
        """True if the window before ``frame`` is gone, or was encoded for a prompt that comes later."""
        deployment = self.stage.generator.deployment
        oldest = 0 if deployment.local_past is None else max(0, frame - deployment.local_past)
        gone = any(past not in self.history.pages for past in range(oldest, frame))
        return gone or any(switch > frame for switch in self.script.switches)

    def _script_from(self, frame: int, again: bool) -> Script:
        script = self.script.switched(frame, self.cue) if again else self.script
        return script.routed({}, frame // self.stage.generator.block)

    def _take_back(self, stream: Stream, spool: Spool, script: Script, frame: int, again: bool) -> None:
        """Rewind a stream; if ``again`` is set, its next block re-encodes its window first."""
        stream.history.rewind(frame)
        if not frame:
            stream.history.sink = tuple(range(self.stage.generator.deployment.sink))
        stream.latents = self.before(spool, frame)
        stream.prompt, stream.fresh_prompt = script.shown(), False
        stream.segment = len(script.segments) - 1 - (again and frame > 0)

    def before(self, spool: Spool, frame: int) -> list[Tensor]:
        """The clean latent blocks before a frame that the next block may re-encode."""
        tail = spool.read(max(0, frame - self.stage.local_frames), frame)
        return list(tail.to(self.stage.generator.device).split(self.stage.generator.block)) if frame else []

    def decoding_at(self, arm: Arm, frame: int) -> object | None:
        """Rebuild the codec's state at a frame from the latents of the window before it."""
        before = self.before(arm.spool, frame)
        return self.stage.codec.decode_next(torch.cat(before), None)[1] if before else None

    def open_fork(self, name: str, frame: int, count: int, blocks: int) -> Branches:
        """Run the deployed continuation and ``count`` routed ones of an arm from a past frame.

        All share prompt and noise. The session itself stays where it is. Raises Refusal.
        """
        stage, arm = self.stage, self.arms[name]
        generator = stage.generator
        if frame % generator.block or not 0 < frame <= self.start:
            raise Refusal(
                "out_of_range",
                f"frame: must be a multiple of {generator.block} in 1..{self.start}, got {frame}",
            )
        if generator.deployment.bank_size and frame != self.start:
            raise Refusal("unavailable", "frame: a memory bank cannot go back; fork at the next block")
        again = self._encodes_again(frame)
        root = arm.stream.fork()
        try:
            script = self._script_from(frame, again)
            self._embed(self._told(script, frame))
            self._take_back(root, arm.spool, script, frame, again)
            switch_prompts(generator, [root])
            routes = self._drawn(root.history, frame, count)
            pages = [None, *(root.history.page_ids(route) for route in routes)]
            clean_RTCHW = self._continued(root, pages, blocks)
            lead = arm.spool.read(max(0, frame - stage.local_frames), frame)
            pixels = stage.codec.decode(clean_RTCHW, lead)
        finally:
            root.history.release()
        self.fork = Branches(name, frame, (None, *routes), tuple(pixels), blocks, self.prompt)
        return self.fork

    def _drawn(self, history: History, frame: int, count: int) -> list[tuple[int, ...]]:
        """Draw dispersed routes among the resident frames for a fork's branches."""
        exploration = self.stage.exploration
        pool = sorted(set(history.pages) - set(history.sink) - set(range(frame - exploration.recent, frame)))
        distinct = exploration.distinct
        while distinct > 1 and math.comb(len(pool), distinct) < count:
            distinct -= 1
        if math.comb(len(pool), distinct) < count:
            raise Refusal(
                "out_of_range", f"branches: {len(pool)} resident frames at {frame} do not give {count} routes"
            )
        draws = keyed_generator("fork", self.script.seed, frame, count)
        drawn = dispersed_routes(
            pool, branches=count, routed=exploration.routed, distinct=distinct, generator=draws
        )
        return [tuple(route) for route in drawn.tolist()]

    def _continued(self, root: Stream, pages: Sequence[list[int] | None], blocks: int) -> Tensor:
        """Continue a root under each row of pages; returns clean latents ``[R, T, C, H, W]``."""
        end = root.start + blocks * self.stage.generator.block
        streams = [replace(root.fork(), end=end) for _ in pages]
        try:
            for _ in range(blocks):
                advance(
                    self.stage.generator,
                    streams,
                    routes=pages,
                    recent=self.stage.exploration.recent,
                    resident=1,
                )
            return torch.stack([torch.cat(stream.latents[-blocks:]) for stream in streams])
        finally:
            for stream in streams:
                stream.history.release()

    def choose(self, branch: int | None, ranking: Sequence[int] = ()) -> Branches:
        """Close the fork and continue along a branch, or (None) from where the stream was.

        Raises Refusal if no fork is open, there is no such branch, or ``ranking`` does not list all branches
        with the chosen one first.
        """
        fork = self.fork
        if fork is None:
            raise Refusal("no_fork", "there is no open fork to choose from")
        if branch is not None and not 0 <= branch < len(fork.routes):
            raise Refusal("out_of_range", f"branch: must be 0..{len(fork.routes) - 1}, got {branch}")
        if ranking and (sorted(ranking) != list(range(len(fork.routes))) or ranking[0] != branch):
            raise Refusal(
                "out_of_range",
                f"ranking: must be 0..{len(fork.routes) - 1} in any order, the chosen one first",
            )
        self.fork = None
        if branch is not None:
            self.back_to(fork.frame)
            route = fork.routes[branch]
            coming = {self.block + n: route for n in range(fork.blocks)} if route else {}
            self.script = self.script.routed(coming, self.block)
            self.hold()
        return fork

    def release(self) -> None:
        """Release all pages and the disk space of the spools."""
        for arm in self.arms.values():
            arm.stream.history.release()
            arm.spool.close()
