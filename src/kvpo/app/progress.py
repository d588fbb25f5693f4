"""Progress bars on standard error; standard output is for results."""

from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn


def progress_bars() -> Progress:
    """The display; a context manager."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=Console(stderr=True),
    )


class Bars:
    """One bar per stage, made when the stage is first heard of; a ``kvpo.training.run.Progress``."""

    def __init__(self, display: Progress) -> None:
        self.display = display
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, stage: str, done: int, total: int, numbers: Mapping[str, float]) -> None:
        if stage not in self.tasks:
            self.tasks[stage] = self.display.add_task(stage, total=total, note="")
        note = f"reward {numbers['reward_mean']:.3f}" if "reward_mean" in numbers else ""
        self.display.update(self.tasks[stage], completed=done, note=note)
