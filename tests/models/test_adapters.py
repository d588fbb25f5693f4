"""Adapters: three ways to start training, and a starting policy that equals the policy bit for bit."""

from dataclasses import replace

import pytest
import torch
from peft.tuners.lora import Linear

from kvpo.models.adapted_linear import held_weights
from kvpo.models.adapter_files import PEFT_PREFIX
from kvpo.models.adapters import (
    LORA_TARGETS,
    adapter_state,
    add_adapter,
    base_state,
    load_adapter,
    merge_adapter,
    merged_state,
    reference_policy,
    trained_parameters,
)
from kvpo.training.policy import swapped_parameters
from tests.models.tiny import ADAPTED, random_adapter, tiny_model, velocity


def fresh(model):
    add_adapter(model, 3, 6.0, generator=torch.Generator().manual_seed(0))


def continued(model):
    load_adapter(model, random_adapter(model))


def merged(model):
    merge_adapter(model, random_adapter(model))
    fresh(model)


STARTS = {"fresh": fresh, "continued": continued, "merged": merged}


def nudge(model):
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for value in trained_parameters(model).values():
            value += 0.1 * torch.randn(value.shape, generator=generator)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16 weights", "bfloat16 autocast"])
def test_the_reference_equals_the_policy_bitwise_at_update_zero_and_stays(start, precision):
    model = tiny_model()
    if precision == "bfloat16 weights":
        model.to(torch.bfloat16)
    STARTS[start](model)

    @torch.no_grad()
    def predict():
        # One autocast region per pass: a region keeps the casts of the weights it has seen.
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bfloat16 autocast"):
            return velocity(model)

    policy = predict()
    with reference_policy(model):
        assert torch.equal(predict(), policy)
    nudge(model)
    assert not torch.equal(predict(), policy)
    with reference_policy(model):
        assert torch.equal(predict(), policy)


def test_adapters_are_narrowed_once_while_they_are_held():
    model = tiny_model().to(torch.bfloat16)
    continued(model)
    nudge(model)

    @torch.no_grad()
    def predict():
        with torch.profiler.profile() as profile:
            found = velocity(model)
        return found, sum(event.count for event in profile.key_averages() if event.key == "aten::_to_copy")

    expected, more = predict()
    with held_weights(model):
        found, casts = predict()
    assert torch.equal(found, expected)
    assert casts <= more - 2 * len(ADAPTED)


@pytest.mark.parametrize("start", ["continued", "merged"])
def test_the_starting_policy_is_base_plus_adapter(start):
    model, plain = tiny_model(), tiny_model()
    STARTS[start](model)
    adapter = random_adapter(plain)
    for name in ADAPTED:  # by hand: W + (alpha / rank) B A
        a, b = adapter.pair(name)
        plain.get_submodule(name).weight.data += 2.0 * b @ a
    with torch.no_grad():
        expected = velocity(plain)
        assert (velocity(model) - expected).abs().max() < 1e-5 * expected.abs().max()
        assert (velocity(tiny_model()) - expected).abs().max() > 1e-2 * expected.abs().max()


@pytest.mark.parametrize("start", STARTS)
def test_only_the_trained_adapter_receives_gradients(start):
    model = tiny_model()
    STARTS[start](model)
    nudge(model)
    names = trained_parameters(model).keys()
    assert names and all(".lora_" in name and ".default." in name for name in names)
    assert all(value.dtype == torch.float32 for value in trained_parameters(model).values())
    velocity(model).square().sum().backward()
    for name, value in model.named_parameters():
        assert (value.grad is not None and value.grad.abs().max() > 0) == (name in names), name


def switches(model):
    layers = [m for m in model.modules() if hasattr(m, "lora_A")]
    return (
        [(tuple(layer.active_adapters), layer.disable_adapters) for layer in layers],
        [(name, value.requires_grad) for name, value in model.named_parameters()],
    )


