"""LoRA adapters on the transformer: train a fresh one, continue a given one, or merge it.

The starting policy needs no second network: it is the same network with the adapter switched off or, for a
continued adapter, with a frozen copy of its initial value in its place.
"""

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from kvpo.models.adapted_linear import AdaptedLinear, adapted_weight, lora_layers
from kvpo.models.adapter_files import PEFT_PREFIX, AdapterState, adapter_of, in_peft_layout
from kvpo.models.finite import require_finite_weights
from kvpo.models.tensor_files import check_tensors

LORA_TARGETS = (
    "self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
    "cross_attn.q", "cross_attn.k", "cross_attn.v", "cross_attn.o", "ffn.0", "ffn.2",
)  # fmt: skip
"""Name endings of the layers that get an adapter: every linear layer of a block, as in public adapters."""
TRAINED = "default"
REFERENCE = "reference"


def target_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers that ``LORA_TARGETS`` names, with or without an adapter, by name."""
    ends = tuple(f".{end}" for end in LORA_TARGETS)
    return {name: cast(nn.Linear, one) for name, one in model.named_modules() if f".{name}".endswith(ends)}


def check_adapter(model: nn.Module, adapter: AdapterState) -> None:
    """Check that a model has every adapted layer, with the right widths, and that all values are finite.

    Raises ValueError naming layers that the model lacks, halves of another shape, NaN or infinity.
    """
    layers, halves = dict(model.named_modules()), {}
    for module in adapter.modules:
        if isinstance(layer := layers.get(module), nn.Linear):
            rank = adapter.pair(module)[0].shape[0]
            halves[module] = (rank, layer.in_features), (layer.out_features, rank)
    check_tensors(adapter.tensors, in_peft_layout(halves), adapter.source)
    require_finite_weights(adapter.tensors, adapter.source)


def lora_config(adapter: AdapterState, base_model: str | None = None) -> LoraConfig:
    """PEFT's configuration of an adapter, with the full name of every layer."""
    ranks = {module: adapter.pair(module)[0].shape[0] for module in adapter.modules}
    return LoraConfig(
        r=adapter.rank,
        # PEFT declares the field as an integer, but computes with fractions as well.
        lora_alpha=int(adapter.alpha) if adapter.alpha == int(adapter.alpha) else cast(int, adapter.alpha),
        rank_pattern={module: rank for module, rank in ranks.items() if rank != adapter.rank},
        alpha_pattern=dict(adapter.alphas),
        target_modules=sorted(adapter.modules),
        lora_dropout=0.0,
        base_model_name_or_path=base_model,
    )


def _inject(model: nn.Module, adapter: AdapterState, name: str, dtype: torch.dtype) -> None:
    """Add an adapter under ``name`` with a copy of the given weights on the model's device."""
    config = lora_config(adapter)
    config._register_custom_module({nn.Linear: AdaptedLinear})
    # On the meta device, PEFT's own initialisation draws nothing from the global generator.
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", message="Already found a `peft_config`"
        )  # the second adapter is intended
        inject_adapter_in_model(config, model, adapter_name=name, low_cpu_mem_usage=True)
    for module in adapter.modules:
        layer = model.get_submodule(module)
        assert isinstance(layer, LoraLayer)
        device = cast(Tensor, layer.get_base_layer().weight).device
        for half, tensor in zip((layer.lora_A, layer.lora_B), adapter.pair(module), strict=True):
            value = tensor.detach().to(device=device, dtype=dtype, copy=True)
            half[name].weight = nn.Parameter(value, requires_grad=name == TRAINED)


def add_adapter(
    model: nn.Module, rank: int, alpha: float | None = None, *, generator: torch.Generator
) -> None:
    """Freeze the model and add a fresh adapter to train; the starting policy is the adapter switched off.

    ``A`` is drawn from a CPU generator, uniform in ±1/sqrt(in) as in PEFT, and ``B`` is zero, so the policy
    starts out exactly equal to the model. The scale is ``alpha`` / rank, by default 1, so that the rank does
    not affect the learning rate. The adapter is in float32, whatever the model's precision.
    """
    pairs = {}
    for name, layer in target_layers(model).items():
        bound = 1.0 / math.sqrt(layer.in_features)
        a = torch.empty(rank, layer.in_features).uniform_(-bound, bound, generator=generator)
        pairs[name] = a, torch.zeros(layer.out_features, rank)
    fresh = AdapterState(in_peft_layout(pairs), rank, alpha or float(rank), "fresh adapter")
    _inject(model, fresh, TRAINED, torch.float32)


def load_adapter(model: nn.Module, adapter: AdapterState, *, dtype: torch.dtype = torch.float32) -> None:
    """Freeze the model and continue to train an adapter; the starting policy is a frozen copy of it.

    Raises ValueError as `check_adapter` does.
    """
    check_adapter(model, adapter)
    for name in (TRAINED, REFERENCE):
        _inject(model, adapter, name, dtype)
    for layer in lora_layers(model):
        layer.set_adapter(TRAINED)


