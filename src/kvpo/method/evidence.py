"""The seam between a method and its trainer: evidence in, one table of squared residuals out.

Every method asks the model for the same thing: at these states, in the deployment context, how far is your
velocity from this target?

    table[n, b, s] = w[n, b, s] mean || target[n, b, s] - v_theta(state[n, b, s]) ||^2

A method says which states, targets and weights (``Evidence``), and gives a scalar loss on the table. The
trainer replays the states, differentiates the loss on the table's numbers and backpropagates its cells in
micro-batches, which is exact. The mean runs over the d elements of a block. docs/method.md, "One table", has
the rows of every method.

Axes: M members (G branches, then the anchor), Q replayed trajectories, N rows of the table, P blocks of the
window, S solver steps, F C H W one block.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Generic

import torch
from torch import Tensor

from kvpo.method.settings import MethodSettings, Own


@dataclass(frozen=True)
class Trajectories:
    """The members of one fork over the explored window, the anchor last."""

    states_MPSFCHW: Tensor
    """Solver states, the first of each block being pure noise."""
    velocities_MPSFCHW: Tensor
    """Each member's own velocity at each state, in the context that it was generated in."""
    clean_MPFCHW: Tensor
    """Clean latents of the window."""
    sigmas: tuple[float, ...]
    """Noise levels of the S states, falling from 1; the last step lands on 0."""
    noise: float = 0.0
    """Strength of the noise that distinguishes the branches; unused for routed branches."""

    @property
    def anchor(self) -> int:
        """Index of the unrouted member."""
        return len(self.states_MPSFCHW) - 1

    def levels(self, steps: int) -> Tensor:
        """Noise levels of the first ``steps`` states, shaped to broadcast over them: float64 [1, 1, S]."""
        device = self.states_MPSFCHW.device
        return torch.tensor(self.sigmas[:steps], dtype=torch.float64, device=device).view(1, 1, steps)


@dataclass(frozen=True)
class Credit:
    """The branches of one fork that are trained on, and their advantages."""

    branches: tuple[int, ...]
    advantages_G: Tensor
    """Advantages of the selected branches."""
    all_advantages_G: Tensor
    """Advantages of every branch, before selection."""
    gap_G: Tensor
    """Rank of the selected branches under the first reward minus their mean rank under the others."""
    withheld: int = 0
    """Number of branches that lost a positive advantage to selective fusion."""

    def advantages_N(self, branch_N: Sequence[int], like: Tensor) -> Tensor:
        """Advantages of a table's rows, [N]."""
        return self.advantages_G.to(like)[[self.branches.index(branch) for branch in branch_N]]


def no_credit(branches: int) -> Credit:
    """All branches with equal advantages, for methods without a reward and for checks."""
    zeros = torch.zeros(branches)
    return Credit(tuple(range(branches)), zeros, zeros, zeros)


@dataclass(frozen=True)
class Evidence:
    """The states at which the policy is evaluated, and the target velocities there.

    A row's target is ``targets_NPSFCHW`` plus ``share_N`` times the velocity of its ``teacher_N`` at the same
    states: "" (none), "old" (the old policy), "reference" (the starting policy) or "routed" (the policy
    itself, without gradient, under the routed history of the row's branch). Weights are float32 or wider.
    """

    states_QPSFCHW: Tensor
    past_Q: tuple[int, ...]
    """Member whose own earlier blocks each trajectory is replayed after."""
    query_N: tuple[int, ...]
    """Trajectory at which each row is evaluated."""
    branch_N: tuple[int, ...]
    """Branch that each row belongs to; -1: no branch."""
    targets_NPSFCHW: Tensor
    weights_NPS: Tensor
    teacher_N: tuple[str, ...]
    share_N: tuple[float, ...]

    @property
    def teachers(self) -> set[str]:
        """Policies whose velocities the targets need."""
        return set(self.teacher_N) - {""}

    def with_teacher(self, teacher: str, velocities_NPSFCHW: Tensor) -> "Evidence":
        """The same rows with one teacher's velocities added to the targets."""
        of_teacher = [name == teacher for name in self.teacher_N]
        share = [s if asked else 0.0 for s, asked in zip(self.share_N, of_teacher, strict=True)]
        wide = torch.promote_types(velocities_NPSFCHW.dtype, torch.float32)
        share_N = torch.tensor(share, dtype=wide, device=velocities_NPSFCHW.device)
        added = share_N.view(-1, *(1,) * (velocities_NPSFCHW.dim() - 1)) * velocities_NPSFCHW
        rest = tuple("" if asked else name for name, asked in zip(self.teacher_N, of_teacher, strict=True))
        return replace(self, targets_NPSFCHW=self.targets_NPSFCHW + added, teacher_N=rest)


