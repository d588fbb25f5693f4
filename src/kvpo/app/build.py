"""Builds the parts that a configuration names, using the source for its kind of generator."""

import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path

import torch

from kvpo.app.rank_rewards import with_served_rewards
from kvpo.app.sources.common import Source
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.prompts import VideoPrompt
from kvpo.training.backbone import Backbone
from kvpo.training.checkpoint import find_checkpoint, no_improvement
from kvpo.training.policy import policy_of
from kvpo.training.ranks import ALONE, Ranks
from kvpo.training.run import open_checkpoint
from kvpo.training.setup import Setup

logger = logging.getLogger(__name__)

SOURCES = {"world": "kvpo.app.sources.world", "wan": "kvpo.app.sources.wan"}
"""``backbone.kind`` -> the module with its ``SOURCE``, imported on first use, since that takes seconds."""


def source_of(config: Config) -> Source:
    """The source of a configuration's generator."""
    source: Source = import_module(SOURCES[config.backbone.kind]).SOURCE
    return source


def build_setup(config: Config, ranks: Ranks = ALONE) -> Setup:
    """Build everything that a run needs on these ranks.

    Raises ConfigurationError, or ValueError for files that cannot be used.
    """
    check_device(config.device)
    source = source_of(config)
    setup = source.setup(with_served_rewards(config, source.frame_rate, ranks))
    weights = replace(setup.backbone.weights, config=config)
    setup = replace(setup, backbone=replace(setup.backbone, weights=weights), ranks=ranks)
    setup.blend()  # refuses settings that do not fit the components
    return setup


def load_backbone(config: Config, prompts: Sequence[VideoPrompt] = ()) -> Backbone:
    """Load a configuration's generator for the given prompts. Raises the errors of ``build_setup``."""
    check_device(config.device)
    return source_of(config).backbone(config, prompts)


def check_device(name: str, field: str = "device") -> None:
    """Raise ConfigurationError, beginning with ``field``, if torch cannot use the device of this name."""
    try:
        if torch.empty(0, device=name).is_meta:
            raise RuntimeError("it holds no data")
    except (RuntimeError, AssertionError) as error:  # torch without CUDA raises AssertionError
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ConfigurationError(
            f"{field}: {name!r} cannot be used here ({reason}); --device cpu always can"
        ) from error


def checkpoint_of(run: Path | None, name: str | int | Path | None, ranks: Ranks = ALONE) -> Path | None:
    """The checkpoint of a run, None without a run; warns if it is just the base. Raises CheckpointError.

    The first rank chooses for all, because a run that is still training saves while they look.
    """
    if run is None:
        return None
    path = ranks.once("looking for the checkpoint", partial(find_checkpoint, run / "checkpoints", name))
    if (warning := no_improvement(path, name)) is not None:
        logger.warning("%s; --checkpoint latest takes the trained weights", warning)
    return path


def opened_arms(
    backbone: Backbone, checkpoint: Path | None, weights: str
) -> dict[str, Callable[[], AbstractContextManager[None]]]:
    """Contexts in which the generator has the base's weights or, given a checkpoint, the aligned model's."""
    if checkpoint is None:
        return {"base": policy_of(backbone.weights.model).reference}
    both = open_checkpoint(backbone.weights, checkpoint, weights)
    return {"base": both.base, "aligned": both.aligned}
