"""Client of a reward server: a scorer in another process that is called like a function."""

import asyncio
import contextlib
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from urllib.parse import urlsplit

import torch
from torch import Tensor

from kvpo.extras import extra
from kvpo.files import parse_json, printable
from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Declaration, checked
from kvpo.rewards.service.messages import (
    PROTOCOL,
    Body,
    ScoreRequest,
    decode_offers,
    eight_bit,
    encode_question,
)
from kvpo.rewards.service.patience import (
    AGAIN,
    AGAIN_AT_START,
    PATIENCE,
    Away,
    Failed,
    Patience,
    RequestRefused,
    StillLoading,
    Trial,
)

with extra("server"):
    import httpx

logger = logging.getLogger(__name__)

T = TypeVar("T")

REQUEST_BYTES = 8 * 2**20
"""A batch is split into requests of about this size, or of one clip if a clip is larger. Scoring begins when
the first request has arrived."""
IN_FLIGHT = 3
"""Requests in flight per client: one being scored, one waiting, one in transit. Preparing and sending more
while the first is scored would slow it down if the server is on the same machine."""
PART_BYTES = 2**20
"""Bytes of a body sent at a time: each part costs Python time, and copies within the CPU cache are cheap."""
NO_BODY = Body(b"", memoryview(b""))
CONNECT_SECONDS = 10.0
SILENCE, SILENCE_AT_START = 30.0, 1.0
"""Seconds without scores, or without any answer, after which the wait is logged."""
WORDS = 200
"""Maximum number of characters of a server's own message to quote."""


