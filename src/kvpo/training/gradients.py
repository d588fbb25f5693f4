"""The gradient of one rollout: a table of squared residuals, a loss on it, backward in micro-batches.

The loss is differentiated with respect to the table, and each micro-batch of cells is backpropagated with its
coefficients d loss / d table. This is exact, and only the activations of one micro-batch are in memory
(docs/method.md, "The gradient").
"""

import math
from collections.abc import Generator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.replay import ReplayRow, replay_context, replay_velocities
from kvpo.engine.rollout import Group
from kvpo.engine.stream import Stream
from kvpo.method.evidence import Credit, Evidence, Method, Metrics, Tables, residual_table
from kvpo.method.settings import MethodSettings
from kvpo.models.finite import require_finite
from kvpo.training.policy import Policy, swapped_parameters
from kvpo.training.ranks import ONE_TEAM, Teams
from kvpo.training.reduction import Gradients, taken


@dataclass(frozen=True)
class Learner:
    """Everything that turns the branches of a fork into gradients."""

    generator: StreamingGenerator
    policy: Policy
    average: Mapping[str, Tensor]
    """Moving average of the trained parameters."""
    method: Method[Any]
    settings: MethodSettings[Any]
    velocity_kl: float
    """Weight of the velocity KL to the starting policy."""
    rows: int
    """Forward rows (trajectories x blocks x steps) per forward pass; 0 means no limit."""
    teams: Teams = ONE_TEAM
    """The ranks that share this rank's groups and divide the replay of their trajectories."""


@dataclass(frozen=True)
class Lesson:
    """One fork to learn from: the method's evidence, followed by the rows of the velocity KL."""

    group: int
    """Index of its group in the rollout."""
    root: Stream
    past_MPFCHW: Tensor
    """Clean latents of the window for every member."""
    routed_pages: Mapping[int, tuple[tuple[int, ...], ...]]
    """Routed pages by branch, if the evidence needs its routed history; ``recent`` frames follow them."""
    recent: int
    credit: Credit
    evidence: Evidence
    drift_rows: int

    @property
    def blocks(self) -> int:
        """P, the number of blocks in the window."""
        return self.past_MPFCHW.shape[1]

    @property
    def steps(self) -> int:
        """S, the number of solver steps to learn from."""
        return self.evidence.states_QPSFCHW.shape[2]

    def row(self, query: int) -> ReplayRow:
        """The replay row of one of the evidence's trajectories."""
        evidence = self.evidence
        return ReplayRow(self.root, self.past_MPFCHW[evidence.past_Q[query]], evidence.states_QPSFCHW[query])

    def table(self, velocities_QPSFCHW: Tensor) -> Tensor:
        """The table [N, P, S] for a policy's velocities at every trajectory."""
        evidence = self.evidence
        asked = velocities_QPSFCHW[list(evidence.query_N)]
        return residual_table(evidence.weights_NPS, evidence.targets_NPSFCHW, asked)

    def require_finite(self, table_NPS: Tensor, policy: str = "") -> None:
        """Raise NonFiniteError, naming the prompt, if any number in a table is not finite."""
        named = {f"prompt {self.root.prompt.id}": table_NPS}
        way_out = "the policy has diverged, lower optim.lr, or try --optim.autocast none"
        require_finite(named, f"replayed residuals{policy}", way_out)

    def tables(self, now_NPS: Tensor, old_NPS: Tensor, reference_NPS: Tensor) -> Tables:
        """The rows that enter the method's loss, under three policies."""
        rows = len(self.evidence.query_N) - self.drift_rows
        return Tables(now_NPS[:rows], old_NPS[:rows], reference_NPS[:rows], self.evidence.branch_N[:rows])

    def taught(self, teacher: str, velocities_QPSFCHW: Tensor) -> "Lesson":
        """The lesson with a teacher's velocities, given at every trajectory, added to its targets."""
        known = self.evidence.with_teacher(teacher, velocities_QPSFCHW[list(self.evidence.query_N)])
        return replace(self, evidence=known)


