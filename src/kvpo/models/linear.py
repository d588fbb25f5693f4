"""Linear layers whose products on the CPU are oneDNN's.

torch gives float32 products to MKL, which leaves half of the vector width unused on processors of other
makers than its own; oneDNN has kernels for all of them.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""This torch has oneDNN and the operation that its own compiler uses."""


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


def fastest(x: Tensor, weight: Tensor) -> Callable[..., Tensor]:
    """The faster of torch's linear and oneDNN's, which records no gradients, for such operands."""
    narrow = x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    off = not AVAILABLE or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled
    return F.linear if narrow or off or x.device.type != "cpu" else _onednn


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, which records no gradients."""
    return fastest(x, weight)(x, weight, bias)


class _Product(torch.autograd.Function):
    """``linear`` with the gradients of all that it is given."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        (gradient,) = gradients
        times = fastest(gradient, weight)
        of_x = times(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        rows, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        of_weight = times(gradient.t(), rows.t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as torch's linear layer has it, computed by ``linear`` where that is faster."""
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's linear layer as a ``product``."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)