async def in_parallel(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """Run coroutines at once and return their results in order; raises the first exception alone."""
    try:
        async with asyncio.TaskGroup() as tasks:
            started = [tasks.create_task(one) for one in coroutines]
    except ExceptionGroup as errors:  # some versions of Python wrap what is raised within `except*`
        raise errors.exceptions[0] from None
    return [task.result() for task in started]


class Link:
    """A connection to one server, run by an event loop in a daemon thread.

    Calls can be interrupted at any moment (Ctrl-C) and may come from any thread, even one with its own event
    loop.
    """

    def __init__(
        self,
        url: str,
        token: str | None,
        patience: Patience,
        *,
        at_once: int | None = None,
        role: str = "reward server",
        kind: str = "application/octet-stream",
    ) -> None:
        self.url = checked_url(url)
        self.patience = patience
        self.role = role
        self.kind = kind
        self.loop = asyncio.new_event_loop()
        at_once = at_once or IN_FLIGHT
        self.in_flight = asyncio.Semaphore(at_once)
        self.preparation = asyncio.Lock()
        self.upload = asyncio.Lock()  # held by the request that is sending its body
        self.client = httpx.AsyncClient(
            base_url=self.url,
            headers={} if token is None else {"Authorization": f"Bearer {token}"},
            timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
            limits=httpx.Limits(max_connections=at_once),
            trust_env=False,  # a web proxy cannot reach this machine's own addresses
            verify=self.url.startswith("https:"),  # reading all certificates takes a fifth of a second
        )
        threading.Thread(target=self.loop.run_forever, name="kvpo reward client", daemon=True).start()

    def begin(self, coroutine: Coroutine[Any, Any, T]) -> Callable[[], T]:
        """Start a coroutine; the returned function waits for its result, and cancels it if interrupted."""
        future = asyncio.run_coroutine_threadsafe(coroutine, self.loop)

        def result() -> T:
            try:
                return future.result()
            finally:
                future.cancel()

        return result

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine to completion and return its result."""
        return self.begin(coroutine)()

    def close(self) -> None:
        """Close the connection and end the thread."""
        self.run(self.client.aclose())
        self.run(self.loop.shutdown_asyncgens())
        self.loop.call_soon_threadsafe(self.loop.stop)

    async def ask(
        self, method: str, path: str, read: Callable[[Any], T], body: Body = NO_BODY, *, first: bool = False
    ) -> T:
        """Send a request, repeatedly until ``read`` accepts an answer or the policy's limits are reached.

        The wait, its reason and its limit are logged at the first failure or after some silence, and
        regularly from then on. ``first``: nothing has shown yet that this is a reward server.

        Raises:
            StillLoading: the server only answered that it is loading.
            ValueError: the server refuses, or gave no usable answer in time; the message says which.
        """
        trial, again = Trial(self.patience, first, self.role), AGAIN_AT_START if first else AGAIN

        def say() -> None:
            nonlocal timer
            logger.warning("%s %s: %s; %s", self.role, self.url, trial.problem, trial.plan)
            timer = self.loop.call_later(again, say)

        timer = self.loop.call_later(SILENCE_AT_START if first else SILENCE, say)
        try:
            while True:
                try:
                    return read(_content(await self._send(method, path, body, trial.seconds)))
                except RequestRefused as error:
                    raise ValueError(f"{self.role} {self.url} refused: {error}") from error
                except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                    trial.failed(Away(f"cannot connect: {_reason(error)}"))
                except httpx.DecodingError as error:
                    trial.failed(Failed(f"the answer cannot be decoded: {error}"))
                except (TimeoutError, Failed, Away, httpx.TransportError) as error:
                    trial.failed(error)
                if trial.over:
                    end = trial.end()
                    raise type(end)(f"{self.role} {self.url}: {end}")
                if trial.tries == 1:
                    timer.cancel()
                    say()
                await asyncio.sleep(trial.wait)
        finally:
            timer.cancel()

    async def _send(self, method: str, path: str, body: Body, seconds: float) -> httpx.Response:
        """Send one request and await its response. Bodies are sent in turn, so the first arrives early."""
        with contextlib.ExitStack() as upload:

            async def parts() -> AsyncIterator[Any]:
                for part in body.parts(PART_BYTES):
                    yield part
                upload.close()

            async with asyncio.timeout(seconds):
                await self.upload.acquire()
                upload.callback(self.upload.release)
                headers = {"Content-Length": str(len(body)), "Content-Type": self.kind}
                return await self.client.request(method, path, content=parts(), headers=headers)


def _content(response: httpx.Response) -> Any:
    """JSON of a response; any other response raises an error that says whether to ask again."""
    status = response.status_code
    try:
        content = parse_json(response.text)
    except ValueError as error:
        if status == 200:
            raise Failed(f"the answer is not JSON: {response.text[:100]!r}") from error
        content = {}
    if status == 200:
        return content
    detail = content.get("detail") if isinstance(content, dict) and content else response.text
    words = printable(" ".join(str(detail or "").split()))[:WORDS]
    problem = f"{status} {response.reason_phrase}" + (f": {words}" if words else "")
    if status in (429, 502, 503, 504):
        after = response.headers.get("retry-after", "")
        raise Away(problem, float(after) if after.isdecimal() else None)
    raise (Failed if status in (408, 499) or status >= 500 else RequestRefused)(problem)


def _reason(error: BaseException) -> str:
    """The operating system's own message, without the exceptions wrapped around it."""
    reason = str(error)
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            reason = (
                os.strerror(cause.errno) if cause.errno > 0 else cause.strerror
            )  # asyncio words it differently
        cause = (
            cause.exceptions[0]
            if isinstance(cause, BaseExceptionGroup)
            else cause.__cause__ or cause.__context__
        )
    return reason or type(error).__name__


@dataclass(frozen=True)
class RemoteScorer:
    """A server's rewards as a scorer.

    Pixels are sent in their own precision, or in 8 bits if all scorers round to 8 bits anyway, so the scores
    equal those of the same scorers in this process.
    """

    link: Link
    declarations: tuple[Declaration, ...]
    """Declarations of the components of all requested rewards."""
    frame_rate: float
    """Frames per second of the clips that the server's scorers were built for."""
    request_bytes: int
    """The server's limit on the size of a request."""

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(declaration.name for declaration in self.declarations)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B], in the order of the clips, however they are split into requests.

        Raises:
            ValueError: see ``begin``.
        """
        return self.begin(video_BTCHW, prompts)()

    def begin(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Callable[[], dict[str, Tensor]]:
        """Send clips, after those of earlier calls; the returned function waits for component -> [B].

        Raises:
            ValueError: the server refuses, or gives no usable scores in time; the message names the server.
        """
        rounded = all(declaration.eight_bit for declaration in self.declarations)
        clip_bytes = video_BTCHW[0].numel() * (1 if rounded else video_BTCHW.element_size())
        if clip_bytes > self.request_bytes:
            raise ValueError(
                f"reward server {self.link.url}: a clip of {list(video_BTCHW.shape[1:])} has {clip_bytes:,} "
                f"bytes, its limit for a request is {self.request_bytes:,}; start it with a larger one"
            )
        clips = max(1, min(REQUEST_BYTES, self.request_bytes) // clip_bytes)
        pieces = [slice(at, at + clips) for at in range(0, len(prompts), clips)]
        answers = self.link.begin(self._score(video_BTCHW.detach(), prompts, pieces, rounded))

        def scores() -> dict[str, Tensor]:
            found = answers()
            return {name: torch.cat([answer[name] for answer in found]) for name in self.components}

        return scores

    async def _score(
        self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt], pieces: Sequence[slice], rounded: bool
    ) -> list[dict[str, Tensor]]:
        def body_of(own: tuple[ClipPrompt, ...], clips_BTCHW: Tensor) -> Body:
            sent_BTCHW = (eight_bit(clips_BTCHW) if rounded else clips_BTCHW).cpu()
            return encode_question(ScoreRequest(sent_BTCHW, own, self.components))

        async def score(piece: slice) -> dict[str, Tensor]:
            own = tuple(prompts[piece])

            def read(content: Any) -> dict[str, Tensor]:
                try:
                    found = content["scores"].items()
                    scores = {name: torch.tensor(values, dtype=torch.float32) for name, values in found}
                    return {name: checked(name, scores, len(own)) for name in self.components}
                except (
                    AttributeError,
                    KeyError,
                    TypeError,
                    ValueError,
                    RuntimeError,
                    OverflowError,
                ) as error:
                    raise Failed(f"unusable scores: {error}") from error

            async with self.link.in_flight:  # fetch clips from their device only for requests in flight
                async with self.link.preparation:
                    body = await asyncio.to_thread(body_of, own, video_BTCHW[piece])
                return await self.link.ask("POST", "/score", read, body)

        return await in_parallel(map(score, pieces))

    def close(self) -> None:
        """Close the connection."""
        self.link.close()


def connect(
    url: str, names: Sequence[str], *, token: str | None = None, patience: Patience = PATIENCE
) -> RemoteScorer:
    """Connect to the rewards ``names`` of the server at ``url``, which may still be starting or loading.

    Raises:
        StillLoading: the server was loading for longer than ``patience.outage``.
        ValueError: the URL is invalid, no server answers in time, or it speaks another protocol or does not
            have a reward.
    """
    link = Link(url, token, patience)

    def read(content: Any) -> RemoteScorer:
        try:
            if content["protocol"] != PROTOCOL:
                raise RequestRefused(
                    f"it is of kvpo {content['kvpo']} and speaks protocol {content['protocol']}, "
                    f"this one {PROTOCOL}; use one version on both sides"
                )
            offers = decode_offers(content["rewards"])
            limit, rate = int(content["limits"]["request_bytes"]), float(content["frame_rate"])
        except RequestRefused:
            raise
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError) as error:
            raise RequestRefused(f"it is not a kvpo reward server: {error!r} in its answer") from error
        if unknown := [name for name in names if name not in offers]:
            raise RequestRefused(f"it does not have {unknown[0]!r}; it has {', '.join(offers)}")
        return RemoteScorer(link, tuple(one for name in names for one in offers[name]), rate, limit)

    try:
        return link.run(link.ask("GET", "/rewards", read, first=True))
    except BaseException:
        link.close()
        raise


def reach(url: str, names: Sequence[str], *, token: str | None = None, patience: Patience = PATIENCE) -> None:
    """Check that a reward server is at ``url``; it may still be loading. Raises ValueError as ``connect``."""
    with contextlib.suppress(StillLoading):
        connect(url, names, token=token, patience=replace(patience, outage=0.0)).close()


def checked_url(url: str) -> str:
    """``url`` without a trailing slash; ValueError unless it is a plain http(s) address."""
    try:
        parts = urlsplit(url)
        right = parts.port != 0 and parts.scheme in ("http", "https") and parts.hostname
    except ValueError:  # an invalid port or IPv6 address
        right = False
    if not right or parts.query or parts.fragment:
        raise ValueError(
            f"reward server {url.rpartition('@')[2]!r}: expected http://HOST:PORT or https://HOST"
        )
    if parts.username or parts.password:
        raise ValueError(f"reward server at {parts.hostname}: a token must not be part of its address")
    return url.rstrip("/")
