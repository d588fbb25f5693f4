"""The real live server on a loopback port, and a client that speaks its protocol."""

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

from kvpo.live.scheduler import Scheduler, SessionLimits
from kvpo.live.server import ENDPOINT, LARGEST_MESSAGE, live_app
from kvpo.live.theatre import Theatre
from tests.http_servers import served_app
from tests.live.stage import LIMITS, running, scheduler, slow_stage, unpacked


def theatre_of(out: Path, own: Scheduler) -> Theatre:
    """A theatre without stories."""
    codec, block = own.stage.codec, own.stage.generator.block
    info = {"rate": codec.frames_per_second, "block": block, "arms_there": list(own.sides)}
    return Theatre(own, out, info)


@contextmanager
def serving(
    out: Path,
    own: Scheduler | None = None,
    *,
    limits: SessionLimits = LIMITS,
    token: str | None = None,
    theatre: Theatre | None = None,
) -> Iterator["Served"]:
    """A running server; unless another scheduler is given, of a generator that takes no time."""
    own = theatre.scheduler if theatre else own or scheduler(slow_stage(), limits, ("base", "aligned"))
    theatre = theatre or theatre_of(out, own)
    app = live_app(theatre, host="127.0.0.1", token=token)
    # the buffer is small, so that slow readers are soon noticed
    with running(own), served_app(app, send_buffer=1 << 14, ws_max_size=LARGEST_MESSAGE) as url:
        yield Served(theatre, url)


class Served:
    """A server's address and inside."""

    def __init__(self, theatre: Theatre, url: str) -> None:
        self.theatre, self.scheduler, self.url = theatre, theatre.scheduler, url
        self.port = int(url.rpartition(":")[2])

    def connect(self, query: str = "", **options: Any) -> "Client":
        """A client's connection."""
        url = f"ws://127.0.0.1:{self.port}{ENDPOINT}{query}"
        return Client(url, max_size=None, open_timeout=20, **options)

    @property
    def pages(self) -> int:
        return self.scheduler.cache.pages_in_use


class Client:
    """Sends messages and waits for answers."""

    def __init__(self, url: str, **options: Any) -> None:
        self._open = ExitStack()
        self.socket = self._open.enter_context(connect(url, **options))
        self.blocks: list[dict[str, Any]] = []
        """Headers of the blocks that have come."""

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        self._open.close()

    def send(self, type: str, **values: Any) -> None:
        self.socket.send(json.dumps({"type": type, **values}))

    def receive(self, timeout: float = 20) -> dict[str, Any]:
        """The next event, or the header of the next binary message."""
        message = self.socket.recv(timeout)
        if isinstance(message, str):
            return json.loads(message)
        header, pictures = unpacked(message)
        header["pictures"] = pictures
        if header["type"] == "video.block":
            self.blocks.append(header)
        return header

    def until(self, type: str, timeout: float = 20, **values: Any) -> dict[str, Any]:
        """The next event or block of a type whose fields have given values."""
        end = time.monotonic() + timeout
        while True:
            message = self.receive(max(0.01, end - time.monotonic()))
            if message["type"] == type and all(message[name] == value for name, value in values.items()):
                return message
            assert message["type"] != "error" or type == "error", message

    def ask(self, type: str, **values: Any) -> dict[str, Any]:
        """Send a message and wait until it is accepted."""
        self.send(type, **values)
        return self.until(f"{type}.accepted")

    def start(self, prompt: str = "a red square", **values: Any) -> dict[str, Any]:
        self.send("session.start", prompt=prompt, **values)
        return self.until("video.start")

    def refused(self, type: str, **values: Any) -> str:
        """Send a message that is refused; returns the code."""
        self.send(type, **values)
        return self.until("error")["code"]
