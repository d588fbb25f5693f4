"""Reading the golden fixtures: discovery by metadata, and the generator each one describes."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpo.engine.generator import StreamingGenerator
from kvpo.method.flow import STEPS
from kvpo.models.adapter_files import PEFT_PREFIX, AdapterState
from kvpo.models.adapters import merge_adapter
from kvpo.models.cache import PageShape
from kvpo.models.causal_wan import CausalWan, WanShape
from tests.published_bank import PublishedBank

GOLDEN = Path(os.environ.get("KVPO_GOLDEN", Path(__file__).resolve().parents[2] / ".." / "shared" / "golden"))
SIGMAS = (1.0, 0.9375, 5 * 0.5 / 3, 0.625)
CONTEXT_NOISE = 0.00498008
"""Noise level of the clean pass in the public trainer and sampler."""
TINY = WanShape(
    dim=96, num_heads=3, num_layers=3, ffn_dim=192, freq_dim=256, text_len=16, text_dim=64, channels=16,
    patch_size=(1, 2, 2), latent_height=8, latent_width=12,
)  # fmt: skip


DEFAULTS = dict(
    model="longlive", window=12, sink=3, switches=[], keep_sink_at_switch=True, bank_size=0,
    sparse_activation=False, bank_every_block=False, relative_positions=False, lora=False, dtype="float32",
)  # fmt: skip
BLOCK = 3
CHUNKS = (0, *range(21, 1024, 18))
"""Frames at which the public sampler and trainer look for a prompt switch."""


def metadata(kind: str | None, **changes) -> dict:
    """Metadata of a fixture of this kind.

    Raises:
        ValueError: naming a field and its value that the parity runs do not know.
    """
    meta = {**DEFAULTS, **changes, "kind": kind}
    for field, known in {**KNOWN, **KNOWN_OF_KIND.get(kind, {})}.items():
        if not known(meta[field]):
            raise ValueError(f"fixture metadata: {field} = {meta[field]!r} is not known to the parity runs")
    if meta["window"] != -1 and meta["window"] < meta["sink"] + BLOCK:
        raise ValueError(f"fixture metadata: window = {meta['window']} does not hold the sink and a block")
    if meta["model"] != "memflow" or not meta["sink"]:
        # MemFlow alone has a bank, and never reads it without a sink.
        meta |= dict(bank_size=0, sparse_activation=False, bank_every_block=False)
    if kind == "replay" and meta["bank_size"]:
        raise ValueError(
            f"fixture metadata: bank_size = {meta['bank_size']}, but a stored history has no bank"
        )
    return meta


def is_count(value: object) -> bool:
    return type(value) is int and value >= 0


def are_frames(value: object) -> bool:
    """True for frames in ascending order."""
    return isinstance(value, list) and all(map(is_count, value)) and value == sorted(value)


KNOWN = {
    "kind": lambda value: value in ("stream", "routing", "replay", "units"),
    "model": lambda value: value in ("longlive", "memflow", "selfforcing"),
    "dtype": lambda value: value in ("float32", "bfloat16"),
    "window": lambda value: value == -1 or is_count(value),
    "sink": is_count,
    "bank_size": is_count,
    "switches": are_frames,
} | {field: lambda value: isinstance(value, bool) for field in DEFAULTS if isinstance(DEFAULTS[field], bool)}
KNOWN_OF_KIND = {
    "routing": {
        "fork_frame": lambda value: is_count(value) and value % BLOCK == 0,
        "branch_chunk_start": lambda value: is_count(value) and value % BLOCK == 0,
        "perturbed_blocks": is_count,
        "resident_frames": is_count,
        "nearest_counting_current_block": lambda value: is_count(value) and value >= BLOCK,
        "used_frames": lambda value: isinstance(value, list) and all(map(are_frames, value)),
    },
    "replay": {
        "fork_frame": is_count,
        "history_filled_frames": lambda value: are_frames(value) and len(set(value)) == 1,
        "history_end_frame": lambda value: are_frames(value) and len(set(value)) == 1,
    },
}


def read(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors of one fixture."""
    with safe_open(path, "pt") as file:
        meta = json.loads(file.metadata()["meta"])
        kind = meta.pop("kind", None)
        return metadata(kind, **meta), {name: file.get_tensor(name) for name in file.keys()}