@pytest.mark.parametrize("start", STARTS)
def test_the_context_restores_the_previous_state_exactly(start):
    model = tiny_model()
    STARTS[start](model)
    for frozen in (False, True):
        for value in list(trained_parameters(model).values())[::2]:
            value.requires_grad_(not frozen)
        before = switches(model)
        with reference_policy(model):
            inside = switches(model)
            assert inside != before and not torch.is_grad_enabled()
            with reference_policy(model):
                assert switches(model) == inside
            assert switches(model) == inside
        assert switches(model) == before and torch.is_grad_enabled()
        with pytest.raises(KeyError), reference_policy(model):
            raise KeyError
        assert switches(model) == before


def test_a_graph_recorded_before_the_context_is_differentiated_as_the_policy():
    def gradients(visit_reference):
        model = tiny_model()
        model.checkpointing = True
        continued(model)
        nudge(model)
        loss = velocity(model).square().sum()
        if visit_reference:
            with reference_policy(model):
                velocity(model)
        loss.backward()
        return [value.grad for value in trained_parameters(model).values()]

    for alone, visited in zip(gradients(False), gradients(True), strict=True):
        assert torch.equal(alone, visited)


def test_a_fresh_adapter_draws_from_its_generator_only():
    before = torch.get_rng_state()
    model = tiny_model()
    torch.set_rng_state(before)
    fresh(model)
    assert torch.equal(torch.get_rng_state(), before)
    again = tiny_model()
    fresh(again)
    state = adapter_state(model)
    assert (state.rank, state.alpha) == (3, 6.0)
    assert all(
        torch.equal(value, adapter_state(again).tensors[name]) for name, value in state.tensors.items()
    )
    a, b = state.pair("blocks.1.ffn.0")
    assert a.shape == (3, 24) and b.shape == (40, 3) and not b.any()
    assert a.abs().max() <= 24**-0.5 and a.std() > 0.4 * 24**-0.5


def test_every_linear_layer_of_every_block_gets_an_adapter():
    model = tiny_model()
    fresh(model)
    wanted = {f"blocks.{i}.{target}" for i in range(2) for target in LORA_TARGETS}
    assert set(adapter_state(model).modules) == wanted


def test_the_public_layout_round_trips():
    model = tiny_model()
    given = random_adapter(model)
    load_adapter(model, given)
    state = adapter_state(model)
    assert state.tensors.keys() == given.tensors.keys()
    assert all(torch.equal(value, given.tensors[name]) for name, value in state.tensors.items())
    assert (state.rank, state.alpha) == (given.rank, given.alpha)
    nudge(model)
    assert all(value.any() for value in given.tensors.values())
    assert not torch.equal(given.pair(ADAPTED[0])[0], adapter_state(model).pair(ADAPTED[0])[0])


def test_adapters_that_do_not_fit_are_named():
    model = tiny_model()
    adapter = random_adapter(model)
    misnamed = {n.replace("blocks.1.ffn.0", "blocks.7.ffn.0"): v for n, v in adapter.tensors.items()}
    for call in (load_adapter, merge_adapter):
        with pytest.raises(ValueError, match=r"unexpected \(2\): .*blocks.7.ffn.0.lora_A.weight"):
            call(model, replace(adapter, tensors=misnamed))
        wide = adapter.tensors | {f"{PEFT_PREFIX}{ADAPTED[0]}.lora_A.weight": torch.zeros(3, 99)}
        with pytest.raises(
            ValueError, match=r"self_attn.q.lora_A.weight \(file \[3, 99\], model \[3, 24\]\)"
        ):
            call(model, replace(adapter, tensors=wide))


@pytest.mark.parametrize("start", STARTS)
def test_merged_weights_are_the_policy_and_the_base_is_untouched(start):
    model = tiny_model()
    base = {name: value.clone() for name, value in model.state_dict().items()}
    STARTS[start](model)
    nudge(model)
    weights = merged_state(model)
    assert list(weights) == list(base)
    plain = tiny_model()
    plain.load_state_dict(weights)
    with torch.no_grad():
        expected = velocity(model)
        assert (velocity(plain) - expected).abs().max() < 1e-5 * expected.abs().max()
    if start != "merged":
        assert all(torch.equal(value, base[name]) for name, value in base_state(model).items())


