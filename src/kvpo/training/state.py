"""The state of training as named tensors and JSON, and back, exactly."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kvpo.files import named_list
from kvpo.training.checkpoint import CheckpointError


def flatten_state(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Split nested dicts, lists and tuples into tensors by path and a JSON skeleton; exact both ways.

    Raises ValueError for a leaf that is neither a tensor nor JSON, or a dict key that is not a string.
    """
    tensors: dict[str, Tensor] = {}

    def walk(node: Any, path: str) -> Any:
        if isinstance(node, Tensor):
            if path in tensors:  # a key that contains "/" can spell the path of another tensor
                raise ValueError(f"{path}: two tensors have this path")
            tensors[path] = node
            return {"tensor": path}
        if isinstance(node, Mapping):
            if not all(isinstance(key, str) for key in node):
                raise ValueError(f"{path}: keys must be strings, got {named_list(map(repr, node))}")
            return {"dict": {key: walk(value, f"{path}/{key}") for key, value in node.items()}}
        if isinstance(node, list | tuple):
            kind = "tuple" if isinstance(node, tuple) else "list"
            return {kind: [walk(value, f"{path}/{index}") for index, value in enumerate(node)]}
        if node is None or type(node) in (bool, int, float, str):
            return node
        raise ValueError(f"{path}: a {type(node).__name__} is neither a tensor nor JSON")

    return tensors, walk(tree, "state")


def unflatten_state(tensors: Mapping[str, Tensor], skeleton: Any) -> Any:
    """Undo ``flatten_state``. Raises CheckpointError when a tensor is missing."""
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, content),) = skeleton.items()
    if kind == "tensor":
        if content not in tensors:
            raise CheckpointError(f"checkpoint has no tensor {content}")
        return tensors[content]
    if kind == "dict":
        return {key: unflatten_state(tensors, value) for key, value in content.items()}
    items = [unflatten_state(tensors, value) for value in content]
    return tuple(items) if kind == "tuple" else items


def optimizer_state(optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor]) -> dict[str, Any]:
    """``optimizer.state_dict()`` keyed by parameter names, so that it does not depend on their order."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    groups = [
        {**{key: value for key, value in group.items() if key != "params"},
         "params": [names[id(parameter)] for parameter in group["params"]]}
        for group in optimizer.param_groups
    ]  # fmt: skip
    return {
        "state": {names[id(parameter)]: dict(state) for parameter, state in optimizer.state.items()},
        "param_groups": groups,
    }


def moment_of(path: str) -> str:
    """Name of the parameter whose state a tensor of a flattened ``optimizer_state`` is."""
    return path.split("/")[2]


def load_optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: Mapping[str, Tensor], saved: Mapping[str, Any]
) -> None:
    """Undo ``optimizer_state``. Raises CheckpointError when the parameters are not those that were saved."""
    names = {id(parameter): name for name, parameter in parameters.items()}
    ours = [[names[id(parameter)] for parameter in group["params"]] for group in optimizer.param_groups]
    theirs = [group["params"] for group in saved["param_groups"]]
    if [sorted(group) for group in ours] != [sorted(group) for group in theirs]:
        changed = {name for group in ours for name in group} ^ {name for group in theirs for name in group}
        raise CheckpointError(f"the optimiser state is of other parameters: {named_list(sorted(changed))}")
    numbers = {name: index for index, name in enumerate(name for group in ours for name in group)}
    optimizer.load_state_dict(
        {
            "state": {numbers[name]: dict(state) for name, state in saved["state"].items()},
            "param_groups": [
                {**group, "params": [numbers[name] for name in own]}
                for group, own in zip(saved["param_groups"], ours, strict=True)
            ],
        }
    )
