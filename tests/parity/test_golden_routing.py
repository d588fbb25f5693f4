"""Routed branches and their anchor against the public sampler's numbers."""

import pytest

from tests.parity.fixtures import base_model, load, of_kind
from tests.parity.runs import run_routing


@pytest.mark.parametrize("path", of_kind("routing"), ids=lambda path: path.stem)
def test_golden_routing(path):
    meta, data = load(path)
    *branches, anchor = run_routing(meta, data, base_model(meta))
    expected = {f"latents_branch_{k}": branch for k, branch in enumerate(branches)}
    expected |= {"latents_anchor": anchor, "prefix_latents": anchor[: data["prefix_latents"].shape[1]]}
    for name, latents in expected.items():
        difference = latents.float() - data[name][0].float()
        if meta["dtype"] == "float32":
            assert difference.abs().max() <= 1e-4, name
        else:
            assert difference.square().mean().sqrt() < 0.03, name
