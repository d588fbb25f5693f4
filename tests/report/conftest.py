from pathlib import Path

import pytest
from synthetic_run import write_run

from kvpo.report import write_report


@pytest.fixture(scope="session")
def finished_run(tmp_path_factory) -> Path:
    """A finished synthetic run with its report; tests must not change it."""
    directory = write_run(tmp_path_factory.mktemp("report") / "finished")
    write_report(directory)
    return directory
