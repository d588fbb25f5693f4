"""A reward server and its client over a real loopback connection: right numbers, or a clear error."""

import asyncio
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
from kvpo.rewards.protocol import Declaration, Sampling
from kvpo.rewards.service import client as client_module
from kvpo.rewards.service import scoring_queue
from kvpo.rewards.service.client import Link, RemoteScorer, connect, reach
from kvpo.rewards.service.messages import (
    PROTOCOL,
    Body,
    Question,
    decode_offers,
    decode_question,
    eight_bit,
    encode_offers,
    encode_question,
    fractions,
)
from kvpo.rewards.service.patience import Away, Patience, StillLoading, Trial
from kvpo.rewards.service.scoring_queue import ScoringQueue
from kvpo.rewards.service.server import Limits, reward_app
from kvpo.world.render import render
from kvpo.world.reward import WorldScorer
from kvpo.world.stories import distinct_stories
from tests.reward_servers import QUICK, Named, eventually, free_port, number_of, numbered, offer, serving


def encoded(question: Question) -> bytes:
    """A question as one piece."""
    return b"".join(encode_question(question).parts(1000))


def decoded(body: bytes) -> Question:
    """The question of a body that has arrived."""
    return decode_question(memoryview(bytearray(body)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.uint8])
def test_a_question_survives_its_journey_to_the_bit(dtype: torch.dtype) -> None:
    video = (torch.rand(2, 3, 3, 4, 6) * 255).to(dtype)
    prompts = (ClipPrompt("Ein Bär, “groß”", "vorher\n", 2), ClipPrompt(""))
    found = decoded(encoded(Question(video, prompts, ("a", "b"))))
    assert torch.equal(found.video_BTCHW, video) and found.components == ("a", "b")
    assert [(str(p), p.before, p.switch) for p in found.prompts] == [
        ("Ein Bär, “groß”", "vorher\n", 2),
        ("", "", 0),
    ]


