"""Linear layers whose products on the CPU are oneDNN's.

torch gives float32 products to MKL, which leaves half of the vector width unused on processors of other
makers than its own; oneDNN has kernels for all of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""This torch has oneDNN and the operation that its own compiler uses."""
FEW = 2**20
"""Multiplications of a product that take less time than oneDNN needs to begin with one."""


def needs_gradients(*tensors: Tensor) -> bool:
    """True where gradients of a function of these tensors may be asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b``, which records no gradients."""
    narrow = x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    off = not AVAILABLE or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled
    few = x.numel() * len(weight) < FEW
    if few or narrow or off or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


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
        of_x = linear(gradient, weight.t()) if ctx.needs_input_grad[0] else None
        rows, gradient = x.flatten(0, -2), gradient.flatten(0, -2)
        of_weight = linear(gradient.t(), rows.t()) if ctx.needs_input_grad[1] else None
        return of_x, of_weight, gradient.sum(0) if ctx.needs_input_grad[2] else None


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` as torch's linear layer has it, computed by ``linear`` where that is faster."""
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if needs_gradients(x, weight):
        return _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's linear layer as a ``product``."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)
