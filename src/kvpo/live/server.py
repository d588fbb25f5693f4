"""Serves the live page and its protocol: ``ws://HOST:PORT/v1/realtime/video`` (``docs/live.md``)."""

import asyncio
import json
from collections.abc import AsyncIterator, Collection
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict, dataclass
from typing import Any
from urllib.parse import parse_qs

from kvpo.extras import extra
from kvpo.live.direct import Direction
from kvpo.live.protocol import Refusal, parse_message
from kvpo.live.theatre import Connection, Theatre
from kvpo.serving import add_page, admitted, host_of, is_loopback, is_own_page, page_headers

with extra("server"):
    from fastapi import FastAPI, HTTPException, Request, Response, WebSocket, WebSocketDisconnect
    from fastapi.responses import FileResponse
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

ENDPOINT = "/v1/realtime/video"
LARGEST_MESSAGE = 1 << 20
"""Largest message that is read, in bytes; above ``SessionLimits.message_bytes``, the answer is an error."""


@dataclass(frozen=True)
class Guard:
    """Admits this server's own pages, and programs that use its name and send the token.

    A page of another site can open a WebSocket to this machine, which ``Origin`` reveals, or make its own
    host name point here, which ``Host`` reveals.
    """

    app: ASGIApp
    host: str
    token: str | None
    page: Collection[str]
    """Paths that need no token."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        refused = self._refused(scope)

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = page_headers("img-src 'self' blob: data:")
                own = [(name.encode(), value.encode()) for name, value in headers.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        if refused is None:
            await self.app(scope, receive, with_headers)
        elif scope["type"] == "websocket":
            await receive()
            await send({"type": "websocket.close", "code": 1008, "reason": refused[1]})
        else:
            status, detail = refused
            await Response(json.dumps({"detail": detail}), status, media_type="application/json")(
                scope, receive, with_headers
            )

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        name = headers.get("host", "")
        if is_loopback(self.host) and not is_loopback(host_of(name)):
            return 403, "this server answers to the names of this machine only"
        if not is_own_page(headers.get("origin"), name):
            return 403, "pages of other sites may not connect"
        if scope["path"] in self.page:
            return None
        shown = headers.get("authorization", "").removeprefix("Bearer ")
        if not shown:
            shown = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        return None if admitted(shown, self.token) else (401, "a token is needed")


def live_app(theatre: Theatre, *, host: str, token: str | None) -> FastAPI:
    """Build the application: page, protocol, exported files, ``/metrics``.

    Args:
        host: address that it listens on.
        token: token that clients must send; None requires none.
    """

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        theatre.loop = asyncio.get_running_loop()
        yield

    app = FastAPI(title="kvpo live", openapi_url=None, lifespan=lifespan)
    app.add_middleware(Guard, host=host, token=token, page=add_page(app, "kvpo.live"))
    _add_questions(app, theatre)

    @app.websocket(ENDPOINT)
    async def realtime(socket: WebSocket) -> None:
        await socket.accept()
        await serve_connection(theatre, socket)

    return app


def _add_questions(app: FastAPI, theatre: Theatre) -> None:
    """Add the routes that need no session."""

    @app.get("/v1/info")
    async def info() -> dict[str, Any]:
        return {**theatre.info, "limits": asdict(theatre.scheduler.limits)}

    @app.get("/v1/sessions")
    async def sessions() -> dict[str, Any]:
        return {"sessions": list(theatre.rooms)}

    @app.get("/v1/story")
    async def story(seed: int) -> dict[str, Any]:
        if theatre.story is None:
            raise HTTPException(404, "this generator comes without stories")
        return {"prompts": [asdict(cue) for cue in theatre.story(seed)]}

    @app.get("/v1/files/{name}")
    async def exported(name: str) -> FileResponse:
        if name not in theatre.exported:  # only names of this run's exports, never paths
            raise HTTPException(404, "no such file")
        return FileResponse(theatre.exported[name], filename=name)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        return Response(theatre.scheduler.metrics.text(), media_type="text/plain; version=0.0.4")


async def serve_connection(theatre: Theatre, socket: WebSocket) -> None:
    """Serve one client until it disconnects; a session that it directs ends with it."""
    with theatre.connected() as connection:
        writer = asyncio.create_task(_write(socket, connection))
        try:
            await _read(theatre, socket, connection)
        except (WebSocketDisconnect, RuntimeError):  # the latter if the writer has closed it
            pass
        finally:
            writer.cancel()
            with suppress(asyncio.CancelledError, WebSocketDisconnect, RuntimeError):
                await writer
            await theatre.left(connection)


async def _read(theatre: Theatre, socket: WebSocket, connection: Connection) -> None:
    """Handle a client's messages one after another."""
    direction = Direction(theatre, connection)
    limit = theatre.scheduler.limits.message_bytes
    if theatre.crowded:
        refusal = Refusal("busy", f"{theatre.scheduler.limits.viewers} viewers are connected already")
        await socket.send_text(json.dumps(refusal.event()))
        await socket.close(1013)
        return
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        try:
            text = message.get("text")
            if text is None:
                raise Refusal("malformed", "binary messages are not understood; send JSON text")
            if (size := len(text.encode(errors="replace"))) > limit:
                raise Refusal("too_large", f"a message may have {limit:,} bytes, got {size:,}")
            await direction.carry_out(*parse_message(text))
        except Refusal as refusal:
            theatre.scheduler.metrics.refused.labels(refusal.code).inc()
            connection.outbox.put(refusal.event())


async def _write(socket: WebSocket, connection: Connection) -> None:
    """Send the items of the outbox; disconnect a reader that cannot keep up with its events."""
    while (item := await connection.outbox.get()) is not None:
        if isinstance(item, bytes):
            await socket.send_bytes(item)
        else:
            await socket.send_text(json.dumps(item))
    await socket.close(1008, "too many events unread")