def test_offers_survive_their_journey() -> None:
    declarations = (
        Declaration("a", -math.inf, math.inf, True, False, 2, 100, Sampling(2.0, 4, 32, 2, None)),
        Declaration("b", 0.0, 1.0, False, True, 1, 50, weight=0.5),
    )
    offers = {"both": declarations}
    assert decode_offers(json.loads(json.dumps(encode_offers(offers), allow_nan=False))) == offers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda body: b"", "must be a safetensors file"),
        (lambda body: b"\xff" * 40, "must be a safetensors file"),
        (lambda body: body[:-3], "189 bytes .* are no video"),
        (lambda body: body + b"123", "195 bytes .* are no video"),
        (lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[2, 2, 3, 2, 0]"), "must be .* got"),
        (lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[2, 2, 3, 2,-2]"), "must be .* got"),
        (lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[2, 2, 3, 2, 3]"), "are no video"),
        (lambda body: body.replace(b'"F32"', b'"F16"'), "are no video"),
        (lambda body: body.replace(b'"prompts"', b'"prompps"'), "must be a safetensors file"),
        (lambda body: body.replace(b"clip 0", b'\\"\\"]..'), "must be a safetensors file"),
        (lambda body: body.replace(b'"video"', b'"audio"'), "one tensor, 'video', got audio"),
        (
            lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[2, 3, 2, 2, 2]"),
            "must be .* got \\[2, 3, 2, 2, 2\\]",
        ),
        (lambda body: body.replace(b"[2, 2, 3, 2, 2]", b"[4, 1, 3, 2, 2]"), "2 prompts for 4 clips"),
        (lambda body: body.replace(b'"F32"', b'"I32"'), "of I32"),
    ],
)
def test_a_damaged_question_is_refused(change: Any, message: str) -> None:
    video, prompts = numbered(2)
    body = encoded(Question(video, tuple(prompts), ("own",)))
    assert change(body) != body
    with pytest.raises(ValueError, match=message):
        decoded(change(body))


def test_remote_scores_are_the_local_ones_to_the_bit() -> None:
    """Real clips, two of each length, in both precisions that a run decodes to."""
    stories = distinct_stories("validation", 4, 1, 12, 0)
    generator = torch.Generator().manual_seed(0)
    video = torch.stack([render(story, generator) for story in stories])
    prompts = [ClipPrompt(story.acts[0].caption) for story in stories]
    scorer = WorldScorer()
    with serving(scorer) as url:
        remote = connect(url, ["own"], patience=QUICK)
        assert remote.components == scorer.components and remote.frame_rate == 16.0
        for clips in (video, video[:, :5], video.half()):
            expected = scorer(clips, prompts)
            for name, values in remote(clips, prompts).items():
                assert torch.equal(values, expected[name].float()), name
        remote.close()


def test_eight_bit_clips_are_scored_as_fractions() -> None:
    video = torch.arange(256, dtype=torch.uint8)[:, None, None, None, None].expand(-1, 1, 3, 1, 1)
    with serving(Named(lambda clips, prompts: clips[:, 0, 0, 0, 0])) as url:
        scores = connect(url, ["own"], patience=QUICK)(video, [ClipPrompt("")] * 256)["own"]
    assert torch.equal(scores, torch.arange(256) / 255)


def test_clips_travel_in_eight_bits_to_a_scorer_that_rounds() -> None:
    video = torch.rand(3, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    seen: list[torch.Tensor] = []

    def observed(clips: Any, prompts: Any) -> Any:
        seen.append(clips)
        return clips.mean((1, 2, 3, 4))

    scorer = Named(observed)
    rounds = replace(offer(scorer)["own"][0], eight_bit=True)
    for declaration, expected in (
        (rounds, (video * 255).round() / 255),
        (replace(rounds, eight_bit=False), video),
    ):
        seen.clear()
        with serving(scorer, {"own": (declaration,)}) as url:
            for clips in (video, video.bfloat16()) if declaration.eight_bit else (video,):
                connect(url, ["own"], patience=QUICK)(clips, [ClipPrompt("")] * 3)
        assert torch.equal(seen[0], expected)
        assert len(seen) == 1 or torch.equal(seen[1], (video.bfloat16().float() * 255).round() / 255)


@pytest.mark.parametrize("clips_of_room", [20, 2])
def test_clips_of_eight_bits_count_at_their_full_size(clips_of_room: int) -> None:
    """They are converted on arrival where there is room for that, and when they are scored where not."""
    hold, busy = threading.Event(), threading.Event()

    def observed(video: Any, prompts: Any) -> Any:
        busy.set()
        hold.wait(20)
        return video[:, 0, 0, 0, 0] * 255

    video = torch.arange(1, 3, dtype=torch.uint8)[:, None, None, None, None].repeat(1, 4, 3, 64, 64)
    size = video[0].numel()
    with serving(Named(observed), limits=Limits(queue_bytes=clips_of_room * size + 2000)) as url:
        remote = connect(url, ["own"], patience=QUICK)
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(remote, video, [ClipPrompt("")] * 2)
            assert busy.wait(20)
            held = httpx.get(f"{url}/health").json()["held_bytes"]
            hold.set()
            assert answer.result(20)["own"].tolist() == [1, 2]
        assert held // size == (10 if clips_of_room == 20 else 2)
        eventually(lambda: httpx.get(f"{url}/health").json()["held_bytes"] == 0)


def test_eight_bits_of_what_is_no_colour() -> None:
    values = torch.tensor([-0.1, 0.0, 0.5 / 255, 0.51 / 255, 1.5 / 255, 1.0, 1.2])[:, None, None, None, None]
    assert eight_bit(values).flatten().tolist() == [0, 0, 0, 1, 2, 255, 255]
    whole = torch.arange(256, dtype=torch.uint8)[:, None, None, None, None]
    assert eight_bit(whole) is whole and torch.equal(eight_bit(fractions(whole)), whole)


def test_large_clips_are_scored_without_company(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring_queue, "JOINED_PIXELS", 2 * 24 + 23)
    calls: list[int] = []
    hold, busy = threading.Event(), threading.Event()

    def observed(video: Any, prompts: Any) -> Any:
        calls.append(len(video))
        busy.set()
        hold.wait(20)
        return number_of(video, prompts)

    queue = ScoringQueue([Named(observed)], batch=4)
    video, prompts = numbered(8)
    sizes = [1, 1, 1, 3, 1, 1]  # 24 numbers a clip: two go together; three are more, and go alone
    starts = [sum(sizes[:n]) for n in range(len(sizes))]
    asked = []
    for start, size in zip(starts, sizes, strict=True):
        rows = slice(start, start + size)
        asked.append(queue.put(Question(video[rows], tuple(prompts[rows]), ("own",))))
        busy.wait(20)
    hold.set()
    found = torch.cat([answer.result(20)["own"] for answer in asked])
    assert torch.equal(found, torch.arange(8.0)) and calls == [1, 2, 3, 2]
    queue.close()


def test_bodies_leave_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parts of bodies are not mixed, so that the first arrives early. A retry sends all of its own again."""
    sent: list[int] = []

    class Watched(Body):
        def parts(self, size: int) -> Any:
            name = next(numbers)
            for part in super().parts(size):
                sent.append(name)
                yield part

    numbers = iter(range(100))
    monkeypatch.setattr(client_module, "REQUEST_BYTES", 96)
    monkeypatch.setattr(client_module, "PART_BYTES", 16)
    encode = client_module.encode_question
    monkeypatch.setattr(client_module, "encode_question", lambda question: Watched(**vars(encode(question))))
    failures = iter([True, False, True])

    def failing(video: Any, prompts: Any) -> Any:
        if next(failures, False):
            raise RuntimeError("not now")
        return number_of(video, prompts)

    with serving(Named(failing), limits=Limits(batch=1)) as url:
        found = connect(url, ["own"], patience=replace(QUICK, attempts=3))(*numbered(6))["own"]
    assert torch.equal(found, torch.arange(6.0))
    assert sent == sorted(sent) and sent.count(0) == 7 and max(sent) == 7


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


def test_batches_begun_together_arrive_in_order_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has begun several batches keeps the server busy with the oldest of them."""
    seen: list[float] = []
    under_way, most = [0], [0]
    monkeypatch.setattr(client_module, "REQUEST_BYTES", 96)
    ask = Link.ask

    async def watched(self: Link, method: str, *rest: Any, **named: Any) -> Any:
        under_way[0] += method == "POST"
        most[0] = max(most[0], under_way[0])
        try:
            return await ask(self, method, *rest, **named)
        finally:
            under_way[0] -= method == "POST"

    monkeypatch.setattr(Link, "ask", watched)

    def observed(video: Any, prompts: Any) -> Any:
        time.sleep(0.005)
        seen.extend(number_of(video, prompts).tolist())
        return number_of(video, prompts)

    with serving(Named(observed), limits=Limits(batch=1)) as url:
        remote = connect(url, ["own"], patience=QUICK)
        answers = [remote.begin(*numbered(8, 8 * n)) for n in range(3)]
        eventually(lambda: len(seen) == 24)
        last = answers[2]()["own"]
        found = torch.cat([answers[0]()["own"], answers[1]()["own"], last])
    assert torch.equal(found, torch.arange(24.0)) and most[0] == client_module.IN_FLIGHT
    # a clip is sent when all before it have been scored but those that are under way with it
    assert all(number < at + client_module.IN_FLIGHT for at, number in enumerate(seen))


def test_a_large_batch_is_split_and_put_together_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []

    def observed(video: Any, prompts: Any) -> Any:
        sizes.append(len(video))
        time.sleep(0.002 * (len(sizes) % 3))
        return number_of(video, prompts)

    monkeypatch.setattr(client_module, "REQUEST_BYTES", 5 * 96 + 95)
    video, prompts = numbered(103)
    with serving(Named(observed), limits=Limits(batch=8)) as url:
        assert torch.equal(connect(url, ["own"], patience=QUICK)(video, prompts)["own"], torch.arange(103.0))
    assert sum(sizes) == 103 and max(sizes) <= 8


def test_requests_of_many_clients_are_batched_by_shape() -> None:
    calls: list[tuple[int, ...]] = []
    hold, busy = threading.Event(), threading.Event()

    def observed(video: Any, prompts: Any) -> Any:
        calls.append(tuple(video.shape[:2]))
        busy.set()
        hold.wait(20)
        return video[:, 0, 0, 0, 0]

    queue = ScoringQueue([Named(observed)], batch=4)
    video, prompts = numbered(20)

    def ask(n: int, frames: int) -> Any:
        return queue.put(Question(video[n : n + 1, :frames], tuple(prompts[n : n + 1]), ("own",)))

    first = ask(0, 2)
    assert busy.wait(10)
    order = [(1, 2), (2, 1), (3, 2), (4, 2), (5, 1), (6, 2), (7, 2)]
    answers = [ask(*item) for item in order]
    assert queue.waiting_clips == 7 and queue.began is not None
    withdrawn = ask(8, 2)
    withdrawn.cancel()
    hold.set()
    assert first.result(10)["own"].tolist() == [0]
    assert [answer.result(10)["own"].tolist() for answer in answers] == [[n] for n, _ in order]
    assert calls == [(1, 2), (4, 2), (2, 1), (1, 2)]  # the oldest first, with those of its shape
    queue.close()


def test_a_question_that_breaks_the_scorer_breaks_no_other() -> None:
    busy, hold = threading.Event(), threading.Event()

    def picky(video: Any, prompts: Any) -> Any:
        busy.set()
        hold.wait(20)
        if any("3" in prompt for prompt in prompts):
            raise SystemExit("no threes")
        return number_of(video, prompts)

    queue = ScoringQueue([Named(picky)], batch=16)
    video, prompts = numbered(6)
    answers = [queue.put(Question(video[n][None], (prompts[n],), ("own",))) for n in range(6)]
    hold.set()
    for n, answer in enumerate(answers):
        if n == 3:
            with pytest.raises(ValueError, match="the scorer failed: SystemExit: no threes"):
                answer.result(10)
        else:
            assert answer.result(10)["own"].tolist() == [n]
    queue.close()
    assert queue.put(Question(video, tuple(prompts), ("own",))).done() is False  # nobody works any more


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


def test_limits_of_a_request() -> None:
    video, prompts = numbered(3)
    body = encoded(Question(video, tuple(prompts), ("own",)))
    with serving(Named(number_of), limits=Limits(request_bytes=len(body))) as url:
        assert httpx.post(f"{url}/score", content=body).json() == {"scores": {"own": [0, 1, 2]}}
        answer = httpx.post(f"{url}/score", content=body + b" ")
        assert answer.status_code == 413 and f"limit of {len(body):,}" in answer.json()["detail"]
        assert httpx.post(f"{url}/score", content=iter([body])).status_code == 411
        assert httpx.post(f"{url}/score", content=body[:-1]).status_code == 400
        other = encoded(Question(video[:2], tuple(prompts[:2]), ("other",)))
        answer = httpx.post(f"{url}/score", content=other)
        assert answer.status_code == 400 and answer.json()["detail"] == "no component 'other'; there are own"
        remote = connect(url, ["own"], patience=QUICK)
        with pytest.raises(ValueError, match="a clip of \\[500, 3, 2, 2\\] has 24,000 bytes, its limit"):
            remote(torch.zeros(1, 500, 3, 2, 2), prompts[:1])
        assert httpx.get(f"{url}/health").json()["held_bytes"] == 0


def test_a_body_that_ends_early_is_refused() -> None:
    """Below HTTP, which would not let it through: the rest would be what an earlier request left behind."""
    app = reward_app([Named(number_of)], offer(Named(number_of)), frame_rate=16.0)
    video, prompts = numbered(1)
    whole = encoded(Question(video, tuple(prompts), ("own",)))

    async def posted(body: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/score", content=body, headers={"Content-Length": str(len(whole))})

    assert asyncio.run(posted(whole)).status_code == 200
    short = asyncio.run(posted(whole[:-8]))
    assert short.status_code == 400 and f"{len(whole):,} were declared" in short.json()["detail"]


def test_a_full_queue_says_when_to_come_back_and_the_client_does() -> None:
    hold, busy = threading.Event(), threading.Event()

    def slow(video: Any, prompts: Any) -> Any:
        busy.set()
        hold.wait(20)
        return number_of(video, prompts)

    video, prompts = numbered(2)
    body = encoded(Question(video, tuple(prompts), ("own",)))
    limits = Limits(request_bytes=2 * len(body), queue_bytes=2 * len(body), retry_seconds=1)
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


def test_who_may_ask() -> None:
    body = encoded(Question(*map(lambda part: part[:1], numbered(1)), ("own",)))  # type: ignore[arg-type]
    with serving(Named(number_of), token="swordfish") as url:
        assert httpx.get(f"{url}/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer swordfis"}, {"Authorization": "Basic swordfish"}):
            assert httpx.post(f"{url}/score", content=body, headers=headers).status_code == 401
            assert httpx.get(f"{url}/rewards", headers=headers).status_code == 401
        assert "swordfish" not in httpx.get(f"{url}/docs").text
        for token in (None, "marlin"):
            with pytest.raises(
                ValueError, match=f"{url} refused: 401 Unauthorized: a bearer token is needed"
            ):
                connect(url, ["own"], token=token, patience=QUICK)
        assert connect(url, ["own"], token="swordfish", patience=QUICK)(*numbered(1))["own"].tolist() == [0]


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
        assert caplog.text == ""
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


@pytest.mark.parametrize("field", ["prompts", "components"])
@pytest.mark.parametrize("text", ["[" * 50_000, '["\\ud800"]'])
def test_bodies_that_no_scorer_should_see(field: str, text: str) -> None:
    header = {"__metadata__": {"prompts": '[["", "", 0]]', "components": '["own"]', field: text}, "video": {}}
    encoded_header = json.dumps(header).encode()
    body = memoryview(len(encoded_header).to_bytes(8, "little") + encoded_header)
    with pytest.raises(ValueError, match="nested too deeply|half of a character"):
        decode_question(body)


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


def test_ten_thousand_queued_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most wait at once, the rest comes back; nothing is lost, mis-assigned or held beyond the limit."""
    video, prompts = numbered(25)
    size = len(encoded(Question(video, tuple(prompts), ("own",)))) + 200  # later numbers are longer
    room = 270 * size
    monkeypatch.setattr(client_module, "REQUEST_BYTES", 25 * 96)
    monkeypatch.setattr(client_module, "IN_FLIGHT", 100)
    release, most_held = threading.Event(), [0]

    def observed(video: Any, prompts: Any) -> Any:
        release.wait(60)
        return number_of(video, prompts)

    limits = Limits(request_bytes=size, queue_bytes=room, batch=64, retry_seconds=0)
    with serving(Named(observed), limits=limits) as url, ThreadPoolExecutor(4) as threads:
        patience = Patience(answer=60, outage=60, first_pause=0.5, longest_pause=0.5)
        remotes = [connect(url, ["own"], patience=patience) for _ in range(4)]
        asked = [threads.submit(r, *numbered(2500, 2500 * n)) for n, r in enumerate(remotes)]

        def full() -> bool:
            health = httpx.get(f"{url}/health").json()
            most_held[0] = max(most_held[0], health["held_bytes"])
            return health["waiting_clips"] > 6000

        eventually(full, 60)
        release.set()
        found = torch.cat([item.result(60)["own"] for item in asked])
        assert most_held[0] <= room and full() is False
    assert torch.equal(found, torch.arange(10_000.0))


def test_several_threads_share_one_client() -> None:
    with serving(Named(number_of)) as url, ThreadPoolExecutor(4) as threads:
        remote = connect(url, ["own"], patience=QUICK)
        asked = [threads.submit(remote, *numbered(7, 7 * n)) for n in range(20)]
        found = torch.cat([item.result(20)["own"] for item in asked])
    assert torch.equal(found, torch.arange(140.0))
