"""Exact conversion of AdamW's state to named tensors and back; its settings are constants of the trainer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

MOMENTS = ("step", "exp_avg", "exp_avg_sq")


def moments_of(optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The state of every parameter that has taken a step: NAME.step [], NAME.exp_avg and NAME.exp_avg_sq."""
    return {
        f"{name}.{key}": value
        for name, parameter in parameters.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def moment_of(name: str) -> str:
    """Name of the parameter that an entry of ``moments_of`` belongs to."""
    return name.rpartition(".")[0]


def expected_moments(parameters: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors with the names and shapes that ``saved`` must have for each parameter it has entries for."""
    with_state = {moment_of(name) for name in saved}
    return {
        f"{name}.{key}": torch.empty(()) if key == "step" else parameter
        for name, parameter in parameters.items()
        if name in with_state
        for key in MOMENTS
    }


def load_moments(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, nn.Parameter], saved: Mapping[str, Tensor]
) -> None:
    """Inverse of ``moments_of``; ``saved`` has the names of ``expected_moments``. Steps stay on the CPU."""
    optimizer.state.clear()
    for name, parameter in parameters.items():
        for key in MOMENTS:
            if (value := saved.get(f"{name}.{key}")) is not None:
                optimizer.state[parameter][key] = value if key == "step" else value.to(parameter)
