"""Metrics for Weights & Biases and trackio, through their own packages, beside TensorBoard."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from kvpo.extras import extra

TRACKERS = ("wandb", "trackio")
"""Packages with the same few calls: init, log and finish."""


class Tracker:
    """A run of one of the packages, which go by their own environment variables (WANDB_MODE=offline, ...)."""

    def __init__(self, package: str, name: str, config: Mapping[str, Any]) -> None:
        with extra("trackers"):
            self._module = import_module(package)
        self._module.init(project="kvpo", name=name, config=dict(config))

    def write(self, update: int, numbers: Mapping[str, float]) -> None:
        """Log numbers of an update."""
        self._module.log(dict(numbers), step=update)

    def close(self) -> None:
        """Send what is left."""
        self._module.finish()
