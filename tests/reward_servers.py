"""Reward servers for tests: the real HTTP server on a loopback port, in a thread."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Declaration, Scorer
from kvpo.rewards.service.messages import Offers, ScoreRequest, encode_question
from kvpo.rewards.service.patience import Patience
from kvpo.rewards.service.server import RequestLimits, reward_app
from tests.http_servers import served_app

LIMITS = RequestLimits()
QUICK = Patience(answer=20, attempts=2, start=1.0, outage=1.0, first_pause=0.05, longest_pause=0.2)


@dataclass(frozen=True)
class Named:
    """A scorer with one component, from any function."""

    function: Callable[[Tensor, Sequence[ClipPrompt]], Any]
    component: str = "own"

    @property
    def components(self) -> tuple[str, ...]:
        return (self.component,)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        return {self.component: self.function(video_BTCHW, prompts)}


def offer(scorer: Scorer, name: str = "own") -> Offers:
    """Offer all components of a scorer under one name."""
    declarations = tuple(Declaration(c, -inf, inf, True, 1, 32 * 32) for c in scorer.components)
    return {name: declarations}


@contextmanager
def serving(
    scorer: Scorer,
    offers: Offers | None = None,
    *,
    port: int = 0,
    token: str | None = None,
    limits: RequestLimits = LIMITS,
) -> Iterator[str]:
    """Run a server, with one reward called "own" unless ``offers`` are given; yields its address."""
    offers = offers or offer(scorer)
    app = reward_app([scorer], offers, frame_rate=16.0, token=token, limits=limits)
    with served_app(app, port=port) as url:
        yield url


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def eventually(condition: Callable[[], bool], seconds: float = 10.0) -> None:
    """Wait until ``condition`` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def numbered(count: int, first: int = 0) -> tuple[Tensor, list[ClipPrompt]]:
    """Tiny clips identified by their pixels and prompts."""
    numbers = torch.arange(first, first + count, dtype=torch.float32)
    video = numbers[:, None, None, None, None].expand(-1, 2, 3, 2, 2).contiguous()
    return video, [ClipPrompt(f"clip {n}", f"before {n}", n % 3) for n in range(first, first + count)]


def number_of(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """The numbers of ``numbered`` clips, checked against their prompts."""
    numbers = video_BTCHW[:, 0, 0, 0, 0]
    for number, prompt in zip(numbers.tolist(), prompts, strict=True):
        told = (str(prompt), prompt.before, prompt.switch)
        assert told == (f"clip {number:.0f}", f"before {number:.0f}", number % 3)
    return numbers


def encoded(question: ScoreRequest) -> bytes:
    """The bytes of a request."""
    return b"".join(encode_question(question).parts(1000))
