"""Questions from many clients, answered by one thread: batched where they fit, but failing separately."""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Scorer, checked
from kvpo.rewards.service.messages import ScoreRequest, fractions, one_batch
from kvpo.threads import start_thread

JOINED_PIXELS = 8 * 2**20
"""Questions are batched up to this many pixel values: copying more costs more than batching saves."""
Answer = dict[str, Tensor]
"""Component -> [B]."""


@dataclass(frozen=True, eq=False)
class Job:
    """A question and its pending answer; cancelling the answer withdraws the question."""

    question: ScoreRequest
    answer: Future[Answer] = field(default_factory=Future)

    def goes_with(self, other: "Job") -> bool:
        """True if both can be scored in one call."""
        one, two = self.question, other.question
        return (
            one.video_BTCHW.shape[1:] == two.video_BTCHW.shape[1:]
            and one.video_BTCHW.dtype == two.video_BTCHW.dtype
            and one.components == two.components
        )


class ScoringQueue:
    """Questions in order of arrival; one thread calls the scorers with at most ``batch`` clips."""

    def __init__(self, scorers: Sequence[Scorer], *, batch: int) -> None:
        self.scorer_of = {name: scorer for scorer in scorers for name in scorer.components}
        self.batch = batch
        self.began: float | None = None
        """Start of the current call on the monotonic clock; None between calls."""
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # a daemon: a scorer that hangs cannot keep the server from stopping
        start_thread(self._work, "kvpo scoring")

    def put(self, question: ScoreRequest) -> Future[Answer]:
        """Queue a question; its components must exist. The future raises ValueError if a scorer fails."""
        job = Job(question)
        with self._changed:
            self._waiting.append(job)
            self._changed.notify()
        job.answer.add_done_callback(self._withdraw)
        return job.answer

    def _withdraw(self, answer: Future[Answer]) -> None:
        """Drop the clips of a cancelled question, so that they no longer count towards any limit."""
        if answer.cancelled():
            with self._changed:
                self._waiting = deque(job for job in self._waiting if job.answer is not answer)

    @property
    def waiting_clips(self) -> int:
        """Clips that are not being scored yet."""
        with self._changed:
            return sum(len(job.question.prompts) for job in self._waiting)

    def close(self) -> None:
        """Cancel the waiting questions and stop the thread, without waiting for the current call."""
        with self._changed:
            self._closed = True
            withdrawn, self._waiting = self._waiting, deque()
            self._changed.notify()
        for job in withdrawn:
            job.answer.cancel()

    def _work(self) -> None:
        while (jobs := self._next()) is not None:
            asked = [job for job in jobs if job.answer.set_running_or_notify_cancel()]
            if asked:
                self.began = time.monotonic()
                self._answer(asked)
                self.began = None
            del jobs, asked  # free the clips before the thread waits again

    def _next(self) -> list[Job] | None:
        """The oldest question and later ones that fit into the same call; None once closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            if self._closed:
                return None
            chosen = [self._waiting.popleft()]
            clips, others = len(chosen[0].question.prompts), []
            most = min(self.batch, JOINED_PIXELS // chosen[0].question.video_BTCHW[0].numel())
            while self._waiting and clips < most:
                job = self._waiting.popleft()
                size = len(job.question.prompts)
                if job.goes_with(chosen[0]) and clips + size <= most:
                    chosen.append(job)
                    clips += size
                else:
                    others.append(job)
            self._waiting.extendleft(reversed(others))
            return chosen

    def _answer(self, jobs: Sequence[Job]) -> None:
        try:
            scores = self._score([job.question for job in jobs])
        except BaseException as error:  # third-party code may raise anything; this thread must survive
            if len(jobs) == 1:
                known = isinstance(error, ValueError)
                jobs[0].answer.set_exception(
                    error if known else ValueError(f"the scorer failed: {type(error).__name__}: {error}")
                )
            else:  # one bad question must not fail the others
                for job in jobs:
                    self._answer([job])
            return
        at = 0
        for job in jobs:
            rows = slice(at, at + len(job.question.prompts))
            job.answer.set_result({name: values[rows] for name, values in scores.items()})
            at = rows.stop

    def _score(self, questions: Sequence[ScoreRequest]) -> Answer:
        """Scores of questions that go together, ``batch`` clips per call; ValueError for bad numbers."""
        prompts = [prompt for question in questions for prompt in question.prompts]
        video = one_batch([question.video_BTCHW for question in questions])
        pieces = [
            self._call(video[at : at + self.batch], prompts[at : at + self.batch], questions[0].components)
            for at in range(0, len(prompts), self.batch)
        ]
        return {name: torch.cat([piece[name] for piece in pieces]) for name in questions[0].components}

    def _call(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt], components: Sequence[str]) -> Answer:
        video_BTCHW = fractions(video_BTCHW)
        found: Answer = {}
        for name in components:
            if name not in found:
                scorer = self.scorer_of[name]
                with torch.no_grad():
                    scores = scorer(video_BTCHW, prompts)
                found |= {own: checked(own, scores, len(prompts)) for own in scorer.components}
        return found
