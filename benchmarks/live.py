"""Measure `kvpo live`: first frame, frames per second, prompt switches, viewers, several sessions.

    python benchmarks/live.py [--run RUN] [--quick] [--json FILE]

Server, generator and clients run in this process, share the machine's cores and talk over real sockets.
Prints a Markdown table, which includes the load of other processes at the start.
"""

import argparse
import json
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import uvicorn
from measuring import table, write_json
from websockets.sync.client import connect

from kvpo.app.configuration import preset, resolve_saved
from kvpo.app.live import theatre_of
from kvpo.live.protocol import Refusal
from kvpo.live.scheduler import SessionLimits
from kvpo.live.server import ENDPOINT, live_app
from kvpo.training.device import computing

PROMPTS = ("A red circle drifts right by the sea.", "A blue square drifts left in a meadow.")


class Client:
    """A connection that directs or watches a session."""

    def __init__(self, port: int) -> None:
        self._open = ExitStack()
        url = f"ws://127.0.0.1:{port}{ENDPOINT}"
        self.socket = self._open.enter_context(connect(url, max_size=None, open_timeout=60))

    def close(self) -> None:
        self._open.close()

    def send(self, type: str, **values: Any) -> None:
        self.socket.send(json.dumps({"type": type, **values}))

    def block(self) -> dict[str, Any]:
        """The header of the next block, with its time of arrival. Raises Refusal."""
        while isinstance(message := self.socket.recv(60), str):
            event = json.loads(message)
            if event["type"] == "error":
                raise Refusal(event["code"], event["message"])
        (length,) = struct.unpack(">I", message[:4])
        return {**json.loads(message[4 : 4 + length]), "at": time.monotonic()}


@contextmanager
def served(run: Path | None, limits: SessionLimits) -> Any:
    """Run a server in this process; yields its port."""
    config = preset("demo") if run is None else resolve_saved(run / "config.yaml")
    with ExitStack() as stack:
        out = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        stack.enter_context(computing(config))
        theatre = theatre_of(config, out, run=run, checkpoint=None, weights="average", limits=limits)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        app = live_app(theatre, host="127.0.0.1", token=None)
        server = uvicorn.Server(uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1))
        worker = threading.Thread(target=theatre.scheduler.run)
        serving = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        worker.start()
        serving.start()
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = True
            serving.join()  # before the scheduler stops, which ends the sessions of the clients that leave
            theatre.scheduler.stop()
            worker.join()


def one_session(port: int, blocks: int) -> dict[str, float]:
    """Run one session with all arms at full speed, with a prompt switch every ten blocks."""
    client = Client(port)
    asked = time.monotonic()
    client.send("session.start", prompt=PROMPTS[0], speed=0)
    came = [client.block()]
    switched, switches = 0.0, []
    for n in range(1, blocks):
        if n % 10 == 0:
            switched = time.monotonic()
            client.send("session.prompt_update", prompt=PROMPTS[n // 10 % 2])
        came.append(client.block())
        if switched and came[-1]["prompt"] != came[-2]["prompt"]:
            switches.append(came[-1]["at"] - switched)
            switched = 0.0
    client.close()
    frames = sum(map(len, came[0]["frames"].values()))
    return {
        "first frame, s": came[0]["at"] - asked,
        "frames a second, all arms": frames * (blocks - 1) / (came[-1]["at"] - came[0]["at"]),
        "time between blocks, p95, s": float(np.percentile(np.diff([one["at"] for one in came]), 95)),
        "prompt sent to first block under it, p50, s": float(np.median(switches)),
    }


def watched(port: int, viewers: int, seconds: float) -> dict[str, float]:
    """Run one session at the video's rate with many viewers: how late blocks reach the slowest one."""
    director = Client(port)
    director.send("session.start", prompt=PROMPTS[0], speed=1)
    session = director.block()["session"]
    arrivals: list[dict[int, float]] = [{} for _ in range(viewers)]

    def watch(own: dict[int, float]) -> None:
        client = Client(port)
        client.send("session.watch", session=session)
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            block = client.block()
            own[block["block"]] = block["at"]
        client.close()

    threads = [threading.Thread(target=watch, args=(own,)) for own in arrivals]
    for thread in threads:
        thread.start()
    reference = {}
    end = time.monotonic() + seconds + 1
    while time.monotonic() < end:
        block = director.block()
        reference[block["block"]] = block["at"]
    for thread in threads:
        thread.join()
    director.close()
    behind = [own[n] - at for own in arrivals for n, at in reference.items() if n in own]
    gaps = [n for own in arrivals for n in range(min(own), max(own)) if n not in own]
    return {
        f"{viewers} watchers: blocks behind the director's, p99, s": float(np.percentile(behind, 99)),
        f"{viewers} watchers: blocks left out": len(gaps),
        f"{viewers} watchers: blocks in time": block["numbers"]["deadlines_met"] or 0.0,
    }


def many_sessions(port: int, sessions: int, blocks: int) -> dict[str, float]:
    """Run several sessions at full speed, and check that one more is refused."""
    clients = [Client(port) for _ in range(sessions)]
    for n, client in enumerate(clients):
        client.send("session.start", prompt=PROMPTS[n % 2], seed=n, speed=0)
    refused = Client(port)
    refused.send("session.start", prompt=PROMPTS[0])
    try:
        refused.block()
        code = "none"
    except Refusal as refusal:
        code = refusal.code
    came: list[list[float]] = [[] for _ in clients]

    def read(client: Client, own: list[float]) -> None:
        for _ in range(blocks):
            own.append(client.block()["at"])

    threads = [threading.Thread(target=read, args=pair) for pair in zip(clients, came, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for client in [*clients, refused]:
        client.close()
    rates = [3 * (blocks - 1) / (own[-1] - own[0]) for own in came]
    return {
        f"{sessions} sessions: frames a second of one arm, slowest session": min(rates),
        f"{sessions} sessions: fastest over slowest": max(rates) / min(rates),
        f"{sessions} sessions: one more is refused ({code})": float(code == "busy"),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path, help="a run; without it the base streams alone")
    parser.add_argument("--quick", action="store_true", help="small counts: checks the benchmark itself")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    sessions = 2 if options.quick else 8
    numbers: dict[str, float] = {"load before": os.getloadavg()[0]}
    with served(options.run, SessionLimits(sessions=sessions)) as port:
        numbers |= one_session(port, 22 if options.quick else 60)
        numbers |= watched(port, *((2, 1.0) if options.quick else (50, 10.0)))
        numbers |= many_sessions(port, sessions, 3 if options.quick else 25)
    print(table(["measured", "value"], list(numbers.items())))
    write_json(options.json, numbers)


if __name__ == "__main__":
    main()
