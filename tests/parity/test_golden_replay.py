"""Replay scores under the public trainer's conventions (the documented parity option)."""

import pytest

from tests.parity.fixtures import base_model, load, of_kind
from tests.parity.runs import run_replay


@pytest.mark.parametrize("path", of_kind("replay"), ids=lambda path: path.stem)
def test_golden_replay(path):
    meta, data = load(path)
    tolerance = 1e-4 if meta["dtype"] == "float32" else 0.03
    for name, scores in run_replay(meta, data, lambda: base_model(meta)).items():
        assert (scores - data[name].float()).abs().max() <= tolerance, name
