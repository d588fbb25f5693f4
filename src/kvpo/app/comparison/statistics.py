"""Tests of one arm against another, or against chance. Runs and prompts both vary: each has its test."""

import math
from collections.abc import Sequence
from itertools import combinations
from statistics import mean

import torch
from torch import Tensor

from kvpo.engine.noise import keyed_generator

MOST_RELABELLINGS = 20_000
"""Up to this many relabellings of runs are all counted; beyond it, PERMUTATIONS are drawn."""
PERMUTATIONS = 10_000


def relabelling_p(one_S: Sequence[float], other_S: Sequence[float]) -> float:
    """Two-sided p-value of the difference in means between runs, by permuting their labels.

    Its smallest value for S runs each is 2 / C(2S, S): 0.33 for two, 0.008 for five.
    """
    runs, size = torch.tensor([*one_S, *other_S], dtype=torch.float64), len(one_S)
    if math.comb(len(runs), size) <= MOST_RELABELLINGS:
        chosen = torch.tensor(list(combinations(range(len(runs)), size)))
    else:
        draws = keyed_generator("relabelling", len(runs))
        keys = torch.rand(PERMUTATIONS, len(runs), generator=draws)
        keys[0] = torch.arange(len(runs))  # the observed labels
        chosen = keys.argsort(1)[:, :size]
    firsts = runs[chosen].sum(1)
    differences = firsts / size - (runs.sum() - firsts) / (len(runs) - size)
    observed = mean(one_S) - mean(other_S)
    return float((differences.abs() >= abs(observed) - 1e-12).double().mean())


def sign_flip_p(difference_N: Tensor) -> float:
    """Two-sided p-value of the mean paired difference, by flipping the sign of each prompt's difference."""
    difference_N = difference_N.double()
    draws = keyed_generator("sign flips", len(difference_N))
    signs = 2.0 * torch.randint(2, (PERMUTATIONS, len(difference_N)), generator=draws).double() - 1
    observed = difference_N.mean().abs() - 1e-12
    return (1 + int(((signs @ difference_N / len(difference_N)).abs() >= observed).sum())) / (
        1 + PERMUTATIONS
    )


def permutation_p(one_SN: Tensor, other_SN: Tensor) -> float:
    """Two-sided p-value of the difference between two arms' gains ``[seeds, prompts]`` on the same prompts.

    The larger of two p-values: one from relabelling runs, one from flipping the sign of each prompt's
    difference (averaged over runs). A difference must hold in both tests, since runs share prompts and
    prompts share runs.
    """
    of_runs = relabelling_p(one_SN.double().mean(1).tolist(), other_SN.double().mean(1).tolist())
    return max(of_runs, sign_flip_p(one_SN.double().mean(0) - other_SN.double().mean(0)))


def least_p(seeds: int) -> float:
    """The smallest p-value that a difference between two arms of ``seeds`` runs each can have."""
    return 2 / math.comb(2 * seeds, seeds)
