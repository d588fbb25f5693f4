"""Several ranks on one machine, forked from a server that has already imported everything."""

import pickle
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from kvpo.training.ranks import Ranks, joined_ranks
from tests.processes import CHILDREN, TIME_LIMIT

Work = Callable[..., Any]
"""A module-level function: (ranks, *arguments) -> a result that can be pickled."""


def _child(work: Work, rank: int, count: int, meeting: Path, short: float, arguments: Sequence[Any]) -> None:
    import torch
    from torch.distributed import FileStore, is_initialized

    torch.set_num_threads(1)
    store = FileStore(str(meeting / "store"), count)
    try:
        with joined_ranks(
            "cpu", traces=meeting, short=timedelta(seconds=short), rendezvous=(store, rank, count)
        ) as ranks:
            found = work(ranks, *arguments)
        assert not is_initialized(), "the process group outlives its run"
    except Exception as error:
        found = error
        (meeting / f"traceback-{rank}").write_text(traceback.format_exc())
    (meeting / f"found-{rank}").write_bytes(pickle.dumps(found))


def on_ranks(count: int, meeting: Path, work: Work, *arguments: Any, short: float = 60.0) -> list[Any]:
    """Run ``work`` on ``count`` ranks; returns each rank's result or exception, or None if it was killed.

    A single rank runs in this process without a process group. ``short``: the short time-out in seconds.
    """
    if count == 1:
        return [work(Ranks(), *arguments)]
    meeting.mkdir(parents=True)
    children = [
        CHILDREN.Process(target=_child, args=(work, rank, count, meeting, short, arguments))
        for rank in range(count)
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(TIME_LIMIT)
        assert child.exitcode is not None, f"still running after {TIME_LIMIT} s"
    files = [meeting / f"found-{rank}" for rank in range(count)]
    return [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]
