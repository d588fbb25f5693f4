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
from kvpo.engine.replay import ReplayRow, replay_context, replay_kind, replay_velocities
from kvpo.engine.rollout import Group
from kvpo.engine.stream import Stream
from kvpo.method.evidence import Credit, Evidence, Method, Metrics, Tables, asked_of, residual_table
from kvpo.models.finite import require_finite
from kvpo.training.policy import Policy, swapped_parameters


@dataclass(frozen=True)
class Learner:
    """Everything that turns the branches of a fork into gradients."""

    generator: StreamingGenerator
    policy: Policy
    average: Mapping[str, Tensor]
    """Moving average of the trained parameters."""
    method: Method
    settings: Any
    """The method's own."""
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

    root: Stream
    kind: tuple[int, int]
    """Lessons of one ``replay_kind`` can be replayed together."""
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
        group.root,
        replay_kind(learner.generator, group),
        trajectories.clean_MPFCHW,
        {branch: group.routed_pages(branch) for branch in routed},
        group.recent,
        credit,
        evidence,
        drift_rows,
    )


def micro_batches(learner: Learner, lessons: Sequence[Lesson]) -> list[list[tuple[int, int]]]:
    """(lesson, trajectory) pairs in micro-batches of at most ``learner.rows`` forward rows."""
    pairs = [(n, query) for n, lesson in enumerate(lessons) for query in range(len(lesson.evidence.past_Q))]
    size = trajectories_together(learner.rows, lessons[0].blocks, learner.steps) or len(pairs)
    return [pairs[at : at + size] for at in range(0, len(pairs), size)]


