"""Ctrl-C and SIGTERM as a request to stop at the next safe point."""

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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

    in_main_thread = threading.current_thread() is threading.main_thread()
    signals = (signal.SIGINT, signal.SIGTERM) if in_main_thread else ()
    former = [(number, signal.signal(number, handle)) for number in signals]
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in former:
            signal.signal(number, handler)
