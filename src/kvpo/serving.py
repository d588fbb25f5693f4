"""Shared parts of the package's HTTP servers: addresses, tokens, listening and stopping."""

import errno
import hmac
import ipaddress
import json
import logging
import os
import signal
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.resources import files
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import urlsplit

from kvpo.config_checks import ConfigurationError
from kvpo.extras import extra
from kvpo.files import read_text

logger = logging.getLogger(__name__)

STOPPING_SECONDS = 30
"""Seconds that running requests may still take after a server is told to stop."""
QUESTION_SECONDS, RETRY_SECONDS = 10, 2
"""Before a server is ready: seconds in which a request must arrive, and until it is to be repeated."""


def is_loopback(host: str) -> bool:
    """True if only this machine can reach ``host``."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def host_of(address: str) -> str:
    """The host name in an address without a scheme; empty if none can be read."""
    try:
        return urlsplit(f"//{address}").hostname or ""
    except ValueError:
        return ""


def is_own_page(origin: str | None, host: str) -> bool:
    """True if a request with this ``Origin`` comes from a page that ``host`` served, or from no page."""
    return origin is None or bool(host) and origin in (f"http://{host}", f"https://{host}")


def check_address(host: str, token: str | None, variable: str) -> None:
    """Refuse to listen to other machines without a token.

    ``variable`` is the environment variable that may hold the token. Raises ConfigurationError.
    """
    if token is None and not is_loopback(host):
        raise ConfigurationError(
            f"--host: {host} is open to other machines, which needs a token: set {variable} or "
            "give --token-file FILE"
        )


def read_token(file: Path | None, environment: Mapping[str, str], variable: str) -> str | None:
    """The bearer token: from ``file`` if given, else from the environment ``variable``; None if unset.

    Raises ConfigurationError if the file or the variable holds no valid token.
    """
    where, text = variable, environment.get(variable)
    if file is not None:
        try:
            where, text = f"--token-file: {file}", read_text(file)
        except ValueError as error:
            raise ConfigurationError(f"--token-file: cannot read {error}") from error
    if text is None:
        return None
    token = text.strip()
    if not token or not token.isascii() or not token.isprintable() or " " in token:
        raise ConfigurationError(f"{where}: a token is one word of letters, digits and signs")
    return token


def admitted(shown: str, token: str | None) -> bool:
    """True if ``shown`` is the token, or none is required; compares in constant time."""
    return token is None or hmac.compare_digest(shown.encode(), token.encode())


def listener(host: str, port: int) -> socket.socket:
    """A socket that listens at ``host`` and ``port`` (0: any free one). Raises ConfigurationError."""
    if not 0 <= port < 2**16:
        raise ConfigurationError(f"--port: must be 0 to {2**16 - 1}, got {port}")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            flag, way_out = "--port", "give another --port, or 0 for any free one"
        else:
            flag, way_out = "--host", "give an address of this machine"
        # a name that is not found has numbers of its own
        reason = error.strerror if isinstance(error, socket.gaierror) else os.strerror(error.errno)
        raise ConfigurationError(
            f"{flag}: cannot listen at {host}:{port} ({reason.lower()}); {way_out}"
        ) from error


@contextmanager
def answering_later(listening: socket.socket, words: str) -> Iterator[None]:
    """Answer every request with 503, ``Retry-After`` and the message ``words`` while the block runs."""
    content = json.dumps({"detail": words}).encode()

    class Answer(BaseHTTPRequestHandler):
        timeout = QUESTION_SECONDS

        def do_GET(self) -> None:
            self.send_response(503)
            self.send_header("Retry-After", str(RETRY_SECONDS))
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_POST = do_GET

        def log_message(self, format: str, *args: Any) -> None:
            """Log nothing: clients ask again and again."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *of: Any) -> None:
            """Print no traceback when a client goes away."""

    server = Server(("", 0), Answer, bind_and_activate=False)
    server.socket.close()
    server.socket = listening
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, name="kvpo answering later")
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def page_headers(policy: str) -> dict[str, str]:
    """Headers of every response of a server with a page that loads from this server alone.

    ``policy`` holds further directives of the content security policy.
    """
    return {
        "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
        f"connect-src 'self'; {policy}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-resource-policy": "same-origin",
        "cache-control": "no-store",
    }


def add_page(app: Any, package: str) -> list[str]:
    """Serve NAME.html (at /), NAME.css and NAME.js, assets of the ``package`` kvpo.NAME; return the paths."""
    with extra("server"):
        from fastapi import Response

    def constant(file: str, kind: str) -> Any:
        content = files(package).joinpath("assets", file).read_bytes()

        async def answer() -> Response:
            return Response(content, media_type=kind)

        return answer

    name = package.rpartition(".")[2]
    page = {"/": "text/html", f"/{name}.css": "text/css", f"/{name}.js": "text/javascript"}
    for path, kind in page.items():
        app.add_api_route(path, constant(path[1:] or f"{name}.html", kind), methods=["GET"])
    return list(page)


def url_of(host: str, port: int) -> str:
    """The URL of a server, as one types it; with this machine's name if it listens at every address."""
    name = socket.gethostname() if host in ("", "0.0.0.0", "::") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


def run_app(app: Any, listening: socket.socket, **options: Any) -> None:
    """Serve an application until SIGTERM or Ctrl-C; ``options`` are uvicorn's."""
    with extra("server"):
        import uvicorn
    config = uvicorn.Config(
        app, log_level="warning", access_log=False, timeout_graceful_shutdown=STOPPING_SECONDS, **options
    )
    # uvicorn stops at a signal and then raises it again for the previous handler
    former = signal.signal(signal.SIGTERM, lambda number, frame: None)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    finally:
        signal.signal(signal.SIGTERM, former)
    logger.info("stopped")
