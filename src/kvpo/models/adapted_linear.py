"""Linear layers with a LoRA adapter: added to float32 weights, computed beside narrower ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from kvpo.models.linear import linear

Pair = tuple[Tensor, Tensor]


def adapted_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``W + scale B A``, rounded in PEFT's order: on some processors a fused sum rounds differently."""
    delta = b @ a
    return (delta if scale == 1 else delta.mul_(scale)).add_(weight)


class _AdaptedProduct(torch.autograd.Function):
    """``x (W + scale B A)^T``, with gradients for x, A and B.

    Saves only x: the sum is as large as the weight and is recomputed unless ``held`` is given.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: Tensor | None, base: nn.Linear, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        ctx.save_for_backward(x, held, base.weight, a, b)
        ctx.scale = scale
        return linear(x, adapted_weight(base.weight, a, b, scale) if held is None else held, base.bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, held, weight, a, b = ctx.saved_tensors
        (gradient,) = gradients
        rows, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        inner, outer = linear(gradient, b.t()), linear(rows, a)
        if ctx.scale != 1:
            inner, outer = ctx.scale * inner, ctx.scale * outer
        of_x = None
        if ctx.needs_input_grad[0]:
            total = adapted_weight(weight, a, b, ctx.scale) if held is None else held
            of_x = linear(gradient, total.t()).view_as(x)
        # The narrow operand comes first because a transposed first operand is copied.
        of_b = linear(outer.t(), gradient.t()).t().contiguous()
        return of_x, None, None, linear(inner.t(), rows.t()), of_b, None


class _ProductBeside(torch.autograd.Function):
    """``x W^T + scale (x A^T) B^T`` in the precision of W, with gradients for x, A and B.

    A and B keep their own precision; ``held`` are copies of them in the precision of W.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: Pair | None, base: nn.Linear, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        y, outer = _beside(x, base, held or (a.to(base.weight.dtype), b.to(base.weight.dtype)), scale)
        ctx.save_for_backward(x, outer, base.weight, a, b, *(held or ()))
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, outer, weight, a, b, *held = ctx.saved_tensors
        narrow_a, narrow_b = held or (a.to(weight.dtype), b.to(weight.dtype))
        rows, gradient = x.flatten(0, -2), gradients[0].flatten(0, -2)
        inner = gradient.mm(narrow_b)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient.mm(weight).addmm_(inner, narrow_a, alpha=ctx.scale).view_as(x)
        of_a, of_b = inner.t().mm(rows).to(a.dtype), gradient.t().mm(outer).to(b.dtype)
        if ctx.scale != 1:
            of_a, of_b = ctx.scale * of_a, ctx.scale * of_b
        return of_x, None, None, of_a, of_b, None


def _beside(x: Tensor, base: nn.Linear, narrow: Pair, scale: float) -> Pair:
    """``x W^T + scale (x A^T) B^T``, and ``x A^T`` flattened to rows."""
    rows, (a, b) = x.flatten(0, -2), narrow
    outer = rows.mm(a.t())
    y = F.linear(rows, base.weight, base.bias).addmm_(outer, b.t(), alpha=scale)
    return y.unflatten(0, x.shape[:-1]), outer


class AdaptedLinear(Linear):
    """A linear layer with adapters; the active one is added to the weight before the product.

    Weights narrower than float32 would lose the adapter's small values in the sum. There, the adapter is
    computed beside the weight, in the weight's precision.
    """

    held: Tensor | Pair | None = None
    """Set inside ``held_weights``: the summed weight, or (A, B) in the precision of a narrow weight."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        base, scale = cast(nn.Linear, self.base_layer), self.scaling[self.active_adapters[0]]
        if torch.is_grad_enabled():
            a, b = self.halves()
            if x.requires_grad or a.requires_grad:
                product = _ProductBeside if _narrow(base.weight) else _AdaptedProduct
                return cast(Tensor, product.apply(x, self.held, base, a, b, scale))  # type: ignore[no-untyped-call]
        held = _holdable([self])[0] if self.held is None else self.held
        return linear(x, held, base.bias) if isinstance(held, Tensor) else _beside(x, base, held, scale)[0]

    @torch.no_grad()
    def summed(self, dtype: torch.dtype) -> Tensor:
        """The weight plus the active adapter, ``[out, in]``, computed in ``dtype``."""
        a, b = (half.to(dtype) for half in self.halves())
        weight = cast(nn.Linear, self.base_layer).weight.to(dtype)
        return adapted_weight(weight, a, b, self.scaling[self.active_adapters[0]])

    def halves(self) -> Pair:
        """A and B of the active adapter, promoted to at least the weight's precision."""
        name, weight = self.active_adapters[0], cast(nn.Linear, self.base_layer).weight
        a, b = (cast(nn.Linear, half[name]).weight for half in (self.lora_A, self.lora_B))
        wide = torch.promote_types(a.dtype, weight.dtype)
        return a.to(wide), b.to(wide)


def _narrow(weight: Tensor) -> bool:
    return weight.dtype.itemsize < 4


@torch.no_grad()
def _holdable(layers: Sequence[AdaptedLinear]) -> list[Tensor | Pair]:
    """``held`` of every layer, computed in few operations; calls can share it until the weights change."""
    if not layers:
        return []
    weights = [cast(nn.Linear, layer.base_layer).weight for layer in layers]
    halves = [layer.halves() for layer in layers]
    if _narrow(weights[0]):
        wide = [half for pair in halves for half in pair]
        narrow = [torch.empty_like(half, dtype=weights[0].dtype) for half in wide]
        torch._foreach_copy_(narrow, wide)
        return list(zip(narrow[::2], narrow[1::2], strict=True))
    sums = [b @ a for a, b in halves]  # in the order of ``adapted_weight``
    scales = [layer.scaling[layer.active_adapters[0]] for layer in layers]
    if any(scale != 1 for scale in scales):
        torch._foreach_mul_(sums, scales)
    torch._foreach_add_(sums, weights)
    return [*sums]


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Prepare every adapter once for all calls inside the block, where the weights must not change.

    Weights sharded over ranks are skipped: they are whole only while their layer runs. Contexts may nest.
    """
    free = [layer for layer in lora_layers(model) if layer.held is None and not layer.disable_adapters]
    layers = [layer for layer in free if not isinstance(layer.halves()[0], DTensor)]
    try:
        for layer, held in zip(layers, _holdable(layers), strict=True):
            layer.held = held
        yield
    finally:
        for layer in layers:
            layer.held = None


def lora_layers(model: nn.Module) -> list[AdaptedLinear]:
    """A model's layers with adapters."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]
