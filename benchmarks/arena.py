"""Measure `kvpo arena` under load: latency of votes and videos while several raters vote at once.

    python benchmarks/arena.py [--raters 8] [--pairs 40] [--json FILE]

Server and raters share this process and its cores and talk over real sockets; raters do not pause to watch.
Every vote is on disk before it is acknowledged. Prints a Markdown table; "load before" is the load of other
processes.
"""

import argparse
import hashlib
import os
import socket
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import httpx
import numpy as np
import uvicorn
from measuring import table, write_json

from kvpo.arena.intake import create_study
from kvpo.arena.server import arena_app
from kvpo.arena.store import Study
from kvpo.arena.study import Design, Scene

VIDEO_BYTES = 150_000
"""About the size of a demo video."""


def study_of(directory: Path, pairs: int) -> Study:
    """A study of two arms whose videos are arbitrary bytes, which the server does not decode."""
    draws, videos, scenes = np.random.default_rng(0), {}, []
    for n in range(pairs):
        shown = {}
        for arm in ("base", "aligned"):
            path = directory / f"{arm} {n}.mp4"
            path.write_bytes(draws.bytes(VIDEO_BYTES))
            shown[arm] = hashlib.sha256(path.read_bytes()).hexdigest()
            videos[shown[arm]] = path
        scenes.append(Scene((f"prompt {n}",), shown))
    return create_study(directory / "study", Design("load", tuple(scenes), pairs=pairs), videos)


def vote_through(url: str, token: str, taken: dict[str, list[float]]) -> None:
    """Do what the page does from the first ballot to the last, and record how long each request took."""
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=url, headers=headers, timeout=60) as client:

        def ask(kind: str, method: str, path: str, **body: object) -> httpx.Response:
            asked = time.perf_counter()
            answer = client.request(method, path, **body).raise_for_status()  # type: ignore[arg-type]
            taken[kind].append(time.perf_counter() - asked)
            return answer

        for position in range(client.get("/session").raise_for_status().json()["ballots"]):
            ballot = ask("ballot", "GET", f"/ballots/{position}").json()
            for place in range(ballot["videos"]):
                ask("video", "GET", f"/ballots/{position}/videos/{place}")
            answers = dict.fromkeys(ballot["questions"], "left")
            ask("vote", "POST", "/votes", json={"position": position, "answers": answers, "finished": True})


def load(url: str, study: Study, raters: int) -> dict[str, float]:
    """Latencies while ``raters`` raters vote at once."""
    taken: list[dict[str, list[float]]] = [{"ballot": [], "video": [], "vote": []} for _ in range(raters)]
    links = [study.invite(f"rater {n} of {raters}") for n in range(raters)]
    own = [
        threading.Thread(target=vote_through, args=(url, *pair)) for pair in zip(links, taken, strict=True)
    ]
    began = time.perf_counter()
    for thread in own:
        thread.start()
    for thread in own:
        thread.join()
    seconds = time.perf_counter() - began
    votes = [one for rater in taken for one in rater["vote"]]
    numbers = {f"{raters} at once: votes a second": len(votes) / seconds}
    for kind in ("vote", "video"):
        p50, p99 = np.percentile([one for rater in taken for one in rater[kind]], (50, 99))
        numbers |= {
            f"{raters} at once: {kind}, p50, s": float(p50),
            f"{raters} at once: {kind}, p99, s": float(p99),
        }
    stored = sum(study.done(rater) for link in links if (rater := study.rater_of(link)))
    if stored != len(votes):
        raise RuntimeError(f"{len(votes)} votes were acknowledged, {stored} are stored")
    return numbers


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--raters", type=int, default=8)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    numbers: dict[str, float] = {"load before": os.getloadavg()[0]}
    with tempfile.TemporaryDirectory() as directory, socket.create_server(("127.0.0.1", 0)) as listener:
        study = study_of(Path(directory), options.pairs)
        server = uvicorn.Server(uvicorn.Config(arena_app(study), log_level="critical"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            for raters in (1, options.raters):
                numbers |= load(f"http://127.0.0.1:{listener.getsockname()[1]}", study, raters)
        finally:
            server.should_exit = True
            thread.join()
    print(table(["measured", "value"], list(numbers.items())))
    write_json(options.json, numbers)


if __name__ == "__main__":
    main()
