"""Write adapters for PEFT, diffusers and ComfyUI, and merged weights in diffusers' or the public layout.

Every writer moves its result into place in one step: an interrupted export leaves nothing that looks
finished.
"""

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from kvpo.extras import extra
from kvpo.files import new_directory, new_file
from kvpo.models.adapter_files import DIFFUSERS_ADAPTER_NAME, PEFT_FILES, AdapterState
from kvpo.models.adapters import lora_config
from kvpo.models.checkpoints import WEIGHTS_NAME, to_diffusers_name
from kvpo.models.geometry import SIZE_FIELDS
from kvpo.models.settings import WanShape
from kvpo.models.tensor_files import RECORD, check_tensors, shapes_of, storable

SHARD_BYTES = 5_000_000_000
Record = Mapping[str, Any]
"""Record of what weights were made with, stored with them as JSON."""
NOTHING: Record = {}
Finish = Callable[[Path], None]
"""Called with a written directory or file before it is moved into place; if it raises, nothing is left."""


def demand_new(path: Path) -> None:
    """Raise ValueError if an export would replace a file or a directory that is not empty."""
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ValueError(f"{path}: already exists; export to a new place, or remove it first")


def _new_directory(directory: Path) -> AbstractContextManager[Path]:
    """A scratch directory that becomes ``directory`` when the block succeeds."""
    demand_new(directory)
    return new_directory(directory, failures=(SafetensorError,))


def _header(record: Record) -> dict[str, str]:
    return {"format": "pt"} | ({RECORD: json.dumps(record)} if record else {})


def save_peft_adapter(
    directory: str | Path,
    adapter: AdapterState,
    *,
    base_model: str = "",
    record: Record = NOTHING,
    finish: Finish = lambda written: None,
) -> None:
    """Write ``adapter_model.safetensors`` and ``adapter_config.json``, as PEFT reads them.

    Args:
        base_model: name of the weights that the adapter belongs to, recorded in the configuration.
        record: stored in the header.
        finish: called before the directory is moved into place.

    Raises:
        ValueError: the directory exists and is not empty.
    """
    with _new_directory(Path(directory)) as scratch:
        lora_config(adapter, base_model).save_pretrained(str(scratch))
        save_file(storable(adapter.tensors), scratch / PEFT_FILES[0], metadata=_header(record))
        finish(scratch)


def save_diffusers_adapter(
    directory: str | Path,
    adapter: AdapterState,
    *,
    record: Record = NOTHING,
    finish: Finish = lambda written: None,
) -> None:
    """Write ``pytorch_lora_weights.safetensors``, as diffusers' LoRA loaders read it (see `_folded`).

    Raises:
        ValueError: the directory exists and is not empty.
    """
    tensors = _folded(adapter, lambda module: f"transformer.{to_diffusers_name(module)}")
    _save_file(directory, DIFFUSERS_ADAPTER_NAME, tensors, record, finish)


def save_comfy_adapter(
    directory: str | Path,
    adapter: AdapterState,
    *,
    record: Record = NOTHING,
    finish: Finish = lambda written: None,
) -> None:
    """Write one safetensors file, named after the directory, as ComfyUI and Scope read it (see `_folded`).

    Raises:
        ValueError: the directory exists and is not empty.
    """
    tensors = _folded(adapter, lambda module: f"diffusion_model.{module}")
    _save_file(directory, f"{Path(directory).name}.safetensors", tensors, record, finish)


def _save_file(
    directory: str | Path, name: str, tensors: dict[str, Tensor], record: Record, finish: Finish
) -> None:
    """Write a new directory with one file of tensors and anything that ``finish`` adds."""
    with _new_directory(Path(directory)) as scratch:
        save_file(tensors, scratch / name, metadata=_header(record))
        finish(scratch)


def _folded(adapter: AdapterState, name_of: Callable[[str], str]) -> dict[str, Tensor]:
    """An adapter's tensors under the layer names that ``name_of`` returns.

    Readers of these layouts do not agree on a place for alpha, so a scale alpha / rank other than 1 is
    multiplied into ``B`` (exact for powers of two).
    """
    tensors = {}
    for module in adapter.modules:
        (a, b), scale = adapter.pair(module), adapter.scale(module)
        prefix = f"{name_of(module)}.lora_"
        tensors[prefix + "A.weight"] = a
        tensors[prefix + "B.weight"] = b if scale == 1 else b * scale
    return storable(tensors)


def save_diffusers_transformer(
    directory: str | Path,
    tensors: Mapping[str, Tensor],
    shape: WanShape,
    *,
    shard_bytes: int = SHARD_BYTES,
    record: Record = NOTHING,
    finish: Finish = lambda written: None,
) -> None:
    """Write weights and configuration as diffusers' ``WanTransformer3DModel.from_pretrained`` reads them.

    Args:
        tensors: all weights under bare Wan names.
        shard_bytes: size beyond which weights are split into several safetensors files with an index.
        record: stored in the header of every file.
        finish: called before the directory is moved into place.

    Raises:
        ValueError: keys or shapes that do not match the configuration, or a directory that is not empty.
    """
    with extra("wan"):
        from diffusers import WanTransformer3DModel

    with torch.device("meta"):
        model: Any = WanTransformer3DModel(
            **{name: getattr(shape, ours) for name, ours in SIZE_FIELDS.items()},
            patch_size=shape.patch_size,
            out_channels=shape.channels,
        )
    named = {to_diffusers_name(name): tensor for name, tensor in tensors.items()}
    check_tensors(named, shapes_of(model.state_dict()), "export for diffusers")
    with _new_directory(Path(directory)) as scratch:
        model.save_config(scratch)
        _save_sharded(scratch, named, shard_bytes, _header(record))
        finish(scratch)


def _save_sharded(
    directory: Path, tensors: Mapping[str, Tensor], shard_bytes: int, header: dict[str, str]
) -> None:
    shards: list[list[str]] = [[]]
    used = 0
    for name, tensor in tensors.items():
        if shards[-1] and used + tensor.nbytes > shard_bytes:
            shards.append([])
            used = 0
        shards[-1].append(name)
        used += tensor.nbytes
    stem, suffix = Path(WEIGHTS_NAME).stem, Path(WEIGHTS_NAME).suffix
    files = [f"{stem}-{i:05d}-of-{len(shards):05d}{suffix}" for i in range(1, len(shards) + 1)]
    if len(shards) == 1:
        files = [WEIGHTS_NAME]
    for file, names in zip(files, shards, strict=True):
        save_file(storable({name: tensors[name] for name in names}), directory / file, metadata=header)
    if len(shards) > 1:
        weight_map = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        total = sum(tensor.nbytes for tensor in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / f"{WEIGHTS_NAME}.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")


def save_public_checkpoint(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    *,
    record: Record = NOTHING,
    finish: Finish = lambda written: None,
) -> None:
    """Write ``{"generator": {"model.…": …}}``, the layout of LongLive, MemFlow and Self-Forcing.

    Args:
        tensors: all weights under bare Wan names.
        record: stored in an entry of its own.
        finish: called before the file is moved into place.

    Raises:
        ValueError: the file exists.
    """
    path = Path(path)
    demand_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, failures=(RuntimeError,)) as scratch:  # torch raises it for a full disk
        with scratch.open("wb") as file:  # given a name, torch's writer wants letters on both sides of a dot
            content: dict[str, Any] = {RECORD: json.dumps(record)} if record else {}
            named = {f"model.{name}": tensor for name, tensor in storable(tensors).items()}
            torch.save({"generator": named, **content}, file)
        finish(scratch)
