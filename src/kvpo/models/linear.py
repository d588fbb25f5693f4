"""Linear layers that use oneDNN for products on the CPU.

torch uses MKL for float32 products. On processors not made by Intel, MKL leaves half of the vector width
unused; oneDNN has kernels for all of them.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
"""True if this torch has oneDNN and the linear operation that torch's compiler uses."""
FEW = 2**20
"""Products with fewer multiplications than this take less time than oneDNN needs to start."""


def needs_gradients(*tensors: Tensor) -> bool:
    """True if gradients of a function of these tensors may be needed."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + b`` for ``x [..., in]`` and ``W [out, in]``, without gradients (see ``product``)."""
    narrow = x.dtype != torch.float32 or weight.dtype != torch.float32 or torch.is_autocast_enabled("cpu")
    off = not AVAILABLE or torch.compiler.is_compiling() or not torch.backends.mkldnn.enabled
    few = x.numel() * len(weight) < FEW
    if few or narrow or off or x.device.type != "cpu":
        return F.linear(x, weight, bias)
    found: Tensor = torch.ops.mkldnn._linear_pointwise.default(x, weight, bias, "none", [], "")
    return found


class _Product(torch.autograd.Function):
    """``linear`` with gradients for all of its inputs."""

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
    """``x W^T + b`` with gradients, as ``F.linear``, but computed by ``linear`` where that is faster."""
    if x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return F.linear(x, weight, bias)
    if needs_gradients(x, weight):
        return _Product.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return linear(x, weight, bias)


class Linear(nn.Linear):
    """torch's linear layer, computed by ``product``."""

    def forward(self, input: Tensor) -> Tensor:
        return product(input, self.weight, self.bias)