def test_a_model_without_an_adapter_trains_and_exports_all_of_itself():
    model = tiny_model()
    assert trained_parameters(model).keys() == dict(model.named_parameters()).keys()
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in merged_state(model).items())


def test_a_moving_average_takes_the_place_of_the_weights():
    model = tiny_model()
    continued(model)
    average = {name: value.detach() + 1 for name, value in trained_parameters(model).items()}
    before = {name: value.clone() for name, value in adapter_state(model).tensors.items()}
    with swapped_parameters(trained_parameters(model), average):
        state = adapter_state(model)
    for name, value in before.items():
        assert torch.equal(state.tensors[name], value + 1)


def adapted_layer(dtype=torch.float64):
    model = tiny_model().to(dtype)
    load_adapter(model, random_adapter(model), dtype=torch.promote_types(dtype, torch.float32))
    return model, model.get_submodule(ADAPTED[0])


def test_an_adapter_in_the_weights_is_what_it_is_beside_them():
    """Values and gradients are those of PEFT's own layer, which adds two products; also while it is held."""
    model, layer = adapted_layer()
    draws = torch.Generator().manual_seed(7)
    x = torch.randn(2, 5, 24, generator=draws, dtype=torch.float64, requires_grad=True)
    target = torch.randn(2, 5, 24, generator=draws, dtype=torch.float64)
    asked = (x, layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    outs = layer(x), Linear.forward(layer, x)
    torch.testing.assert_close(*outs, rtol=1e-12, atol=1e-12)
    found, expected = (torch.autograd.grad((out * target).sum(), asked) for out in outs)
    for one, other in zip(found, expected, strict=True):
        assert other.abs().max() > 0.1
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with held_weights(model):
        held = torch.autograd.grad((layer(x) * target).sum(), asked)
    assert all(map(torch.equal, held, found))


@pytest.mark.parametrize("scale", [1.0, 0.7])
def test_an_adapter_beside_narrow_weights_is_rounded_as_they_are(scale):
    """Values and gradients are PEFT's own in float64 within the rounding of bfloat16, also while held."""
    draws = torch.Generator().manual_seed(7)
    given, target = (torch.randn(2, 5, 24, generator=draws, dtype=torch.float64) for _ in range(2))
    numbers = {}
    for dtype in (torch.bfloat16, torch.float64):
        model, layer = adapted_layer(torch.bfloat16)
        layer.scaling["default"] = scale
        halves = layer.lora_A["default"].weight, layer.lora_B["default"].weight
        assert {half.dtype for half in halves} == {torch.float32}
        x = given.to(torch.bfloat16).to(dtype).requires_grad_()
        if dtype == torch.bfloat16:
            out = layer(x)
            with held_weights(model):
                held = layer(x)
                again = torch.autograd.grad((held * target.to(dtype)).sum(), (x, *halves))
                with torch.no_grad():
                    assert torch.equal(layer(x), out) and torch.equal(held, out)
        else:
            out = Linear.forward(model.double() and layer, x)
        numbers[dtype] = out, *torch.autograd.grad((out * target.to(dtype)).sum(), (x, *halves))
    narrow, wide = numbers.values()
    assert narrow[2].dtype == narrow[3].dtype == torch.float32
    assert all(map(torch.equal, again, narrow[1:]))
    for one, other in zip(narrow, wide, strict=True):
        assert (one - other).norm() < 0.02 * other.norm()


def test_under_autocast_an_adapter_is_computed_as_peft_does():
    model, layer = adapted_layer(torch.float32)
    x = torch.randn(2, 5, 24, generator=torch.Generator().manual_seed(7)).bfloat16()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), held_weights(model):
        assert torch.equal(layer(x), Linear.forward(layer, x))


def test_weights_are_summed_once_while_they_are_held():
    model, layer = adapted_layer(torch.float32)
    before = velocity(model)
    with torch.no_grad(), held_weights(model):
        assert torch.equal(velocity(model), before)
        with reference_policy(model):
            assert torch.equal(velocity(model), before)  # a copy of the start, held in its place
        layer.lora_B["default"].weight.mul_(2)
        assert torch.equal(velocity(model), before)
    assert not torch.equal(velocity(model), before)