def evidence_of(
    states_QPSFCHW: Tensor,
    past_Q: Sequence[int],
    targets_NPSFCHW: Tensor,
    branch_N: Sequence[int],
    *,
    query_N: Sequence[int] | None = None,
    weights: float | Tensor = 1.0,
    teacher: str = "",
    share_N: Sequence[float] | None = None,
) -> Evidence:
    """Build evidence with one row per trajectory, in order, unless ``query_N`` says otherwise.

    ``weights`` broadcasts over [N, P, S].
    """
    rows = len(targets_NPSFCHW)
    own = weights.dtype if isinstance(weights, Tensor) else torch.float32
    wide = torch.promote_types(torch.promote_types(states_QPSFCHW.dtype, torch.float32), own)
    weights_NPS = torch.as_tensor(weights, dtype=wide, device=states_QPSFCHW.device)
    return Evidence(
        states_QPSFCHW,
        tuple(past_Q),
        tuple(range(rows)) if query_N is None else tuple(query_N),
        tuple(branch_N),
        targets_NPSFCHW,
        weights_NPS.expand(targets_NPSFCHW.shape[:3]),
        (teacher,) * rows,
        (1.0 if teacher else 0.0,) * rows if share_N is None else tuple(share_N),
    )


def joined_evidence(first: Evidence, second: Evidence) -> Evidence:
    """The rows of both; a trajectory that both evaluate (same past, same states) is replayed once."""
    states, past_Q, moved = list(first.states_QPSFCHW), list(first.past_Q), []
    for past, own in zip(second.past_Q, second.states_QPSFCHW, strict=True):
        known = (q for q, other in enumerate(states) if past_Q[q] == past and torch.equal(other, own))
        place = next(known, len(states))
        if place == len(states):
            past_Q.append(past)
            states.append(own)
        moved.append(place)
    return Evidence(
        torch.stack(states),
        tuple(past_Q),
        first.query_N + tuple(moved[q] for q in second.query_N),
        first.branch_N + second.branch_N,
        torch.cat([first.targets_NPSFCHW, second.targets_NPSFCHW]),
        torch.cat([first.weights_NPS, second.weights_NPS]),
        first.teacher_N + second.teacher_N,
        first.share_N + second.share_N,
    )


def drift_evidence(states_QPSFCHW: Tensor, past_Q: Sequence[int]) -> Evidence:
    """Rows whose table sums to mean || v_theta - v_ref ||^2 at the given states: the velocity KL."""
    rows, blocks, steps = states_QPSFCHW.shape[:3]
    zero = torch.zeros_like(states_QPSFCHW)
    weight = 1 / (rows * blocks * steps)
    return evidence_of(states_QPSFCHW, past_Q, zero, [-1] * rows, weights=weight, teacher="reference")


def anchor_drift(
    trajectories: Trajectories, credit: Credit, evidence: Evidence, settings: object
) -> Evidence:
    """The velocity KL at the anchor's states: unlike a simplex KL, it sees drift that all branches share."""
    anchor, steps = trajectories.anchor, evidence.states_QPSFCHW.shape[2]
    return drift_evidence(trajectories.states_MPSFCHW[[anchor], :, :steps], [anchor])


