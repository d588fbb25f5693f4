"""Read checkpoints of the Wan transformer in every public layout, converting to bare Wan names.

docs/backbones.md lists the layouts.
"""

import logging
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
    renamed,
    shapes_of,
)

logger = logging.getLogger(__name__)

TRANSFORMER_ENTRIES = ("generator", "generator_ema", "model", "model_state_dict", "state_dict")
"""Top-level entries that hold transformer weights, in the order the public loaders try them."""
LORA_ENTRIES = ("generator_lora", "generator_ema_lora")
"""Top-level entries that hold nothing but an adapter."""
ADAPTER_ENTRIES = (*LORA_ENTRIES, *TRANSFORMER_ENTRIES)
"""Top-level entries that may hold an adapter; a trainer's other copies must be requested by name."""
NAMED_ENTRIES = ("ema", "initial_generator_lora")
"""Entries of KVPO's own checkpoints that are read only when asked for by name."""
WEIGHTS_NAME = "diffusion_pytorch_model.safetensors"

_WRAPPERS = re.compile(r"(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
PREFIX = re.compile(
    r"^(?:(?:module|model|base_model|generator|transformer|diffusion_model|pipe\.dit|dit)\.)+"
)
"""Prefixes that trainers, pipelines and user interfaces add to the transformer's parameter names."""
ADAPTER_KEY = re.compile(r"^(?P<module>.+)\.lora[._](?P<half>A|B|down|up)\.(?:[^.]+\.)?weight$")
_KOHYA = re.compile(r"^(?:lora_unet|lora_transformer|lycoris)_(?P<block>blocks_\d+_)?(?P<layer>[^.]+)")

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
    # The affine norm comes before cross-attention: Wan counts it third, diffusers second.
    "norm3": "norm2",
    "ffn.0": "ffn.net.0.proj",
    "ffn.2": "ffn.net.2",
    "modulation": "scale_shift_table",
}
_DOTTED = {
    name.replace(".", "_"): name for table in (_TOP_NAMES, _BLOCK_NAMES) for name in (*table.values(), *table)
}
"""Layer names of kohya's trainers, with underscores for dots -> the same names with dots."""
_WEIGHTS = re.compile(
    r"(?P<stem>diffusion_pytorch_model|model|pytorch_model)(?P<variant>\.(?:fp16|bf16|fp32))?"
    r"\.(?P<kind>safetensors|bin|pt|pth)(?P<index>\.index(?:\.(?P<of>\w+))?\.json)?"
)
"""File names of whole weights or of their index."""


@dataclass(frozen=True)
class TransformerState:
    """Transformer weights with bare Wan names, a phrase saying where they came from, and the files read."""

    tensors: dict[str, Tensor]
    source: str
    files: tuple[Path, ...] = ()
    adapted: bool = False
    """True if the file also holds an adapter of these weights."""


def _rename(name: str, top: Mapping[str, str], block: Mapping[str, str]) -> str:
    match = re.match(r"(blocks\.\d+\.)(.*)", name)
    prefix, rest, table = (match[1], match[2], block) if match else ("", name, top)
    return prefix + renamed(rest, table)


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
    r"\.(?:diff|diff_b|w_norm|b_norm)$": "differences of whole weights, which no LoRA holds: merge the file "
    "into the checkpoint with the tool that wrote it",
    r"(?:^|\.)scaled_fp8$|\.(?:scale_weight|weight_scale|scale_input|input_scale|weight_scale_inv)$|"
    r"\.comfy_quant$": "scaled fp8 weights, numbers without meaning until each is multiplied by its scale: "
    "give the fp16, bf16 or plain fp8 file",
    r"^token_embedding\.|^shared\.weight|\.SelfAttention\.": "a T5 text encoder",
    r"^(?:encoder|decoder)\.(?:conv1|conv_in|middle|mid_block|head)\.": "a VAE",
}
"""Key patterns, and descriptions of files with such keys; the first pattern that matches any key decides."""


def refuse_layout(names: Iterable[str], source: str) -> None:
    """Raise ValueError for keys of a known but unsupported layout, naming it and the first such key."""
    for key, words in _LAYOUTS.items():
        if found := next((name for name in names if re.search(key, _WRAPPERS.sub("", name))), None):
            raise ValueError(f"{source}: {words}; that is not read (key {found})")


def say_prefixes(names: Iterable[str], source: str) -> None:
    """Log the prefixes that `in_wan_names` removes."""
    found = dict.fromkeys(match[0] for name in names if (match := PREFIX.match(_WRAPPERS.sub("", name))))
    if found:
        logger.info(
            "%s: prefix %s removed from the names of its layers", source, named_list(map(repr, found))
        )


