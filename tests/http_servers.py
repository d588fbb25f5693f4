"""A web application on a loopback port, in a thread of this process."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn


@contextmanager
def served_app(app: Any, *, port: int = 0, send_buffer: int | None = None, **options: Any) -> Iterator[str]:
    """The address of an application that serves until the end of the context.

    ``send_buffer`` is the socket's, in bytes; ``options`` are uvicorn's.
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
