import logging
from pathlib import Path

import pytest
from edits import copy_of

from kvpo.app.align import align
from tests.tiny_world import tiny_config


class Lines(logging.Handler):
    """Collects the lines that a user sees during a run."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


@pytest.fixture(scope="session")
def run_and_console(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A finished run of a tiny generator as `kvpo align` leaves it, and its printed lines.

    It has four branches, of which the best and the worst train, a fixed temperature, and donor histories.
    """
    config = tiny_config(
        tiny_base,
        seed=1,  # one of its two validations beats the base
        exploration__branches=4,
        exploration__donor=1,
        objective__keep=(1, 1),
        objective__temperature=0.01,
        evaluation__every=1,
        evaluation__watchers=["motion_smoothness"],
        optim__updates=2,
    )
    directory = tmp_path_factory.mktemp("report") / "finished"
    console, logger = Lines(), logging.getLogger("kvpo")
    logger.addHandler(console)
    try:
        assert align(config, directory) is not None
    finally:
        logger.removeHandler(console)
    return directory, console.lines


@pytest.fixture(scope="session")
def nft_run(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shortest finished run of a method other than KVPO; tests must not change it."""
    directory = tmp_path_factory.mktemp("report") / "nft"
    config = tiny_config(tiny_base, method="nft", optim__updates=1, stream__schedule=(1.0, 0.5))
    assert align(config, directory) is not None
    return directory


@pytest.fixture(scope="session")
def finished_run(run_and_console: tuple[Path, list[str]]) -> Path:
    """A finished run; tests must change only copies (``edits.copy_of``)."""
    return run_and_console[0]


@pytest.fixture
def bare_run(tmp_path):
    """A minimal run: a configuration and no metrics yet."""
    (tmp_path / "config.yaml").write_text("preset: demo\nseed: 3\n")
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path


@pytest.fixture
def run(finished_run, tmp_path):
    """A copy of the finished run, to change."""
    return copy_of(finished_run, tmp_path / "run")
