"""Policy for requests to a reward server: retries, timeouts, and what is logged meanwhile."""

import time
from dataclasses import dataclass, field
from math import inf

KNOCK_SECONDS = 2.0
"""Longest pause between attempts to reach a server that has not answered yet."""
AGAIN, AGAIN_AT_START = 30.0, 5.0
"""Seconds between log lines about a wait: after and before a server's first answer."""


@dataclass(frozen=True)
class Patience:
    """Retry and timeout policy."""

    answer: float = 300.0
    """Seconds to wait for an answer, including the time in the server's queue."""
    attempts: int = 3
    """Failed answers (late, an error of the scorer, unusable scores) after which the client gives up."""
    start: float = 15.0
    """Seconds within which the server must first answer, if only to say that it is loading its models."""
    outage: float = 300.0
    """Seconds that the server may load at the start, and later be unreachable or full: enough to restart and
    load its models."""
    first_pause: float = 0.5
    """Seconds before the second attempt; doubled after each further one."""
    longest_pause: float = 30.0


PATIENCE = Patience()


class RequestRefused(ValueError):
    """The server refuses this request for good."""


class Failed(ValueError):
    """An unusable answer; asking again may help."""


class Away(ValueError):
    """No server answers, or it asks the client to retry ``after`` seconds."""

    def __init__(self, problem: str, after: float | None = None) -> None:
        super().__init__(problem)
        self.after = after


class GaveUp(ValueError):
    """No usable answer within the limits of the policy."""


class NeverUsable(GaveUp, Failed):
    """Too many answers failed."""


class StillLoading(GaveUp):
    """The server answers, but is not ready."""


@dataclass
class Trial:
    """The attempts at one request."""

    patience: Patience
    first: bool
    """True until the first usable answer: until then, something else may be listening there."""
    role: str = "reward server"
    tries: int = 0
    failures: int = 0
    problem: str = "no answer yet"
    promised: bool = False
    """True if the last answer said when to come back."""
    began: float = field(default_factory=time.monotonic)
    over: bool = False
    wait: float = 0.0
    """Seconds before the next attempt."""

    def __post_init__(self) -> None:
        self.pause, self.alive = self.patience.first_pause, self.began
        self.away_since = self.began if self.first else inf

    @property
    def until(self) -> float:
        """Time at which to give up on a server that does not answer at all."""
        if self.first and not self.promised:
            return self.alive + self.patience.start
        return self.away_since + self.patience.outage

    @property
    def seconds(self) -> float:
        """Seconds that the next attempt may take."""
        left = self.until - time.monotonic() if self.first else self.patience.answer
        return max(0.0, min(left, self.patience.answer))

    @property
    def plan(self) -> str:
        """The next step, in words."""
        if self.first and not self.failures:
            return f"waiting up to {max(0.0, self.until - time.monotonic()):.0f} s for it"
        if not self.tries:
            return f"waiting up to {self.patience.answer:g} s"
        times = f"asking again, up to {self.patience.attempts} times"
        return times if self.first else f"{times}, or {self.patience.outage:g} s of an outage"

    def failed(self, error: Exception) -> None:
        """Record a failed attempt: the problem, and whether and when to try again."""
        now, late = time.monotonic(), isinstance(error, TimeoutError)
        self.problem = str(error).rstrip(".") or f"the connection broke ({type(error).__name__})"
        if late:
            self.problem = (
                f"no answer within {now - self.alive if self.first else self.patience.answer:.3g} s"
            )
        self.tries += 1
        after = error.after if isinstance(error, Away) else None
        self.promised = after is not None
        if self.promised:
            self.alive = now
        if isinstance(error, Failed) or (late and not self.first):
            self.failures += 1
            self.over = self.failures >= self.patience.attempts
            self.away_since = inf
        else:
            self.away_since = min(self.away_since, now)
            self.over = now + self.pause > self.until
        longest = KNOCK_SECONDS if self.first else self.patience.longest_pause
        self.wait = max(self.pause, min(after or 0.0, longest))
        self.pause = min(2 * self.pause, longest)

    def end(self) -> GaveUp:
        """The error to give up with."""
        times = "once" if self.tries == 1 else f"{self.tries} times"
        seconds = time.monotonic() - self.began
        server = "`kvpo reward-server`" if self.role == "reward server" else f"server of the {self.role}"
        way_out = f"; is a {server} there, and ready to answer?" if self.first else ""
        kind = NeverUsable if self.failures >= self.patience.attempts else GaveUp
        if self.first and self.promised:
            kind = StillLoading
        return kind(f"asked {times} in {seconds:.1f} s, then gave up: {self.problem}{way_out}")
