"""What tests of a run that is taken up again share: settings, the command line, what a directory holds."""

from pathlib import Path
from typing import Any

from kvpo.app.cli import main

QUICK: dict[str, Any] = {
    "rewards__scorers": ("tests.tiny_world:toy",),
    "optim__updates": 2,
    "evaluation__every": 0,
    "stream__schedule": (1.0, 0.5),
}


def command(*words: object) -> int:
    """Status of ``kvpo`` with these arguments."""
    return main([str(word) for word in words])


def contents(directory: Path) -> dict[str, bytes]:
    """Every file below a directory by name, locks aside."""
    files = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith("."))
    return {str(path.relative_to(directory)): path.read_bytes() for path in files}
