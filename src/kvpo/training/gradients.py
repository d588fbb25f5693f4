"""The gradient of one rollout: a table of squared residuals, a loss on it, backward in micro-batches.

The loss is differentiated on the table's numbers, and each micro-batch of cells is backpropagated with its
coefficients d loss / d table: exact, with the activations of one micro-batch in memory (docs/method.md, "The
gradient").
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.replay import ReplayRow, replay_context, replay_kind, replay_velocities
from kvpo.engine.rollout import Group
from kvpo.engine.stream import Stream
from kvpo.method.evidence import (
    Credit,
    Evidence,
    Method,
    Metrics,
    Tables,
    asked_of,
    residual_table,
)
from kvpo.models.finite import require_finite
from kvpo.training.policy import Policy


@dataclass(frozen=True)
class Learner:
    """Everything that turns the branches of a fork into gradients."""

    generator: StreamingGenerator
    policy: Policy
    method: Method
    settings: Any
    """The method's own."""
    steps: int
    """First solver steps that count."""
    velocity_kl: float
    """Weight of the velocity KL to the starting policy."""
    rows: int
    """Forward rows (trajectories x blocks x steps) per forward pass; 0 means no limit."""


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

    @property
    def method_rows(self) -> int:
        """Rows of the table that the method's loss is about."""
        return len(self.evidence.query_N) - self.drift_rows

    def row(self, query: int) -> ReplayRow:
        """One of the trajectories that the evidence asks at."""
        evidence = self.evidence
        return ReplayRow(self.root, self.past_MPFCHW[evidence.past_Q[query]], evidence.states_QPSFCHW[query])

    def routed_row(self, number: int) -> ReplayRow:
        """The trajectory that a row of the table asks at, under the history that its branch was routed."""
        pages = self.routed_pages[self.evidence.branch_N[number]]
        return replace(self.row(self.evidence.query_N[number]), routes=pages, recent=self.recent)

    def table(self, velocities_QPSFCHW: Tensor) -> Tensor:
        """The table [N, P, S] for the velocities at every trajectory."""
        evidence = self.evidence
        asked = velocities_QPSFCHW[list(evidence.query_N)]
        return residual_table(evidence.weights_NPS, evidence.targets_NPSFCHW, asked)


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


@contextmanager
def replayed(
    learner: Learner, rows: Sequence[ReplayRow], *, gradients: bool = False
) -> Iterator[Iterator[tuple[range, Tensor]]]:
    """Replay rows under the current policy, some blocks of the window at a time.

    Yields (blocks, velocities [R, P', S, F, C, H, W]). With ``gradients``, backpropagate each part, inside
    the context, before the next one is taken.
    """
    blocks, steps = rows[0].states_PSFCHW.shape[:2]
    size = blocks_together(learner.rows, blocks, steps)
    with replay_context(learner.generator, rows) as replay:

        def parts() -> Iterator[tuple[range, Tensor]]:
            for at in range(0, blocks, size):
                part = range(at, min(at + size, blocks))
                with torch.set_grad_enabled(gradients):
                    velocities = replay_velocities(learner.generator, rows, replay, part)
                yield part, velocities

        yield parts()


def velocities_of(learner: Learner, lessons: Sequence[Lesson]) -> list[Tensor]:
    """Velocities [Q, P, S, F, C, H, W] at every trajectory of the lessons, without gradients."""
    found: list[list[Tensor]] = [[] for _ in lessons]
    for pairs in micro_batches(learner, lessons):
        rows = [lessons[n].row(query) for n, query in pairs]
        for (n, _), velocity in zip(pairs, _whole(learner, rows), strict=True):
            found[n].append(velocity)
    return [torch.stack(own) for own in found]


def _whole(learner: Learner, rows: Sequence[ReplayRow]) -> Tensor:
    with replayed(learner, rows) as parts:
        return torch.cat([velocities for _, velocities in parts], 1)


def tables_of(learner: Learner, lessons: Sequence[Lesson]) -> list[Tensor]:
    """The table [N, P, S] of every lesson under the current policy, without gradients."""
    tables: list[Tensor] = []
    for batch in lesson_batches(learner, lessons):
        found = zip(batch, velocities_of(learner, batch), strict=True)
        own = [lesson.table(velocities) for lesson, velocities in found]
        _require_finite(batch, own)
        tables += own
    return tables


def with_old_policy(learner: Learner, lessons: Sequence[Lesson]) -> list[Lesson]:
    """The lessons with the velocities of the old policy, which is the current one, in their targets."""
    if not any("old" in lesson.evidence.teachers for lesson in lessons):
        return list(lessons)
    known: list[Lesson] = []
    for batch in lesson_batches(learner, lessons):
        known += _taught(batch, "old", velocities_of(learner, batch))
    return known


def _require_finite(batch: Sequence[Lesson], tables: Sequence[Tensor], policy: str = "") -> None:
    named = {f"prompt {item.root.prompt.id}": own for item, own in zip(batch, tables, strict=True)}
    source = f"replayed residuals{policy}"
    require_finite(named, source, "the policy has diverged, lower optim.lr, or try --optim.autocast none")


def _taught(lessons: Sequence[Lesson], teacher: str, velocities: Sequence[Tensor]) -> list[Lesson]:
    """The lessons once the velocities [Q, ...] of one teacher are known."""
    return [
        replace(lesson, evidence=lesson.evidence.with_teacher(teacher, found[list(lesson.evidence.query_N)]))
        for lesson, found in zip(lessons, velocities, strict=True)
    ]


