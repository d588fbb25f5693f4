"""Sums of gradients over ranks, added in the same order for any number of ranks."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kvpo.training.ranks import Ranks
from kvpo.training.sharding import local, spread_like

BUCKET = 2**26
"""Elements exchanged at a time, unless one parameter is larger: 256 MB in float32, twice during exchanges."""

Gradients = Sequence[Tensor | None]
"""One gradient per parameter; None means zero."""


class OrderedSum:
    """Sums gradients in the order of their groups, so that the result is the same for any number of ranks.

    If a team of ranks shares a group, the group's gradient is the sum of its micro-batches, in their order. A
    rank receives one part of every gradient from all others and adds it up; it gets the sums of the other
    parts at the end. This moves as many bytes as a ring all-reduce, which would add in its own order.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter], team: int = 1) -> None:
        """``team``: number of neighbouring ranks that share their groups. Sharded parameters add up parts."""
        self.ranks, self.team = ranks, team
        self.parameters = parameters
        self.values = [local(parameter.detach()) for parameter in parameters]
        self.buckets = list(_buckets(self.values))
        self.parts = [self.values[own.start].new_zeros(self._part_size(own)) for own in self.buckets]

    def add(self, groups: Sequence[Sequence[Gradients]], slots: int, cells: int = 1) -> None:
        """Add one turn of every rank, starting with rank 0's. All ranks must take part in every turn.

        Args:
            groups: per group, the gradients of this rank's micro-batches (every ``team``-th of the group's).
            slots: the most groups that a rank has in a turn; missing ones are zero.
            cells: the most micro-batches that a rank has of a group.
        """
        count = self.ranks.count
        for bucket, part in zip(self.buckets, self.parts, strict=True):
            flat_SCN = part.new_zeros(slots, cells, count * len(part))
            for rows_CN, group in zip(flat_SCN, groups, strict=False):
                for row_N, own in zip(rows_CN, group, strict=False):
                    self._flatten(row_N, own, bucket)
            by_rank = flat_SCN.view(slots, cells, count, -1).permute(2, 0, 1, 3)
            received = self.ranks.exchange_parts(by_rank.reshape(-1))
            in_order = received.view(-1, self.team, slots, cells, len(part)).permute(0, 2, 3, 1, 4)
            for group_CP in in_order.reshape(-1, cells * self.team, len(part)):
                whole, *rest = group_CP
                for row_P in rest:
                    whole += row_P
                part += whole

    def store(self) -> None:
        """Set the parameters' ``.grad`` to the sum."""
        for bucket, part in zip(self.buckets, self.parts, strict=True):
            whole, at = self.ranks.join_parts(part), 0
            for parameter, value in ((self.parameters[n], self.values[n]) for n in bucket):
                parameter.grad = spread_like(parameter, whole[at : at + value.numel()].view_as(value))
                at += value.numel()

    def _part_size(self, bucket: range) -> int:
        return math.ceil(sum(self.values[n].numel() for n in bucket) / self.ranks.count)

    def _flatten(self, row_N: Tensor, gradients: Gradients, bucket: range) -> None:
        at = 0
        for n in bucket:
            size = self.values[n].numel()
            if (gradient := gradients[n]) is not None:
                row_N[at : at + size] = local(gradient).flatten()
            at += size


def _buckets(parameters: Sequence[Tensor]) -> Iterator[range]:
    """Ranges of parameters of one dtype and device with at most BUCKET elements, or of one parameter."""
    start, size = 0, 0
    for n, parameter in enumerate(parameters):
        alike = parameter.dtype == parameters[start].dtype and parameter.device == parameters[start].device
        if n > start and (size + parameter.numel() > BUCKET or not alike):
            yield range(start, n)
            start, size = n, 0
        size += parameter.numel()
    yield range(start, len(parameters))


def taken(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Return the parameters' gradients and set ``.grad`` to None."""
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def digest(tensors: Sequence[Tensor]) -> int:
    """Checksum of the tensors, or of this rank's parts of them; in practice any changed bit changes it.

    It mixes the sums of the tensors' bits, read as integers.
    """
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = 0
    for tensor in tensors:
        total = local(tensor.detach()).contiguous().view(words[tensor.element_size()]).sum(dtype=torch.int64)
        found = (found * 1_000_003 + int(total)) % 2**64
    return found
