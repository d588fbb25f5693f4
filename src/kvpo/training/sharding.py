"""Weights sharded over the ranks of a team, with torch's FSDP2 (`fully_shard`).

Every layer with its adapters is a group of its own that is gathered just before it runs. All ranks of a team
must make the same number of passes in the same order. Trained parameters, their moments and averages are
DTensors, of which each rank holds a part; checkpoints are whole (`kvpo.training.checkpoint`).
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor
from torch.distributed import DeviceMesh
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from kvpo.models.causal_wan import CausalWan
from kvpo.training.ranks import Ranks

SAVING, READING = "saving a checkpoint", "reading the checkpoint"
"""Names, in messages, of work that ranks do together."""


def shard(model: CausalWan, team: Ranks, device: torch.device | str) -> None:
    """Shard the parameters of a transformer over a team, in place; gradients are summed, not averaged."""
    mesh = DeviceMesh.from_group(team.prompt, torch.device(device).type)

    for module in (*model.blocks, model):
        # By default the outermost group would stay gathered, and be stale once its values are exchanged.
        fully_shard(module, mesh=mesh, reshard_after_forward=True)
    for block in model.blocks:
        for method in ("only_keys_values", "text_of"):  # called besides ``forward``, never within it
            register_fsdp_forward_method(block, method)
    for method in ("text_of", "text_keys"):
        register_fsdp_forward_method(model, method)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def sharded(tensors: Iterable[Tensor]) -> bool:
    """True if any of the tensors is sharded."""
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor, sharing its memory; other tensors are returned as they are."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor  # type: ignore[no-any-return]


def spread_like(tensor: Tensor, part: Tensor) -> Tensor:
    """Return ``part``, this rank's part, as a tensor that is sharded like ``tensor`` if that is sharded."""
    if not isinstance(tensor, DTensor) or isinstance(part, DTensor):
        return part
    return DTensor.from_local(
        part,
        tensor.device_mesh,
        tensor.placements,
        run_check=False,
        shape=tensor.shape,
        stride=tensor.stride(),
    )


def write_parts(tensors: Mapping[str, Tensor], file: Path, team: Ranks) -> None:
    """Write sharded tensors to a safetensors file, each rank its parts; the file holds the whole tensors.

    All ranks of the team must call this together; rank 0 joins the parts. Raises OSError on a rank that
    cannot write, and RankError on the others.
    """
    parts = file.parent / "parts"
    writer = dcp.HuggingFaceStorageWriter(str(parts), save_distributed=True, enable_consolidation=True)
    save = partial(dcp.save, dict(tensors), storage_writer=writer, process_group=team.patient)
    _together(team, SAVING, save)
    if team.main:
        (joined,) = parts.glob("*.safetensors")
        _write_counts(joined, tensors)
        joined.rename(file)
        shutil.rmtree(parts)


def _write_counts(file: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write the values of 0-d tensors, which torch leaves zero when it joins parts."""
    with file.open("r+b") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        header = json.loads(stream.read(length))
        for name, value in tensors.items():
            if not value.dim():
                stream.seek(8 + length + header[name]["data_offsets"][0])
                stream.write(value.cpu().numpy().tobytes())


def read_parts(file: Path, spread: Mapping[str, Tensor], team: Ranks) -> dict[str, Tensor]:
    """Read every tensor of a safetensors file; of sharded tensors, each rank of the team reads its parts.

    ``spread`` maps the names of sharded tensors to tensors that are sharded alike; all others are read whole.
    All ranks of the team must call this together.
    """
    with safe_open(file, "pt") as header:
        names = list(header.keys())
        found = {name: header.get_tensor(name) for name in names if name not in spread}
    parts = {name: torch.zeros_like(value.detach()) for name, value in spread.items() if name in names}
    reader = dcp.HuggingFaceStorageReader(str(file.parent))
    _together(team, READING, partial(dcp.load, parts, storage_reader=reader, process_group=team.patient))
    return found | parts


def _together(team: Ranks, doing: str, action: Callable[[], object]) -> None:
    """Run a torch checkpoint function on all ranks of a team.

    If it fails on some ranks, torch raises an error on all of them that no ``except Exception`` catches.
    Here, a rank that failed raises its own error, and the others raise RankError.
    """
    with team.together(doing):
        try:
            action()
        except CheckpointException as error:
            if team.rank in error.failures:
                raise error.failures[team.rank][0] from error
