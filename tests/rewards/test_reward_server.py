"""A reward server and its client over a real loopback connection: right numbers, or a clear error."""

import asyncio
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import httpx
import pytest
import torch

from kvpo.prompts import ClipPrompt
from kvpo.rewards.service import client as client_module
from kvpo.rewards.service import scoring_queue
from kvpo.rewards.service.client import Link, connect
from kvpo.rewards.service.messages import (
    Body,
    ScoreRequest,
)
from kvpo.rewards.service.patience import Patience
from kvpo.rewards.service.scoring_queue import ScoringQueue
from kvpo.rewards.service.server import RequestLimits, reward_app
from kvpo.world.render import render
from kvpo.world.reward import WorldScorer
from kvpo.world.stories import distinct_stories
from tests.reward_servers import (
    QUICK,
    Named,
    encoded,
    eventually,
    number_of,
    numbered,
    offer,
    serving,
)


def test_remote_scores_are_the_local_ones_to_the_bit() -> None:
    """Real clips, two of each length, in both precisions that a run decodes to."""
    stories = distinct_stories("validation", 4, 1, 12, 0)
    video = torch.stack([render(story) for story in stories])
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
    with serving(Named(observed), limits=RequestLimits(queue_bytes=clips_of_room * size + 2000)) as url:
        remote = connect(url, ["own"], patience=QUICK)
        with ThreadPoolExecutor(1) as threads:
            answer = threads.submit(remote, video, [ClipPrompt("")] * 2)
            assert busy.wait(20)
            held = httpx.get(f"{url}/health").json()["held_bytes"]
            hold.set()
            assert answer.result(20)["own"].tolist() == [1, 2]
        assert held // size == (10 if clips_of_room == 20 else 2)
        eventually(lambda: httpx.get(f"{url}/health").json()["held_bytes"] == 0)


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
        asked.append(queue.put(ScoreRequest(video[rows], tuple(prompts[rows]), ("own",))))
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

    with serving(Named(failing), limits=RequestLimits(batch=1)) as url:
        found = connect(url, ["own"], patience=replace(QUICK, attempts=3))(*numbered(6))["own"]
    assert torch.equal(found, torch.arange(6.0))
    assert sent == sorted(sent) and sent.count(0) == 7 and max(sent) == 7


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

    with serving(Named(observed), limits=RequestLimits(batch=1)) as url:
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
    with serving(Named(observed), limits=RequestLimits(batch=8)) as url:
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
        return queue.put(ScoreRequest(video[n : n + 1, :frames], tuple(prompts[n : n + 1]), ("own",)))

    first = ask(0, 2)
    assert busy.wait(10)
    order = [(1, 2), (2, 1), (3, 2), (4, 2), (5, 1), (6, 2), (7, 2)]
    answers = [ask(*item) for item in order]
    assert queue.waiting_clips == 7 and queue.began is not None
    withdrawn = ScoreRequest(video[8:9], tuple(prompts[8:9]), ("own",))
    clips, answer = weakref.ref(withdrawn), queue.put(withdrawn)
    del withdrawn
    answer.cancel()
    assert clips() is None and queue.waiting_clips == 7, "it is let go at once"
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
    answers = [queue.put(ScoreRequest(video[n][None], (prompts[n],), ("own",))) for n in range(6)]
    hold.set()
    for n, answer in enumerate(answers):
        if n == 3:
            with pytest.raises(ValueError, match="the scorer failed: SystemExit: no threes"):
                answer.result(10)
        else:
            assert answer.result(10)["own"].tolist() == [n]
    queue.close()
    assert queue.put(ScoreRequest(video, tuple(prompts), ("own",))).done() is False  # nobody works any more


def test_limits_of_a_request() -> None:
    video, prompts = numbered(3)
    body = encoded(ScoreRequest(video, tuple(prompts), ("own",)))
    with serving(Named(number_of), limits=RequestLimits(request_bytes=len(body))) as url:
        assert httpx.post(f"{url}/score", content=body).json() == {"scores": {"own": [0, 1, 2]}}
        answer = httpx.post(f"{url}/score", content=body + b" ")
        assert answer.status_code == 413 and f"limit of {len(body):,}" in answer.json()["detail"]
        assert httpx.post(f"{url}/score", content=iter([body])).status_code == 411
        assert httpx.post(f"{url}/score", content=body[:-1]).status_code == 400
        other = encoded(ScoreRequest(video[:2], tuple(prompts[:2]), ("other",)))
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
    whole = encoded(ScoreRequest(video, tuple(prompts), ("own",)))

    async def posted(body: bytes) -> httpx.Response:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://test") as client:
            return await client.post("/score", content=body, headers={"Content-Length": str(len(whole))})

    assert asyncio.run(posted(whole)).status_code == 200
    short = asyncio.run(posted(whole[:-8]))
    assert short.status_code == 400 and f"{len(whole):,} were declared" in short.json()["detail"]


def test_who_may_ask() -> None:
    body = encoded(ScoreRequest(*map(lambda part: part[:1], numbered(1)), ("own",)))  # type: ignore[arg-type]
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


def test_a_page_that_is_open_in_a_browser_cannot_ask() -> None:
    body = encoded(ScoreRequest(*map(lambda part: part[:1], numbered(1)), ("own",)))  # type: ignore[arg-type]
    with serving(Named(number_of)) as url:
        for origin in ("https://example.com", "null", url):  # the last: a name that was made to point here
            answer = httpx.post(f"{url}/score", content=body, headers={"Origin": origin})
            assert answer.status_code == 403 and "not web pages" in answer.json()["detail"]
        assert httpx.post(f"{url}/score", content=body).status_code == 200


def test_ten_thousand_queued_clips(monkeypatch: pytest.MonkeyPatch) -> None:
    """Most wait at once, the rest comes back; nothing is lost, mis-assigned or held beyond the limit."""
    video, prompts = numbered(25)
    size = len(encoded(ScoreRequest(video, tuple(prompts), ("own",)))) + 200  # later numbers are longer
    room = 270 * size
    monkeypatch.setattr(client_module, "REQUEST_BYTES", 25 * 96)
    monkeypatch.setattr(client_module, "IN_FLIGHT", 100)
    release, most_held = threading.Event(), [0]

    def observed(video: Any, prompts: Any) -> Any:
        release.wait(60)
        return number_of(video, prompts)

    limits = RequestLimits(request_bytes=size, queue_bytes=room, batch=64, retry_seconds=0)
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
