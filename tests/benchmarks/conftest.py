"""Fixtures for tests of the benchmark scripts."""

import json
from pathlib import Path

import pytest

from tests.tiny_world import SETTINGS


@pytest.fixture(autouse=True)
def benchmark_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the scripts import each other by plain name, as when they are run."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))


@pytest.fixture
def tiny_words(tiny_base: Path) -> list[str]:
    """The tiny generator's settings as command-line words."""
    settings = {**SETTINGS, "backbone.checkpoint": str(tiny_base)}
    return [
        word
        for path, value in settings.items()
        for word in (f"--{path}", value if isinstance(value, str) else json.dumps(value))
    ]