def with_routed_teacher(learner: Learner, lesson: Lesson) -> Lesson:
    """The lesson with the policy's own velocities under the branches' routed history in its targets."""
    rows = [n for n, name in enumerate(lesson.evidence.teacher_N) if name == "routed"]
    if not rows:
        return lesson
    velocities = torch.zeros_like(lesson.evidence.targets_NPSFCHW)
    size = trajectories_together(learner.rows, lesson.blocks, learner.steps) or len(rows)
    for at in range(0, len(rows), size):
        some = rows[at : at + size]
        velocities[some] = _whole(learner, [lesson.routed_row(n) for n in some])
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
        found, kl = _accumulate_batch(learner, batch, old, len(lessons))
        metrics += found
        drift += kl / len(lessons)
    return metrics, drift


def _accumulate_batch(
    learner: Learner, batch: Sequence[Lesson], old: Sequence[Tensor] | None, lessons: int
) -> tuple[list[Metrics], float]:
    with learner.policy.reference():
        of_reference = velocities_of(learner, batch)
    batch = [with_routed_teacher(learner, item) for item in _taught(batch, "reference", of_reference)]
    references = [lesson.table(found) for lesson, found in zip(batch, of_reference, strict=True)]
    batches = micro_batches(learner, batch)
    now: list[Tensor] | None = None
    if learner.method.linear:
        now = references  # the loss has the same gradient at any table
    elif len(batches) > 1 or blocks_together(learner.rows, batch[0].blocks, batch[0].steps) < batch[0].blocks:
        # The loss couples cells, so the whole table must be known before any backward.
        found = velocities_of(learner, batch)
        now = [lesson.table(velocities) for lesson, velocities in zip(batch, found, strict=True)]
    coefficients = None if now is None else _coefficients(learner, batch, now, old, references)
    tables = [torch.zeros_like(table) for table in references]
    for pairs in batches:
        rows = [batch[n].row(query) for n, query in pairs]
        with replayed(learner, rows, gradients=True) as parts:
            for blocks, velocities in parts:
                cells = _cells(batch, pairs, blocks, velocities)
                for n, numbers, part in cells:
                    tables[n][numbers, blocks.start : blocks.stop] = part.detach()
                if coefficients is None:
                    coefficients = _coefficients(learner, batch, tables, old, references)
                loss = torch.stack(
                    [
                        (coefficients[n][numbers, blocks.start : blocks.stop] * part).sum()
                        for n, numbers, part in cells
                    ]
                ).sum()
                if loss.requires_grad:
                    (loss / lessons).backward()
    return _metrics(learner, batch, tables, old, references)


def _cells(
    batch: Sequence[Lesson], pairs: Sequence[tuple[int, int]], blocks: range, velocities_RPSFCHW: Tensor
) -> list[tuple[int, list[int], Tensor]]:
    """(lesson, rows of its table, their cells [N', P', S]) that a micro-batch of trajectories gives."""
    found = []
    part = slice(blocks.start, blocks.stop)
    for n, lesson in enumerate(batch):
        places = {query: row for row, (owner, query) in enumerate(pairs) if owner == n}
        evidence = lesson.evidence
        numbers = [number for number, query in enumerate(evidence.query_N) if query in places]
        if not numbers:
            continue
        asked = velocities_RPSFCHW[[places[evidence.query_N[number]] for number in numbers]]
        targets = evidence.targets_NPSFCHW[numbers, part]
        found.append((n, numbers, residual_table(evidence.weights_NPS[numbers, part], targets, asked)))
    return found


def _losses(
    learner: Learner,
    batch: Sequence[Lesson],
    tables: Sequence[Tensor],
    old: Sequence[Tensor] | None,
    references: Sequence[Tensor],
) -> Iterator[tuple[Tensor, Tensor, Metrics, Tensor]]:
    """(table that requires gradients, loss, metrics, velocity KL) of every lesson."""
    for n, lesson in enumerate(batch):
        rows, table = lesson.method_rows, tables[n].detach().requires_grad_()
        before = tables[n] if old is None else old[n]
        with torch.enable_grad():
            three = Tables(table[:rows], before[:rows].detach(), references[n][:rows])
            loss, metrics = learner.method.loss(
                three, lesson.evidence.branch_N[:rows], lesson.credit, learner.settings
            )
            yield table, loss, metrics, table[rows:].sum()


def _coefficients(
    learner: Learner,
    batch: Sequence[Lesson],
    tables: Sequence[Tensor],
    old: Sequence[Tensor] | None,
    references: Sequence[Tensor],
) -> list[Tensor]:
    """d loss / d table of every lesson, the velocity KL included. Raises NonFiniteError."""
    _require_finite(batch, tables)
    _require_finite(batch, references, " of the starting policy")
    return [
        torch.autograd.grad(loss + learner.velocity_kl * drift, table)[0]
        for table, loss, _, drift in _losses(learner, batch, tables, old, references)
    ]


def _metrics(
    learner: Learner,
    batch: Sequence[Lesson],
    tables: Sequence[Tensor],
    old: Sequence[Tensor] | None,
    references: Sequence[Tensor],
) -> tuple[list[Metrics], float]:
    """Metrics of every lesson, and the sum of their velocity KLs."""
    metrics, drift = [], 0.0
    for _, _, found, kl in _losses(learner, batch, tables, old, references):
        metrics.append(found)
        drift += float(kl.detach())
    return metrics, drift
