"""Sums of gradients over ranks, added in one order whatever the number of ranks."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from kvpo.training.ranks import Ranks

BUCKET = 2**26
"""Numbers exchanged at a time, if no parameter is larger: 256 MB in float32, twice during an exchange."""

Gradients = Sequence[Tensor | None]
"""One per parameter; None is zero."""


class OrderedSum:
    """A sum of gradients of groups, taken in the order of the groups, so that it is the same on any ranks.

    A rank adds up one part of every gradient: it receives that part from all others, adds them in order, and
    gets the other parts' sums at the end. Where every rank has one gradient, that moves as many bytes as a
    ring all-reduce, which adds in an order of its own.
    """

    def __init__(self, ranks: Ranks, parameters: Sequence[nn.Parameter]) -> None:
        self.ranks = ranks
        self.parameters = parameters
        self.buckets = list(_buckets(parameters))
        self.parts = [
            parameters[own.start].new_zeros(self._part_size(own), requires_grad=False) for own in self.buckets
        ]

    def add(self, gradients: Sequence[Gradients], slots: int) -> None:
        """Add a turn of every rank, those of rank 0 first. Every rank takes part in every turn.

        ``slots``: the most gradients that a rank has in a turn; missing ones are zero.
        """
        for bucket, part in zip(self.buckets, self.parts, strict=True):
            flat_SN = part.new_zeros(slots, self.ranks.count * len(part))
            for row_N, own in zip(flat_SN, gradients, strict=False):
                self._flatten(row_N, own, bucket)
            by_rank = flat_SN.view(slots, self.ranks.count, -1).transpose(0, 1)
            received = self.ranks.exchange_parts(by_rank.reshape(-1))
            for row_P in received.view(-1, len(part)):
                part += row_P

    def store(self) -> None:
        """Make the sum the parameters' ``.grad``."""
        for bucket, part in zip(self.buckets, self.parts, strict=True):
            whole, at = self.ranks.join_parts(part), 0
            for parameter in (self.parameters[n] for n in bucket):
                parameter.grad = whole[at : at + parameter.numel()].view_as(parameter)
                at += parameter.numel()

    def _part_size(self, bucket: range) -> int:
        return math.ceil(sum(self.parameters[n].numel() for n in bucket) / self.ranks.count)

    def _flatten(self, row_N: Tensor, gradients: Gradients, bucket: range) -> None:
        at = 0
        for n in bucket:
            size = self.parameters[n].numel()
            if (gradient := gradients[n]) is not None:
                row_N[at : at + size] = gradient.flatten()
            at += size


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[range]:
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
    """A number that changes with any bit of the tensors, in practice: sums of their bits, mixed."""
    words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    found = 0
    for tensor in tensors:
        total = tensor.detach().contiguous().view(words[tensor.element_size()]).sum(dtype=torch.int64)
        found = (found * 1_000_003 + int(total)) % 2**64
    return found
