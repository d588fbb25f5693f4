"""LoRA adapters on the transformer: train a fresh one, continue a given one, or merge it; and the policy they
started from.

The starting policy needs no second network: it is the same weights with the adapter switched off, or with a
frozen copy of its starting value in its place.
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
"""Endings of the layers that get an adapter: every linear layer of a block, as in the public adapters."""
TRAINED = "default"
REFERENCE = "reference"


def _linear_shapes(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Output and input width of every linear layer by name."""
    return {
        name: (module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }


def check_adapter(model: nn.Module, adapter: AdapterState) -> None:
    """Demand that every adapted layer exists in a model with the right widths.

    Raises ValueError that names layers the model does not have, halves of another shape, NaN and infinity.
    """
    shapes, halves = _linear_shapes(model), {}
    for module in adapter.modules:
        if module in shapes:
            (out_width, in_width), rank = shapes[module], adapter.pair(module)[0].shape[0]
            halves[module] = (rank, in_width), (out_width, rank)
    check_tensors(adapter.tensors, in_peft_layout(halves), adapter.source)
    require_finite_weights(adapter.tensors, adapter.source)


def lora_config(adapter: AdapterState, base_model: str | None = None) -> LoraConfig:
    """PEFT's configuration of an adapter, which names its layers one by one."""
    ranks = {module: adapter.pair(module)[0].shape[0] for module in adapter.modules}
    return LoraConfig(
        r=adapter.rank,
        # PEFT's field is an integer wherever it can be, and computes with fractions as well.
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
        )  # the second adapter is meant
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
    """Freeze the model and train a fresh adapter on it; the starting policy is the adapter switched off.

    ``A`` is drawn by a CPU generator, uniform in ±1/sqrt(in) as PEFT initialises it, and ``B`` is zero, so
    that the policy starts out exactly equal to the model. The scale is ``alpha`` / rank, by default 1: the
    rank does not move the learning rate. The adapter is in float32, whatever the model's precision.
    """
    pairs = {}
    for name, (out_width, in_width) in _linear_shapes(model).items():
        if f".{name}".endswith(tuple(f".{end}" for end in LORA_TARGETS)):
            bound = 1.0 / math.sqrt(in_width)
            a = torch.empty(rank, in_width).uniform_(-bound, bound, generator=generator)
            pairs[name] = a, torch.zeros(out_width, rank)
    fresh = AdapterState(in_peft_layout(pairs), rank, alpha or float(rank), "fresh adapter")
    _inject(model, fresh, TRAINED, torch.float32)


def load_adapter(model: nn.Module, adapter: AdapterState, *, dtype: torch.dtype = torch.float32) -> None:
    """Freeze the model and continue a given adapter; the starting policy is a frozen copy of it.

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

    ``wide`` holds the weights by name as they were before rounding to the model's precision, so that the sum
    is rounded once; None: the model's own. Raises ValueError as `check_adapter` does.
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
    """Inside, the model is the starting policy and records no gradients; afterwards it is exactly as before.

    Contexts may be nested.
    """
    layers = lora_layers(model)
    assert layers, "a model without an adapter has no starting policy to switch to"
    switches = [(one, list(one.active_adapters), one.disable_adapters, one.held) for one in layers]
    # PEFT's switches also set requires_grad, which is a property of the training run and not of the policy.
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
    """An adapter's current weights (sharing memory) in PEFT's public layout.

    ``name`` is TRAINED, or REFERENCE for what a continued adapter started from.
    """
    tensors = get_peft_model_state_dict(model, adapter_name=name)
    modules = model.named_modules()
    return adapter_of(
        {PEFT_PREFIX + path: tensor.detach() for path, tensor in tensors.items()},
        {path: layer.lora_alpha[name] for path, layer in modules if isinstance(layer, LoraLayer)},
        f"{name} adapter",
    )


def _stacked(parts: Sequence[tuple[AdapterState, float]], module: str) -> tuple[Tensor, Tensor]:
    """A and B of scale 1, in float64, that do in a layer what adapters do together, each times a factor."""
    own = [(one, factor) for one, factor in parts if module in one.modules]
    a = torch.cat([one.pair(module)[0].double() for one, _ in own])
    return a, torch.cat([f * one.scale(module) * one.pair(module)[1].double() for one, f in own], 1)


def _of_scale_1(
    pairs: Mapping[str, tuple[Tensor, Tensor]], source: str, files: tuple[Path, ...] = (), stated: str = ""
) -> AdapterState:
    tensors = in_peft_layout({module: (a.float(), b.float()) for module, (a, b) in pairs.items()})
    return adapter_of(tensors, {m: float(len(a)) for m, (a, _) in pairs.items()}, source, files, stated)


def joined_adapters(adapters: Sequence[AdapterState]) -> AdapterState:
    """One adapter of scale 1 that does what several do together, at the sum of their ranks."""
    parts = [(one, 1.0) for one in adapters]
    pairs = {module: _stacked(parts, module) for one in adapters for module in one.modules}
    source, files = " and ".join(one.source for one in adapters), sum((one.files for one in adapters), ())
    return _of_scale_1(pairs, source, files, "those of the adapters, multiplied in")


def adapter_difference(
    continued: AdapterState, given: AdapterState, rank: int = 0
) -> tuple[AdapterState, float]:
    """The adapter that makes ``continued`` of ``given`` when it is added, of scale 1, and how much is lost.

    Concatenated it is exact, ``[s B, -s' B'] [A; A']``, at the sum of both ranks; at a lower ``rank`` its
    layers are their best approximations (truncated singular values), which lose a share of the Frobenius norm
    of all.
    """
    pairs = {}
    squares, lost = 0.0, 0.0
    for module in continued.modules:
        a, b = _stacked([(continued, 1.0), (given, -1.0)], module)
        squares += float(((b.T @ b) * (a @ a.T)).sum())  # of b @ a, which may be large
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
    """The model's weights without any adapter (sharing memory), under bare names."""
    return {
        name.replace(".base_layer.", "."): value.detach()
        for name, value in model.state_dict().items()
        if ".lora_" not in name
    }


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The weights that the trained policy amounts to, under bare names; the model is left as it is."""
    tensors = base_state(model)
    if lora_layers(model):
        adapter = adapter_state(model)
        for module in adapter.modules:
            weight = tensors[f"{module}.weight"]
            a, b = (half.to(weight.device, torch.float32) for half in adapter.pair(module))
            whole = adapted_weight(weight.float(), a, b, adapter.scale(module))
            tensors[f"{module}.weight"] = whole.to(weight.dtype)
    return tensors
