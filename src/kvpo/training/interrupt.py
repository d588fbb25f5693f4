"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

import logging
import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


def patience() -> float:
    """Half of torchrun's grace period, in seconds, between signalling and killing a process; 0 without it."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 0.0
    return float(os.environ.get("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "30")) / 2


class StopAtOnce(KeyboardInterrupt):
    """Stop without saving anything."""


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield ``interrupted()``, which turns true at the first SIGINT or SIGTERM.

    A second signal raises KeyboardInterrupt, so that the block can save its work. Since that may take too
    long, every further signal raises StopAtOnce. If ``patience()`` is not 0, KeyboardInterrupt is also raised
    unless ``interrupted()`` is called within that time after the first signal. The previous handlers are
    restored when the block ends. Outside the main thread, where Python allows no handlers, ``interrupted()``
    stays false.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        signal.setitimer(signal.ITIMER_REAL, patience() if len(received) == 1 else 0.0)
        if len(received) == 1:
            logger.warning("stopping at the next safe point; press Ctrl-C again to stop at once")
        elif len(received) == 2:
            raise KeyboardInterrupt
        else:
            raise StopAtOnce

    def interrupted() -> bool:
        if received:
            signal.setitimer(signal.ITIMER_REAL, 0.0)
        return bool(received)

    with _handled(handle, signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
        try:
            yield interrupted
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def sigterm_as_interrupt() -> AbstractContextManager[None]:
    """Context in which SIGTERM raises KeyboardInterrupt like Ctrl-C; no effect outside the main thread."""
    return _handled(signal.default_int_handler, signal.SIGTERM)


@contextmanager
def _handled(handler: Callable[[int, FrameType | None], object], *signals: signal.Signals) -> Iterator[None]:
    in_main_thread = threading.current_thread() is threading.main_thread()
    former = [(number, signal.signal(number, handler)) for number in signals if in_main_thread]
    try:
        yield
    finally:
        for number, before in former:
            signal.signal(number, before)
