"""Tensor files: read by memory map, without running code from them, and assigned strictly to models."""

import difflib
import hashlib
import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from kvpo.files import NAMES_SHOWN, demand_utf8, named_list, read_json, refuse_pointers
from kvpo.models.finite import require_finite_weights

SAMPLES = 64
SAMPLE_BYTES = 65536
ALIGNMENT = 64
RECORD = "kvpo"
"""Field of a safetensors header, or entry of a .pt file, with the record of how weights were made."""
FETCH_AGAIN = "; download it again"
"""The way out of damaged weights, except for those that were written here."""
DIGESTED = 64
"""Values of each tensor that `digest_of` samples."""

Shapes = Mapping[str, tuple[int, ...]]


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, memory-mapped.

    Raises:
        ValueError: truncated or damaged file, a name that is not UTF-8.
    """
    demand_utf8(path)
    refuse_pointers(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated or damaged safetensors file ({path.stat().st_size} bytes): {error}"
            f"{FETCH_AGAIN}"
        ) from error


def safetensors_header(path: Path) -> dict[str, str]:
    """The metadata in the header of a safetensors file, recognised by its content; empty for other files."""
    with path.open("rb") as file:
        if file.read(9)[8:] != b"{":
            return {}
    with safe_open(path, framework="pt") as opened:
        return dict(opened.metadata() or {})


def storable(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors, each with its own storage: files must hold neither views nor shared memory."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        plain = tensor.detach().cpu().contiguous()
        memory = plain.untyped_storage()
        stored[name] = (
            plain.clone() if memory.data_ptr() in seen or memory.nbytes() != plain.nbytes else plain
        )
        seen.add(memory.data_ptr())
    return stored


def fingerprint(paths: Iterable[Path], settings: str = "") -> str:
    """Digest of the content of files, of the names and content below directories, and of ``settings``.

    The location and name of a file itself do not count. Large files are sampled at even intervals, so that a
    fingerprint takes a fraction of a second.
    """
    digest = hashlib.sha256(settings.encode())
    for path in paths:
        for file in sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]:
            size = file.stat().st_size
            name = file.relative_to(path).as_posix() if path.is_dir() else ""
            digest.update(json.dumps([name, size]).encode())
            with file.open("rb") as stream:
                if size <= SAMPLES * SAMPLE_BYTES:
                    digest.update(stream.read())
                    continue
                for sample in range(SAMPLES):
                    stream.seek((size - SAMPLE_BYTES) * sample // (SAMPLES - 1))
                    digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Digest of weights: names, shapes and evenly spaced values in bfloat16, whatever file they come from."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(json.dumps([name, list(tensor.shape)]).encode())
        sample = tensor.detach().reshape(-1)[:: max(1, tensor.numel() // DIGESTED)].cpu().to(torch.bfloat16)
        digest.update(bytes(sample.contiguous().view(torch.uint8).numpy()))
    return digest.hexdigest()


def _read_torch(path: Path, mmap: bool) -> object:
    try:
        with warnings.catch_warnings():  # about pickle protocols: the file is read or refused anyway
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # on damaged bytes, the unpickler may raise anything
        raise ValueError(f"{path}: {_why_unreadable(error, path.stat().st_size)}") from error


def _why_unreadable(error: Exception, num_bytes: int) -> str:
    """One sentence for torch's long report, without its advice to run the file's code."""
    text = str(error)
    culprit = re.search(r"GLOBAL ([\w.]+)", text)
    code = None
    if culprit and not culprit[1].startswith("torch._utils._rebuild"):  # a cut-off name of a plain tensor
        code = f"it would call {culprit[1]}"
    elif "TorchScript" in text:
        code = "it is a TorchScript program"
    elif isinstance(error, pickle.UnpicklingError) and not culprit:
        detail = re.search(r"WeightsUnpickler error:\s*(.*)", text)
        code = detail[1].strip() if detail else "unknown instructions"
    if code is None:
        reason = text.splitlines()[0].removesuffix(".") if text and not culprit else "it ends too early"
        return f"truncated or damaged torch file ({num_bytes} bytes): {reason}{FETCH_AGAIN}"
    return (
        f"refused, because the file holds pickled code and not only tensors ({code}); save its tensors "
        "alone, with torch.save or safetensors, where the file is trusted"
    )


def read_tensor_file(path: Path) -> dict[str, object]:
    """The mapping stored in a torch or safetensors file, recognised by its content, memory-mapped on the CPU.

    Raises:
        ValueError: missing, empty, truncated or damaged file, pickled code, content that is not a mapping.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    refuse_pointers(path)
    with path.open("rb") as file:
        head = file.read(40)
    if not head:
        raise ValueError(f"{path}: the file is empty{FETCH_AGAIN}")
    if head[8:9] == b"{":
        return dict(read_safetensors(path))
    if not head.startswith((b"PK", b"\x80")):
        word = head[:12].split()[0].decode("latin-1") if head[:12].strip() else ""
        starts = f"; it starts with {word!r}" if word.isascii() and word.isprintable() and word else ""
        raise ValueError(f"{path}: neither a torch nor a safetensors file{starts}")
    # Only the zip format can be mapped; the older one is read into memory, also without running code.
    content = _read_torch(path, mmap=head.startswith(b"PK"))
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(f"{path}: holds a {type(content).__name__}, expected a mapping of names to tensors")
    return content


