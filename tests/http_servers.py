"""Web applications on a loopback port, in a thread of this process."""

import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import uvicorn

from kvpo.app.cli import main


@contextmanager
def served_app(app: Any, *, port: int = 0, send_buffer: int | None = None, **options: Any) -> Iterator[str]:
    """Serve an application until the context exits; yields its address.

    ``send_buffer`` is the socket's send buffer in bytes; ``options`` go to uvicorn.
    """
    with socket.create_server(("127.0.0.1", port)) as listener:
        if send_buffer is not None:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, **options)
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def visited(words: Sequence[str], visit: Callable[[str], Any], caplog: pytest.LogCaptureFixture) -> int:
    """Run a serving `kvpo` command here, and call ``visit`` on the address it logs; returns its status."""
    wrong: list[BaseException] = []

    def call() -> None:
        try:
            deadline = time.monotonic() + 60
            while not (found := re.findall(r"http://127\.0\.0\.1:\d+/\S*", caplog.text)):
                assert time.monotonic() < deadline, "it logged no address"
                time.sleep(0.02)
            with socket.create_connection(("127.0.0.1", int(found[0].split(":")[2].split("/")[0])), 20):
                visit(found[0])
        except BaseException as error:  # re-raised in the test's thread
            wrong.append(error)
        finally:
            os.kill(os.getpid(), signal.SIGTERM)

    caller = threading.Thread(target=call)
    caller.start()
    with caplog.at_level("INFO", "kvpo"):
        status = main([*words])
    caller.join()
    if wrong:
        raise wrong[0]
    return status
