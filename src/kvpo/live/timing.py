"""Measures the arrival times of a session's blocks against their deadlines."""

from collections import deque
from dataclasses import dataclass, field

import numpy as np

INTERVALS_KEPT = 512
"""Number of latest intervals between blocks from which the percentiles are computed."""


@dataclass
class Switch:
    """A prompt switch that has not been seen yet."""

    asked: float
    prompt: str
    before: str
    shown: bool = False


@dataclass
class Pace:
    """Deadlines and latencies of a stream; all times in seconds of one monotonic clock.

    Playback starts when the first block arrives, and block n is due n periods later. A late block stalls
    playback and moves the later deadlines by as much.
    """

    asked: float
    """Time at which the session was requested."""
    first_frame: float | None = None
    """Seconds from the request to the first block."""
    deadline: float | None = None
    """Time at which the next block is due; None: it starts playback."""
    last: float | None = None
    met: int = 0
    missed: int = 0
    stalled: float = 0.0
    intervals: deque[float] = field(default_factory=lambda: deque(maxlen=INTERVALS_KEPT))
    switch: Switch | None = None
    switch_shown: float | None = None
    """Seconds from sending the last prompt to the first block generated under it."""
    switch_seen: float | None = None
    """Seconds from sending the last prompt to the first block on which the scorer sees it."""

    def restart(self) -> None:
        """Let the next block restart playback, after a pause or a change of rate."""
        self.deadline = self.last = None

    def arrived(self, now: float, period: float) -> float:
        """Record an arrival and return the seconds that it stalled playback. ``period`` 0: no deadlines."""
        if self.first_frame is None:
            self.first_frame = now - self.asked
        if self.last is not None:
            self.intervals.append(now - self.last)
        self.last = now
        late = 0.0
        if period and self.deadline is not None:
            late = max(0.0, now - self.deadline)
            self.met, self.missed = self.met + (not late), self.missed + bool(late)
            self.stalled += late
        self.deadline = (now if self.deadline is None else max(now, self.deadline)) + period
        return late

    def numbers(self) -> dict[str, float | int | None]:
        """The measurements as the page shows them; keys that end in "_s" are in seconds."""
        p50, p95, p99 = np.percentile(self.intervals, (50, 95, 99)).tolist() if self.intervals else [None] * 3
        total = self.met + self.missed
        return {
            "first_frame_s": _rounded(self.first_frame),
            "block_p50_s": _rounded(p50),
            "block_p95_s": _rounded(p95),
            "block_p99_s": _rounded(p99),
            "deadlines_met": _rounded(self.met / total if total else None),
            "stalls": self.missed,
            "stalled_s": _rounded(self.stalled),
            "switch_shown_s": _rounded(self.switch_shown),
            "switch_seen_s": _rounded(self.switch_seen),
        }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