def in_wan_names(tensors: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    """Tensors under Wan's names, with wrappers, prefixes and PEFT's ``base_layer`` removed.

    Raises:
        ValueError: two names that become the same, or all blocks have a prefix that no public layout has.
    """
    names = {name: _bare(name) for name in tensors}
    if _is_diffusers(names.values()):
        names = {name: from_diffusers_name(bare) for name, bare in names.items()}
    twice = [bare for bare, count in Counter(names.values()).items() if count > 1]
    if twice:
        raise ValueError(
            f"{source}: parameters under several names that differ only in prefixes: {named_list(twice)}"
        )
    strange = {match[1] for bare in names.values() if (match := re.match(r"(.+?\.)blocks\.\d+\.", bare))}
    if strange and not any(bare.startswith("blocks.") for bare in names.values()):
        raise ValueError(
            f"{source}: its layers have {named_list(sorted(strange))} before their names, which no public "
            "layout has; save them without it"
        )
    return {names[name]: tensor for name, tensor in tensors.items()}


def _bare(name: str) -> str:
    bare = PREFIX.sub("", _WRAPPERS.sub("", name)).replace(".base_layer.", ".")
    match = _KOHYA.match(bare)
    if match is None or match["layer"] not in _DOTTED:
        return bare
    return (match["block"] or "").replace("_", ".") + _DOTTED[match["layer"]] + bare[match.end() :]


def choose_entry(
    content: Mapping[str, object], entry: str | None, order: tuple[str, ...], source: str
) -> tuple[dict[str, Tensor], str]:
    """The requested entry of a checkpoint, else the first of ``order``, else the bare tensors themselves.

    Returns the tensors, and ``source`` with the entry that was taken and the ones that were not. Raises
    ValueError if there is no such entry or it holds something other than tensors.
    """
    entries = {name: value for name, value in content.items() if isinstance(value, dict)}
    if entry is None:
        entry = next((name for name in order if name in entries), None)
        if entry is None and content and all(isinstance(value, Tensor) for value in content.values()):
            return only_tensors(content, source), source
    if entry not in entries:
        wanted = entry or " or ".join(order)
        message = f"{source}: no entry {wanted}; the file holds {named_list(content) or 'nothing'}"
        if order is TRANSFORMER_ENTRIES and any(name in entries for name in LORA_ENTRIES):
            message += ". It is an adapter: give it as the adapter, beside the base checkpoint"
        raise ValueError(message)
    unused = [name for name in entries if name != entry and name in (*order, *NAMED_ENTRIES)]
    source += f", entry {entry}"
    return only_tensors(entries[entry], source), source + (
        f" (not used: {named_list(unused)})" if unused else ""
    )


def _weights_file(directory: Path) -> Path:
    """The weights file in a directory, or its index; prefers safetensors, and no variant over a variant."""
    kinds = ("safetensors", "bin", "pt", "pth")
    stems = ("diffusion_pytorch_model", "model", "pytorch_model")
    for folder in (directory, directory / "transformer"):
        files = sorted(folder.iterdir()) if folder.is_dir() else []
        found = {file: match for file in files if (match := _WEIGHTS.fullmatch(file.name))}
        if found:
            return min(found, key=lambda file: (
                stems.index(found[file]["stem"]), kinds.index(found[file]["kind"]),
                bool(found[file]["variant"] or found[file]["of"]), not found[file]["index"],
            ))  # fmt: skip
    raise ValueError(
        f"{directory}: no weights (such as {WEIGHTS_NAME}, its index.json, or model.pt), here or in "
        f"transformer/; the directory holds "
        f"{named_list(sorted(p.name for p in directory.iterdir())) or 'nothing'}"
    )


def load_transformer_state(
    path: str | Path, *, entry: str | None = None, quiet: bool = False
) -> TransformerState:
    """Load transformer weights of any public layout, memory-mapped, under bare Wan names.

    Understands the ``.pt`` layouts of Self-Forcing, LongLive, MemFlow and KVPO, Wan's own safetensors,
    diffusers directories (single file, sharded, a variant) and ComfyUI's files, with wrapper, compile and
    trainer prefixes. From a whole PEFT model it takes the base weights and sets ``adapted``.

    Args:
        path: a file, an index of shards or a directory.
        entry: top-level entry of a ``.pt`` file, by default the first of TRANSFORMER_ENTRIES that is present.
            The result's ``source`` says which entries were taken and which were not.
        quiet: do not log removed prefixes.

    Raises:
        ValueError: unreadable file, pickled code, no such entry, an adapter instead of weights.
    """
    path = Path(path)
    if path.is_dir():
        path = _weights_file(path)
    if path.suffix == ".json":
        if entry is not None:
            raise ValueError(f"{path}: an index of shards has no entry {entry}; only .pt files have entries")
        (tensors, files), source = read_shards(path), str(path)
    else:
        tensors, source = choose_entry(read_tensor_file(path), entry, TRANSFORMER_ENTRIES, str(path))
        files = (path,)
    refuse_layout(tensors, source)
    own = {name: tensor for name, tensor in tensors.items() if not ADAPTER_KEY.match(name)}
    adapted = len(own) < len(tensors)
    if adapted and not any(".base_layer." in name for name in own):
        raise ValueError(f"{source}: holds an adapter, not transformer weights; give it as the adapter")
    if not quiet:
        say_prefixes(own, source)
    return TransformerState(in_wan_names(own, source), source, files, adapted)


def transformer_sizes(shapes: Shapes) -> dict[str, int]:
    """Sizes of a Wan transformer, inferred from its parameter shapes."""
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
    """Check that weights fit a transformer.

    Raises:
        ValueError: naming every missing, unexpected and misshapen key, and the sizes that differ if the
            file is for another architecture.
    """
    check_tensors(state.tensors, shapes_of(model.state_dict()), state.source, transformer_sizes)


def assign_state(
    model: nn.Module, state: TransformerState, *, device: torch.device | str, dtype: torch.dtype
) -> None:
    """Assign weights to a transformer built on the meta device, without a second copy in memory.

    Raises:
        ValueError: see `check_state`.
    """
    assign_tensors(model, state.tensors, state.source, device=device, dtype=dtype, sizes=transformer_sizes)
