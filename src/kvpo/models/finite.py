"""Checks that stop NaN and infinity where they first appear, with one reduction per tensor.

``torch.aminmax`` propagates NaN, needs no temporary tensor, and runs at about the full memory bandwidth.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


class NonFiniteError(ValueError):
    """A NaN or an infinity where numbers must be finite; the message is one line."""


def magnitudes(tensors: Iterable[Tensor]) -> Tensor:
    """Largest absolute value of every tensor, ``[n]`` float64 on the CPU; NaN where it holds NaN.

    All tensors must be on one device, which is synchronised once. Integers and empty tensors count as 0.
    """
    found = []
    for tensor in tensors:
        if tensor.numel() and tensor.is_floating_point():
            exact = tensor.detach().float() if tensor.itemsize == 1 else tensor.detach()  # no 8-bit aminmax
            low, high = torch.aminmax(exact)
            found.append(torch.maximum(high, -low).double())
        else:
            found.append(torch.zeros((), dtype=torch.float64, device=tensor.device))
    return torch.stack(found).cpu() if found else torch.empty(0, dtype=torch.float64)


def first_non_finite(named: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Name of the first tensor that is not finite, and "NaN" or "infinity"; None if all are finite."""
    sizes = magnitudes(named.values())
    for name, size in zip(named, sizes, strict=True):
        if not size.isfinite():
            return name, "NaN" if size.isnan() else "infinity"
    return None


def require_finite(named: Mapping[str, Tensor], source: str, way_out: str) -> None:
    """Raise NonFiniteError, naming ``source``, the first tensor that is not finite, and ``way_out``."""
    if (found := first_non_finite(named)) is not None:
        raise NonFiniteError(f"{source}: {found[0]} holds {found[1]}; {way_out}")


def require_finite_weights(named: Mapping[str, Tensor], source: str) -> None:
    """Raise NonFiniteError if weights, read from ``source``, hold NaN or infinity."""
    require_finite(named, source, "the file is damaged or its training diverged: download it again")


def first_non_finite_layer(model: nn.Module, call: Callable[[], object]) -> str | None:
    """Name of the first layer of ``model`` with a non-finite output during ``call``, or None."""
    found: list[str] = []

    def look(name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        if not found and not bool(magnitudes(_tensors(output)).isfinite().all()):
            found.append(name)

    hooks = [
        module.register_forward_hook(partial(look, name)) for name, module in model.named_modules() if name
    ]
    try:
        call()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for part in output:
            yield from _tensors(part)