def micro_batches(learner: Learner, lesson: Lesson) -> list[range]:
    """Split a lesson's trajectories into micro-batches of at most ``learner.rows`` forward rows.

    Every rank of a team gets one if there are enough trajectories.
    """
    every = len(lesson.evidence.past_Q)
    size = trajectories_together(learner.rows, lesson.blocks, learner.settings.steps) or every
    size = min(size, -(-every // learner.teams.team.count))
    return [range(at, min(at + size, every)) for at in range(0, every, size)]


def own_batches(learner: Learner, lesson: Lesson) -> list[range]:
    """This rank's micro-batches: equally many on each rank of its team, repeating the last one if needed."""
    return learner.teams.team.deal(micro_batches(learner, lesson))


def trajectories_together(rows: int, blocks: int, steps: int) -> int:
    """Trajectories that fit in a micro-batch of ``rows`` forward rows, at least one; 0 means no limit."""
    return max(1, rows // (blocks * steps)) if rows else 0


def blocks_together(rows: int, blocks: int, steps: int) -> int:
    """Blocks of a window that fit in a forward pass of ``rows`` rows, at least one; all if ``rows`` is 0."""
    return min(blocks, max(1, rows // steps)) if rows else blocks


def replayed(
    learner: Learner, rows: Sequence[ReplayRow], *, gradients: bool = False
) -> Generator[tuple[slice, Tensor]]:
    """Replay rows under the current policy, some blocks of the window at a time.

    Yields (blocks, velocities [R, P', S, F, C, H, W]). With ``gradients``, backpropagate each part before
    taking the next one. Always close the generator: it holds the rows' pages until then.
    """
    blocks, steps = rows[0].states_PSFCHW.shape[:2]
    size = blocks_together(learner.rows, blocks, steps)
    with replay_context(learner.generator, rows) as replay:
        for at in range(0, blocks, size):
            part = range(at, min(at + size, blocks))
            with torch.set_grad_enabled(gradients):
                velocities = replay_velocities(learner.generator, rows, replay, part)
            yield slice(part.start, part.stop), velocities


def whole_velocities(learner: Learner, rows: Sequence[ReplayRow]) -> Tensor:
    """Velocities [R, P, S, F, C, H, W] for all blocks of the window, without gradients."""
    return torch.cat([velocities for _, velocities in replayed(learner, rows)], 1)


def velocities_of(learner: Learner, lesson: Lesson) -> Tensor:
    """Velocities [Q, P, S, F, C, H, W] at the trajectories that this rank replays, without gradients.

    Trajectories that other ranks of its team replay are zero.
    """
    velocities = torch.zeros_like(lesson.evidence.states_QPSFCHW)
    for own in own_batches(learner, lesson):
        velocities[list(own)] = whole_velocities(learner, [lesson.row(query) for query in own])
    return velocities


def whole_table(learner: Learner, lesson: Lesson, table_NPS: Tensor, policy: str = "") -> Tensor:
    """Fill in, in place, the cells that the team's other ranks have replayed. Raises NonFiniteError."""
    queries = {query for own in own_batches(learner, lesson) for query in own}
    rows = [number for number, query in enumerate(lesson.evidence.query_N) if query in queries]
    for others, cells in learner.teams.team.gather((rows, table_NPS[rows].cpu()), "replaying"):
        table_NPS[others] = cells.to(table_NPS)
    lesson.require_finite(table_NPS, policy)
    return table_NPS


def table_of(learner: Learner, lesson: Lesson) -> Tensor:
    """The table [N, P, S] of a lesson under the current policy, without gradients. Raises NonFiniteError."""
    return whole_table(learner, lesson, lesson.table(velocities_of(learner, lesson)))


def lesson_of(learner: Learner, group: Group, credit: Credit, generator: torch.Generator) -> Lesson:
    """The lesson of a group; ``generator`` draws the random numbers of the evidence.

    If the method needs its old policy's velocities, they are added to the targets. The old policy is either
    the moving average or the current policy, which must then be the one that generated the rollout.
    """
    trajectories = group.trajectories
    evidence, drift_rows = learner.method.asks(trajectories, credit, learner.settings, generator)
    routed = credit.branches if "routed" in evidence.teachers else ()
    lesson = Lesson(
        group.index,
        group.root,
        trajectories.clean_MPFCHW,
        {branch: group.routed_pages(branch) for branch in routed},
        group.recent,
        credit,
        evidence,
        drift_rows,
    )
    if "old" not in evidence.teachers:
        return lesson
    averaged = learner.method.averaged_old(learner.settings)
    with swapped_parameters(learner.policy.parameters, learner.average) if averaged else nullcontext():
        return lesson.taught("old", velocities_of(learner, lesson))


def with_routed_teacher(learner: Learner, lesson: Lesson) -> Lesson:
    """Add the policy's own velocities under the branches' routed history to the lesson's targets."""
    evidence = lesson.evidence
    rows = [n for n, name in enumerate(evidence.teacher_N) if name == "routed"]
    if not rows:
        return lesson
    velocities = torch.zeros_like(evidence.targets_NPSFCHW)
    team, found = learner.teams.team, []
    mine = team.deal(rows)
    size = trajectories_together(learner.rows, lesson.blocks, learner.settings.steps) or len(mine)
    for at in range(0, len(mine), size):
        plain = [(lesson.row(evidence.query_N[n]), evidence.branch_N[n]) for n in mine[at : at + size]]
        some = [replace(row, routes=lesson.routed_pages[g], recent=lesson.recent) for row, g in plain]
        found += list(whole_velocities(learner, some).cpu())
    answers = team.in_order(found, "replaying")[: len(rows)]
    velocities[rows] = torch.stack(answers).to(velocities)
    return replace(lesson, evidence=evidence.with_teacher("routed", velocities))


def accumulate_gradients(
    learner: Learner,
    lesson: Lesson,
    old_table: Tensor | None,
    lessons: int,
    parts: list[Gradients] | None = None,
) -> tuple[Metrics, float]:
    """Add the gradient of a lesson's share of the mean loss over ``lessons`` to the parameters' ``.grad``.

    For a lesson that a team shares, this adds the gradient of this rank's micro-batches. ``old_table`` is the
    table under the rollout policy; None means that this is still the current policy, so that every ratio is
    exactly 1. ``parts`` receives the gradient of each micro-batch separately; None adds them up.

    Returns the lesson's metrics and its velocity KL to the starting policy, or nan if the lesson has none.
    """
    with learner.policy.reference():
        of_reference = velocities_of(learner, lesson)
    lesson = with_routed_teacher(learner, lesson.taught("reference", of_reference))
    reference = whole_table(learner, lesson, lesson.table(of_reference), " of the starting policy")

    def differentiated(table_NPS: Tensor) -> tuple[Tensor, Metrics, float]:
        """Differentiate the loss at a table under the current policy."""
        old = table_NPS if old_table is None else old_table
        return differentiate(learner, lesson, table_NPS, old, reference)

    batches, rank = micro_batches(learner, lesson), learner.teams.team.rank
    coefficients: Tensor | None = None
    if learner.method.linear:  # the loss has the same gradient at any table
        coefficients = differentiated(reference)[0]
    elif len(batches) > 1 or blocks_together(learner.rows, lesson.blocks, lesson.steps) < lesson.blocks:
        # The loss couples cells, so the whole table must be known before any backward.
        coefficients = differentiated(table_of(learner, lesson))[0]
    table = torch.zeros_like(reference)
    for number, queries in enumerate(own_batches(learner, lesson)):
        again = rank + number * learner.teams.team.count >= len(batches)  # a repeat of another rank's
        rows = [lesson.row(query) for query in queries]
        with closing(replayed(learner, rows, gradients=True)) as replay:
            for blocks, velocities in replay:
                place, cells = _cells(lesson, queries, blocks, velocities)
                table[place] = cells.detach()
                if coefficients is None:
                    coefficients = differentiated(table)[0]
                loss = (0.0 if again else 1.0) * (coefficients[place] * cells).sum()
                if loss.requires_grad:
                    (loss / lessons).backward()
        if parts is not None:
            parts.append(taken(list(learner.policy.parameters.values())))
    return differentiated(whole_table(learner, lesson, table))[1:]


def _cells(
    lesson: Lesson, queries: range, blocks: slice, velocities_RPSFCHW: Tensor
) -> tuple[tuple[list[int], slice], Tensor]:
    """The index of a micro-batch of trajectories in a lesson's table, and its cells there: [N', P', S]."""
    evidence = lesson.evidence
    numbers = [number for number, query in enumerate(evidence.query_N) if query in queries]
    place = (numbers, blocks)
    asked = velocities_RPSFCHW[[evidence.query_N[number] - queries.start for number in numbers]]
    return place, residual_table(evidence.weights_NPS[place], evidence.targets_NPSFCHW[place], asked)


def differentiate(
    learner: Learner, lesson: Lesson, now_NPS: Tensor, old_NPS: Tensor, reference_NPS: Tensor
) -> tuple[Tensor, Metrics, float]:
    """Differentiate the loss with respect to a lesson's table, given under three policies.

    Returns d loss / d table [N, P, S], including the velocity KL; the metrics; and the velocity KL alone, or
    nan if the lesson has none. Raises NonFiniteError.
    """
    lesson.require_finite(now_NPS)
    table = now_NPS.detach().requires_grad_()
    tables = lesson.tables(table, old_NPS.detach(), reference_NPS)
    with torch.enable_grad():
        loss, metrics = learner.method.loss(tables, lesson.credit, learner.settings)
        drift = table[len(tables.branch_N) :].sum()
        (gradient,) = torch.autograd.grad(loss + learner.velocity_kl * drift, table)
    return gradient, metrics, float(drift.detach()) if lesson.drift_rows else math.nan
