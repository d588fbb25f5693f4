"""Layers of 8 bits: products, what they are copies of, and what is left as it was."""

from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter

from kvpo.models import quantised
from kvpo.models.adapted_linear import AdaptedLinear
from kvpo.models.adapters import LORA_TARGETS, add_adapter, reference_policy
from kvpo.models.causal_wan import CausalWan
from kvpo.models.quantised import QuantisedLinear, check_rollouts, largest, quantised_layers, rounded
from tests.models.tiny import SHAPE

STEP = {"int8": 1 / 63, "fp8": 2**-3}
"""Largest distance of neighbouring numbers, over the largest of a row, or over the number."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def linear(inputs: int = 48, outputs: int = 64) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    layer.weight.data, layer.bias.data = draw(outputs, inputs), draw(outputs, seed=1)
    return layer


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("autocast", [False, True])
def test_the_product_is_that_of_the_rounded_operands(precision: str, autocast: bool) -> None:
    layer, x = linear(), draw(3, 20, 48, seed=2)
    x[0, 0] = 0.0  # a row without a largest element
    made = QuantisedLinear(layer, precision)
    given, own = rounded(x.flatten(0, 1), made.weight_OI.dtype, made.most), (made.weight_OI, made.scale_O1)
    x_RI, weight_OI = (eight.double() * scale for eight, scale in (given, own))
    expected = (x_RI @ weight_OI.T + layer.bias.double()).unflatten(0, (3, 20))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = made(x)
    assert found.dtype == (torch.bfloat16 if autocast else torch.float32) and not found.requires_grad
    rtol, atol = (1e-5, 1e-4) if precision == "int8" and not autocast else (1e-2, 0.1)
    torch.testing.assert_close(found.double(), expected, rtol=rtol, atol=atol)
    distance = (weight_OI - layer.weight).abs() / layer.weight.abs().amax(1, keepdim=True)
    assert 0 < distance.max() <= STEP[precision] / 2 * 1.001


def test_rows_keep_to_the_range_whose_products_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where processors add two products of 8 bits in 16, half the range is used."""
    device = torch.device("cpu")
    largest.cache_clear()
    assert largest(torch.int8, device) in (63, 127)
    product = torch._int_mm
    monkeypatch.setattr(torch, "_int_mm", lambda a, b: product(a, b).clamp(max=2**15 - 1))
    largest.cache_clear()
    assert largest(torch.int8, device) == 63 == QuantisedLinear(linear(), "int8").weight_OI.abs().amax()
    largest.cache_clear()


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_layers_of_every_rollout_share_one_compiled_graph(precision: str) -> None:
    torch._dynamo.reset()
    largest.cache_clear()
    graphs = CompileCounter()
    product = torch.compile(lambda layer, x: layer(x), backend=graphs, dynamic=True)
    for rows in (20, 30):
        product(QuantisedLinear(linear(), precision), draw(rows, 48))
    assert graphs.frame_count == 1


def adapted() -> CausalWan:
    model = CausalWan(SHAPE)
    with torch.no_grad():
        add_adapter(model, 2, generator=torch.Generator().manual_seed(3))
        for n, (name, value) in enumerate(model.named_parameters()):
            if "lora_B" in name:
                value.copy_(0.1 * draw(*value.shape, seed=n))
    return model


def test_blocks_are_quantised_with_their_adapter_and_come_back() -> None:
    model = adapted()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = {name: one for name, one in model.named_modules() if isinstance(one, AdaptedLinear)}
    with pytest.raises(KeyError), quantised_layers(model, "int8"):
        inside = {name: one for name, one in model.named_modules() if isinstance(one, QuantisedLinear)}
        assert inside.keys() == layers.keys()
        assert all(name.endswith(LORA_TARGETS) for name in inside)
        for name, one in inside.items():
            expected = rounded(layers[name].summed(torch.float32), torch.int8, one.most)
            assert torch.equal(one.weight_OI, expected[0]) and torch.equal(one.scale_O1, expected[1])
            base = rounded(layers[name].base_layer.weight, torch.int8, one.most)
            assert not torch.equal(one.weight_OI, base[0])
            assert not list(one.parameters()) or one.bias is layers[name].base_layer.bias
        raise KeyError
    assert {name: one for name, one in model.named_modules() if isinstance(one, AdaptedLinear)} == layers
    after = model.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    with reference_policy(model):
        name, layer = next(iter(layers.items()))
        own = QuantisedLinear(layer, "int8")
        assert torch.equal(own.weight_OI, rounded(layer.base_layer.weight, torch.int8, own.most)[0]), name


def test_narrow_weights_are_summed_with_their_adapter_before_they_are_rounded() -> None:
    wide = next(one for one in adapted().modules() if isinstance(one, AdaptedLinear))
    narrow = deepcopy(wide)
    wide.base_layer.weight.data = wide.base_layer.weight.data.bfloat16().float()
    narrow.base_layer.weight.data = narrow.base_layer.weight.data.bfloat16()
    made = [QuantisedLinear(one, "int8") for one in (wide, narrow)]
    assert torch.equal(made[0].weight_OI, made[1].weight_OI) and torch.equal(*(one.scale_O1 for one in made))


def test_a_device_that_cannot_multiply_so_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    check_rollouts("same", "nowhere", SHAPE)
    state = torch.get_rng_state()
    for precision in ("int8", "fp8"):
        check_rollouts(precision, "cpu", SHAPE)
    assert torch.equal(state, torch.get_rng_state())

    def refuse(*arguments: Any, **named: Any) -> Tensor:
        raise RuntimeError("needs compute capability >= 8.9.\nelsewhere")

    monkeypatch.setattr(quantised.torch, "_scaled_mm", refuse)
    with pytest.raises(ValueError) as caught:
        check_rollouts("fp8", "cpu", SHAPE)
    assert str(caught.value) == (
        "optim.rollout_precision: must be same, or other 8 bits, got fp8 on cpu "
        "(needs compute capability >= 8.9)"
    )