def residual_table(weights_NPS: Tensor, targets_NPSFCHW: Tensor, velocities_NPSFCHW: Tensor) -> Tensor:
    """w mean || target - v ||^2 over the elements of a block: [N, P, S], in the widest type of the three."""
    wide = torch.promote_types(targets_NPSFCHW.dtype, velocities_NPSFCHW.dtype)
    wide = torch.promote_types(wide, weights_NPS.dtype)
    squared = (targets_NPSFCHW.to(wide) - velocities_NPSFCHW.to(wide)).square()
    return weights_NPS.to(wide) * squared.mean(dim=(-4, -3, -2, -1))


@dataclass(frozen=True)
class Tables:
    """A method's rows under three policies, [N, P, S] each; only ``now`` carries gradients."""

    now: Tensor
    old: Tensor
    """Under the policy that generated the rollout; equal to ``now`` in the first step after it."""
    reference: Tensor
    """Under the starting policy."""
    branch_N: tuple[int, ...]
    """Branch that each row belongs to."""

    def per_branch(self, branches: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Sums of every branch's cells, [G] each: now, old, reference."""
        at = [tuple(branches).index(branch) for branch in self.branch_N]
        rows = torch.tensor(at, device=self.now.device)

        def sums(table_NPS: Tensor) -> Tensor:
            return table_NPS.new_zeros(len(branches)).index_add(0, rows, table_NPS.sum((1, 2)))

        return sums(self.now), sums(self.old.detach()), sums(self.reference.detach())


Metrics = dict[str, float]


@dataclass(frozen=True)
class Metric:
    """A number that a method reports for each group."""

    meaning: str
    """One sentence, as the report shows it."""
    largest: bool = False
    """An update reports the maximum over its groups instead of the mean."""


@dataclass(frozen=True)
class Method(Generic[Own]):
    """One way to learn from the branches of a fork; ``Own`` is its section of settings."""

    evidence: Callable[[Trajectories, Credit, MethodSettings[Own], torch.Generator], Evidence]
    """(trajectories, credit, settings, generator) -> the evidence to evaluate the policy on."""
    loss: Callable[[Tables, Credit, MethodSettings[Own]], tuple[Tensor, Metrics]]
    """(tables, credit, settings) -> a scalar to minimise, and metrics."""
    metrics: Mapping[str, Metric] = field(default_factory=dict)
    drift: Callable[[Trajectories, Credit, Evidence, MethodSettings[Own]], Evidence | None] = anchor_drift
    """(trajectories, credit, evidence, settings) -> rows of the velocity KL to the starting policy."""
    probabilities: Callable[[Tables, Credit, MethodSettings[Own]], Tensor] | None = None
    """(tables, credit, settings) -> the old policy's probabilities of the credit's branches, [G], or with the
    anchor last [G + 1]; None for methods that define none."""
    averaged_old: Callable[[MethodSettings[Own]], bool] = lambda settings: False
    """(settings) -> True if the "old" teacher is the policy's moving average, not the rollout policy."""
    rewarded: bool = True
    """False: every branch is trained on, regardless of its score."""
    arrivals: bool = False
    """The evidence also reads the state that the last of the solver steps leads to."""
    keep_pool: bool = False
    """Targets are computed under routed history, so its pages are kept until the replay."""
    imitates: bool = False
    """If only the best branches are kept, they are imitated: their advantages are not centred."""
    linear: bool = False
    """The loss is linear in the table, so its gradient needs no table; saves a pass in micro-batches."""
    residual: str = "residual"
    """Name of a branch's summed residuals, for the branch explorer of the report."""

    def asks(
        self,
        trajectories: Trajectories,
        credit: Credit,
        settings: MethodSettings[Own],
        generator: torch.Generator,
    ) -> tuple[Evidence, int]:
        """All evidence of one fork, and how many rows at its end are the velocity KL."""
        evidence = self.evidence(trajectories, credit, settings, generator)
        drift = self.drift(trajectories, credit, evidence, settings)
        return (evidence, 0) if drift is None else (joined_evidence(evidence, drift), len(drift.query_N))
