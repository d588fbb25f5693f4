"""The server of a study in a thread or, to be killed, in a process of its own."""

import json
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from kvpo.arena.server import arena_app
from kvpo.arena.store import Study
from tests.http_servers import served_app

CHILD = """
import sys, uvicorn
from pathlib import Path
from kvpo.arena.server import arena_app
from kvpo.arena.store import Study
uvicorn.run(arena_app(Study(Path(sys.argv[1]))), fd=int(sys.argv[2]), log_level="critical")
"""


@contextmanager
def served(study: Study) -> Iterator[str]:
    """The address of a server of ``study`` in this process."""
    with served_app(arena_app(study)) as url:
        yield url


def child_server(directory: Path, listener: socket.socket) -> subprocess.Popen:
    """A server in a process of its own, which answers on ``listener`` once it has started."""
    words = [sys.executable, "-c", CHILD, str(directory), str(listener.fileno())]
    return subprocess.Popen(words, pass_fds=(listener.fileno(),))


def ask(
    url: str,
    token: str | None,
    body: Any = None,
    *,
    headers: Sequence[tuple[str, str]] = (),
    raw: bytes | None = None,
) -> tuple[int, bytes, dict[str, str]]:
    """Status, content and headers of an answer."""
    content = raw if raw is not None else None if body is None else json.dumps(body).encode()
    request = Request(url, content, dict(headers))
    if token is not None:
        request.add_header("Authorization", f"Bearer {token}")
    if content is not None:
        request.add_header("Content-Type", "application/json")
    try:
        with urlopen(request, timeout=30) as answer:
            return answer.status, answer.read(), dict(answer.headers)
    except HTTPError as error:
        with error:
            return error.code, error.read(), dict(error.headers)
