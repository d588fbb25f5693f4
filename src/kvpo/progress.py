"""Progress bars on standard error; standard output is for results."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

NOTES = {"reward_mean": "reward", "loss": "loss"}
"""Metrics that a bar can show -> their labels."""


class Bars:
    """One bar per stage, created when the stage is first reported."""

    def __init__(self, display: Progress) -> None:
        self.display = display
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float] | None = None) -> None:
        """Show ``done`` of ``total`` steps, and the first of ``NOTES`` that is among ``numbers``."""
        if stage not in self.tasks:
            self.tasks[stage] = self.display.add_task(stage, total=total, note="")
        notes = [f"{word} {numbers[name]:.3f}" for name, word in NOTES.items() if name in (numbers or {})]
        self.display.update(self.tasks[stage], completed=done, total=total, note=" ".join(notes[:1]))


def counter(show: Callable[..., None], stage: str, total: int) -> Callable[[int], None]:
    """Begin a stage of ``show``, and return a function that adds to what is done of it, up to ``total``."""
    done = 0

    def add(count: int) -> None:
        nonlocal done
        done = min(total, done + count)
        show(stage, done, total)

    add(0)
    return add


@contextmanager
def progress_bars(*, lasting: bool = True, shown: bool = True) -> Iterator[Bars]:
    """Show bars while the block runs. Bars that are not ``lasting`` vanish at its end and need a terminal."""
    display = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
        transient=not lasting,
        disable=not shown or (not lasting and not sys.stderr.isatty()),
    )
    with display:
        yield Bars(display)
