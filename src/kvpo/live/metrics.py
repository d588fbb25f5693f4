"""The metrics behind ``/metrics``, for Prometheus."""

import resource
import sys
from typing import Any

from kvpo.extras import extra

with extra("server"):
    from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

LATENCIES = (0.025, 0.05, 0.1, 0.15, 0.25, 0.4, 0.6, 1.0, 1.6, 2.5, 4.0, 10.0)
"""Upper bounds of the histogram buckets, in seconds."""


def memory_bytes() -> int:
    """Peak resident memory of the process, in bytes."""
    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else 1024 * used


class ServerMetrics:
    """Metrics of one server, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry, "namespace": "kvpo_live"}
        times: dict[str, Any] = {**own, "buckets": LATENCIES}
        self.first_frame = Histogram("first_frame_seconds", "session.start to its first block", **times)
        self.interval = Histogram("block_interval_seconds", "time between the blocks of a session", **times)
        self.switch_shown = Histogram(
            "switch_shown_seconds", "prompt sent to the first block generated under it", **times
        )
        self.switch_seen = Histogram(
            "switch_seen_seconds", "prompt sent to the first block on which the scorer sees it", **times
        )
        self.blocks = Counter("blocks", "blocks generated, per arm", ["arm"], **own)
        self.deadlines = Counter("deadlines", "blocks that were in time, or late", ["met"], **own)
        self.stalled = Counter("stalled_seconds", "time that playback waited for late blocks", **own)
        self.refused = Counter("refused", "requests that were not carried out", ["code"], **own)
        self.dropped = Counter("dropped_blocks", "blocks that a slow reader did not get", **own)
        self.sessions = Gauge("sessions", "sessions that stream", **own)
        self.viewers = Gauge("viewers", "open connections", **own)
        self.pages = Gauge("pages_in_use", "pages of the frame cache that are in use", **own)
        self.capacity = Gauge("pages_total", "pages of the frame cache", **own)
        self.memory = Gauge("memory_peak_bytes", "most memory that the process has held", **own)
        self.memory.set_function(memory_bytes)

    def text(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
