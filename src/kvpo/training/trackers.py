"""Metrics for Weights & Biases and trackio, through their own packages, in addition to TensorBoard."""

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from kvpo.extras import extra

TRACKERS = ("wandb", "trackio")
"""Packages that share the few calls used here: init, log and finish."""


class Tracker:
    """A run in one of the packages, which read their own environment variables (WANDB_MODE=offline, ...)."""

    def __init__(self, package: str, name: str, config: Mapping[str, Any]) -> None:
        with extra("trackers"):
            self._module = import_module(package)
        self._module.init(project="kvpo", name=name, config=dict(config))

    def write(self, update: int, numbers: Mapping[str, float]) -> None:
        """Log numbers of an update."""
        self._module.log(dict(numbers), step=update)

    def close(self) -> None:
        """Send the remaining data and end the run."""
        self._module.finish()
