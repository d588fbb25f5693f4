"""CPU offloading for frozen networks."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def on_device(networks: Iterable[nn.Module], device: torch.device | str) -> Iterator[None]:
    """Move networks to ``device`` for the duration of the block.

    Their values must not change in the block: on exit, the original tensors are restored without copying
    anything back. Networks that already are on the device are not copied.
    """
    modules = [module for network in networks for module in network.modules()]
    home = [
        (module, name, value)
        for module in modules
        for name, value in (*module.named_parameters(recurse=False), *module.named_buffers(recurse=False))
    ]
    # By identity, so that one tensor under two names (tied weights) stays one tensor.
    visiting = {id(value): _moved(value, device) for _, _, value in home}
    try:
        for module, name, value in home:
            setattr(module, name, visiting[id(value)])
        yield
    finally:
        for module, name, value in home:
            setattr(module, name, value)


def _moved(value: Tensor, device: torch.device | str) -> Tensor:
    moved = value.detach().to(device)
    return nn.Parameter(moved, requires_grad=False) if isinstance(value, nn.Parameter) else moved