def only_tensors(content: Mapping[str, object], source: str) -> dict[str, Tensor]:
    """Return ``content`` if all of its values are tensors.

    Raises:
        ValueError: naming the entries that are not tensors.
    """
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    if others := [name for name in content if name not in tensors]:
        raise ValueError(f"{source}: entries that are not tensors: {named_list(others)}")
    return tensors


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The flat mapping of names to tensors stored in a file.

    Raises:
        ValueError: see `read_tensor_file`; also if an entry is not a tensor.
    """
    return only_tensors(read_tensor_file(path), str(path))


def read_shards(index: Path) -> tuple[dict[str, Tensor], tuple[Path, ...]]:
    """Tensors of a sharded checkpoint, each read from the shard that the index names, and the shards' paths.

    Raises:
        ValueError: not an index, absent or damaged shards, keys that are missing from their shard.
    """
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index}: not a safetensors index, a JSON object with a weight_map")
    if wrong := [f"{key} ({name!r})" for key, name in weight_map.items() if not isinstance(name, str)]:
        raise ValueError(f"{index}: keys whose shard is not a file name: {named_list(wrong)}")
    shards = sorted(set(weight_map.values()))
    if absent := [name for name in shards if Path(name).name != name or not (index.parent / name).is_file()]:
        raise ValueError(f"{index}: shards that are not beside it: {named_list(absent)}; download the rest")
    held = {shard: read_tensors(index.parent / shard) for shard in shards}
    if lost := [f"{key} ({shard})" for key, shard in weight_map.items() if key not in held[shard]]:
        raise ValueError(f"{index}: keys that their shard does not hold: {named_list(lost)}")
    tensors = {key: held[shard][key] for key, shard in weight_map.items()}
    return tensors, tuple(index.parent / shard for shard in shards)


def renamed(name: str, table: Mapping[str, str]) -> str:
    """``name`` with the first key of ``table`` that equals it, or its beginning up to a dot, replaced."""
    for old, new in table.items():
        if name == old or name.startswith(f"{old}."):
            return new + name[len(old) :]
    return name


def shapes_of(tensors: Mapping[str, Tensor]) -> Shapes:
    """The shape of every tensor, by name."""
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def check_tensors(
    tensors: Mapping[str, Tensor],
    expected: Shapes,
    source: str,
    sizes: Callable[[Shapes], dict[str, int]] | None = None,
) -> None:
    """Check that tensors have exactly the expected names and shapes.

    Args:
        sizes: infers model sizes from a set of shapes, so that the message can say which differ.

    Raises:
        ValueError: naming the missing, unexpected and misshapen keys (up to twelve of each, and the number of
            others), the nearest missing name for each unexpected one, and the sizes that differ.
    """
    missing = [name for name in expected if name not in tensors]
    unexpected = [name for name in tensors if name not in expected]
    misshapen = [
        name for name in tensors if name in expected and tuple(tensors[name].shape) != tuple(expected[name])
    ]
    if not (missing or unexpected or misshapen):
        return
    lines = [f"{source}: the weights do not fit the model"]
    if sizes is not None:
        in_file, in_model = sizes(shapes_of(tensors)), sizes(expected)
        if differing := [
            field for field in in_model if in_file.get(field, in_model[field]) != in_model[field]
        ]:
            lines.append(
                "  another architecture: the file has "
                + ", ".join(f"{field} {in_file[field]}" for field in differing)
                + "; the model has "
                + ", ".join(f"{field} {in_model[field]}" for field in differing)
                + ". Choose the preset that the file was made for, or give its sizes with backbone.geometry"
            )

    def with_hint(name: str) -> str:
        nearest = difflib.get_close_matches(name, missing, n=1, cutoff=0.8)
        return f"{name} (did you mean {nearest[0]}?)" if nearest else name

    if missing:
        lines.append(f"  missing ({len(missing)}): {named_list(missing)}")
    if unexpected:
        hinted = [*map(with_hint, unexpected[:NAMES_SHOWN]), *unexpected[NAMES_SHOWN:]]
        lines.append(f"  unexpected ({len(unexpected)}): {named_list(hinted)}")
    if misshapen:
        described = (f"{n} (file {list(tensors[n].shape)}, model {list(expected[n])})" for n in misshapen)
        lines.append(f"  misshapen ({len(misshapen)}): {named_list(described)}")
    raise ValueError("\n".join(lines))


def require_numbers(tensors: Mapping[str, Tensor], source: str) -> None:
    """Reject weights that are not floating-point numbers: quantised ones mean nothing without their scales.

    Raises:
        ValueError: naming the first.
    """
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise ValueError(
                f"{source}: {name} holds {str(tensor.dtype).removeprefix('torch.')}, not floating-point "
                "numbers; give the weights as they were before they were quantised"
            )


def _placed(tensor: Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
    moved = tensor.to(device=device, dtype=dtype)
    if moved is tensor and device.type == "cpu" and tensor.data_ptr() % ALIGNMENT:
        # Kernels may choose their summation order by alignment: results from a view into a mapped file could
        # differ in the last digit from those of the same weights in memory of their own.
        return tensor.clone()
    return moved


def assign_tensors(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    source: str,
    *,
    device: torch.device | str,
    dtype: torch.dtype,
    sizes: Callable[[Shapes], dict[str, int]] | None = None,
) -> None:
    """Assign exactly the expected weights to a model built on the meta device, tensor by tensor.

    Besides the mapped file, there is no second copy of the weights. If device and dtype already agree, the
    model uses the mapping itself. ``sizes`` is passed to `check_tensors`. Raises ValueError as
    `check_tensors` does, and naming the first tensor that is quantised or holds NaN or infinity.
    """
    check_tensors(tensors, shapes_of(model.state_dict()), source, sizes)
    require_numbers({name: tensors[name] for name, _ in model.named_parameters()}, source)
    # By identity, so that one tensor under two names (tied weights) stays one tensor.
    placed = {id(tensor): _placed(tensor, torch.device(device), dtype) for tensor in tensors.values()}
    named = {name: placed[id(t)] for name, t in tensors.items()}
    require_finite_weights(named, source)
    model.load_state_dict(named, strict=True, assign=True)
    left = [name for name, value in (*model.named_parameters(), *model.named_buffers()) if value.is_meta]
    assert not left, f"still on the meta device: {left}"