def trajectories_together(rows: int, blocks: int, steps: int) -> int:
    """Trajectories that one micro-batch of at most ``rows`` forward rows holds; 0: no limit."""
    return max(1, rows // (blocks * steps)) if rows else 0


def blocks_together(rows: int, blocks: int, steps: int) -> int:
    """Blocks of a window that one forward pass of at most ``rows`` rows holds, at least one; 0: all."""
    return min(blocks, max(1, rows // steps)) if rows else blocks


def lesson_batches(learner: Learner, lessons: Sequence[Lesson]) -> list[list[Lesson]]:
    """Lessons of one kind whose replay fits one micro-batch; one that does not fit stands alone."""
    batches: list[list[Lesson]] = []
    for lesson in lessons:
        alike = batches and batches[-1][-1].kind == lesson.kind
        if alike and len(micro_batches(learner, [*batches[-1], lesson])) == 1:
            batches[-1].append(lesson)
        else:
            batches.append([lesson])
    return batches


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


def velocities_of(learner: Learner, lessons: Sequence[Lesson]) -> list[Tensor]:
    """Velocities [Q, P, S, F, C, H, W] at every trajectory of the lessons, without gradients."""
    found: list[list[Tensor]] = [[] for _ in lessons]
    for pairs in micro_batches(learner, lessons):
        rows = [lessons[n].row(query) for n, query in pairs]
        for (n, _), velocity in zip(pairs, whole_velocities(learner, rows), strict=True):
            found[n].append(velocity)
    return [torch.stack(own) for own in found]


def tables_of(learner: Learner, lessons: Sequence[Lesson]) -> list[Tensor]:
    """The table [N, P, S] of every lesson under the current policy, without gradients."""
    tables: list[Tensor] = []
    for batch in lesson_batches(learner, lessons):
        found = zip(batch, velocities_of(learner, batch), strict=True)
        tables += [lesson.table(velocities) for lesson, velocities in found]
    return tables


def with_old_policy(learner: Learner, lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons with the velocities of the method's old policy in their targets, where they ask for it.

    That is the current policy, which has to be the one that generated the rollout, or the average.
    """
    if not any("old" in lesson.evidence.teachers for lesson in lessons):
        return list(lessons)
    known: list[Lesson] = []
    with learner.old_policy():
        for batch in lesson_batches(learner, lessons):
            found = zip(batch, velocities_of(learner, batch), strict=True)
            known += [lesson.taught("old", velocities) for lesson, velocities in found]
    return known


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
    learner: Learner, lessons: Sequence[Lesson], old_tables: Sequence[Tensor] | None
) -> tuple[list[Metrics], float]:
    """Add the gradient of the mean loss over the lessons to the parameters' ``.grad``.

    Args:
        old_tables: tables under the rollout policy; None while the current policy still is that policy (they
            are then the current tables, and every ratio is exactly 1).

    Returns:
        metrics per lesson and the velocity KL to the starting policy, averaged over lessons.
    """
    metrics: list[Metrics] = []
    drift, done = 0.0, 0
    for batch in lesson_batches(learner, lessons):
        old = None if old_tables is None else old_tables[done : done + len(batch)]
        done += len(batch)
        found = _accumulate_batch(learner, batch, old, len(lessons))
        metrics += [own for own, _ in found]
        drift += sum(kl for _, kl in found) / len(lessons)
    return metrics, drift


def _accumulate_batch(
    learner: Learner, batch: Sequence[Lesson], old: Sequence[Tensor] | None, lessons: int
) -> list[tuple[Metrics, float]]:
    """Backpropagate some of ``lessons`` lessons; the metrics and the velocity KL of each."""
    with learner.policy.reference():
        starting = list(zip(batch, velocities_of(learner, batch), strict=True))
    batch = [with_routed_teacher(learner, lesson.taught("reference", found)) for lesson, found in starting]
    references = [
        lesson.table(found, " of the starting policy")
        for lesson, (_, found) in zip(batch, starting, strict=True)
    ]

    def differentiated(tables: Sequence[Tensor]) -> list[Differentiated]:
        """Every lesson's table [N, P, S] under the current policy, differentiated."""
        before = tables if old is None else old
        return [differentiate(learner, *own) for own in zip(batch, tables, before, references, strict=True)]

    batches = micro_batches(learner, batch)
    coefficients: list[Tensor] | None = None
    if learner.method.linear:  # the loss has the same gradient at any table
        coefficients = [found.gradient for found in differentiated(references)]
    elif len(batches) > 1 or blocks_together(learner.rows, batch[0].blocks, batch[0].steps) < batch[0].blocks:
        # The loss couples cells, so the whole table must be known before any backward.
        coefficients = [found.gradient for found in differentiated(tables_of(learner, batch))]
    tables = [torch.zeros_like(table) for table in references]
    for pairs in batches:
        rows = [batch[n].row(query) for n, query in pairs]
        with closing(replayed(learner, rows, gradients=True)) as parts:
            for blocks, velocities in parts:
                cells = _cells(batch, pairs, blocks, velocities)
                for n, place, part in cells:
                    tables[n][place] = part.detach()
                if coefficients is None:
                    coefficients = [found.gradient for found in differentiated(tables)]
                loss = torch.stack([(coefficients[n][place] * part).sum() for n, place, part in cells]).sum()
                if loss.requires_grad:
                    (loss / lessons).backward()
    return [(found.metrics, found.drift) for found in differentiated(tables)]


def _cells(
    batch: Sequence[Lesson], pairs: Sequence[tuple[int, int]], blocks: slice, velocities_RPSFCHW: Tensor
) -> list[tuple[int, tuple[list[int], slice], Tensor]]:
    """(lesson, place in its table, the cells [N', P', S] there) that a micro-batch of trajectories gives."""
    found = []
    for n, lesson in enumerate(batch):
        places = {query: row for row, (owner, query) in enumerate(pairs) if owner == n}
        evidence = lesson.evidence
        numbers = [number for number, query in enumerate(evidence.query_N) if query in places]
        if numbers:
            place = (numbers, blocks)
            asked = velocities_RPSFCHW[[places[evidence.query_N[number]] for number in numbers]]
            table = residual_table(evidence.weights_NPS[place], evidence.targets_NPSFCHW[place], asked)
            found.append((n, place, table))
    return found


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
