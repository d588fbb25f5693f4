"""Checkpoints in: every public layout of the Wan transformer and of its adapters, under bare Wan names.

Layouts and key forms: MODELS.md section 1.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from kvpo.models.tensor_files import (
    Shapes,
    assign_tensors,
    check_tensors,
    named_list,
    only_tensors,
    read_file,
    read_shards,
    read_tensors,
)

TRANSFORMER_ENTRIES = ("generator", "generator_ema", "model")
"""Top-level entries that hold transformer weights, in the order the public loaders try them."""
ADAPTER_ENTRIES = ("generator_lora",)
"""Top-level entries that hold an adapter; a trainer's other copies are chosen by name."""
NAMED_ENTRIES = ("ema", "initial_generator_lora")
"""Entries of KVPO's own checkpoints that are read only when asked for by name."""
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"
PEFT_PREFIX = "base_model.model."
PEFT_FILES = ("adapter_model.safetensors", "adapter_model.bin")
DIFFUSERS_ADAPTER_NAME = "pytorch_lora_weights.safetensors"

_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_MODEL_PREFIX = re.compile(r"^(?:(?:module|model)\.)+")
_ADAPTER_PREFIX = re.compile(r"^(?:(?:module|model|base_model|transformer|diffusion_model)\.)+")
_ADAPTER_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<half>[AB])\.(?:[^.]+\.)?weight$")