@torch.no_grad()
def merge_adapter(model: nn.Module, adapter: AdapterState, wide: Mapping[str, Tensor] | None = None) -> None:
    """Add an adapter into the model's weights, ``W + scale B A``, computed in float32.

    ``wide`` maps names to the weights before they were rounded to the model's precision, so that the sum is
    rounded only once; None: the model's own weights. Raises ValueError as `check_adapter` does.
    """
    check_adapter(model, adapter)
    for module in adapter.modules:
        weight = model.get_submodule(module).weight
        assert isinstance(weight, Tensor)
        whole = weight if wide is None else wide[f"{module}.weight"].to(weight.device, torch.float32)
        a, b = (half.to(weight.device, torch.float32) for half in adapter.pair(module))
        weight.copy_(adapted_weight(whole.float(), a, b, adapter.scale(module)))


@contextmanager
def reference_policy(model: nn.Module) -> Iterator[None]:
    """Make the model the starting policy, without gradients; on exit, restore it exactly.

    Contexts may be nested.
    """
    layers = lora_layers(model)
    assert layers, "a model without an adapter has no starting policy to switch to"
    switches = [(one, list(one.active_adapters), one.disable_adapters, one.held) for one in layers]
    # PEFT's switches also set requires_grad, which belongs to the training run and not to the policy.
    gradients = [(p, p.requires_grad) for layer in layers for p in cast(nn.Module, layer).parameters()]
    try:
        for layer in layers:
            layer.held = None
            if REFERENCE in layer.lora_A:
                layer.set_adapter(REFERENCE, inference_mode=True)
            else:
                layer.enable_adapters(False)
        with torch.no_grad():
            yield
    finally:
        for layer, active, disabled, held in switches:
            layer.held = held
            layer.set_adapter(active)
            layer.enable_adapters(not disabled)
        for parameter, requires_grad in gradients:
            parameter.requires_grad_(requires_grad)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by name: the adapter's, or all of a model without one."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def adapter_state(model: nn.Module, name: str = TRAINED) -> AdapterState:
    """An adapter's current weights in PEFT's public layout; they share memory with the model.

    ``name`` is TRAINED, or REFERENCE for the initial value of a continued adapter.
    """
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    modules = model.named_modules()
    return adapter_of(
        {PEFT_PREFIX + path: tensor.detach() for path, tensor in tensors.items()},
        {path: layer.lora_alpha[name] for path, layer in modules if isinstance(layer, LoraLayer)},
        f"{name} adapter",
    )


def _stacked(parts: Sequence[tuple[AdapterState, float]], module: str) -> tuple[Tensor, Tensor]:
    """A and B in float64, of scale 1, that equal the sum of a layer's adapters, each times its factor."""
    own = [(one, factor) for one, factor in parts if module in one.modules]
    a = torch.cat([one.pair(module)[0].double() for one, _ in own])
    return a, torch.cat([f * one.scale(module) * one.pair(module)[1].double() for one, f in own], 1)


def _of_scale_1(
    pairs: Mapping[str, tuple[Tensor, Tensor]], source: str, files: tuple[Path, ...] = (), stated: str = ""
) -> AdapterState:
    tensors = in_peft_layout({module: (a.float(), b.float()) for module, (a, b) in pairs.items()})
    return adapter_of(tensors, {m: float(len(a)) for m, (a, _) in pairs.items()}, source, files, stated)


def joined_adapters(adapters: Sequence[AdapterState]) -> AdapterState:
    """One adapter of scale 1 that equals the sum of several; its rank is the sum of theirs."""
    parts = [(one, 1.0) for one in adapters]
    pairs = {module: _stacked(parts, module) for one in adapters for module in one.modules}
    source, files = " and ".join(one.source for one in adapters), sum((one.files for one in adapters), ())
    return _of_scale_1(pairs, source, files, "those of the adapters, multiplied in")


def adapter_difference(
    continued: AdapterState, given: AdapterState, rank: int = 0
) -> tuple[AdapterState, float]:
    """Adapter of scale 1 that turns ``given`` into ``continued`` when added, and the share that is lost.

    By default it is exact: the concatenation ``[s B, -s' B'] [A; A']``, which has the sum of both ranks. With
    a lower ``rank``, each layer is its best approximation (truncated singular values); the lost share is
    relative to the Frobenius norm over all layers.
    """
    pairs = {}
    squares, lost = 0.0, 0.0
    for module in continued.modules:
        a, b = _stacked([(continued, 1.0), (given, -1.0)], module)
        squares += float(((b.T @ b) * (a @ a.T)).sum())  # of b @ a, without forming it
        if 0 < rank < len(a):
            (q, r), (other_q, other_r) = torch.linalg.qr(b), torch.linalg.qr(a.T)
            left, values, right = torch.linalg.svd(r @ other_r.T)
            lost += float(values[rank:].square().sum())
            root = values[:rank].sqrt()
            b = q @ left[:, :rank] * root
            a = root[:, None] * (right[:rank] @ other_q.T)
        pairs[module] = a, b
    return _of_scale_1(pairs, "difference"), math.sqrt(lost / squares) if squares else 0.0


def base_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights without any adapter, under bare names; they share memory with the model."""
    return {
        name.replace(".base_layer.", "."): value.detach()
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The trained policy's weights with the adapter merged in, under bare names; the model is unchanged."""
    tensors = base_state(model)
    if lora_layers(model):
        adapter = adapter_state(model)
        for module in adapter.modules:
            weight = tensors[f"{module}.weight"]
            a, b = (half.to(weight.device, torch.float32) for half in adapter.pair(module))
            whole = adapted_weight(weight.float(), a, b, adapter.scale(module))
            tensors[f"{module}.weight"] = whole.to(weight.dtype)
    return tensors
