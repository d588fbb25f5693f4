"""`kvpo export`: what a run trained, in the layouts that other programs load."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kvpo.app.build import source_of
from kvpo.app.configuration import resolve_run
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.files import local_path
from kvpo.models.adapters import adapter_state, merged_state
from kvpo.models.export import (
    demand_new,
    save_diffusers_adapter,
    save_diffusers_transformer,
    save_peft_adapter,
    save_public_checkpoint,
)
from kvpo.training.checkpoint import find_checkpoint, no_improvement
from kvpo.training.run import open_checkpoint

Layout = Literal["peft", "diffusers-lora", "diffusers", "pt"]


def export(
    run: Path | str,
    out: Path | str,
    *,
    layout: Layout,
    checkpoint: str | None = None,
    weights: str = "average",
    places: Mapping[str, Any] | None = None,
) -> Path:
    """Write a run's model with what it trained, averaged or raw, and return the path written.

    Text encoder, VAE and the run's device are not needed. Adapters are written bit for bit as they were
    trained. All weights are merged and written in float32, regardless of the run's precision.

    Args:
        layout: ``peft`` or ``diffusers-lora``, the adapter alone; ``diffusers`` or ``pt``, all weights with
            the adapter merged, as a diffusers directory or as the public ``.pt`` file.
        checkpoint: best, latest, an update, a directory; None: the best.
        weights: the moving ``average`` of the trained weights, or the ``raw`` ones of the last update.
        places: where the run's weights lie now, by setting (``{"backbone.checkpoint": "/new/base.pt"}``).

    Raises:
        ConfigurationError: an adapter alone of a run that trained all parameters, or whose adapter belongs to
            merged weights that no file holds.
        ValueError: a run, checkpoint or target that cannot be used; a best checkpoint that is the base.
    """
    run, out = local_path(run, "run"), local_path(out, "out")
    config = resolve_run(run, places)
    demand_new(out)
    adapted = config.optim.lora_rank > 0
    if layout in ("peft", "diffusers-lora") and not adapted:
        raise ConfigurationError(
            f"--layout {layout}: {run} trained all parameters (optim.lora_rank 0) and has no adapter; "
            "use diffusers or pt"
        )
    merged = bool(config.backbone.lora) and config.backbone.lora_start == "merge"
    if layout in ("peft", "diffusers-lora") and merged:
        raise ConfigurationError(
            f"--layout {layout}: {run} trained its adapter on {config.backbone.checkpoint} with "
            f"{config.backbone.lora} merged into it (backbone.lora_start merge), weights that no file holds; "
            "use diffusers or pt"
        )
    path = find_checkpoint(run / "checkpoints", checkpoint)
    if (refusal := no_improvement(path, checkpoint)) is not None:
        raise ValueError(refusal)
    trained = source_of(config).weights(on_host(config))
    model = trained.model
    with open_checkpoint(trained, path, weights).aligned():
        match layout:
            case "peft":
                save_peft_adapter(out, adapter_state(model), base_model=config.backbone.checkpoint)
            case "diffusers-lora":
                save_diffusers_adapter(out, adapter_state(model))
            case "diffusers":
                save_diffusers_transformer(out, merged_state(model), config.model)
            case "pt":
                save_public_checkpoint(out, merged_state(model))
    return out


def on_host(config: Config) -> Config:
    """The same model in float32 on the CPU: nothing is computed with it but a merge."""
    return replace(config, device="cpu", optim=replace(config.optim, autocast="none", compile=False))
