"""Is one arm better than another, and than chance? Runs and prompts are two sources of it, tested apart."""

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import mean, stdev

import torch
from torch import Tensor

from kvpo.engine.noise import keyed_generator

MOST_RELABELLINGS = 20_000
"""Relabellings of runs that are all counted; of more, PERMUTATIONS are drawn."""
PERMUTATIONS = 10_000


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation (ddof 1); None of fewer than two."""
    return stdev(values) if len(values) > 1 else None


def relabelling_p(one_S: Sequence[float], other_S: Sequence[float]) -> float:
    """Two-sided p of the difference of means of runs whose labels are exchangeable.

    Its least value is 2 / C(2S, S) of S runs each: 0.33 of two, 0.008 of five.
    """
    runs, size = torch.tensor([*one_S, *other_S], dtype=torch.float64), len(one_S)
    if math.comb(len(runs), size) <= MOST_RELABELLINGS:
        chosen = torch.tensor(list(combinations(range(len(runs)), size)))
    else:
        draws = keyed_generator("relabelling", len(runs))
        keys = torch.rand(PERMUTATIONS, len(runs), generator=draws)
        keys[0] = torch.arange(len(runs))  # as it was
        chosen = keys.argsort(1)[:, :size]
    firsts = runs[chosen].sum(1)
    differences = firsts / size - (runs.sum() - firsts) / (len(runs) - size)
    observed = mean(one_S) - mean(other_S)
    return float((differences.abs() >= abs(observed) - 1e-12).double().mean())


def sign_flip_p(difference_N: Tensor) -> float:
    """Two-sided p of the mean of paired differences whose signs are exchangeable prompt by prompt."""
    difference_N = difference_N.double()
    draws = keyed_generator("sign flips", len(difference_N))
    signs = 2.0 * torch.randint(2, (PERMUTATIONS, len(difference_N)), generator=draws).double() - 1
    observed = difference_N.mean().abs() - 1e-12
    return (1 + int(((signs @ difference_N / len(difference_N)).abs() >= observed).sum())) / (
        1 + PERMUTATIONS
    )


def permutation_p(one_SN: Tensor, other_SN: Tensor) -> float:
    """Two-sided p of the difference between two arms' gains ``[seeds, prompts]`` on the same prompts.

    The larger of two: of relabelled runs, and of flipped signs of each prompt's difference (averaged over
    runs). A difference has to hold against both, since runs share prompts and prompts share runs.
    """
    of_runs = relabelling_p(one_SN.double().mean(1).tolist(), other_SN.double().mean(1).tolist())
    return max(of_runs, sign_flip_p(one_SN.double().mean(0) - other_SN.double().mean(0)))


def least_p(seeds: int) -> float:
    """The least p that a difference between two arms of so many runs can have."""
    return 2 / math.comb(2 * seeds, seeds)
