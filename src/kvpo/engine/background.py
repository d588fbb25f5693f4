"""Calls in a second thread, one after another, in the order they were given."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

LEAVING_SECONDS = 5.0
"""Seconds that leaving the block waits for the current call; one that hangs is abandoned."""

Submit = Callable[[Callable[[], Any]], Future[Any]]
"""Takes a call without arguments and returns the future of its result."""


@contextmanager
def in_background() -> Iterator[Submit]:
    """Yield ``submit``, whose calls run one at a time in a thread of their own.

    ``submit`` raises what an earlier call raised, so that no work is added to a lost cause. Leaving the block
    drops calls that have not begun. The thread is a daemon: a call that hangs cannot keep the process alive.
    """
    calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
    given: list[Future[Any]] = []

    def run() -> None:
        while (item := calls.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # it is raised where the result is asked for
                    future.set_exception(error)
            del item, future, call  # what the call held must not outlive it while the thread waits

    def submit(call: Callable[[], Any]) -> Future[Any]:
        for earlier in given:
            if earlier.done():
                earlier.result()
        future: Future[Any] = Future()
        given.append(future)
        calls.put((future, call))
        return future

    thread = threading.Thread(target=run, name="kvpo background", daemon=True)
    thread.start()
    try:
        yield submit
    finally:
        for future in given:
            future.cancel()
        calls.put(None)
        thread.join(LEAVING_SECONDS)
