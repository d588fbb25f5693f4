"""Judges behind chat completions: rubrics, readings, and a server that misbehaves in every way we know."""

import base64
import io
import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from kvpo.app.calibrate import calibrate
from kvpo.app.named_rewards import named_rewards
from kvpo.config_checks import ConfigurationError
from kvpo.prompts import ClipPrompt
from kvpo.rewards.cache import ScoreCache
from kvpo.rewards.reward import Reward
from kvpo.rewards.service.judge import Rubric, connect_judge, read_rubric
from kvpo.rewards.service.patience import Patience

QUICK = Patience(answer=0.5, attempts=3, start=1.0, outage=2.0, first_pause=0.02, longest_pause=0.05)
RUBRIC = Rubric("How well does it show {prompt}? 1 to 5.", {str(n): float(n) for n in range(1, 6)}, frames=3)


def completion(text: str | None, **choice: Any) -> dict[str, Any]:
    return {"choices": [{"message": {"role": "assistant", "content": text}, **choice}]}


@dataclass
class Stub:
    """Answers of a model; ``bad`` comes first, ``answer`` once it is used up."""

    answer: Callable[[dict[str, Any]], Any] = lambda question: completion("4")
    bad: list[Callable[[Any], None]] = field(default_factory=list)
    questions: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    at_once: int = 0
    most: int = 0
    url: str = ""


