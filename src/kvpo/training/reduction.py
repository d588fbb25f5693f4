"""Sums of gradients over ranks, added in one order whatever the number of ranks."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kvpo.training.ranks import Ranks
from kvpo.training.sharding import local, spread_like

BUCKET = 2**26
"""Numbers exchanged at a time, if no parameter is larger: 256 MB in float32, twice during an exchange."""

Gradients = Sequence[Tensor | None]
"""One per parameter; None is zero."""


class OrderedSum:
    """A sum of gradients of groups, taken in the order of the groups, so that it is the same on any ranks.

    Where a team of ranks has a group in common, its gradient is the sum of its micro-batches, in their order.
    A rank adds up one part of every gradient, which it receives from all others, and gets the other parts'
    sums at the end: as many bytes as a ring all-reduce moves, which adds in an order of its own.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter], team: int = 1) -> None:
        """``team``: neighbouring ranks that have their groups in common. Of spread parameters, add parts."""
        self.ranks, self.team = ranks, team
        self.parameters = parameters
        self.values = [local(parameter.detach()) for parameter in parameters]
        self.buckets = list(_buckets(self.values))
        self.parts = [self.values[own.start].new_zeros(self._part_size(own)) for own in self.buckets]

    def add(self, groups: Sequence[Sequence[Gradients]], slots: int, cells: int = 1) -> None:
        """Add a turn of every rank, those of rank 0 first. Every rank takes part in every turn.

        Args:
            groups: gradients of this rank's micro-batches of every group, every team-th one of the group's.
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
        """Make the sum the parameters' ``.grad``."""
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
    """Runs of parameters of at most BUCKET numbers and one kind, or of a single parameter."""
    start, size = 0, 0
    for n, parameter in enumerate(parameters):
        alike = parameter.dtype == parameters[start].dtype and parameter.device == parameters[start].device
        if n > start and (size + parameter.numel() > BUCKET or not alike):
            yield range(start, n)
            start, size = n, 0
        size += parameter.numel()
    yield range(start, len(parameters))


def taken(parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """The gradients of the parameters, which no longer hold them."""
    found = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return found


def digest(tensors: Sequence[Tensor]) -> int:
    """A number that changes with any bit of the tensors, or of this rank's parts of them, in practice.

    Sums of their bits, mixed.
    """
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = 0
    for tensor in tensors:
        total = local(tensor.detach()).contiguous().view(words[tensor.element_size()]).sum(dtype=torch.int64)
        found = (found * 1_000_003 + int(total)) % 2**64
    return found
