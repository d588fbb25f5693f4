"""A toy policy with a few parameters, forks sampled from it, and the trainer's route to gradients.

The velocity is v = W x + b + h p with h a number per block that stands for the history: the mean of the
trajectory's earlier clean blocks, or what a routed branch saw instead.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.method.evidence import Credit, Evidence, Method, Metrics, Tables, Trajectories, residual_table
from kvpo.method.flow import Step

SIGMAS = (1.0, 0.9375, 5 / 6, 0.625)
BRANCHES, BLOCKS, SHAPE = 4, 2, (2, 3, 2, 2)
ELEMENTS = 2 * 3 * 2 * 2

Parameters = tuple[Tensor, Tensor, Tensor]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parameters(seed: int, spread: float = 0.3, around: Parameters | None = None) -> Parameters:
    generator = seeded(seed)
    drawn = [spread * torch.randn(shape, generator=generator).double() for shape in ((3, 3), (3,), (3,))]
    start = around or (torch.zeros(3, 3).double(), torch.zeros(3).double(), torch.zeros(3).double())
    weight, bias, history = (at + change for at, change in zip(start, drawn, strict=True))
    return weight, bias, history


def velocity(policy: Parameters, x: Tensor, history: Tensor) -> Tensor:
    """[..., F, C, H, W] from states and one history number per element of the leading axes."""
    weight, bias, past = policy
    seen = history[..., None, None, None, None] * past[:, None, None] + bias[:, None, None]
    return torch.einsum("cd,...dhw->...chw", weight, x) + seen


def history_of(clean_PFCHW: Tensor) -> Tensor:
    """Mean of the earlier blocks, 0 before the first: [P]."""
    return torch.stack([clean_PFCHW[:b].mean() if b else clean_PFCHW.new_zeros(()) for b in range(BLOCKS)])


ROUTED = torch.linspace(-1, 1, BRANCHES * BLOCKS).double().view(BRANCHES, BLOCKS)
"""History numbers that the branches were routed."""


def sampled(policy: Parameters, step: Step, *, routed: bool = False, noise: float = 0.0) -> Trajectories:
    """A fork: branches differ in their steps' noise or, ``routed``, in their history; the anchor is last."""
    generator = seeded(7)
    initial = torch.randn(BLOCKS, *SHAPE, generator=generator).double()
    states, velocities, clean = [], [], []
    for member in range(BRANCHES + 1):
        done: list[Tensor] = []
        for block in range(BLOCKS):
            own = torch.stack([*done, *[initial[0]] * (BLOCKS - block)])
            history = ROUTED[member] if routed and member < BRANCHES else history_of(own)
            x = initial[block]
            for sigma, sigma_next in zip(SIGMAS, (*SIGMAS[1:], 0.0), strict=True):
                v = velocity(policy, x, history[block])
                states.append(x)
                velocities.append(v)
                x = step.rule(x, v, sigma, sigma_next, torch.randn(SHAPE, generator=generator).double())
            done.append(x)
        clean.append(torch.stack(done))
    shape = (BRANCHES + 1, BLOCKS, len(SIGMAS), *SHAPE)
    return Trajectories(
        torch.stack(states).view(shape),
        torch.stack(velocities).view(shape),
        torch.stack(clean),
        SIGMAS,
        noise,
    )


def credit(*branches: int, advantages: tuple[float, ...] = (1.0, -0.7, 0.4, -1.3)) -> Credit:
    """Credit of some branches."""
    values = torch.tensor(advantages, dtype=torch.float64)
    gap = torch.tensor([2.0, -1.0, 1.0, -2.0], dtype=torch.float64)
    chosen = list(branches)
    return Credit(branches, values[chosen], values, gap[chosen])


def replayed(policy: Parameters, trajectories: Trajectories, evidence: Evidence) -> Tensor:
    """A policy's velocities at every trajectory of the evidence, [Q, P, S, F, C, H, W]."""
    return torch.stack(
        [
            velocity(policy, states, history_of(trajectories.clean_MPFCHW[past])[:, None])
            for states, past in zip(evidence.states_QPSFCHW, evidence.past_Q, strict=True)
        ]
    )


@dataclass(frozen=True)
class Policies:
    """Parameters of the three policies; ``now`` requires gradients."""

    now: Parameters
    old: Parameters
    reference: Parameters


def policies(seed: int = 0, moved: float = 0.1) -> Policies:
    """Three policies near one another, none equal to another."""
    old = parameters(seed)
    now = parameters(seed + 1, moved, old)
    for tensor in now:
        tensor.requires_grad_()
    return Policies(now, old, parameters(seed + 2, moved, old))


def taught(evidence: Evidence, trajectories: Trajectories, known: Policies) -> Evidence:
    """The evidence with the velocities of its teachers in its targets."""
    for teacher in evidence.teachers:
        if teacher == "routed":
            asked = evidence.states_QPSFCHW[list(evidence.query_N)]
            routed = ROUTED[[max(branch, 0) for branch in evidence.branch_N]]
            velocities = velocity(known.now, asked, routed[:, :, None]).detach()
        else:
            found = replayed(vars(known)[teacher], trajectories, evidence)
            velocities = found[list(evidence.query_N)]
        evidence = evidence.with_teacher(teacher, velocities)
    return evidence


def table_of(policy: Parameters, trajectories: Trajectories, evidence: Evidence) -> Tensor:
    """The whole table [N, P, S] of one policy."""
    asked = replayed(policy, trajectories, evidence)[list(evidence.query_N)]
    return residual_table(evidence.weights_NPS, evidence.targets_NPSFCHW, asked)


Splits = Callable[[tuple[int, int, int]], list[tuple[slice, slice, slice]]]
ONE = slice(None)
SPLITS: dict[str, Splits] = {
    "everything at once": lambda shape: [(ONE, ONE, ONE)],
    "row by row": lambda shape: [(slice(n, n + 1), ONE, ONE) for n in range(shape[0])],
    "block by block": lambda shape: [(ONE, slice(b, b + 1), ONE) for b in range(shape[1])],
    "cell by cell": lambda shape: [
        (slice(n, n + 1), slice(b, b + 1), slice(s, s + 1))
        for n in range(shape[0])
        for b in range(shape[1])
        for s in range(shape[2])
    ],
}


def through_the_table(
    method: Method,
    settings: object,
    trajectories: Trajectories,
    evidence: Evidence,
    earned: Credit,
    known: Policies,
    splits: Splits,
) -> tuple[Tensor, Metrics, list[Tensor]]:
    """Loss, metrics and parameter gradients as a trainer gets them: numbers, coefficients, then cells."""
    now, old, reference = (
        table_of(policy, trajectories, evidence).detach()
        for policy in (known.now, known.old, known.reference)
    )
    now.requires_grad_()
    loss, metrics = method.loss(Tables(now, old, reference, evidence.branch_N), earned, settings)
    (coefficients,) = torch.autograd.grad(loss, now)
    gradients = [torch.zeros_like(tensor) for tensor in known.now]
    for part in splits(tuple(now.shape)):
        cells = table_of(known.now, trajectories, evidence)[part]
        found = torch.autograd.grad((coefficients[part] * cells).sum(), known.now)
        gradients = [total + share for total, share in zip(gradients, found, strict=True)]
    return loss.detach(), metrics, gradients


def relative_difference(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference over the largest expected number."""
    scale = max(float(tensor.abs().max()) for tensor in expected)
    assert scale > 0, "an expected gradient of zero proves nothing"
    return max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True)) / scale
