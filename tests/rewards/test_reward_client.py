"""A client of a reward server that is slow, full, absent or something else: a clear error in good time."""

import contextlib
import json
import math
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

from kvpo.prompts import ClipPrompt
from kvpo.rewards.service import client as client_module
from kvpo.rewards.service.client import Link, RemoteScorer, connect, reach
from kvpo.rewards.service.messages import (
    PROTOCOL,
    ScoreRequest,
)
from kvpo.rewards.service.patience import Away, Failed, Patience, StillLoading, Trial
from kvpo.rewards.service.server import RequestLimits
from tests.reward_servers import (
    QUICK,
    Named,
    encoded,
    eventually,
    free_port,
    number_of,
    numbered,
    offer,
    serving,
)


def test_a_server_that_stops_reading_costs_its_time_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once per request that waits behind the first."""
    monkeypatch.setattr(client_module, "REQUEST_BYTES", 1)
    declared = offer(Named(number_of))["own"]
    with socket.create_server(("127.0.0.1", 0)) as frozen:  # connections wait to be accepted for ever
        link = Link(
            f"http://127.0.0.1:{frozen.getsockname()[1]}", None, replace(QUICK, answer=0.5, attempts=2)
        )
        remote = RemoteScorer(link, declared, 16.0, 10**9)
        started = time.monotonic()
        with pytest.raises(ValueError, match="asked 2 times .* no answer within 0.5 s"):
            remote(torch.zeros(8, 8, 3, 256, 256), [ClipPrompt("")] * 8)
        assert time.monotonic() - started < 3.0
        link.close()


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (lambda v, p: 1 / 0, "500 .* the scorer failed: ZeroDivisionError: division by zero"),
        (lambda v, p: torch.full((len(v),), math.nan), "500 .*'own' is nan for clip 0 of 3"),
        (lambda v, p: torch.zeros(len(v) + 1), "500 .*expected 3 scores, got shape \\[4\\]"),
        (lambda v, p: torch.zeros(len(v), 1), "500 .*expected 3 scores, got shape \\[3, 1\\]"),
        (lambda v, p: None, "500 .*the scorer failed: AttributeError"),
    ],
)
def test_a_scorer_that_fails_costs_a_retry_and_then_a_clear_error(broken: Any, message: str) -> None:
    well = threading.Event()
    scorer = Named(lambda v, p: number_of(v, p) if well.is_set() else broken(v, p))
    video, prompts = numbered(3)
    with serving(scorer) as url:
        remote = connect(url, ["own"], patience=QUICK)
        with pytest.raises(ValueError, match=f"reward server {url}: asked 2 times in .* s, .*{message}"):
            remote(video, prompts)
        well.set()
        assert remote(video, prompts)["own"].tolist() == [0, 1, 2]


def test_a_scorer_that_fails_once_costs_a_retry_only() -> None:
    calls = []

    def moody(video: Any, prompts: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("CUDA error: unspecified launch failure")
        return number_of(video, prompts)

    with serving(Named(moody)) as url:
        assert connect(url, ["own"], patience=QUICK)(*numbered(2))["own"].tolist() == [0, 1]
    assert len(calls) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"scores": {"own": [0.5]}}, "expected 2 scores"),
        ({"scores": {"own": [0.5, math.nan]}}, "'own' is nan for clip 1 of 2"),
        ({"scores": {"own": ["a", None]}}, "unusable scores"),
        ({"scores": {"other": [0.5, 0.5]}}, "'own' is missing"),
        ([1, 2], "unusable scores"),
        ("<html>", "the answer is not JSON: '<html>'"),
    ],
)
def test_an_answer_that_is_not_the_scores_asked_for_is_never_used(answer: Any, message: str) -> None:
    content = answer if isinstance(answer, str) else json.dumps(answer)
    with serving(Named(number_of)) as url:
        remote = connect(url, ["own"], patience=QUICK)
        remote.link.client._transport = httpx.MockTransport(lambda request: httpx.Response(200, text=content))
        with pytest.raises(ValueError, match=f"{url}: asked 2 times .*{message}"):
            remote(*numbered(2))


def test_a_slow_server_ends_in_an_error_and_its_queue_forgets_the_question() -> None:
    hold, calls = threading.Event(), []

    def slow(video: Any, prompts: Any) -> Any:
        calls.append(len(video))
        hold.wait(20)
        return number_of(video, prompts)

    with serving(Named(slow)) as url:
        remote = connect(url, ["own"], patience=replace(QUICK, answer=0.3))
        started = time.monotonic()
        with pytest.raises(ValueError, match=f"{url}: asked 2 times in .* s, .* no answer within 0.3 s"):
            remote(*numbered(2))
        assert 0.6 < time.monotonic() - started < 5
        eventually(lambda: httpx.get(f"{url}/health").json()["held_bytes"] == 0)
        health = httpx.get(f"{url}/health").json()
        assert health["waiting_clips"] == 0 and health["scoring_seconds"] > 0.3
        hold.set()
        eventually(lambda: httpx.get(f"{url}/health").json()["scoring_seconds"] is None)
        assert remote(*numbered(2))["own"].tolist() == [0, 1]
    assert calls == [2, 2]  # the second try was taken back before it was scored


def test_a_full_queue_says_when_to_come_back_and_the_client_does() -> None:
    hold, busy = threading.Event(), threading.Event()

    def slow(video: Any, prompts: Any) -> Any:
        busy.set()
        hold.wait(20)
        return number_of(video, prompts)

    video, prompts = numbered(2)
    body = encoded(ScoreRequest(video, tuple(prompts), ("own",)))
    limits = RequestLimits(request_bytes=2 * len(body), queue_bytes=2 * len(body), retry_seconds=1)
    with serving(Named(slow), limits=limits) as url, ThreadPoolExecutor(3) as threads:
        clients = [connect(url, ["own"], patience=replace(QUICK, outage=20)) for _ in range(2)]
        answers = [threads.submit(client, video, prompts) for client in clients]
        eventually(lambda: httpx.get(f"{url}/health").json()["held_bytes"] == 2 * len(body))
        refused = httpx.post(f"{url}/score", content=body)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1"
        with pytest.raises(ValueError, match=f"{url}: asked .* then gave up: 503 .*the queue is full"):
            connect(url, ["own"], patience=replace(QUICK, outage=0.3))(video, prompts)
        late = threads.submit(connect(url, ["own"], patience=replace(QUICK, outage=20)), video, prompts)
        time.sleep(0.2)
        assert not late.done()
        hold.set()
        assert [answer.result(10)["own"].tolist() for answer in (*answers, late)] == [[0, 1]] * 3


def test_a_server_that_is_not_there_or_something_else() -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with pytest.raises(
        ValueError, match=f"reward server {url}: asked .* times in .* s, then gave up: .*onnect"
    ):
        connect(url, ["own"], patience=QUICK)
    with serving(Named(number_of)) as url:
        with pytest.raises(ValueError, match=f"{url} refused: it does not have 'hpsv3'; it has own"):
            connect(url, ["hpsv3"], patience=QUICK)
        with pytest.raises(ValueError, match="refused: 404"):
            connect(f"{url}/elsewhere", ["own"], patience=QUICK)


def test_what_is_waited_for_is_said_at_once(caplog: pytest.LogCaptureFixture) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    began = time.monotonic()
    with pytest.raises(ValueError, match="cannot connect: .*refused; is a `kvpo reward-server` there"):
        connect(url, ["own"], patience=replace(QUICK, outage=300))
    assert time.monotonic() - began < 5
    (record,) = caplog.records
    assert record.created - (time.time() - (time.monotonic() - began)) < 0.5
    assert re.search(f"{url}: cannot connect: .*refused; waiting up to 1 s for it", record.message)


@contextmanager
def odd_server(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """The address of something that accepts every connection and does ``behave`` with it."""

    def work(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            behave(connection)

    def accept() -> None:
        with contextlib.suppress(OSError):  # the listener is closed at the end
            while True:
                threading.Thread(target=work, args=(listener.accept()[0],), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


def drip(connection: socket.socket) -> None:
    for byte in b"HTTP/1.1 200 OK\r\nContent-Length: 999\r\n\r\n" + b" " * 999:
        connection.send(bytes([byte]))
        time.sleep(0.05)


def answer(text: str) -> Callable[[socket.socket], None]:
    def behave(connection: socket.socket) -> None:
        connection.recv(65536)
        connection.sendall(text.encode())

    return behave


@pytest.mark.parametrize(
    ("behave", "problem"),
    [
        (lambda connection: connection.recv(65536) and None, "disconnected without sending a response"),
        (lambda connection: time.sleep(5), "no answer within 0.5[0-9]* s"),
        (drip, "no answer within 0.5[0-9]* s"),
        (answer("HTTP/1.1 503 Busy\r\nContent-Length: 9\r\n\r\nnot ready"), "503 Busy: not ready"),
        (answer("HTTP/1.1 502 Bad\r\nContent-Length: 2\r\n\r\n{}"), "502 Bad"),
        (answer("HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{"), "closed connection"),
        (
            answer("HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: 3\r\n\r\nabc"),
            "the answer cannot be decoded",
        ),
    ],
)
def test_something_that_never_answers_is_given_up_at_the_start(
    behave: Any, problem: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "SILENCE_AT_START", 0.2)
    for ask in (connect, reach):
        with odd_server(behave) as url:
            began = time.monotonic()
            with pytest.raises(ValueError, match=f"{problem}.*; is a `kvpo reward-server` there"):
                ask(url, ["own"], patience=replace(QUICK, answer=300, start=0.5, outage=300))
            assert time.monotonic() - began < 5
        assert re.search(f"{url}: .*; (waiting up to 0 s for it|asking again)", caplog.text)


def test_a_server_that_loads_is_waited_for(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_module, "AGAIN_AT_START", 0.4)
    words = '{"detail": "loading hps"}'
    head = f"HTTP/1.1 503 Service Unavailable\r\nRetry-After: 0\r\nContent-Length: {len(words)}\r\n\r\n"
    with odd_server(answer(head + words)) as url:
        reach(url, ["own"])
        # asyncio may complain here of a client of another test.
        assert not [record for record in caplog.records if record.name.startswith("kvpo")]
        with pytest.raises(StillLoading, match="gave up: 503 Service Unavailable: loading hps"):
            connect(url, ["own"], patience=replace(QUICK, start=0.1, outage=2))
    left = re.findall("503 Service Unavailable: loading hps; waiting up to (.) s for it", caplog.text)
    assert len(left) >= 3 and left[0] == "2" and left[-1] in "01"


def test_a_server_that_dies_while_it_loads_is_given_up() -> None:
    trial = Trial(Patience(), first=True, began=time.monotonic() - 200)
    trial.failed(Away("503", 0.0))
    assert not trial.over and 99 < trial.until - time.monotonic() < 101
    trial.failed(httpx.ConnectError("refused"))
    assert not trial.over and 14 < trial.until - time.monotonic() < 15
    trial.alive -= 15
    trial.failed(httpx.ConnectError("refused"))
    assert trial.over


def test_an_outage_begins_when_the_server_goes_away() -> None:
    trial = Trial(Patience(), first=False, began=time.monotonic() - 300)
    for error in (TimeoutError(), Away("refused"), Failed("500"), Away("refused")):
        trial.failed(error)
        assert not trial.over
        assert trial.until - time.monotonic() > 299
    trial.away_since -= 300
    trial.failed(Away("refused"))
    assert trial.over and not isinstance(trial.end(), Failed)


def test_silence_and_outages_are_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(client_module, "SILENCE", 0.1)
    with serving(Named(lambda video, prompts: time.sleep(0.4) or number_of(video, prompts))) as url:
        remote = connect(url, ["own"], patience=QUICK)
        assert caplog.text == ""
        remote(*numbered(1))
        assert "no answer yet; waiting up to 20 s" in caplog.text
    with pytest.raises(ValueError, match="gave up"):
        remote(*numbered(1))
    assert caplog.text.count("asking again, up to 2 times, or 1 s of an outage") == 1


@pytest.mark.parametrize(
    "content",
    [
        {"rewards": []},
        "x",
        {"protocol": PROTOCOL, "kvpo": "", "rewards": {}, "limits": {"request_bytes": "x"}},
    ],
)
def test_an_answer_of_something_else_is_refused(content: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answer = httpx.Response(200, text=json.dumps(content))
    monkeypatch.setattr(client_module.httpx.AsyncClient, "request", lambda *args, **named: later(answer))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(ValueError, match=f"{url} refused: it is not a kvpo reward server"):
            connect(url, ["own"], patience=QUICK)


async def later(value: Any) -> Any:
    return value


@pytest.mark.parametrize(
    "url",
    [
        "http://a:99999",
        "http://a:x",
        "http://[a",
        "127.0.0.1:80",
        "ftp://a",
        "http://",
        "http://a?b=c",
        "http://me:secret@a",
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(ValueError, match="reward server") as caught:
        connect(url, ["own"])
    assert "secret" not in str(caught.value)


def test_a_server_may_come_up_after_its_client_and_come_back() -> None:
    port = free_port()
    video, prompts = numbered(4)
    patience = replace(QUICK, start=20, outage=20)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(connect, f"http://127.0.0.1:{port}", ["own"], patience=patience)
        time.sleep(0.1)
        with serving(Named(number_of), port=port):
            remote = waiting.result(10)
            assert remote(video, prompts)["own"].tolist() == [0, 1, 2, 3]
        answer = threads.submit(remote, video, prompts)
        time.sleep(0.1)
        with serving(Named(number_of), port=port):
            assert answer.result(10)["own"].tolist() == [0, 1, 2, 3]
