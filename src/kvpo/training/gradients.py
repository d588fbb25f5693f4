"""The gradient of one rollout: a table of squared residuals, a loss on it, backward in micro-batches.

The loss is differentiated on the table's numbers, and each micro-batch of cells is backpropagated with its
coefficients d loss / d table: exact, with the activations of one micro-batch in memory (docs/method.md, "The
gradient").
"""

from collections.abc import Generator, Mapping, Sequence
from contextlib import AbstractContextManager, closing, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.replay import ReplayRow, replay_context, replay_velocities
from kvpo.engine.rollout import Group
from kvpo.engine.stream import Stream
from kvpo.method.evidence import Credit, Evidence, Method, Metrics, Tables, asked_of, residual_table
from kvpo.method.settings import MethodSettings
from kvpo.models.finite import require_finite
from kvpo.training.policy import Policy, swapped_parameters


@dataclass(frozen=True)
class Learner:
    """Everything that turns the branches of a fork into gradients."""

    generator: StreamingGenerator
    policy: Policy
    average: Mapping[str, Tensor]
    """Moving average of the trained parameters."""
    method: Method[Any]
    settings: MethodSettings[Any]
    steps: int
    """First solver steps that count."""
    velocity_kl: float
    """Weight of the velocity KL to the starting policy."""
    rows: int
    """Forward rows (trajectories x blocks x steps) per forward pass; 0 means no limit."""

    def old_policy(self) -> AbstractContextManager[None]:
        """Inside, the model is what the method calls the old policy: as it is, or its moving average."""
        if self.method.averaged_old(self.settings):
            return swapped_parameters(self.policy.parameters, self.average)
        return nullcontext()


@dataclass(frozen=True)
class Lesson:
    """One fork to learn from: the method's evidence, followed by the rows of the velocity KL."""

    group: int
    """Position of its group among those of the rollout."""
    root: Stream
    past_MPFCHW: Tensor
    """Every member's clean latents of the window."""
    routed_pages: Mapping[int, tuple[tuple[int, ...], ...]]
    """Pages in the routed slots of branches whose routed history is asked about; ``recent`` frames follow."""
    recent: int
    credit: Credit
    evidence: Evidence
    drift_rows: int

    @property
    def blocks(self) -> int:
        """P, the blocks of the window."""
        return self.past_MPFCHW.shape[1]

    @property
    def steps(self) -> int:
        """S, the solver steps that are learned from."""
        return self.evidence.states_QPSFCHW.shape[2]

    def row(self, query: int) -> ReplayRow:
        """One of the trajectories that the evidence asks at."""
        evidence = self.evidence
        return ReplayRow(self.root, self.past_MPFCHW[evidence.past_Q[query]], evidence.states_QPSFCHW[query])

    def routed_row(self, number: int) -> ReplayRow:
        """The trajectory that a row of the table asks at, under the history that its branch was routed."""
        pages = self.routed_pages[self.evidence.branch_N[number]]
        return replace(self.row(self.evidence.query_N[number]), routes=pages, recent=self.recent)

    def table(self, velocities_QPSFCHW: Tensor, policy: str = "") -> Tensor:
        """The table [N, P, S] for a policy's velocities at every trajectory. Raises NonFiniteError."""
        evidence = self.evidence
        asked = velocities_QPSFCHW[list(evidence.query_N)]
        table = residual_table(evidence.weights_NPS, evidence.targets_NPSFCHW, asked)
        self.require_finite(table, policy)
        return table

    def require_finite(self, table_NPS: Tensor, policy: str = "") -> None:
        """Raise NonFiniteError, naming the prompt, where a number of a table is not finite."""
        named = {f"prompt {self.root.prompt.id}": table_NPS}
        way_out = "the policy has diverged, lower optim.lr, or try --optim.autocast none"
        require_finite(named, f"replayed residuals{policy}", way_out)

    def tables(self, now_NPS: Tensor, old_NPS: Tensor, reference_NPS: Tensor) -> Tables:
        """The rows that the method's loss is about, under three policies."""
        rows = len(self.evidence.query_N) - self.drift_rows
        return Tables(now_NPS[:rows], old_NPS[:rows], reference_NPS[:rows], self.evidence.branch_N[:rows])

    def taught(self, teacher: str, velocities_QPSFCHW: Tensor) -> "Lesson":
        """The lesson once the velocities of a teacher are known at every trajectory."""
        known = self.evidence.with_teacher(teacher, velocities_QPSFCHW[list(self.evidence.query_N)])
        return replace(self, evidence=known)


