"""`kvpo export`: writes a run's trained weights in the layouts that other programs load."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from kvpo.app.build import source_of
from kvpo.app.configuration import resolve_run
from kvpo.app.model_card import CARD, licence_of, model_card
from kvpo.app.origin import record_of
from kvpo.app.sources.common import first_block
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.files import local_path, write_atomic
from kvpo.models.adapter_files import AdapterState, load_adapter_state
from kvpo.models.adapters import (
    REFERENCE,
    adapter_difference,
    adapter_state,
    base_state,
    load_adapter,
    merge_adapter,
    merged_state,
)
from kvpo.models.causal_wan import CausalWan
from kvpo.models.checkpoints import TransformerState, assign_state, load_transformer_state
from kvpo.models.export import (
    Finish,
    demand_new,
    save_comfy_adapter,
    save_diffusers_adapter,
    save_diffusers_transformer,
    save_peft_adapter,
    save_public_checkpoint,
)
from kvpo.models.hub import is_repository, push_files, repository_of, resolve_location, split_entry
from kvpo.models.tensor_files import digest_of
from kvpo.training.checkpoint import find_checkpoint, no_improvement
from kvpo.training.run import open_checkpoint

logger = logging.getLogger(__name__)

Layout = Literal["peft", "diffusers-lora", "comfy", "diffusers", "pt"]
ADAPTERS = ("peft", "diffusers-lora", "comfy")
"""Layouts of the adapter alone."""
OF_CHANGE, OF_LATENTS = 1e-2, 1e-5
"""Tolerance for rounding between the first blocks of the run and of its export: shares of the distance by
which training moved the block, and of its largest latent."""


def export(
    run: Path | str,
    out: Path | str,
    *,
    layout: Layout,
    checkpoint: str | int | Path | None = None,
    weights: str = "average",
    places: Mapping[str, Any] | None = None,
    difference: int | None = None,
    push: str = "",
) -> Path:
    """Export a run's trained weights, averaged or raw, and return the path written.

    Needs no text encoder, no VAE and not the run's device. Adapters are written bit for bit as trained, full
    weights merged and in float32. Before the export is moved into place it is loaded again, and must generate
    the run's first block.

    Args:
        layout: ``peft``, ``diffusers-lora`` or ``comfy`` for the adapter alone; ``diffusers`` or ``pt`` for
            all weights with the adapter merged, as a diffusers directory or the public ``.pt`` file.
        checkpoint: best, latest, an update number or a directory; None: the best.
        weights: the moving ``average`` of the trained weights, or the ``raw`` ones of the last update.
        places: where the run's weights are now, by setting (``{"backbone.checkpoint": "/new/base.pt"}``).
        difference: write only what a continued adapter adds to the given one, exactly (0) or at this rank.
        push: hub repository (owner/name) to upload the export and its card to; empty: none.

    Raises:
        ConfigurationError: an adapter layout for a run that trained all parameters, or trained its adapter on
            merged weights that no file holds; a difference for a run that continued no adapter.
        ValueError: a run, checkpoint or target that cannot be used; a best checkpoint that is the base.
    """
    run, out = local_path(run, "run"), local_path(out, "out")
    config = resolve_run(run, places)
    demand_new(out)
    _check(config, run, layout, difference, push)
    path = find_checkpoint(run / "checkpoints", checkpoint)
    if (refusal := no_improvement(path, checkpoint)) is not None:
        raise ValueError(f"{refusal}; --checkpoint latest takes the trained weights")
    host = on_host(config)
    trained = source_of(config).weights(host)
    model, both = trained.model, open_checkpoint(trained, path, weights)
    record = record_of(config, digest_of(base_state(model)), path, weights)
    with both.base():
        before = first_block(host, model)
    with both.aligned():
        after = first_block(host, model)
        fresh = layout in ADAPTERS and (difference is not None or not config.backbone.lora)
        if fresh and torch.equal(before, after):
            raise ValueError(f"{path}: its adapter changes nothing of what is generated: nothing to export")
        part, given, added = _part(model, config, layout, difference)
        rebuilt, whose = partial(_rebuilt, host, model, given=given), "the run"
        if isinstance(part, AdapterState) and added.get("lost"):
            after, whose = first_block(host, rebuilt(part)), "the difference at this rank"
        record |= added
        card = model_card(layout, out, record, _licence(config.backbone.checkpoint), run)
        proof = _Proof(layout, out, card, host, rebuilt, before, after, whose)
        _write(layout, out, part, config, record, card, proof)
    if push:
        _push(out, push)
    return out


def _push(out: Path, repo: str) -> None:
    """Upload an export with its card. Raises ValueError."""
    card = {out.name: out, CARD: card_beside(out)}
    files = {path.name: path for path in out.iterdir()} if out.is_dir() else card
    logger.warning("pushed to %s", push_files(files, repo, out))


def card_beside(file: Path) -> Path:
    """Path of the card of an export that is a single file."""
    return file.with_name(f"{file.name}.md")


def _part(
    model: CausalWan, config: Config, layout: Layout, difference: int | None
) -> tuple[AdapterState | dict[str, Tensor], AdapterState | None, dict[str, Any]]:
    """The weights that a layout holds, the adapter that they are to be added to, and a record of that."""
    if layout not in ADAPTERS:
        return merged_state(model), None, {}
    trained, lora = adapter_state(model), config.backbone.lora
    if difference is None:
        return trained, None, {}
    given = adapter_state(model, REFERENCE)
    part, lost = adapter_difference(trained, given, difference)
    logger.info("difference to %s: rank %d, without %.2g of it", lora, part.rank, lost)
    return part, given, {"added_to": lora, "rank": part.rank, "lost": lost}


def _check(config: Config, run: Path, layout: Layout, difference: int | None, push: str) -> None:
    """Raise ConfigurationError if a run cannot be exported as asked."""
    adapted = config.optim.lora_rank > 0
    if layout in ADAPTERS and not adapted:
        raise ConfigurationError(
            f"--layout {layout}: {run} trained all parameters (optim.lora_rank 0) and has no adapter; "
            "use diffusers or pt"
        )
    merged = bool(config.backbone.lora) and config.backbone.lora_start == "merge"
    if layout in ADAPTERS and merged:
        raise ConfigurationError(
            f"--layout {layout}: {run} trained its adapter on {config.backbone.checkpoint} with "
            f"{config.backbone.lora} merged into it (backbone.lora_start merge), weights that no file holds; "
            "use diffusers or pt"
        )
    if difference is not None and (layout not in ADAPTERS or not config.backbone.lora):
        what = (
            f"layout {layout} holds all weights" if layout not in ADAPTERS else f"{run} continued no adapter"
        )
        raise ConfigurationError(f"--difference: must be left out, since {what}; got {difference}")
    if difference is not None and difference < 0:
        raise ConfigurationError(f"--difference: must be a rank, or 0 for an exact one, got {difference}")
    if push and not is_repository(push):
        raise ConfigurationError(f"--push {push}: must be a repository of the hub, owner/name")


def _write(
    layout: Layout, out: Path, part: Any, config: Config, record: Mapping[str, Any], card: str, finish: Finish
) -> None:
    how: dict[str, Any] = {"record": record, "finish": finish}
    match layout:
        case "peft":
            save_peft_adapter(out, part, base_model=config.backbone.checkpoint, **how)
        case "diffusers-lora":
            save_diffusers_adapter(out, part, **how)
        case "comfy":
            save_comfy_adapter(out, part, **how)
        case "diffusers":
            save_diffusers_transformer(out, part, config.model, **how)
        case "pt":
            demand_new(card_beside(out))
            save_public_checkpoint(out, part, **how)
            write_atomic(card_beside(out), card)  # last: a card alone would block a retry


def _rebuilt(
    config: Config, model: CausalWan, part: AdapterState | TransformerState, *, given: AdapterState | None
) -> CausalWan:
    """A transformer from loaded weights, or from the base's with ``given`` merged and a loaded adapter."""
    with torch.device("meta"):
        again = CausalWan(config.model)
    state = part if isinstance(part, TransformerState) else TransformerState(base_state(model), "base")
    if given is not None:  # merging changes weights in place, and these are the run's
        state = replace(state, tensors={name: value.clone() for name, value in state.tensors.items()})
    assign_state(again, state, device="cpu", dtype=torch.float32)
    again.requires_grad_(False)
    if given is not None:
        merge_adapter(again, given)
    if isinstance(part, AdapterState):
        load_adapter(again, part)
    return again


