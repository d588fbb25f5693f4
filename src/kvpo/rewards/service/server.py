"""Rewards over HTTP: requests are bounded, batched and scored by one thread.

``GET /health`` reports the load, ``GET /rewards`` lists the rewards, ``POST /score`` scores clips
(``messages``). An error is JSON with a ``detail``; a failing scorer fails only its own question.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from typing import Annotated, Any

from kvpo import __version__
from kvpo.extras import extra
from kvpo.rewards.protocol import Scorer
from kvpo.rewards.service.buffers import MIB, Buffers
from kvpo.rewards.service.messages import (
    PROTOCOL,
    Offers,
    ScoreRequest,
    decode_question,
    encode_offers,
    growth,
    with_fractions,
)
from kvpo.rewards.service.scoring_queue import Answer, ScoringQueue
from kvpo.serving import admitted

with extra("server"):
    from fastapi import Depends, FastAPI, HTTPException, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
    from starlette.requests import ClientDisconnect

KEPT_BYTES = 512 * MIB
"""Memory of past requests that is kept for reuse, in addition to the queue's."""
CLIENT_GONE = 499
"""Status of an answer whose client has disconnected."""


@dataclass(frozen=True)
class RequestLimits:
    """Limits on a server's load."""

    request_bytes: int = 1024 * MIB
    """Size of one request."""
    queue_bytes: int = 4096 * MIB
    """Size of all requests being read, queued or scored; further ones are asked to retry later."""
    batch: int = 16
    """Maximum number of clips per call of a scorer."""
    body_seconds: float = 300.0
    """Seconds within which a body must arrive."""
    retry_seconds: int = 2
    """Seconds after which a client should retry when the queue is full."""


class Room:
    """A budget of bytes for requests being read, queued or scored."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.held = 0

    def take(self, size: int) -> bool:
        """Reserve ``size`` bytes; returns False if there is no room."""
        if self.held + size > self.total:
            return False
        self.held += size
        return True

    def give_back(self, size: int) -> None:
        """Release ``size`` bytes that were taken."""
        self.held -= size


@dataclass(frozen=True)
class Service:
    """State that the server's routes share."""

    offers: Offers
    frame_rate: float
    limits: RequestLimits
    queue: ScoringQueue
    room: Room
    buffers: Buffers

    async def health(self) -> dict[str, Any]:
        """The load at this moment."""
        began = self.queue.began
        return {
            "status": "ok",
            "waiting_clips": self.queue.waiting_clips,
            "held_bytes": self.room.held,
            "scoring_seconds": None if began is None else round(time.monotonic() - began, 3),
        }

    async def rewards(self) -> dict[str, Any]:
        """The available rewards, and the limits on requests."""
        return {
            "protocol": PROTOCOL,
            "kvpo": __version__,
            "frame_rate": self.frame_rate,
            "limits": asdict(self.limits),
            "rewards": encode_offers(self.offers),
        }

    async def score(self, request: Request) -> dict[str, Any]:
        """Component -> scores of the clips in the request's body. Raises HTTPException."""
        held = _declared_size(request, self.limits.request_bytes)
        if not self.room.take(held):
            raise HTTPException(503, "the queue is full", {"Retry-After": str(self.limits.retry_seconds)})
        try:
            question = await _question(request, self.buffers.take(held), self.limits.body_seconds)
            question, larger = await _prepared(question, self.room, self.buffers)
            held += larger
            if unknown := [name for name in question.components if name not in self.queue.scorer_of]:
                raise HTTPException(
                    400, f"no component {unknown[0]!r}; there are {', '.join(self.queue.scorer_of)}"
                )
            scores = await _answered(request, self.queue.put(question))
        finally:
            self.room.give_back(held)
        return {"scores": {name: values.tolist() for name, values in scores.items()}}


def reward_app(
    scorers: Sequence[Scorer],
    offers: Offers,
    *,
    frame_rate: float,
    token: str | None = None,
    limits: RequestLimits = RequestLimits(),
) -> FastAPI:
    """Build the app that serves ``offers``; ``scorers`` compute their components.

    Args:
        frame_rate: frames per second of the clips that the scorers were built for.
        token: the bearer token that clients must send; None requires none.
    """
    service = Service(
        offers=offers,
        frame_rate=frame_rate,
        limits=limits,
        queue=ScoringQueue(scorers, batch=limits.batch),
        room=Room(limits.queue_bytes),
        buffers=Buffers(min(KEPT_BYTES, limits.queue_bytes)),
    )

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.queue.close()

    def authorised(
        request: Request,
        shown: Annotated[HTTPAuthorizationCredentials | None, Depends(HTTPBearer(auto_error=False))],
    ) -> None:
        if "origin" in request.headers:  # browsers send it; without a token, any page could post clips
            raise HTTPException(403, "this server answers programs, not web pages")
        if not admitted("" if shown is None else shown.credentials, token):
            raise HTTPException(401, "a bearer token is needed", {"WWW-Authenticate": "Bearer"})

    app = FastAPI(title="kvpo reward server", openapi_url=None, lifespan=lifespan)
    guarded = [Depends(authorised)]
    app.get("/health")(service.health)
    app.get("/rewards", dependencies=guarded)(service.rewards)
    app.post("/score", dependencies=guarded)(service.score)
    return app


def _declared_size(request: Request, limit: int) -> int:
    text = request.headers.get("content-length", "")
    if not text.isdecimal():
        raise HTTPException(411, "the length of the body must be declared")
    if int(text) > limit:
        raise HTTPException(
            413, f"{int(text):,} bytes are over the limit of {limit:,}; send fewer clips at a time"
        )
    return int(text)


async def _question(request: Request, body: memoryview, seconds: float) -> ScoreRequest:
    at = 0
    try:
        async with asyncio.timeout(seconds):
            async for chunk in request.stream():
                body[at : at + len(chunk)] = chunk
                at += len(chunk)
    except TimeoutError as error:
        raise HTTPException(408, f"the body did not arrive within {seconds:g} s") from error
    except ClientDisconnect as error:
        raise HTTPException(CLIENT_GONE) from error
    if at != len(body):  # the rest of this memory holds an earlier request's data
        raise HTTPException(400, f"{at:,} bytes arrived, {len(body):,} were declared")
    try:
        return await run_in_threadpool(decode_question, body)
    except ValueError as error:
        raise HTTPException(400, str(error)) from error


async def _prepared(question: ScoreRequest, room: Room, buffers: Buffers) -> tuple[ScoreRequest, int]:
    """Convert a question's clips to floats if there is room; returns it and the bytes it has grown by.

    Without room, the clips are converted when they are scored, which makes scoring slower.
    """
    larger = growth(question)
    if not larger or not room.take(larger):
        return question, 0
    try:
        return await run_in_threadpool(with_fractions, question, buffers.take), larger
    except BaseException:
        room.give_back(larger)
        raise


async def _answered(request: Request, answer: Future[Answer]) -> Answer:
    """Wait for the answer; if the client disconnects first, withdraw its question."""
    result = asyncio.wrap_future(answer)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({result, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise HTTPException(CLIENT_GONE)
        return result.result()
    except ValueError as error:
        raise HTTPException(500, str(error)) from error
    finally:
        gone.cancel()
        result.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