@contextmanager
def serving(stub: Stub) -> Iterator[str]:
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def say(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for name, value in {"Content-Length": str(len(body)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(body)

        def do_GET(self) -> None:
            self.say(200, json.dumps({"data": [{"id": "eye-7b"}]}).encode())

        def do_POST(self) -> None:
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with lock:
                stub.questions.append(question)
                stub.headers.append(dict(self.headers))
                bad = stub.bad.pop(0) if stub.bad else None
                stub.at_once += 1
                stub.most = max(stub.most, stub.at_once)
            try:
                if bad is not None:
                    bad(self)
                else:
                    self.say(200, json.dumps(stub.answer(question)).encode())
            except (BrokenPipeError, ConnectionResetError):
                pass
            finally:
                with lock:
                    stub.at_once -= 1

        def log_message(self, *of: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub.url
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@contextmanager
def judging(stub: Stub, rubric: Rubric = RUBRIC, key: str | None = None) -> Iterator[Reward]:
    with serving(stub) as url:
        judge = connect_judge("judge", f"openai:{url}#eye-7b", rubric, key=key, patience=QUICK)
        yield judge
        judge.scorer.link.close()  # type: ignore[attr-defined]


CLIP = torch.linspace(0, 1, 6)[:, None, None, None].expand(6, 3, 8, 12)


def score(judge: Reward, prompt: str = "a fox") -> float:
    return float(judge(CLIP[None], [ClipPrompt(prompt)])["judge"])


def closing(handler: Any) -> None:
    handler.close_connection = True
    handler.connection.close()


def cut(handler: Any) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    closing(handler)


def late(handler: Any) -> None:
    time.sleep(1.0)
    closing(handler)


def saying(status: int, content: Any, **headers: str) -> Callable[[Any], None]:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    return lambda handler: handler.say(status, body, **headers)


MISBEHAVIOUR = {
    "closes the connection": closing,
    "stops in the middle": cut,
    "answers late": late,
    "fails": saying(500, {"error": {"message": "out of memory"}}),
    "is full": saying(503, {"detail": "full"}, Retry_After="0"),
    "limits the rate": saying(429, {"error": {"message": "slow down"}}, Retry_After="0"),
    "speaks no JSON": saying(200, b"<html>"),
    "answers another question": saying(200, {"object": "list"}),
    "has no choice": saying(200, {"choices": []}),
    "says nothing": saying(200, completion(None)),
    "refuses in words": saying(200, completion("I cannot rate this video.")),
    "leaves the scale": saying(200, completion("7")),
    "counts between steps": saying(200, completion("4.5")),
}


@pytest.mark.parametrize("name", MISBEHAVIOUR)
def test_what_goes_wrong_once_is_asked_again(name: str) -> None:
    stub = Stub(bad=[MISBEHAVIOUR[name]])
    with judging(stub) as judge:
        assert score(judge) == 4.0
    assert len(stub.questions) == 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fails", "judge http.*asked 3 times.*500"),
        ("leaves the scale", "no answer of the scale 1, 2, 3, 4, 5 in '7'"),
        ("answers another question", "not a chat completion"),
    ],
)
def test_what_stays_wrong_ends_with_one_line(name: str, message: str) -> None:
    with judging(Stub(bad=[MISBEHAVIOUR[name]] * 9)) as judge, pytest.raises(ValueError, match=message):
        score(judge)


def test_a_key_that_is_refused_stops_at_once() -> None:
    stub = Stub(bad=[saying(401, {"detail": "bad key"})])
    with judging(stub, key="secret") as judge:
        with pytest.raises(ValueError, match="refused: 401 .*bad key"):
            score(judge)
    assert len(stub.questions) == 1 and stub.headers[0]["Authorization"] == "Bearer secret"


def test_the_question_shows_frames_of_the_clip_that_belong_to_its_prompt() -> None:
    stub = Stub()
    with judging(stub, replace(RUBRIC, question="{prompt}, not {before}?", pixels=24)) as judge:
        judge(CLIP[None], [ClipPrompt("a {before} fox", "a dog", 2)])
    (question,) = stub.questions
    text, *images = question["messages"][0]["content"]
    assert text["text"] == "a {before} fox, not a dog?" and question["model"] == "eye-7b"
    assert question["temperature"] == 0 and stub.headers[0]["Content-Type"] == "application/json"
    shown = []
    for image in images:
        data = base64.b64decode(image["image_url"]["url"].removeprefix("data:image/png;base64,"))
        picture = Image.open(io.BytesIO(data))
        assert picture.size == (6, 4)
        shown.append(picture.getpixel((0, 0)))
    grey = [round(255 * float(CLIP[n, 0, 0, 0])) for n in (2, 4, 5)]
    assert [pixel[0] for pixel in shown] == pytest.approx(grey, abs=1)


def test_a_transition_is_judged_by_frames_on_both_sides() -> None:
    stub = Stub()
    with judging(stub, replace(RUBRIC, frames=4, transition=True)) as judge:
        prompts = [ClipPrompt("a fox", "a dog", 3), ClipPrompt("a fox")]
        scores = judge(torch.stack([CLIP, CLIP]), prompts)["judge"]
    assert scores.tolist() == [4.0, 3.0] and len(stub.questions) == 1, "no switch: the middle, without asking"
    kinds = [part.get("text", "image") for part in stub.questions[0]["messages"][0]["content"]][1:]
    assert kinds == ["Frames before:", "image", "image", "Frames after:", "image", "image"]


def test_probabilities_make_more_than_whole_steps() -> None:
    """By hand: 4 and 5 with 0.6 and 0.2, what is not of the scale left out."""
    places = [
        {"token": "Rating", "logprob": 0.0, "top_logprobs": []},
        {"token": " 4", "logprob": math.log(0.6), "top_logprobs": [
            {"token": " 4", "logprob": math.log(0.6)}, {"token": "5", "logprob": math.log(0.2)},
            {"token": "x", "logprob": math.log(0.2)}]},
    ]  # fmt: skip
    stub = Stub(lambda question: completion("Rating: 4", logprobs={"content": places}))
    with judging(stub) as judge:
        assert score(judge) == pytest.approx((0.6 * 4 + 0.2 * 5) / 0.8)
    assert stub.questions[0]["logprobs"] is True
    with judging(Stub(lambda question: completion("4", logprobs=None))) as judge:
        assert score(judge) == 4.0
    with judging(stub, replace(RUBRIC, expectation=False)) as judge:
        assert score(judge) == 4.0 and "logprobs" not in stub.questions[-1]
    garbage = [{"token": "4", "logprob": 0.0, "top_logprobs": [{"token": "4", "logprob": math.nan}]}]
    with judging(Stub(lambda question: completion("4", logprobs={"content": garbage}))) as judge:
        assert score(judge) == 4.0


@pytest.mark.parametrize(
    ("read", "text", "found"),
    [
        ("last", "Motion 2, so overall 4.", "4"),
        ("first", "4. The rest would be 2", "4"),
        ("last", "4/5", "4"),
        ("last", "between -1 and 10", None),
        ("last", "4.5", None),
        (r"score: (\d)", "3 of 5; Score: 2", "2"),
        (r"score: (\d)", "3 of 5", None),
    ],
)
def test_how_an_answer_is_read(read: str, text: str, found: str | None) -> None:
    assert replace(RUBRIC, read=read).value(text) == found


def test_words_are_answers_too() -> None:
    rubric = Rubric("?", {"yes": 1.0, "no": 0.0, "not sure": 0.5})
    assert [rubric.value(text) for text in ("Yes.", "NO", "I am not sure", "yesterday", "yes or no")] == [
        "yes", "no", "not sure", None, "no"
    ]  # fmt: skip


def test_clips_are_asked_about_in_parallel_and_known_ones_not_again(tmp_path: Path) -> None:
    def slow(question: dict[str, Any]) -> Any:
        time.sleep(0.1)
        return completion(question["messages"][0]["content"][0]["text"])

    stub = Stub(slow)
    prompts = [ClipPrompt(str(n)) for n in (3, 1, 5, 2)]
    with judging(stub, replace(RUBRIC, question="{prompt}")) as judge:
        cached = replace(judge, cache=ScoreCache(tmp_path / "scores.sqlite"))
        for _ in range(2):
            assert cached(CLIP.expand(4, -1, -1, -1, -1), prompts)["judge"].tolist() == [3, 1, 5, 2]
    assert stub.most > 1 and len(stub.questions) == 4


BAD = {
    "question: a": "needs question and scale",
    "- a": "needs question and scale",
    "{question: a, scale: [1, 5], frame: 3}": "unknown field 'frame'",
    "{question: a, scale: [5, 1]}": "scale needs two different values",
    "{question: a, scale: 5}": "scale must be \\[lowest, highest\\] or answers",
    "{question: a, scale: {a: b}}": "scale must be",
    "{question: a, scale: [1, 5], frames: 0}": "frames must be of type int, got 0",
    "{question: a, scale: [1, 5], expectation: 3}": "expectation must be of type bool, got 3",
    "{question: a, scale: [1, 5], read: '('}": "read: not a regular expression",
    "{question: a, scale: [1, 5], read: 'x'}": "regular expression with one group",
    "question: [": "not YAML",
}


@pytest.mark.parametrize("text", BAD)
def test_a_rubric_that_cannot_be_used_is_named_with_its_field(tmp_path: Path, text: str) -> None:
    (tmp_path / "r.yaml").write_text(text)
    with pytest.raises(ValueError, match=f"r.yaml: .*{BAD[text]}"):
        read_rubric(tmp_path / "r.yaml")


def test_yes_and_no_are_words_in_a_rubric(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("question: Is it {prompt}?\nscale: {yes: 1, no: 0}\n")
    assert read_rubric(tmp_path / "r.yaml").scale == {"yes": 1.0, "no": 0.0}


def test_a_judge_is_named_like_any_reward(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("question: Is it {prompt}?\nscale: [0, 10]\n")
    with serving(Stub()) as url:
        name, sources = f"plot@openai:{url}#eye-7b", {"plot.rubric": str(tmp_path / "r.yaml")}
        (reward,) = named_rewards([name], sources, prompts=True)
        (declaration,) = reward.declarations
        assert (declaration.name, declaration.low, declaration.high) == ("plot", 0.0, 10.0)
        assert declaration.reads_prompt and reward.version
        assert reward(CLIP[None], [ClipPrompt("a fox")])["plot"].tolist() == [4.0]
        with pytest.raises(
            ConfigurationError, match="judge plot needs a rubric: give --source plot.rubric=FILE"
        ):
            named_rewards([name], {}, prompts=True)
        with pytest.raises(ValueError, match="does not have the model 'ear'; it has eye-7b"):
            named_rewards([f"plot@openai:{url}#ear"], sources, prompts=True)
        with pytest.raises(ValueError, match="name the model too"):
            named_rewards([f"plot@openai:{url}"], sources, prompts=True)


def test_calibration_refuses_judges_that_vary_or_never_do(tmp_path: Path) -> None:
    """One of transitions has nothing to tell apart where no clip has a switch: it is not even asked."""
    asked = iter(range(10**6))
    cases = (
        ("is random: equal clips differ", lambda question: completion(str(1 + next(asked) % 5)), ""),
        ("is the same for all 2 clips", lambda question: completion("3"), ""),
        (
            "is the same for all 2 clips.* prompt switches need clips with one: rewards.transition_blocks",
            lambda question: completion(str(1 + next(asked) % 5)),
            "transition: true\n",
        ),
    )
    for message, answer, transition in cases:
        (tmp_path / "r.yaml").write_text(f"question: Good?\nscale: [1, 5]\nframes: 2\n{transition}")
        with serving(Stub(answer)) as url, pytest.raises(ValueError, match=f"judge {message}"):
            calibrate(
                f"judge@openai:{url}#eye-7b",
                None,
                clips=2,
                out=tmp_path / "noise.json",
                sources={"judge.rubric": str(tmp_path / "r.yaml")},
            )
    assert not (tmp_path / "noise.json").exists()


def test_the_rubrics_of_the_documentation_can_be_used(tmp_path: Path) -> None:
    text = (Path(__file__).parents[2] / "docs/rewards.md").read_text(encoding="utf-8")
    rubrics = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(rubrics) == 2
    for rubric in rubrics:
        (tmp_path / "r.yaml").write_text(rubric)
        assert read_rubric(tmp_path / "r.yaml").scale == {str(n): float(n) for n in range(1, 6)}
    assert read_rubric(tmp_path / "r.yaml").transition
