"""From prompts to lessons: plan a rollout, generate it, score it, and give its branches credit."""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter

import torch
from torch import Tensor

from kvpo.engine.background import Submit, in_background
from kvpo.engine.explorers import EXPLORERS
from kvpo.engine.forks import draw_forks
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import keyed_generator
from kvpo.engine.pages import PlannedRollout, cache_pages
from kvpo.engine.replay import member_row, replay_context, replay_velocities
from kvpo.engine.rollout import Group, Rollout, roll_out
from kvpo.engine.scoring import Scores, score_group
from kvpo.method.diagnostics import group_metrics
from kvpo.method.evidence import Credit, Metrics, no_credit
from kvpo.method.methods import METHODS
from kvpo.models.cache import FrameCache
from kvpo.training.credit import Scale, assign_credit, collection_scale
from kvpo.training.gradients import (
    Learner,
    Lesson,
    lesson_of,
    table_of,
    trajectories_together,
)
from kvpo.training.ranks import ONE_TEAM, Ranks, Teams
from kvpo.training.setup import Setup

LARGEST_GAP = 0.1
"""Policy gap above which a run stops: a tenth of the difference from branch to anchor would be rounding."""


@dataclass(frozen=True)
class Collected:
    """A scored rollout that waits for its update."""

    rollout: Rollout
    """The rollout's roots; its groups have been dropped."""
    credits: dict[int, Credit]
    """Credit by group, for every group worth training on, whichever rank explored it."""
    lessons: dict[int, Lesson]
    """Lessons by group, for those that this rank's team explored."""
    found: list[Metrics]
    """Exploration metrics of every group."""
    old_tables: dict[int, Tensor]
    """Tables of the lessons under the rollout policy; empty if no later step needs them."""
    fresh: bool
    """True for the first update after a collection, when the rollout policy is still the current one."""


def plan_rollout(setup: Setup, update: int) -> PlannedRollout:
    """Plan the rollout of an update: its prompts, and forks with the exploration shrunk to fit."""
    prompts, config = setup.training_prompts(update), setup.config
    forks = draw_forks(prompts, config.exploration, setup.generator.deployment, (config.seed, update))
    blocks = min(fork.exploration.blocks for fork in forks)
    replayed = trajectories_together(config.optim.replay_rows, blocks, config.objective.grad_steps)
    return PlannedRollout(prompts, forks, replayed, METHODS[config.method].keep_pool)


def generate_rollout(
    setup: Setup, update: int, planned: PlannedRollout, submit: Submit, cache: FrameCache, team: Ranks
) -> tuple[Rollout, list[Future[Scores]]]:
    """Generate an update's rollout, scoring finished groups while the next ones are generated.

    Within each group, this rank scores its share of the members.
    """
    config, codec, scorer = setup.config, setup.backbone.codec, setup.judges.scorer
    options = {
        "block": setup.generator.block,
        "transition_blocks": config.rewards.transition_blocks,
        "timed": setup.ranks.clock,
    }
    pending: list[Future[Scores]] = []

    def finished(group: Group) -> None:
        own = replace(group, clean_MTCHW=group.clean_MTCHW[team.rank :: team.count])
        pending.append(submit(partial(score_group, own, codec, scorer, **options)))

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
        finished=finished,
        team=team,
    )
    return rollout, pending


def explore(
    setup: Setup, updates: Sequence[int], teams: Teams = ONE_TEAM
) -> list[tuple[Rollout, list[Scores]]]:
    """Generate and score this team's share of the rollouts of some updates, in one cache.

    Raises ValueError when a reward fails.
    """
    team, doing = teams.team, "exploring and scoring"
    whole = [plan_rollout(setup, update) for update in updates]
    planned = [
        replace(one, share=teams.peers.share(one.turns(teams.count)), branch_ranks=team.count)
        for one in whole
    ]
    cache = setup.generator.new_cache(cache_pages(setup.generator, planned))
    with team.together(doing), in_background() as submit:
        with setup.ranks.clock("rollout"), setup.generator.exploring():
            generated = [
                generate_rollout(setup, update, rollout, submit, cache, team)
                for update, rollout in zip(updates, planned, strict=True)
            ]
        own = [[future.result() for future in pending] for _, pending in generated]
        every = team.gather(own, doing)
    return [
        (rollout, [merged(parts) for parts in zip(*(found[n] for found in every), strict=True)])
        for n, (rollout, _) in enumerate(generated)
    ]


def merged(parts: Sequence[Scores]) -> Scores:
    """Merge the shares that ranks scored into the scores of all members of a group."""
    members = sum(part.local_KM.shape[1] for part in parts)
    whole = torch.empty(2, len(parts[0].components), members)
    for rank, part in enumerate(parts):
        whole[:, :, rank :: len(parts)] = torch.stack([part.local_KM, part.global_KM])
    return Scores(parts[0].components, whole[0], whole[1])


