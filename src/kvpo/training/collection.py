"""From prompts to lessons: plan a rollout, generate it, score it, and give its branches credit."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial

from torch import Tensor

from kvpo.engine.background import Submit, in_background
from kvpo.engine.explorers import EXPLORERS
from kvpo.engine.forks import draw_forks
from kvpo.engine.noise import keyed_generator
from kvpo.engine.pages import PlannedRollout, cache_pages
from kvpo.engine.rollout import Group, Rollout, roll_out
from kvpo.engine.scoring import Scores, score_group
from kvpo.method.advantage import GLOBAL_WEIGHT
from kvpo.method.diagnostics import group_metrics
from kvpo.method.evidence import Credit, Metrics, no_credit
from kvpo.method.methods import METHODS
from kvpo.models.cache import FrameCache
from kvpo.training.credit import Scale, assign_credit, collection_scale
from kvpo.training.gradients import (
    Learner,
    Lesson,
    lesson_of,
    tables_of,
    trajectories_together,
    with_old_policy,
)
from kvpo.training.setup import Setup


@dataclass(frozen=True)
class Collected:
    """A scored rollout that waits for its update."""

    rollout: Rollout
    """Its roots; the groups are gone."""
    lessons: list[Lesson]
    """One per group worth training on."""
    found: list[Metrics]
    """Metrics of the exploration of every group."""
    old_tables: list[Tensor]
    """Tables of the lessons under the rollout policy; empty where no later step needs them."""
    fresh: bool
    """Its update comes first after the collection, so the rollout policy is the current one."""


def plan_rollout(setup: Setup, update: int) -> PlannedRollout:
    """Prompts and forks of an update's rollout, its exploration shrunk to what fits."""
    prompts, config = setup.training_prompts(update), setup.config
    forks = draw_forks(prompts, config.exploration, setup.generator.deployment, (config.seed, update))
    blocks = min(fork.exploration.blocks for fork in forks)
    replayed = trajectories_together(config.optim.replay_rows, blocks, config.objective.grad_steps)
    return PlannedRollout(prompts, forks, replayed, METHODS[config.method].keep_pool)


def generate(
    setup: Setup, update: int, planned: PlannedRollout, submit: Submit, cache: FrameCache
) -> tuple[Rollout, list[Future[Scores]]]:
    """The rollout of an update; finished groups are scored while the next ones are generated."""
    config, codec, scorer = setup.config, setup.backbone.codec, setup.judges.scorer
    options = {"block": setup.generator.block, "shares": setup.clip_shares()}
    pending: list[Future[Scores]] = []
    rollout = roll_out(
        setup.generator,
        planned,
        setup.backbone.texts(planned.prompts),
        setup.backbone.tape("training"),
        (config.seed, update),
        explorer=EXPLORERS[config.exploration.explorer],
        cache=cache,
        steps=config.objective.grad_steps,
        arrivals=METHODS[config.method].arrivals,
        finished=lambda group: pending.append(submit(partial(score_group, group, codec, scorer, **options))),
    )
    return rollout, pending


def explore(setup: Setup, updates: Sequence[int]) -> list[tuple[Rollout, list[Scores]]]:
    """Generate and score the rollouts of some updates in one cache. Raises ValueError when a reward fails."""
    planned = [plan_rollout(setup, update) for update in updates]
    cache = setup.generator.new_cache(cache_pages(setup.generator, planned))
    with in_background() as submit:
        generated = [
            generate(setup, update, rollout, submit, cache)
            for update, rollout in zip(updates, planned, strict=True)
        ]
        return [(rollout, [future.result() for future in pending]) for rollout, pending in generated]


def credit_of(setup: Setup, update: int, index: int, score: Scores, scale: Scale | None) -> Credit | None:
    """The branches of a group to train on, and how hard; None: its rewards differ by noise alone."""
    config = setup.config
    if not METHODS[config.method].rewarded:
        return no_credit(score.local_KM.shape[1] - 1)
    draws = keyed_generator("advantages", config.seed, update, index)
    return assign_credit(score, setup.blend(), config.objective, draws, scale)


def found_in(setup: Setup, group: Group, score: Scores) -> Metrics:
    """Metrics of the exploration of one group."""
    objective = setup.config.objective
    totals = score.totals(setup.judges.weights_K, GLOBAL_WEIGHT)
    window = group.trajectories.clean_MPFCHW.flatten(1, 2)
    of_anchor = objective.advantages == "anchor"
    return group_metrics(totals[:-1], totals[-1], window[:-1], window[-1], relative_to_anchor=of_anchor)


def lessons_of(
    setup: Setup,
    learner: Learner,
    update: int,
    rollout: Rollout,
    scores: Sequence[Scores],
    scale: Scale | None,
) -> list[Lesson]:
    """The lessons of a rollout's groups."""
    lessons = []
    for group, score in zip(rollout.groups, scores, strict=True):
        credit = credit_of(setup, update, group.index, score, scale)
        if credit is not None:
            draws = keyed_generator("evidence", setup.config.seed, update, group.index)
            lessons.append(lesson_of(learner, group, credit, draws))
    return with_old_policy(learner, lessons)


def collect(setup: Setup, learner: Learner, updates: range) -> list[Collected]:
    """Rollouts for ``updates`` under the current policy, scored and turned into lessons.

    Raises ValueError when a reward fails.
    """
    explored = explore(setup, updates)
    every = [score for _, scores in explored for score in scores]
    scale = collection_scale(every, setup.blend(), setup.config.objective)
    collected = []
    for update, (rollout, scores) in zip(updates, explored, strict=True):
        lessons = lessons_of(setup, learner, update, rollout, scores, scale)
        fresh = update == updates.start
        needed = lessons and (setup.config.optim.inner_epochs > 1 or not fresh)
        old = tables_of(learner, lessons) if needed else []
        found = [found_in(setup, group, score) for group, score in zip(rollout.groups, scores, strict=True)]
        collected.append(Collected(replace(rollout, groups=[]), lessons, found, old, fresh))
    return collected
