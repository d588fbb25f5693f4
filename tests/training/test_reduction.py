"""Gradients of ranks are added in one order, and digests tell weights apart."""

from pathlib import Path

import torch
from torch import Tensor, nn

from kvpo.training import reduction
from kvpo.training.ranks import Ranks
from kvpo.training.reduction import OrderedSum, digest, taken
from tests.ranks import on_ranks


def added_up_in_buckets(ranks: Ranks, sizes: list[int], bucket: int) -> list[Tensor]:
    """Nine gradients, dealt in turns of two, of which every third is missing."""
    reduction.BUCKET = bucket
    parameters = [nn.Parameter(torch.zeros(size)) for size in sizes]
    draws = torch.Generator().manual_seed(0)
    every = [[torch.randn(size, generator=draws) for size in sizes] for _ in range(9)]
    turns = [range(at, min(at + 2, 9)) for at in range(0, 9, 2)]
    total = OrderedSum(ranks, parameters)
    for at in range(0, len(turns), ranks.count):
        own = [n for turn in ranks.share(turns[at : at + ranks.count]) for n in turn]
        total.add([[every[n] if n % 3 else [None] * len(sizes)] for n in own], slots=2)
    total.store()
    return [gradient for gradient in taken(parameters) if gradient is not None]


def test_gradients_are_added_in_order_whatever_their_sizes(tmp_path: Path) -> None:
    sizes = [5, 1, 7, 30, 2]
    draws = torch.Generator().manual_seed(0)
    every = [[torch.randn(size, generator=draws) for size in sizes] for _ in range(9)]
    expected = [torch.zeros(size) for size in sizes]
    for n in (1, 2, 4, 5, 7, 8):
        for whole, one in zip(expected, every[n], strict=True):
            whole += one
    for count, bucket in ((1, 8), (2, 8), (3, 2**26)):
        for found in on_ranks(count, tmp_path / str(count), added_up_in_buckets, sizes, bucket):
            assert all(map(torch.equal, found, expected))


def added_up_by_teams(ranks: Ranks, size: int) -> list[Tensor]:
    """Three groups of three micro-batches, which the ranks of a team of all deal among themselves."""
    parameters = [nn.Parameter(torch.zeros(size))]
    draws = torch.Generator().manual_seed(0)
    every = [[torch.randn(size, generator=draws) for _ in range(3)] for _ in range(3)]
    total = OrderedSum(ranks, parameters, team=ranks.count)
    total.add([[[one] for one in group[ranks.rank :: ranks.count]] for group in every], slots=3, cells=2)
    total.store()
    return [gradient for gradient in taken(parameters) if gradient is not None]


def test_gradients_of_a_group_that_a_team_shares_are_added_in_order(tmp_path: Path) -> None:
    draws = torch.Generator().manual_seed(0)
    every = torch.stack([torch.randn(7, generator=draws) for _ in range(9)]).view(3, 3, 7)
    expected = torch.zeros(7)
    for first, second, third in every:
        expected += first + second + third
    for (found,) in on_ranks(2, tmp_path / "ranks", added_up_by_teams, 7):
        assert torch.equal(found, expected)


def test_a_digest_changes_with_any_bit() -> None:
    tensors = [torch.randn(3, 4), torch.zeros(5, dtype=torch.bfloat16)]
    before = digest(tensors)
    assert digest([value.clone() for value in tensors]) == before
    tensors[1][2] = -0.0
    assert digest(tensors) != before
