"""The benchmarks' scripts, for tests of them."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def benchmark_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts import each other by plain name, as they do when run."""
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[2] / "benchmarks"))