_TOP_NAMES = {
    "patch_embedding": "patch_embedding",
    "text_embedding.0": "condition_embedder.text_embedder.linear_1",
    "text_embedding.2": "condition_embedder.text_embedder.linear_2",
    "time_embedding.0": "condition_embedder.time_embedder.linear_1",
    "time_embedding.2": "condition_embedder.time_embedder.linear_2",
    "time_projection.1": "condition_embedder.time_proj",
    "head.modulation": "scale_shift_table",
    "head.head": "proj_out",
}
_ATTENTION_NAMES = {
    "q": "to_q",
    "k": "to_k",
    "v": "to_v",
    "o": "to_out.0",
    "norm_q": "norm_q",
    "norm_k": "norm_k",
}
_BLOCK_NAMES = {
    f"{wan}.{ours}": f"{theirs}.{name}"
    for wan, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"))
    for ours, name in _ATTENTION_NAMES.items()
} | {
    # The affine norm stands before cross-attention: Wan counts it third, diffusers second.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}


@dataclass(frozen=True)
class TransformerState:
    """Transformer weights with bare Wan names, a phrase saying where they came from, and the files read."""

    tensors: dict[str, Tensor]
    source: str
    files: tuple[Path, ...] = ()


@dataclass(frozen=True)
class AdapterState:
    """A LoRA adapter in PEFT's public layout (``base_model.model.<module>.lora_A.weight``).

    Its effect on a layer is ``y = W x + b + (alpha / rank) B (A x)`` (MODELS.md section 1.1).
    """

    tensors: dict[str, Tensor]
    rank: int
    alpha: float
    source: str
    files: tuple[Path, ...] = ()

    @property
    def modules(self) -> tuple[str, ...]:
        """Bare names of the adapted layers."""
        halves = (key.removeprefix(PEFT_PREFIX) for key in self.tensors)
        return tuple(
            half.removesuffix(".lora_A.weight") for half in halves if half.endswith(".lora_A.weight")
        )

    def pair(self, module: str) -> tuple[Tensor, Tensor]:
        """``A [rank, in]`` and ``B [out, rank]`` of an adapted layer."""
        prefix = f"{PEFT_PREFIX}{module}.lora_"
        return self.tensors[prefix + "A.weight"], self.tensors[prefix + "B.weight"]


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.match(r"(blocks\.\d+\.)(.*)", name)
    prefix, rest, table = (match[1], match[2], block) if match else ("", name, top)
    for old, new in table.items():
        if rest == old or rest.startswith(old + "."):
            return prefix + new + rest[len(old) :]
    return name


def to_diffusers_name(name: str) -> str:
    """diffusers' WanTransformer3DModel name of a Wan parameter or module (MODELS.md section 1.2)."""
    return _rename(name, _TOP_NAMES, _BLOCK_NAMES)


def from_diffusers_name(name: str) -> str:
    """Wan name of a parameter or module of diffusers' WanTransformer3DModel; undoes `to_diffusers_name`."""
    return _rename(
        name, {new: old for old, new in _TOP_NAMES.items()}, {new: old for old, new in _BLOCK_NAMES.items()}
    )


def _is_diffusers(names: Iterable[str]) -> bool:
    return any(re.search(r"\.attn[12]\.|\.ffn\.net\.|^condition_embedder\.", name) for name in names)


def _normalised(tensors: Mapping[str, Tensor], prefix: re.Pattern[str], source: str) -> dict[str, Tensor]:
    """Tensors under names without wrapper and model prefixes, in Wan's naming."""
    names = {name: prefix.sub("", _WRAPPERS.sub("", name)) for name in tensors}
    if _is_diffusers(names.values()):
        names = {name: from_diffusers_name(bare) for name, bare in names.items()}
    twice = [bare for bare, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"{source}: parameters under several names that differ only in prefixes: {named_list(twice)}"
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _choose_entry(
    content: Mapping[str, object], entry: str | None, order: tuple[str, ...], source: str
) -> tuple[dict[str, Tensor], str]:
    """The requested entry of a checkpoint, else the first of ``order``, else the bare tensors themselves."""
    entries = {name: value for name, value in content.items() if isinstance(value, dict)}
    if entry is None:
        entry = next((name for name in order if name in entries), None)
        if entry is None and content and all(isinstance(value, Tensor) for value in content.values()):
            return only_tensors(content, source), source
    if entry not in entries:
        wanted = entry or " or ".join(order)
        message = f"{source}: no entry {wanted}; the file holds {named_list(content) or 'nothing'}"
        if order is TRANSFORMER_ENTRIES and any(name in entries for name in ADAPTER_ENTRIES):
            message += ". It is an adapter: give it as the adapter, beside the base checkpoint"
        raise ValueError(message)
    unused = [name for name in entries if name != entry and name in (*order, *NAMED_ENTRIES)]
    source += f", entry {entry}"
    return only_tensors(entries[entry], source), source + (
        f" (not used: {named_list(unused)})" if unused else ""
    )


def _read_directory(directory: Path) -> tuple[dict[str, Tensor], str, tuple[Path, ...]]:
    for folder in (directory, directory / "transformer"):
        if (index := folder / (WEIGHTS_NAME + ".index.json")).is_file():
            tensors, shards = read_shards(index)
            return tensors, str(index), shards
        if (single := folder / WEIGHTS_NAME).is_file():
            return read_tensors(single), str(single), (single,)
    raise ValueError(
        f"{directory}: neither {WEIGHTS_NAME} nor its index.json, here or in transformer/; "
        f"the directory holds {named_list(sorted(p.name for p in directory.iterdir())) or 'nothing'}"
    )


def load_transformer_state(path: str | Path, *, entry: str | None = None) -> TransformerState:
    """Transformer weights of any public layout, memory-mapped, under bare Wan names.

    Understands the ``.pt`` layouts of Self-Forcing, LongLive, MemFlow and KVPO, Wan's own safetensors and
    diffusers directories (single file or sharded), with wrapper, compile and ``model.`` prefixes
    (MODELS.md section 1.1).

    Args:
        path: a file or a directory.
        entry: top-level entry of a ``.pt`` file; by default the first present of ``generator``,
            ``generator_ema``, ``model``. The result's ``source`` says what was taken and what was not.

    Raises:
        ValueError: unreadable file, pickled code, no such entry, an adapter instead of weights.
    """
    path = Path(path)
    if path.is_dir():
        if entry is not None:
            raise ValueError(f"{path}: a directory has no entry {entry}; only .pt files have entries")
        tensors, source, files = _read_directory(path)
    else:
        tensors, source = _choose_entry(read_file(path), entry, TRANSFORMER_ENTRIES, str(path))
        files = (path,)
    if any(_ADAPTER_KEY.match(name) for name in tensors):
        raise ValueError(f"{source}: holds an adapter, not transformer weights; give it as the adapter")
    return TransformerState(_normalised(tensors, _MODEL_PREFIX, source), source, files)


def transformer_sizes(shapes: Shapes) -> dict[str, int]:
    """The sizes that the parameter shapes of a Wan transformer reveal."""
    places = {
        "dim": ("patch_embedding.weight", 0),
        "channels": ("patch_embedding.weight", 1),
        "ffn_dim": ("blocks.0.ffn.0.weight", 0),
        "text_dim": ("text_embedding.0.weight", 1),
        "freq_dim": ("time_embedding.0.weight", 1),
    }
    sizes = {
        field: shapes[name][axis]
        for field, (name, axis) in places.items()
        if axis < len(shapes.get(name, ()))
    }
    layers = {match[1] for name in shapes if (match := re.match(r"blocks\.(\d+)\.", name))}
    return sizes | {"num_layers": len(layers)}


def check_state(model: nn.Module, state: TransformerState) -> None:
    """Demand weights that fit a transformer.

    Raises:
        ValueError: naming every missing, unexpected and misshapen key, and the sizes that differ if the
            file is for another architecture.
    """
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    check_tensors(state.tensors, expected, state.source, transformer_sizes)


def assign_state(
    model: nn.Module, state: TransformerState, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Give a transformer built on the meta device its weights, without a second copy in memory.

    Raises:
        ValueError: see `check_state`.
    """
    check_state(model, state)
    assign_tensors(model, state.tensors, device=device, dtype=dtype)


def _adapter_config(path: Path) -> float | None:
    """Alpha according to a PEFT ``adapter_config.json``; settings that change the formula are refused."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        alpha = float(config["lora_alpha"])
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path}: not a PEFT adapter configuration with lora_alpha: {error!r}") from error
    special = ("use_dora", "use_rslora", "rank_pattern", "alpha_pattern", "modules_to_save", "lora_bias")
    if used := [field for field in special if config.get(field)]:
        raise ValueError(f"{path}: settings that are not supported: {named_list(used)}; only plain LoRA is")
    return alpha


def _file_alpha(path: Path) -> float | None:
    """Alpha that diffusers wrote into the header of a safetensors adapter, if any."""
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    alphas = {float(value) for key, value in header.items() if key.split(".")[-1] == "lora_alpha"}
    return alphas.pop() if len(alphas) == 1 else None


def _adapter_file(directory: Path) -> Path:
    for name in (*PEFT_FILES, DIFFUSERS_ADAPTER_NAME):
        if (directory / name).is_file():
            return directory / name
    raise ValueError(
        f"{directory}: no adapter ({', '.join((*PEFT_FILES, DIFFUSERS_ADAPTER_NAME))}); "
        f"the directory holds {named_list(sorted(p.name for p in directory.iterdir())) or 'nothing'}"
    )


def load_adapter_state(
    path: str | Path, *, entry: str | None = None, alpha: float | None = None
) -> AdapterState:
    """A LoRA adapter of any public layout, in PEFT's layout.

    Understands LongLive's and MemFlow's ``lora.pt``, KVPO's checkpoints (adapter, ``ema``), bare PEFT files,
    PEFT directories and diffusers LoRA files, with the adapter's name in the keys or without.

    Args:
        path: a file or a directory.
        entry: top-level entry of a ``.pt`` file, by default ``generator_lora``; the moving average of a KVPO
            checkpoint is ``ema``.
        alpha: numerator of the scale; by default what the configuration says, else the rank (public ``.pt``
            files hold none).

    Raises:
        ValueError: unreadable file, no adapter in it, layers with only one half, layers of different ranks.
    """
    path = Path(path)
    configured = None
    if path.is_dir():
        if (path / "adapter_config.json").is_file():
            configured = _adapter_config(path / "adapter_config.json")
        path = _adapter_file(path)
    tensors, source = _choose_entry(read_file(path), entry, ADAPTER_ENTRIES, str(path))
    if configured is None:
        configured = _file_alpha(path)
    pairs, strangers = _adapter_pairs(tensors, source)
    if not pairs:
        raise ValueError(
            f"{source}: holds no adapter (keys like {named_list(list(tensors)[:2])}); is it a base model?"
        )
    if strangers:
        raise ValueError(f"{source}: keys that are not halves of a LoRA layer: {named_list(strangers)}")
    if single := [
        f"{module} (only {''.join(halves)})" for module, halves in pairs.items() if len(halves) < 2
    ]:
        raise ValueError(f"{source}: layers with one half of an adapter: {named_list(single)}")
    ranks = {module: (halves["A"].shape[0], halves["B"].shape[1]) for module, halves in pairs.items()}
    rank = Counter(rank for pair in ranks.values() for rank in pair).most_common(1)[0][0]
    if other := [f"{module} (A {a}, B {b})" for module, (a, b) in ranks.items() if (a, b) != (rank, rank)]:
        raise ValueError(f"{source}: ranks other than {rank}: {named_list(other)}")
    public = {
        f"{PEFT_PREFIX}{module}.lora_{half}.weight": halves[half]
        for module, halves in pairs.items()
        for half in "AB"
    }
    chosen = alpha if alpha is not None else configured if configured is not None else float(rank)
    return AdapterState(public, rank, float(chosen), source, (path,))


def _adapter_pairs(
    tensors: Mapping[str, Tensor], source: str
) -> tuple[dict[str, dict[str, Tensor]], list[str]]:
    """Halves per adapted layer (bare Wan name), and the keys that are no such half."""
    pairs: dict[str, dict[str, Tensor]] = {}
    strangers = []
    for name, tensor in _normalised(tensors, _ADAPTER_PREFIX, source).items():
        match = _ADAPTER_KEY.match(name)
        if match is None or tensor.ndim != 2:
            strangers.append(name)
        else:
            pairs.setdefault(match["module"], {})[match["half"]] = tensor
    return pairs, strangers
