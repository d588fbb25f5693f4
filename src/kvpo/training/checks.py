"""Exactness checks of a run, on its own generator with its current weights."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from kvpo.config import Config
from kvpo.engine.explorers import EXPLORERS, Member, RoutedFrame
from kvpo.engine.forks import Fork, plan_forks
from kvpo.engine.pages import PlannedRollout, cache_pages
from kvpo.engine.replay import member_row, replay_context, replay_velocities
from kvpo.engine.rollout import Rollout, roll_out
from kvpo.engine.stream import append_block, commit_banks, text_of
from kvpo.method.evidence import no_credit, residual_table
from kvpo.models.deployment import deployment_context
from kvpo.prompts import VideoPrompt
from kvpo.training.collection import plan_rollout
from kvpo.training.gradients import Lesson, differentiate, lesson_of, table_of
from kvpo.training.ranks import ONE_TEAM
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer

RATIO_TOLERANCE = {"none": 1e-3, "bfloat16": 0.05}
"""Tolerance by autocast. A log-ratio is a difference of energies divided by the temperature, which may be a
hundredth of them, so a rounding error of 1e-6 in an energy becomes 1e-4. A wrong context gives 0.1 or
more."""


def streamed_table(trainer: Trainer, lesson: Lesson) -> Tensor:
    """A lesson's table [N, P, S], computed one trajectory, block and solver step at a time.

    Each trajectory is a separate stream that is given its stored latents, as in deployment; none of the
    replay's batching is used.
    """
    generator, evidence = trainer.setup.generator, lesson.evidence
    every = []
    for query, past in enumerate(evidence.past_Q):
        stream, velocities = lesson.root.fork(), []
        for block, clean_FCHW in enumerate(lesson.past_MPFCHW[past]):
            text = text_of([stream])
            commit_banks(generator, [stream], text)
            context = deployment_context(generator.deployment, [stream.history])
            for step in range(lesson.steps):
                state_FCHW = evidence.states_QPSFCHW[query, block, step]
                level = torch.tensor([generator.sigmas[step]], device=state_FCHW.device)
                velocities.append(generator.velocity(state_FCHW[None], level, text, context)[0])
            if block + 1 < lesson.blocks:
                append_block(generator, [stream], clean_FCHW[None], text, context)
        stream.history.release()
        every.append(torch.stack(velocities).unflatten(0, (lesson.blocks, lesson.steps)))
    return lesson.table(torch.stack(every))


def first_ratio_max_deviation(trainer: Trainer) -> float | None:
    """Largest |pi_theta / pi_old - 1| at theta = theta_old: 0 up to rounding (see ``ratio_tolerance``).

    Compares the table that training's batched replay computes with that of ``streamed_table``, over all
    solver steps that the method can learn from. Uses the branches of the first two groups of a rollout,
    regardless of their rewards. Returns None for methods without a ratio.
    """
    setup, config = trainer.setup, trainer.setup.config
    settings = replace(trainer.learner.settings, steps=len(setup.generator.sigmas))
    learner = replace(trainer.learner, settings=settings, teams=ONE_TEAM)
    if "ratio_deviation" not in learner.method.metrics:
        return None
    planned = plan_rollout(setup, 0)
    forks = [replace(one, exploration=replace(one.exploration, tail_blocks=0)) for one in planned.forks[:2]]
    planned = replace(planned, prompts=planned.prompts[:2], forks=forks)
    texts, tape = setup.backbone.texts(planned.prompts), setup.backbone.tape("training")
    explorer = EXPLORERS[config.exploration.explorer]
    with setup.generator.exploring():
        rollout = roll_out(setup.generator, planned, texts, tape, (config.seed, 0), explorer=explorer)
    deviation = 0.0
    for group in rollout.groups:
        draws = torch.Generator().manual_seed(0)
        lesson = lesson_of(learner, group, no_credit(group.branches), draws)
        with torch.no_grad():
            old, again = table_of(learner, lesson), streamed_table(trainer, lesson)
        deviation = max(deviation, differentiate(learner, lesson, again, old, old)[1]["ratio_deviation"])
    rollout.release()
    return deviation


def ratio_tolerance(config: Config) -> float:
    """Deviation of the first ratio to allow for rounding, as the two batches sum in different orders."""
    return RATIO_TOLERANCE[config.optim.autocast]


def shared_fork(setup: Setup, prompts: Sequence[VideoPrompt]) -> Fork:
    """A fork with as much of the exploration as fits every prompt, no tail, and all members in one batch."""
    roomiest = plan_forks(prompts, setup.config.exploration, setup.generator.deployment).roomiest
    fork = roomiest[len(roomiest) // 2]
    return replace(fork, exploration=replace(fork.exploration, tail_blocks=0, rows=0))


def _grown(setup: Setup, prompts: Sequence[VideoPrompt], fork: Fork) -> Rollout:
    planned = PlannedRollout(prompts, [fork] * len(prompts), keep_pool=True)
    cache = setup.generator.new_cache(cache_pages(setup.generator, [planned]))
    texts, tape = setup.backbone.texts(prompts), setup.backbone.tape("checks")
    rollout = Rollout(setup.generator, planned, texts, tape, cache)
    rollout.grow_roots(range(len(prompts)))
    return rollout


def anchor_energy_at_old(setup: Setup, prompts: Sequence[VideoPrompt]) -> float:
    """Largest residual of anchors against the policy that generated them, at any solver step: exactly 0.

    The replay's velocities are compared with those that the rollout stored, one step at a time and with the
    rows of the rollout's batch, so that both sum in the same order. With quantised rollouts the residual is
    their rounding error, since the replay is not quantised.
    """
    generator, fork = setup.generator, shared_fork(setup, prompts)
    members = [Member(index) for index in range(len(prompts))]
    with generator.exploring():
        rollout = _grown(setup, prompts, fork)
        ran = rollout.run(members)
        groups = [rollout.group_of([member], ran) for member in members]
    rows = [member_row(group, 0) for group in groups]
    energy = 0.0
    with torch.no_grad(), replay_context(generator, rows) as replay:
        for block, step in product(range(fork.exploration.blocks), range(len(generator.sigmas))):
            at_step = replace(generator, sigmas=generator.sigmas[step:])
            here = [replace(row, states_PSFCHW=row.states_PSFCHW[:, step : step + 1]) for row in rows]
            velocity = replay_velocities(at_step, here, replay, range(block, block + 1))
            own = [g.trajectories.velocities_MPSFCHW[0, block : block + 1, step : step + 1] for g in groups]
            table = residual_table(velocity.new_ones(()), torch.stack(own), velocity)
            energy = max(energy, float(table.max()))
    rollout.release()
    return energy


def default_route_max_difference(setup: Setup, prompts: Sequence[VideoPrompt]) -> float:
    """Largest difference between unrouted generation and a route that names the most recent frames: 0."""
    fork = shared_fork(setup, prompts)
    fork = replace(fork, exploration=replace(fork.exploration, blocks=1))
    past, first = setup.generator.deployment.local_past, setup.generator.deployment.sink
    if past is not None:
        first = max(first, fork.frame - past)
    frames = range(first, fork.frame - fork.exploration.recent)
    every = range(len(prompts))
    routed = [Member(n, routes=(tuple(RoutedFrame(n, frame) for frame in frames),)) for n in every]
    with setup.generator.exploring():
        rollout = _grown(setup, prompts, fork)
        expected, found = (list(rollout.run(own)) for own in ([Member(n) for n in every], routed))
    difference = 0.0
    for one, other in zip(expected, found, strict=True):
        pairs = zip(vars(one).values(), vars(other).values(), strict=True)
        difference = max(difference, *(float((a - b).abs().max()) for a, b in pairs))
    rollout.release()
    return difference
