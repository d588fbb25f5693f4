"""The benchmarks' scripts, for tests of them."""

import json
from pathlib import Path

import pytest

from tests.tiny_world import SETTINGS


@pytest.fixture(autouse=True)
def benchmark_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by plain name, as they do when run."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def tiny_words(tiny_base: Path) -> list[str]:
    """The tiny generator's settings as a command line has them."""
    settings = {**SETTINGS, "backbone.checkpoint": str(tiny_base)}
    return [
        word
        for path, value in settings.items()
        for word in (f"--{path}", value if isinstance(value, str) else json.dumps(value))
    ]
