"""Linear layers by oneDNN: torch's values and gradients, and the same numbers with gradients and without."""

import pytest
import torch
from torch import nn

import kvpo.models.linear
from kvpo.models.linear import Linear, linear


@pytest.fixture(autouse=True, params=["few", "many"])
def multiplications(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of this file runs with torch's product, which small ones take, and with oneDNN's."""
    monkeypatch.setattr(kvpo.models.linear, "FEW", 0 if request.param == "many" else 2**20)


def layers(bias: bool = True) -> tuple[Linear, nn.Linear, torch.Tensor]:
    draws = torch.Generator().manual_seed(3)
    ours, theirs = Linear(24, 40, bias), nn.Linear(24, 40, bias)
    for value in ours.parameters():
        value.data.normal_(0, 1, generator=draws)
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs, torch.randn(3, 5, 24, generator=draws)


@pytest.mark.parametrize("bias", [False, True])
def test_values_and_gradients_are_those_of_torch(bias: bool) -> None:
    ours, theirs, x = layers(bias)
    target = torch.randn(3, 5, 40, generator=torch.Generator().manual_seed(4))
    found = []
    for layer in (ours, theirs):
        given = x.clone().requires_grad_()
        out = layer(given)
        found.append((out, *torch.autograd.grad((out * target).sum(), (given, *layer.parameters()))))
    for one, other in zip(*found, strict=True):
        assert other.abs().max() > 1
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_recording_gradients_changes_no_bit() -> None:
    ours, _, x = layers()
    with torch.no_grad():
        assert torch.equal(ours(x), ours(x.clone().requires_grad_()).detach())
        assert torch.equal(ours(x), linear(x, ours.weight, ours.bias))
    recorded = ours(x)
    assert recorded.requires_grad
    with torch.no_grad():
        assert torch.equal(recorded, ours(x))


@pytest.mark.parametrize("precision", ["float64", "autocast", "no oneDNN"])
def test_other_precisions_are_torch_s_own(precision: str) -> None:
    ours, theirs, x = layers()
    if precision == "float64":
        ours, theirs, x = ours.double(), theirs.double(), x.double()
    with (
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"),
        torch.backends.mkldnn.flags(enabled=precision != "no oneDNN"),
    ):
        found, expected = ours(x), theirs(x)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
