"""Child processes for tests that kill, stop and starve runs.

A child is forked, so that it need not spend seconds on importing torch again.
"""

import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from kvpo.app.cli import main

TIME_LIMIT = 100.0


def start(
    arguments: Sequence[str | Path], output: Path, before: Callable[[], None] = lambda: None
) -> multiprocessing.Process:
    """Run ``kvpo`` with ``arguments`` in a child that prints to ``output``; ``before`` runs there first."""

    def child() -> None:
        descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        logging.getLogger().handlers.clear()  # pytest's, which would keep the messages
        before()
        code = main([str(argument) for argument in arguments])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def run(
    arguments: Sequence[str | Path], output: Path, before: Callable[[], None] = lambda: None
) -> tuple[int, str]:
    """``start`` and wait: exit status (negative: the signal) and everything printed."""
    process = start(arguments, output, before)
    process.join(TIME_LIMIT)
    assert process.exitcode is not None, f"still running after {TIME_LIMIT} s"
    return process.exitcode, output.read_text()


def wait_for(condition: Callable[[], bool], process: multiprocessing.Process) -> None:
    """Wait until ``condition`` holds; fail if the child ends first."""
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
        assert process.is_alive(), "the run ended before the moment to disturb it"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines_in(path: Path) -> int:
    """Whole lines of a file that may not be there yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
