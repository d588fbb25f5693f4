"""GELU, root-mean-square normalisation and attention on the CPU, with gradients, in few passes over memory.

On a GPU, torch has a kernel for each. On the CPU, torch's GELU computes ``tanh``, which takes ten times as
long as ``sigmoid``; its normalisation is a chain of operations that autograd records one by one; and its
attention in half precision has a slow backward pass.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from kvpo.models.linear import needs_gradients

SLOPE, CUBIC = 2 * math.sqrt(2 / math.pi), 0.044715
"""Tanh approximation of GELU, written as x sigmoid(SLOPE (x + CUBIC x^3)): arXiv 1606.08415."""


def on_cpu(x: Tensor) -> bool:
    """True if the functions below can be faster than torch's own."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _slope(x: Tensor) -> Tensor:
    return torch.addcmul(x.new_tensor(SLOPE), x, x, value=SLOPE * CUBIC).mul_(x)


def _gelu(x: Tensor) -> Tensor:
    return _slope(x).sigmoid_().mul_(x)


class _Gelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        inner = _slope(x)  # recomputed, because replays are short of memory
        share = inner.sigmoid()
        # d/dx x s(u) = s + x u' s (1 - s), with x u' = SLOPE (x + 3 CUBIC x^3) = 3 (u - 2/3 SLOPE x)
        inner = torch.ops.aten.sigmoid_backward(inner.sub_(x, alpha=2 / 3 * SLOPE), share)
        return share.add_(inner, alpha=3).mul_(gradients[0])


class GELU(nn.Module):
    """GELU in its ``tanh`` approximation."""

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype.itemsize >= 4 and on_cpu(x):
            return _Gelu.apply(x) if needs_gradients(x) else _gelu(x)  # type: ignore[no-untyped-call]
        return F.gelu(x, approximate="tanh")


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised tensor, and the factor that each row was scaled by."""
    wide = torch.promote_types(x.dtype, torch.float32)
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=wide)
    scale = torch.addcmul(norm.new_tensor(eps), norm, norm, value=1 / x.shape[-1]).rsqrt_()
    return (x * scale).mul_(weight).to(x.dtype), scale


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, scale = _rms_norm(x, weight, eps)
        ctx.save_for_backward(x, scale, weight)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, scale, weight = ctx.saved_tensors
        (gradient,), unit = gradients, x * scale
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * unit).flatten(0, -2).sum(0).to(weight.dtype)
        gradient = (gradient * scale).mul_(weight)
        along = torch.linalg.vecdot(gradient, unit)[..., None]
        of_x = gradient.addcmul_(unit, along, value=-1 / unit.shape[-1])
        return of_x.to(x.dtype), of_weight, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``x / sqrt(mean x^2 + eps) * weight`` over the last axis; ``x`` and ``weight`` have the same precision.

    Computed in float32 or wider, and rounded once.
    """
    if not on_cpu(x):
        return F.rms_norm(x, weight.shape, weight, eps)
    if needs_gradients(x, weight):
        return _RMSNorm.apply(x, weight, eps)  # type: ignore[no-untyped-call]
    return _rms_norm(x, weight, eps)[0]


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention of ``[R, N, Q, D]`` to ``[R, N, K, D]``; ``mask [R, 1, 1, K]`` is True where visible.

    Uses torch's attention except under autocast on the CPU. There, it computes two batched products in
    autocast's precision, and the gradients of keys and values have the memory layout of keys and values.
    """
    if not (on_cpu(q) and torch.is_autocast_enabled("cpu")):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    rows, heads, _, width = q.shape
    q, k, v = (x.to(torch.get_autocast_dtype("cpu")).flatten(0, 1) for x in (q, k, v))
    hidden = q.new_zeros(1, 1, 1, 1)
    if mask is not None:
        hidden = q.new_zeros(mask.shape).masked_fill(~mask, -math.inf)
    bias = hidden.expand(rows, heads, -1, -1).flatten(0, 1)
    scores = torch.baddbmm(bias.mT, k, q.mT, alpha=width**-0.5).mT
    return torch.bmm(scores.softmax(-1), v).unflatten(0, (rows, heads))
