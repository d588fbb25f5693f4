"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType

logger = logging.getLogger(__name__)


@contextmanager
def stop_on_signal() -> Iterator[Callable[[], bool]]:
    """Yield ``interrupted()``, which turns true at the first SIGINT or SIGTERM.

    A second signal raises KeyboardInterrupt at once. The former handlers come back when the block ends.
    Outside the main thread, where Python allows no handlers, ``interrupted()`` stays false.
    """
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received:
            raise KeyboardInterrupt
        received.append(number)
        logger.warning("stopping at the next safe point; press Ctrl-C again to stop at once")

    with _handled(handle, signal.SIGINT, signal.SIGTERM):
        yield lambda: bool(received)


def sigterm_as_interrupt() -> AbstractContextManager[None]:
    """Within it SIGTERM raises KeyboardInterrupt, as Ctrl-C does; outside the main thread nothing changes."""
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