def kind_of(path: Path) -> str | None:
    """The kind a file says it is of; None for a file that is no fixture."""
    try:
        with safe_open(path, "pt") as file:
            return json.loads(file.metadata()["meta"]).get("kind", "")
    except (SafetensorError, OSError, TypeError, KeyError, ValueError, AttributeError):
        return None


def of_kind(*kinds: str | None, directory: Path = GOLDEN) -> list[Path]:
    """Every fixture of these kinds; a single missing path (skipped by the test) when there is none."""
    found = [path for path in sorted(directory.glob("*.safetensors")) if kind_of(path) in kinds]
    return found or [directory / f"no {' or '.join(str(kind) for kind in kinds)} fixture"]


def unknown_files(directory: Path = GOLDEN) -> list[Path]:
    """Files that say they are fixtures of a kind without a test, and files that are no fixtures."""
    kinds = {kind_of(path) for path in directory.glob("*.safetensors")} - {
        "stream",
        "routing",
        "replay",
        "units",
    }
    return of_kind(*sorted(kinds, key=str), directory=directory) if kinds else [directory / "no other file"]


def load(path: Path) -> tuple[dict, dict[str, Tensor]]:
    """Metadata and tensors of a fixture whose weights are there; skips the test, with the reason, if not."""
    if not path.exists():
        pytest.skip(f"{path.name} in {path.parent}")
    meta, data = read(path)
    needed = [] if meta["kind"] == "units" else ["tiny_base.pt"]
    if meta["lora"] and meta["kind"] not in ("replay", "units"):
        needed.append("tiny_lora.pt")
    for name in needed:
        if not (GOLDEN / name).exists():
            pytest.skip(f"{path.name} needs {name}, which is not in {GOLDEN}")
    return meta, data


def segments_of(meta: dict, num_frames: int, given: int = 0) -> list[int]:
    """Prompt of every block. The streaming pipelines take over one prompt per block, at the first block at or
    after its switch, given frames aside; the public sampler looks at all switches at the start of a chunk."""
    starts = range(0, num_frames, BLOCK)
    if meta["kind"] != "stream":
        chunk = [max(chunk for chunk in CHUNKS if chunk <= start) for start in starts]
        return [sum(at >= switch for switch in meta["switches"]) for at in chunk]
    segments = []
    for start in starts:
        now = segments[-1] if segments else 0
        due = start >= given and now < len(meta["switches"]) and start >= meta["switches"][now]
        segments.append(now + due)
    return segments


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
        deployment=PublishedBank(
            block=BLOCK,
            window=meta["window"],
            sink=meta["sink"],
            keep_sink_at_switch=meta["keep_sink_at_switch"] or forgets_at_switch(meta),
            bank_size=meta["bank_size"],
            sparse_activation=meta["sparse_activation"],
            bank_every_block=meta["bank_every_block"],
        ),
        sigmas=SIGMAS,
        step=STEPS["renoise"],
        latent_shape=(shape.channels, shape.latent_height, shape.latent_width),
        pages=PageShape(shape.num_layers, shape.tokens_per_frame, shape.num_heads, shape.head_dim),
        context_noise=context_noise,
        page_dtype=next(model.parameters()).dtype,
    )


def forgets_at_switch(meta: dict) -> bool:
    """True where the public code zeroes history at a switch and then re-encodes only its last frames.

    With the sink not kept, MemFlow never rewrites the sink slots, and the sampler's cache is longer than what
    is re-encoded: zero keys and values stay behind and are attended to.
    """
    return not meta["keep_sink_at_switch"] and (meta["model"] == "memflow" or meta["kind"] == "routing")
