"""Replay scores under the public trainer's conventions (the documented parity option)."""

import pytest

from tests.parity.fixtures import GOLDEN, base_model, of_kind, read
from tests.parity.runs import run_replay


@pytest.mark.parametrize("path", of_kind("replay"), ids=lambda path: path.stem)
def test_golden_replay(path):
    if not path.exists():
        pytest.skip(f"no replay fixtures in {GOLDEN}")
    meta, data = read(path)
    tolerance = 1e-4 if meta["dtype"] == "float32" else 0.03
    for name, scores in run_replay(meta, data, lambda: base_model(meta)).items():
        assert (scores - data[name].float()).abs().max() <= tolerance, name
