"""Seconds and bytes of a run's phases on one rank."""

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

PHASES = ("rollout", "decode", "score", "replay", "reduce", "save", "wait")
"""Decoding and scoring overlap the next rollout; ``wait`` is for other ranks, within any phase."""


@dataclass
class Clock:
    """Time and traffic of this rank so far. Phases overlap, so they can add up to more than elapsed time."""

    seconds: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)
    """Bytes sent to other ranks; for ``save``, bytes written."""

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the duration of the ``with`` block to ``phase``."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] += time.perf_counter() - started  # type: ignore[assignment]

    def read(self) -> "Clock":
        """A snapshot of the clock."""
        return Clock(Counter(self.seconds), Counter(self.bytes))

    def since(self, before: "Clock") -> dict[str, dict[str, float]]:
        """Seconds and bytes by phase since the snapshot ``before``."""
        return {
            "seconds": {name: self.seconds[name] - before.seconds[name] for name in PHASES},
            "bytes": {name: self.bytes[name] - before.bytes[name] for name in PHASES if self.bytes[name]},
        }


def phases_of(
    ranks: Sequence[Mapping[str, Mapping[str, float]]], seconds: float, samples: int
) -> dict[str, Any]:
    """Metrics of an update's phases: a value per rank for each, the share of time waiting, throughput."""
    found: dict[str, Any] = {
        kind: {name: [round(own[kind].get(name, 0.0), 4) for own in ranks] for name in ranks[0][kind]}
        for kind in ("seconds", "bytes")
    }
    waited = sum(own["seconds"]["wait"] for own in ranks)
    found["idle"] = waited / (len(ranks) * seconds)
    return found | {"samples_per_second_and_rank": samples / (len(ranks) * seconds)}
