"""Output directories that hold something already, over which no other command may write."""

from pathlib import Path

from kvpo.arena.database import DATABASE
from kvpo.files import StorageError
from kvpo.training.run_directory import belongs_to_run

PLAN = "comparison.json"
"""File of a comparison's directory that describes it."""


def refuse_other(out: Path, own: str) -> None:
    """Refuse a directory whose files a ``run`` or a ``comparison``, as ``own`` says, would replace.

    Raises:
        StorageError: it holds a run, a comparison or a study, and not what it is used for.
    """
    if (out / PLAN).is_file():  # a finished one has a summary, as runs have
        there = "comparison"
    elif (out / DATABASE).is_file():
        there = "study"
    else:
        there = "run" if belongs_to_run(out) else own
    if there != own:
        raise StorageError(f"{out} holds a {there}; choose another --out for the {own}")
