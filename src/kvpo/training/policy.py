"""The trained parameters, their starting values and their moving average; no network is ever copied."""

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from kvpo.models.adapted_linear import lora_layers
from kvpo.models.adapters import reference_policy, trained_parameters
from kvpo.training.sharding import local, sharded


@dataclass(frozen=True)
class Policy:
    """Trainable parameters and access to the reference policy."""

    model: nn.Module
    parameters: Mapping[str, nn.Parameter]
    starting_values: Mapping[str, Tensor] | None
    """Full-parameter training only: a frozen copy of the initial values. With an adapter, the starting policy
    is the adapter switched off, or a frozen copy of its initial state."""

    def reference(self) -> AbstractContextManager[None]:
        """Context in which the model is the starting policy."""
        if self.starting_values is None:
            return reference_policy(self.model)
        return swapped_parameters(self.parameters, self.starting_values)


def policy_of(model: nn.Module) -> Policy:
    """The policy of a model; its trainable parameters are those that require gradients.

    Raises ValueError if there are none.
    """
    parameters = trained_parameters(model)
    if not parameters:
        raise ValueError("nothing to train: the adapter binds no layer of the model; check backbone.lora")
    copies = None if lora_layers(model) else {name: p.detach().clone() for name, p in parameters.items()}
    return Policy(model, parameters, copies)


@contextmanager
def swapped_parameters(
    parameters: Mapping[str, nn.Parameter], values: Mapping[str, Tensor]
) -> Iterator[None]:
    """Context in which the parameters have other values, without gradients; their own are restored on exit.

    Values are copied into sharded parameters, because FSDP does not gather their ``.data``.
    """
    spread = sharded(parameters.values())

    def exchange(given: Mapping[str, Tensor]) -> None:
        for name, parameter in parameters.items():
            if spread:
                local(parameter.detach()).copy_(local(given[name]))
            else:
                parameter.data = given[name]

    own = {
        name: local(parameter.detach()).clone() if spread else parameter.data
        for name, parameter in parameters.items()
    }
    try:
        exchange(values)
        with torch.no_grad():
            yield
    finally:
        try:
            exchange(own)
        except BaseException:  # a signal: the state saved because of it must not be a mix of both
            exchange(own)
            raise


@dataclass(frozen=True)
class Sides:
    """The base and the aligned policy of one model, each as a context manager."""

    policy: Policy
    values: Mapping[str, Tensor]
    """The trained values, averaged or raw."""

    def base(self) -> AbstractContextManager[None]:
        """Context in which the model is the starting policy."""
        return self.policy.reference()

    def aligned(self) -> AbstractContextManager[None]:
        """Context in which the model is the aligned policy."""
        return swapped_parameters(self.policy.parameters, self.values)


class MovingAverage:
    """Exponential moving average of the trained parameters, with a decay that warms up.

    After n updates the decay is min(decay, (1 + n) / (10 + n)). At its full decay from the start, the average
    would stay close to the starting values for about 1 / (1 - decay) updates.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], decay: float) -> None:
        self.decay = decay
        self.updates = 0
        self.values = {name: p.detach().clone() for name, p in parameters.items()}

    def update(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Move towards the current values: average <- d average + (1 - d) value, where d is the decay.

        All tensors are replaced at once and none is modified in place, so that an interrupted update can be
        undone.
        """
        weight = 1 - min(self.decay, (1 + self.updates) / (10 + self.updates))
        with torch.no_grad():
            self.values |= {n: old.lerp(parameters[n].detach(), weight) for n, old in self.values.items()}
        self.updates += 1
