"""Linear layers with 8-bit products for rollouts; they hold copies and leave the trained weights alone."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import cast

import torch
from torch import Tensor, nn

from kvpo.models.adapted_linear import AdaptedLinear
from kvpo.models.adapters import target_layers
from kvpo.models.settings import WanShape, require

EIGHT_BITS = {"int8": torch.int8, "fp8": torch.float8_e4m3fn}


@cache
def largest(dtype: torch.dtype, device: torch.device) -> float:
    """Value that the largest element of a row is scaled to.

    Processors without VNNI add two 8-bit products in 16 bits, where only half of the range cannot overflow.
    """
    if dtype != torch.int8:
        return torch.finfo(dtype).max
    full = torch.full((32, 32), 127, dtype=dtype, device=device)
    return 127.0 if int(torch._int_mm(full, full.t())[0, 0]) == 32 * 127**2 else 63.0


def rounded(x: Tensor, dtype: torch.dtype, most: float) -> tuple[Tensor, Tensor]:
    """Rows ``[R, K]`` quantised to 8 bits, and the float32 factors ``[R, 1]`` that undo the scaling.

    ``most``: see `largest`.
    """
    scale = x.abs().amax(-1, keepdim=True).float().div_(most).clamp_min_(torch.finfo(torch.float32).tiny)
    scaled = (x / scale).clamp_(-most, most)
    return (scaled if dtype.is_floating_point else scaled.round_()).to(dtype), scale


class QuantisedLinear(nn.Module):
    """An 8-bit copy of a linear layer, with the layer's active adapter added to the weight.

    The weight has one scale per output. Inputs are quantised on the fly, with one scale per token.
    """

    def __init__(self, layer: nn.Linear | AdaptedLinear, precision: str) -> None:
        super().__init__()
        base, weight = layer, None
        if isinstance(layer, AdaptedLinear):
            base = cast(nn.Linear, layer.base_layer)
            weight = None if layer.disable_adapters else layer.summed(torch.float32)
        self.in_features, self.out_features = layer.in_features, layer.out_features
        given = base.weight.detach() if weight is None else weight
        eight = EIGHT_BITS[precision]
        self.most = largest(eight, given.device)  # not in `forward`, where it would break a compiled graph
        self.weight_OI, self.scale_O1 = rounded(given, eight, self.most)
        self.bias = cast(nn.Linear, base).bias

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        kind = x.device.type
        wide = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        rows_RI, scale_R1 = rounded(x.flatten(0, -2), self.weight_OI.dtype, self.most)
        scale_1O, weight_IO = self.scale_O1.t(), self.weight_OI.t()
        if self.weight_OI.dtype == torch.int8:
            y_RO = torch._int_mm(rows_RI, weight_IO) * scale_R1
            y_RO = y_RO.mul_(scale_1O) if self.bias is None else torch.addcmul(self.bias, y_RO, scale_1O)
        else:  # with a scale per row, GPUs only return bfloat16
            bias, out = self.bias if self.bias is None else self.bias.to(torch.bfloat16), torch.bfloat16
            y_RO = torch._scaled_mm(
                rows_RI, weight_IO, scale_R1, scale_1O, bias, out_dtype=out, use_fast_accum=True
            )
        return y_RO.to(wide).unflatten(0, x.shape[:-1])


def check_rollouts(precision: str, device: torch.device | str, shape: WanShape) -> None:
    """Raise ValueError if a device does not support a rollout precision for a model's sizes."""
    if precision == "same":
        return
    try:
        layer = nn.utils.skip_init(nn.Linear, shape.dim, shape.ffn_dim, device=device)
        QuantisedLinear(layer, precision)(torch.ones(shape.text_len, shape.dim, device=device))
    except RuntimeError as error:
        found = f"{precision} on {device} ({str(error).splitlines()[0].removesuffix('.')})"
        require(False, "optim.rollout_precision", found, "same, or other 8 bits")


@contextmanager
def quantised_layers(model: nn.Module, precision: str) -> Iterator[None]:
    """Replace linear layers by ``QuantisedLinear`` inside the block, where no weight may change.

    These are the layers that can have adapters (``target_layers``); all others keep their precision.
    """
    layers = target_layers(model)
    try:
        for name, layer in layers.items():
            model.set_submodule(name, QuantisedLinear(layer, precision))
        yield
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
