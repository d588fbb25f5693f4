"""Linear layers with an adapter: in the weight, or beside a weight of fewer digits, with their gradients."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from peft.tuners.lora import Linear
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.distributed.tensor import DTensor

from kvpo.models.linear import fastest, linear

Pair = tuple[Tensor, Tensor]


def adapted_weight(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    """``W + scale B A`` in PEFT's order of rounding: a fused sum has other bits on some processors."""
    delta = b @ a
    return (delta if scale == 1 else delta.mul_(scale)).add_(weight)


class _AdaptedProduct(torch.autograd.Function):
    """``x (W + scale B A)^T``, whose gradients are those of x, A and B.

    Only x is kept for them: a sum that nobody holds, which is as large as the weight, is made again.
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
        times = fastest(gradient, weight)
        rows, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        inner, outer = times(gradient, b.t()), times(rows, a)
        if ctx.scale != 1:
            inner, outer = ctx.scale * inner, ctx.scale * outer
        of_x = None
        if ctx.needs_input_grad[0]:
            total = adapted_weight(weight, a, b, ctx.scale) if held is None else held
            of_x = times(gradient, total.t()).view_as(x)
        # The narrow operand comes first, as the first one is copied where it is transposed.
        of_b = times(outer.t(), gradient.t()).t().contiguous()
        return of_x, None, None, times(inner.t(), rows.t()), of_b, None


class _ProductBeside(torch.autograd.Function):
    """``x W^T + scale (x A^T) B^T`` in the precision of W, whose gradients are those of x, A and B.

    A and B are given in their own precision, and ``held`` as ``_narrowed`` makes them, or they are made anew.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, held: Pair | None, base: nn.Linear, a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        narrow = _narrowed(base.weight, a, b, scale) if held is None else held
        y, outer = _beside(x, base, *narrow)
        ctx.save_for_backward(x, outer, base.weight, a, b, *(held or ()))
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, outer, weight, a, b, *held = ctx.saved_tensors
        narrow_a, narrow_b = held or _narrowed(weight, a, b, ctx.scale)
        rows, gradient = x.flatten(0, -2), gradients[0].flatten(0, -2)
        inner = gradient.mm(narrow_b)
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = gradient.mm(weight).addmm_(inner, narrow_a).view_as(x)
        of_b = gradient.t().mm(outer).to(b.dtype)
        if ctx.scale != 1:
            of_b *= ctx.scale
        return of_x, None, None, inner.t().mm(rows).to(a.dtype), of_b, None


def _narrowed(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Pair:
    """A and scale B in the precision of a weight that they stand beside."""
    return a.to(weight.dtype), (b if scale == 1 else scale * b).to(weight.dtype)


def _beside(x: Tensor, base: nn.Linear, a: Tensor, b: Tensor) -> Pair:
    """``x W^T + (x A^T) B^T`` and, by rows, ``x A^T``."""
    rows = x.flatten(0, -2)
    outer = rows.mm(a.t())
    y = F.linear(rows, base.weight, base.bias).addmm_(outer, b.t())
    return y.unflatten(0, x.shape[:-1]), outer


class AdaptedLinear(Linear):
    """A linear layer with adapters, whose active one is added to the weight before the product.

    Only in float32 and wider, where nothing but rounding is lost; narrower weights have the adapter beside
    them, in their precision, since its small numbers would vanish in theirs.
    """

    held: Tensor | Pair | None = None
    """The sum, or the adapter in the precision of the weight it stands beside, inside ``held_weights``."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.disable_adapters or torch.is_autocast_enabled(x.device.type):
            return super().forward(x, *args, **kwargs)
        base, scale = cast(nn.Linear, self.base_layer), self.scaling[self.active_adapters[0]]
        a, b = self._halves()
        product = _ProductBeside if _narrow(base.weight) else _AdaptedProduct
        if torch.is_grad_enabled() and (x.requires_grad or a.requires_grad):
            return cast(Tensor, product.apply(x, self.held, base, a, b, scale))  # type: ignore[no-untyped-call]
        held = self.holdable() if self.held is None else self.held
        return linear(x, held, base.bias) if isinstance(held, Tensor) else _beside(x, base, *held)[0]

    @torch.no_grad()
    def holdable(self) -> Tensor | Pair:
        """Tensors that calls under the same weights can share (see ``held``)."""
        weight = cast(nn.Linear, self.base_layer).weight
        if _narrow(weight):
            return _narrowed(weight, *self._halves(), self.scaling[self.active_adapters[0]])
        return self.summed(weight.dtype)

    @torch.no_grad()
    def summed(self, dtype: torch.dtype) -> Tensor:
        """The weight and the active adapter in one."""
        a, b = (half.to(dtype) for half in self._halves())
        weight = cast(nn.Linear, self.base_layer).weight.to(dtype)
        return adapted_weight(weight, a, b, self.scaling[self.active_adapters[0]])

    def _halves(self) -> Pair:
        """A and B of the active adapter, at least as wide as the weight."""
        name, weight = self.active_adapters[0], cast(nn.Linear, self.base_layer).weight
        a, b = (cast(nn.Linear, half[name]).weight for half in (self.lora_A, self.lora_B))
        wide = torch.promote_types(a.dtype, weight.dtype)
        return a.to(wide), b.to(wide)


def _narrow(weight: Tensor) -> bool:
    return weight.dtype.itemsize < 4


@contextmanager
def held_weights(model: nn.Module) -> Iterator[None]:
    """Inside, where the weights may not change, every adapter is brought into its layer's product only once.

    Not where weights are spread over ranks: they are whole only while their layer runs. Contexts may be
    nested.
    """
    free = [layer for layer in lora_layers(model) if layer.held is None and not layer.disable_adapters]
    layers = [layer for layer in free if not isinstance(layer._halves()[0], DTensor)]
    try:
        for layer in layers:
            layer.held = layer.holdable()
        yield
    finally:
        for layer in layers:
            layer.held = None


def lora_layers(model: nn.Module) -> list[AdaptedLinear]:
    """A model's layers with adapters."""
    return [module for module in model.modules() if isinstance(module, AdaptedLinear)]
