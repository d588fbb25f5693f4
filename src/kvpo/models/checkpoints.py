"""Checkpoints in: every public layout of the Wan transformer, under bare Wan names.

docs/backbones.md lists the layouts.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kvpo.files import named_list
from kvpo.models.tensor_files import (
    Shapes,
    assign_tensors,
    check_tensors,
    only_tensors,
    read_shards,
    read_tensor_file,
    read_tensors,
)

TRANSFORMER_ENTRIES = ("generator", "generator_ema", "model")
"""Top-level entries that hold transformer weights, in the order the public loaders try them."""
ADAPTER_ENTRIES = ("generator_lora",)
"""Top-level entries that hold an adapter; a trainer's other copies are chosen by name."""
NAMED_ENTRIES = ("ema", "initial_generator_lora")
"""Entries of KVPO's own checkpoints that are read only when asked for by name."""
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_MODEL_PREFIX = re.compile(r"^(?:(?:module|model)\.)+")
ADAPTER_KEY = re.compile(r"^(?P<module>.+)\.lora_(?P<half>[AB])\.(?:[^.]+\.)?weight$")

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


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.match(r"(blocks\.\d+\.)(.*)", name)
    prefix, rest, table = (match[1], match[2], block) if match else ("", name, top)
    for old, new in table.items():
        if rest == old or rest.startswith(old + "."):
            return prefix + new + rest[len(old) :]
    return name


def to_diffusers_name(name: str) -> str:
    """diffusers' WanTransformer3DModel name of a Wan parameter or module."""
    return _rename(name, _TOP_NAMES, _BLOCK_NAMES)


def from_diffusers_name(name: str) -> str:
    """Wan name of a parameter or module of diffusers' WanTransformer3DModel; undoes `to_diffusers_name`."""
    return _rename(
        name, {new: old for old, new in _TOP_NAMES.items()}, {new: old for old, new in _BLOCK_NAMES.items()}
    )


def _is_diffusers(names: Iterable[str]) -> bool:
    return any(re.search(r"\.attn[12]\.|\.ffn\.net\.|^condition_embedder\.", name) for name in names)


_LAYOUTS = {
    r"\.lokr_w[12]": "a LoKr adapter of LyCORIS",
    r"\.hada_w[12]_": "a LoHa adapter of LyCORIS",
    r"\.lora_magnitude_vector|\.dora_scale": "a DoRA adapter",
    r"\.base_layer\.": "a whole PEFT model, base weights and adapter in one (save_pretrained splits them)",
    r"^(?:lora|lycoris)_\w+\.": "an adapter in kohya's layout (lora_unet_...)",
    r"\.diff(?:_b)?$": "differences of whole weights, as ComfyUI's extraction writes them",
    r"^diffusion_model\..*\.lora_(?:down|up)\.": "an adapter in ComfyUI's layout (diffusion_model...)",
    r"\.lora_(?:down|up)\.|\.lora\.(?:down|up)\.": "an adapter of older diffusers (down and up)",
    r"^(?:model\.)*diffusion_model\.(?!.*\.lora_)": "a model in ComfyUI's layout (diffusion_model...)",
    r"^(?:pipe\.)?transformer\.(?!.*\.lora_)": "the part of a diffusers pipeline under transformer...",
    r"^token_embedding\.|^shared\.weight|\.SelfAttention\.": "a T5 text encoder",
    r"^(?:encoder|decoder)\.(?:conv1|conv_in|middle|mid_block|head)\.": "a VAE",
}
"""Patterns of keys, and what a file with such keys is; the first that matches any key holds."""


def layout_of(names: Iterable[str]) -> str | None:
    """The known layout, among those that are not read, of a file with such keys; None elsewhere."""
    bare = [_WRAPPERS.sub("", name) for name in names]
    return next((words for key, words in _LAYOUTS.items() if any(re.search(key, n) for n in bare)), None)


def in_wan_names(tensors: Mapping[str, Tensor], prefix: re.Pattern[str], source: str) -> dict[str, Tensor]:
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


def choose_entry(
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
    diffusers directories (single file or sharded), with wrapper, compile and ``model.`` prefixes.

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
        tensors, source = choose_entry(read_tensor_file(path), entry, TRANSFORMER_ENTRIES, str(path))
        files = (path,)
    adapted = any(ADAPTER_KEY.match(name) for name in tensors)
    weights = in_wan_names(tensors, _MODEL_PREFIX, source)
    fits = any(name.startswith("blocks.") for name in weights) and not adapted
    if not fits and (layout := layout_of(tensors)):
        raise ValueError(f"{source}: {layout}, which is not read as transformer weights")
    if adapted:
        raise ValueError(f"{source}: holds an adapter, not transformer weights; give it as the adapter")
    return TransformerState(weights, source, files)


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
    return sizes | ({"num_layers": len(layers)} if layers else {})


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
    assign_tensors(model, state.tensors, state.source, device=device, dtype=dtype)