def credit_of(setup: Setup, update: int, index: int, score: Scores, scale: Scale | None) -> Credit | None:
    """The branches of a group to train on, and how hard; None if rewards differ by noise alone."""
    config = setup.config
    if not METHODS[config.method].rewarded:
        return no_credit(score.local_KM.shape[1] - 1)
    draws = keyed_generator("advantages", config.seed, update, index)
    return assign_credit(score, setup.blend(), draws, scale)


def credits_of(
    setup: Setup, update: int, scores: Mapping[int, Scores], scale: Scale | None
) -> dict[int, Credit]:
    """Credit by group, for the groups of an update that are worth training on."""
    given = {group: credit_of(setup, update, group, score, scale) for group, score in scores.items()}
    return {group: credit for group, credit in given.items() if credit is not None}


def found_in(setup: Setup, group: Group, score: Scores) -> Metrics:
    """Exploration metrics of one group."""
    objective = setup.config.objective
    totals = score.totals(setup.judges.weights_K)
    of_anchor = objective.advantages == "anchor"
    found = group_metrics(totals, group.trajectories.clean_MPFCHW, relative_to_anchor=of_anchor)
    if setup.config.optim.rollout_precision == "same":
        return found
    with setup.ranks.clock("replay"):
        return found | {"rollout_gap": policy_gap(setup.generator, group)}


@torch.no_grad()
def policy_gap(generator: StreamingGenerator, group: Group) -> float:
    """Relative squared difference between an anchor's velocities as generated and as replayed.

    It is relative to the squared difference between the branches' velocities and the anchor's, and 0 up to
    rounding if the rollout has the replay's precision and policy. No gradients are recorded.
    """
    velocities_MPSFCHW, anchor = group.trajectories.velocities_MPSFCHW, group.trajectories.anchor
    row = member_row(group, anchor)
    with replay_context(generator, [row]) as replay:
        blocks = [replay_velocities(generator, [row], replay, range(n, n + 1)) for n in range(group.blocks)]
    own_PSFCHW = velocities_MPSFCHW[anchor]
    energy = (torch.cat(blocks, 1)[0] - own_PSFCHW).square().mean()
    return float(energy / (velocities_MPSFCHW[:anchor] - own_PSFCHW).square().mean())


def demand_small_gap(setup: Setup, found: Sequence[Metrics]) -> None:
    """Raise ValueError if quantised rollouts are too far from the policy that is trained."""
    gaps = [metrics["rollout_gap"] for metrics in found if "rollout_gap" in metrics]
    gap = sum(gaps) / max(1, len(gaps))
    if not gap <= LARGEST_GAP:
        precision = setup.config.optim.rollout_precision
        finer = ", or with int8, which rounds less" if precision == "fp8" else ""
        raise ValueError(
            f"optim.rollout_precision: {precision} has a policy gap of {gap:.2g}, more than "
            f"{LARGEST_GAP:g}: start again with same{finer}"
        )


def lessons_of(
    setup: Setup, learner: Learner, update: int, rollout: Rollout, credits: Mapping[int, Credit]
) -> dict[int, Lesson]:
    """Lessons by group, for the groups of a rollout that have credit."""
    lessons = {}
    for group in rollout.groups:
        if group.index in credits:
            draws = keyed_generator("evidence", setup.config.seed, update, group.index)
            lessons[group.index] = lesson_of(learner, group, credits[group.index], draws)
    return lessons


def collect(setup: Setup, learner: Learner, updates: range) -> list[Collected]:
    """Generate rollouts for ``updates`` under the current policy, score them and turn them into lessons.

    Every rank explores its share of the groups and receives the scores of all. Raises ValueError when a
    reward fails or when quantised rollouts are too far from the policy.
    """
    ranks, teams, doing = setup.ranks, learner.teams, "exploring and scoring"
    with ranks.together(doing):
        explored = explore(setup, updates, teams)
        own = [
            [
                (g.index, score, found_in(setup, g, score))
                for g, score in zip(rollout.groups, scores, strict=True)
            ]
            for rollout, scores in explored
        ]
    first = ranks.gather(own if teams.team.main else [[] for _ in own], doing)
    by_update = [sorted(sum(shares, []), key=itemgetter(0)) for shares in zip(*first, strict=True)]
    demand_small_gap(setup, [metrics for seen in by_update for _, _, metrics in seen])
    every = [score for seen in by_update for _, score, _ in seen]
    scale = collection_scale(every, setup.blend())
    collected = []
    doing = "replaying the rollout policy"
    with ranks.together(doing), teams.team.together(doing), ranks.clock("replay"):
        for update, (rollout, _), seen in zip(updates, explored, by_update, strict=True):
            credits = credits_of(setup, update, {group: score for group, score, _ in seen}, scale)
            lessons = lessons_of(setup, learner, update, rollout, credits)
            fresh = update == updates.start
            needed = setup.config.optim.inner_epochs > 1 or not fresh
            old = {group: table_of(learner, lesson) for group, lesson in lessons.items() if needed}
            found = [metrics for _, _, metrics in seen]
            collected.append(Collected(replace(rollout, groups=[]), credits, lessons, found, old, fresh))
    return collected