@dataclass(frozen=True)
class _Proof:
    """Checks that a written export does what its run does, and adds the card if it is a directory."""

    layout: Layout
    out: Path
    card: str
    host: Config
    rebuilt: Callable[[Any], CausalWan]
    before: Tensor
    """First block of the base."""
    after: Tensor
    """First block that the export must generate."""
    whose: str
    """The model that generates ``after``, in words."""

    def __call__(self, written: Path) -> None:
        """Load the written export. Raises ValueError if its first block is off ``after`` beyond rounding."""
        load = load_adapter_state if self.layout in ADAPTERS else load_transformer_state
        found = first_block(self.host, self.rebuilt(load(written, quiet=True)))
        off = float((found - self.after).abs().max())
        moved, largest = float((self.after - self.before).abs().max()), float(self.after.abs().max())
        if not off <= OF_CHANGE * moved + OF_LATENTS * largest:
            raise ValueError(
                f"--layout {self.layout}: loaded again, its first block is {off:.2g} off that of "
                f"{self.whose}, which training moved by {moved:.2g}; nothing was exported. Please report this"
            )
        logger.info("%s: loaded again, its first block is that of %s to %.1g", self.out, self.whose, off)
        if self.layout != "pt":
            write_atomic(written / CARD, self.card)


def _licence(base: str) -> str:
    """The licence in a base's card, fetched if it is on the hub; kvpo's own for the embedded generator."""
    if not base:
        return "apache-2.0"
    repo = repository_of(base)
    try:
        return licence_of(resolve_location(f"{repo}/{CARD}" if repo else split_entry(base)[0]))
    except ValueError:  # no card, or no connection
        return "other"


def on_host(config: Config) -> Config:
    """The same model in float32 on the CPU: it is used only for merges and one small block."""
    return replace(config, device="cpu", optim=replace(config.optim, autocast="none", compile=False))
