"""Child processes for tests that kill, stop and starve runs.

Children are forked from a server process that has imported everything and done nothing else, so they neither
spend seconds on importing torch nor inherit locks of threads.
"""

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path

import benchmarks.shapes  # noqa: F401  children share its folder; their own could outlive them

TIME_LIMIT = 280.0
CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(["tests.ranks", "tests.tiny_world", "kvpo.app.align", "kvpo.report.page"])


def nothing() -> None:
    """Default of ``before``: run nothing first."""


def start(arguments: Sequence[str | Path], output: Path, before: Callable[[], None] = nothing) -> BaseProcess:
    """Run ``kvpo`` with ``arguments`` in a child that prints to ``output``; ``before`` runs there first."""
    process = CHILDREN.Process(target=_child, args=([str(part) for part in arguments], output, before))
    process.start()
    return process


def _child(arguments: list[str], output: Path, before: Callable[[], None]) -> None:
    import torch

    from kvpo.app.cli import main

    # Shells start background jobs with SIGINT ignored, which children inherit.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
    logging.getLogger().handlers.clear()
    torch.set_num_threads(1)
    before()
    code = main(arguments)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def run(
    arguments: Sequence[str | Path], output: Path, before: Callable[[], None] = nothing
) -> tuple[int, str]:
    """``start`` and wait; returns the exit status (negative: the signal) and the output."""
    process = start(arguments, output, before)
    process.join(TIME_LIMIT)
    assert process.exitcode is not None, f"still running after {TIME_LIMIT} s"
    return process.exitcode, output.read_text()


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    """Wait until ``condition`` holds; fail if the child ends first."""
    deadline = time.monotonic() + TIME_LIMIT
    while not condition():
        assert process.is_alive(), "the run ended before the moment to disturb it"
        assert time.monotonic() < deadline
        time.sleep(0.005)


def lines_in(path: Path) -> int:
    """Number of complete lines in a file, which may not exist yet."""
    return path.read_bytes().count(b"\n") if path.exists() else 0
