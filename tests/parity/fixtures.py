"""Reading the golden fixtures: discovery by metadata, and the generator each one describes."""

import json
import os
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from kvpo.engine.generator import PageShape, StreamingGenerator
from kvpo.models.adapters import merge_adapter
from kvpo.models.causal_wan import CausalWan, WanShape
from kvpo.models.checkpoints import PEFT_PREFIX, AdapterState
from kvpo.models.deployment import Deployment

GOLDEN = Path(os.environ.get("KVPO_GOLDEN", Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"))
SIGMAS = (1.0, 0.9375, 5 * 0.5 / 3, 0.625)
CONTEXT_NOISE = 0.00498008
"""Noise level of the clean pass in the public trainer and sampler."""
TINY = WanShape(
    dim=96, num_heads=3, num_layers=3, ffn_dim=192, freq_dim=256, text_len=16, text_dim=64, channels=16,
    patch_size=(1, 2, 2), latent_height=8, latent_width=12,
)  # fmt: skip


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors of one fixture."""
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["meta"]), {name: file.get_tensor(name) for name in file.keys()}


def of_kind(kind: str) -> list[Path]:
    """Every fixture of a kind; a single missing path (skipped by the test) when there is none."""
    paths = sorted(GOLDEN.glob("*.safetensors")) if GOLDEN.is_dir() else []
    return [path for path in paths if read(path)[0]["kind"] == kind] or [GOLDEN / f"{kind} fixtures"]


def adapter_of(tensors: dict[str, Tensor], prefix: str = "") -> AdapterState:
    """The rank = alpha adapter whose tensors carry ``prefix`` before their PEFT names."""
    own = {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix + PEFT_PREFIX)
    }
    rank = next(tensor.shape[0] for name, tensor in own.items() if ".lora_A." in name)
    return AdapterState(own, rank, float(rank), prefix or "adapter")


def base_model(meta: dict) -> CausalWan:
    """The fixtures' transformer and weights, with the public adapter merged in where ``lora`` says so."""
    shape = WanShape(**{**TINY.__dict__, "relative_positions": meta["relative_positions"]})
    state = torch.load(GOLDEN / "tiny_base.pt", weights_only=True)["generator"]
    model = CausalWan(shape)
    model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in state.items()})
    model.requires_grad_(False)
    if meta["lora"] and meta["kind"] != "replay":
        adapter = torch.load(GOLDEN / "tiny_lora.pt", weights_only=True)["generator_lora"]
        merge_adapter(model, adapter_of(adapter))
    return model.to(getattr(torch, meta["dtype"]))


def generator_of(meta: dict, model: CausalWan, context_noise: float = 0.0) -> StreamingGenerator:
    """The streaming generator a fixture was made with."""
    shape = model.shape
    return StreamingGenerator(
        transformer=model,
        deployment=Deployment(
            block=3,
            window=meta["window"],
            sink=meta["sink"],
            keep_sink_at_switch=meta["keep_sink_at_switch"] or forgets_at_switch(meta),
            bank_size=meta["bank_size"],
            sparse_activation=meta["sparse_activation"],
            bank_every_block=meta["bank_every_block"],
            bank_as_published=True,
        ),
        sigmas=SIGMAS,
        renoise=True,
        latent_shape=(shape.channels, shape.latent_height, shape.latent_width),
        pages=PageShape(shape.num_layers, shape.tokens_per_frame, shape.num_heads, shape.head_dim),
        context_noise=context_noise,
        page_dtype=next(model.parameters()).dtype,
    )


def forgets_at_switch(meta: dict) -> bool:
    """Whether the public code zeroes history at a switch and then re-encodes only its last frames.

    With the sink not kept, MemFlow never rewrites the sink slots, and the sampler's cache is longer than what
    is re-encoded: zero keys and values stay behind and are attended to (MODELS.md section 8, trap 10).
    """
    return not meta["keep_sink_at_switch"] and (meta["model"] == "memflow" or meta["kind"] == "routing")
