"""Run calls one at a time in a background thread, in submission order."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from queue import SimpleQueue
from typing import Any

from kvpo.threads import start_thread

LEAVING_SECONDS = 5.0
"""Seconds to wait for the running call when the block exits; a call that hangs is abandoned."""

Submit = Callable[[Callable[[], Any]], Future[Any]]
"""Takes a zero-argument callable and returns a future for its result."""


@contextmanager
def in_background() -> Iterator[Submit]:
    """Yield ``submit``, which runs calls one at a time in a background thread.

    ``submit`` re-raises the exception of an earlier call, so no work is queued behind a failure. Leaving the
    block cancels calls that have not started. The thread is a daemon, so a hanging call cannot keep the
    process alive.
    """
    calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
    given: list[Future[Any]] = []

    def run() -> None:
        while (item := calls.get()) is not None:
            future, call = item
            if future.set_running_or_notify_cancel():
                try:
                    future.set_result(call())
                except BaseException as error:  # re-raised when the result is requested
                    future.set_exception(error)
            del item, future, call  # release what the call held while the thread waits for the next

    def submit(call: Callable[[], Any]) -> Future[Any]:
        for earlier in given:
            if earlier.done():
                earlier.result()
        future: Future[Any] = Future()
        given.append(future)
        calls.put((future, call))
        return future

    thread = start_thread(run, "kvpo background")
    try:
        yield submit
    finally:
        for future in given:
            future.cancel()
        calls.put(None)
        thread.join(LEAVING_SECONDS)
