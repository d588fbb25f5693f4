"""A finished run, to resume in tests."""

import shutil
from pathlib import Path

import pytest

from kvpo.app.align import align
from tests.app.finished import QUICK
from tests.tiny_world import tiny_config


@pytest.fixture(scope="session")
def finished(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two updates in the embedded world."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    assert align(tiny_config(tiny_base, **QUICK), out) is not None
    return out


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(finished, tmp_path / "run")