def lesson_of(learner: Learner, group: Group, credit: Credit, generator: torch.Generator) -> Lesson:
    """The lesson of a group; ``generator`` draws the random numbers of the evidence."""
    trajectories = group.trajectories
    evidence, drift_rows = asked_of(
        learner.method, trajectories, credit, learner.steps, learner.settings, generator
    )
    routed = credit.branches if "routed" in evidence.teachers else ()
    return Lesson(
        group.index,
        group.root,
        trajectories.clean_MPFCHW,
        {branch: group.routed_pages(branch) for branch in routed},
        group.recent,
        credit,
        evidence,
        drift_rows,
    )


def micro_batches(learner: Learner, lesson: Lesson) -> list[range]:
    """The trajectories of a lesson in micro-batches of at most ``learner.rows`` forward rows."""
    every = len(lesson.evidence.past_Q)
    size = trajectories_together(learner.rows, lesson.blocks, learner.steps) or every
    return [range(at, min(at + size, every)) for at in range(0, every, size)]


def trajectories_together(rows: int, blocks: int, steps: int) -> int:
    """Trajectories that one micro-batch of at most ``rows`` forward rows holds; 0: no limit."""
    return max(1, rows // (blocks * steps)) if rows else 0


def blocks_together(rows: int, blocks: int, steps: int) -> int:
    """Blocks of a window that one forward pass of at most ``rows`` rows holds, at least one; 0: all."""
    return min(blocks, max(1, rows // steps)) if rows else blocks


def replayed(
    learner: Learner, rows: Sequence[ReplayRow], *, gradients: bool = False
) -> Generator[tuple[slice, Tensor]]:
    """Replay rows under the current policy, some blocks of the window at a time.

    Yields (blocks, velocities [R, P', S, F, C, H, W]). With ``gradients``, backpropagate each part before the
    next one is taken, and close the generator whatever happens: until then it holds the rows' pages.
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
    """Velocities [R, P, S, F, C, H, W] in all blocks of the window, without gradients."""
    return torch.cat([velocities for _, velocities in replayed(learner, rows)], 1)


def velocities_of(learner: Learner, lesson: Lesson) -> Tensor:
    """Velocities [Q, P, S, F, C, H, W] at every trajectory of a lesson, without gradients."""
    batches = micro_batches(learner, lesson)
    return torch.cat([whole_velocities(learner, [lesson.row(query) for query in own]) for own in batches])


def table_of(learner: Learner, lesson: Lesson) -> Tensor:
    """The table [N, P, S] of a lesson under the current policy, without gradients."""
    return lesson.table(velocities_of(learner, lesson))


def with_old_policy(learner: Learner, lesson: Lesson) -> Lesson:
    """The lesson with the velocities of the method's old policy in its targets, where it asks for them.

    That is the current policy, which has to be the one that generated the rollout, or the average.
    """
    if "old" not in lesson.evidence.teachers:
        return lesson
    with learner.old_policy():
        return lesson.taught("old", velocities_of(learner, lesson))


def with_routed_teacher(learner: Learner, lesson: Lesson) -> Lesson:
    """The lesson with the policy's own velocities under the branches' routed history in its targets."""
    rows = [n for n, name in enumerate(lesson.evidence.teacher_N) if name == "routed"]
    if not rows:
        return lesson
    velocities = torch.zeros_like(lesson.evidence.targets_NPSFCHW)
    size = trajectories_together(learner.rows, lesson.blocks, learner.steps) or len(rows)
    for at in range(0, len(rows), size):
        some = rows[at : at + size]
        velocities[some] = whole_velocities(learner, [lesson.routed_row(n) for n in some])
    return replace(lesson, evidence=lesson.evidence.with_teacher("routed", velocities))


def accumulate_gradients(
    learner: Learner, lesson: Lesson, old_table: Tensor | None, lessons: int
) -> tuple[Metrics, float]:
    """Add the gradient of a lesson's share of the mean loss over ``lessons`` to the parameters' ``.grad``.

    Args:
        old_table: the table under the rollout policy; None while the current policy still is that policy (it
            is then the current table, and every ratio is exactly 1).

    Returns:
        metrics of the lesson and its velocity KL to the starting policy.
    """
    with learner.policy.reference():
        of_reference = velocities_of(learner, lesson)
    lesson = with_routed_teacher(learner, lesson.taught("reference", of_reference))
    reference = lesson.table(of_reference, " of the starting policy")

    def differentiated(table_NPS: Tensor) -> Differentiated:
        """The table under the current policy, differentiated."""
        return differentiate(
            learner, lesson, table_NPS, table_NPS if old_table is None else old_table, reference
        )

    batches = micro_batches(learner, lesson)
    coefficients: Tensor | None = None
    if learner.method.linear:  # the loss has the same gradient at any table
        coefficients = differentiated(reference).gradient
    elif len(batches) > 1 or blocks_together(learner.rows, lesson.blocks, lesson.steps) < lesson.blocks:
        # The loss couples cells, so the whole table must be known before any backward.
        coefficients = differentiated(table_of(learner, lesson)).gradient
    table = torch.zeros_like(reference)
    for queries in batches:
        rows = [lesson.row(query) for query in queries]
        with closing(replayed(learner, rows, gradients=True)) as parts:
            for blocks, velocities in parts:
                place, cells = _cells(lesson, queries, blocks, velocities)
                table[place] = cells.detach()
                if coefficients is None:
                    coefficients = differentiated(table).gradient
                loss = (coefficients[place] * cells).sum()
                if loss.requires_grad:
                    (loss / lessons).backward()
    found = differentiated(table)
    return found.metrics, found.drift


def _cells(
    lesson: Lesson, queries: range, blocks: slice, velocities_RPSFCHW: Tensor
) -> tuple[tuple[list[int], slice], Tensor]:
    """The place of a micro-batch of trajectories in a lesson's table, and its cells there: [N', P', S]."""
    evidence = lesson.evidence
    numbers = [number for number, query in enumerate(evidence.query_N) if query in queries]
    place = (numbers, blocks)
    asked = velocities_RPSFCHW[[evidence.query_N[number] - queries.start for number in numbers]]
    return place, residual_table(evidence.weights_NPS[place], evidence.targets_NPSFCHW[place], asked)


@dataclass(frozen=True)
class Differentiated:
    """The loss of a lesson, differentiated on its table."""

    gradient: Tensor
    """d loss / d table, the velocity KL included: [N, P, S]."""
    metrics: Metrics
    drift: float
    """Velocity KL to the starting policy."""


def differentiate(
    learner: Learner, lesson: Lesson, now_NPS: Tensor, old_NPS: Tensor, reference_NPS: Tensor
) -> Differentiated:
    """Differentiate the loss on a lesson's table, given under three policies. Raises NonFiniteError."""
    lesson.require_finite(now_NPS)
    table = now_NPS.detach().requires_grad_()
    tables = lesson.tables(table, old_NPS.detach(), reference_NPS)
    with torch.enable_grad():
        loss, metrics = learner.method.loss(tables, lesson.credit, learner.settings)
        drift = table[len(tables.branch_N) :].sum()
        (gradient,) = torch.autograd.grad(loss + learner.velocity_kl * drift, table)
    return Differentiated(gradient, metrics, float(drift.detach()))
