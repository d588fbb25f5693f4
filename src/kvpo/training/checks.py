"""Exactness checks of a run, measured on its own generator before anything is trained."""

from collections.abc import Sequence
from dataclasses import replace

import torch

from kvpo.config import ExplorationConfig
from kvpo.engine.forks import plan_forks
from kvpo.engine.replay import Member, branch_residuals, replay_context, replay_velocities
from kvpo.engine.rollout import RoutedFrame, grow_roots, run_members
from kvpo.method.objective import policy_ratio
from kvpo.method.policy import branch_log_probs
from kvpo.prompts import VideoPrompt
from kvpo.training.credit import no_credit
from kvpo.training.gradients import Trained, energies_of, temperature_of
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer


def first_ratio_max_deviation(trainer: Trainer) -> float:
    """Largest |pi_theta / pi_old - 1| at theta = theta_old from two independent replays of one rollout.

    All branches take part, whatever their rewards: what is checked is the replay.
    """
    config = trainer.setup.config
    rollout, _, texts = trainer.explore(0)
    trained = [Trained(group, no_credit(group.branches)) for group in rollout.groups]
    replayer = trainer.replayer(texts)
    old, again = energies_of(replayer, trained), energies_of(replayer, trained)
    deviation = 0.0
    for before, after in zip(old, again, strict=True):
        temperature = temperature_of(before, config.objective)
        ratio = policy_ratio(branch_log_probs(after, temperature), branch_log_probs(before, temperature))
        deviation = max(deviation, float((ratio - 1).abs().max()))
    rollout.release()
    return deviation


def shared_fork(setup: Setup, prompts: Sequence[VideoPrompt]) -> tuple[int, ExplorationConfig]:
    """A fork at which most of the exploration fits in every prompt, and that exploration."""
    roomiest = plan_forks(prompts, setup.config.exploration, setup.generator.deployment).roomiest
    fork = roomiest[len(roomiest) // 2]
    return fork.frame, fork.exploration


def anchor_energy_at_old(setup: Setup, prompts: Sequence[VideoPrompt]) -> float:
    """Replay energy of anchors under the policy that made them, one solver step at a time: exactly 0.

    The replay's batch has the rows of the rollout's batch, so that both sum in the same order.
    """
    fork, fitted = shared_fork(setup, prompts)
    texts, tape = setup.texts(prompts), setup.tape("checks")
    exploration = replace(fitted, tail_blocks=0, rows=0)
    rollout = grow_roots(setup.generator, prompts, fork, texts, tape, exploration)
    members = [(index, None) for index in range(len(prompts))]
    states, velocities, clean = run_members(setup.generator, rollout, members, texts, tape)
    groups = [
        replace(
            group,
            states_MPSFCHW=states[index][None],
            velocities_MPSFCHW=velocities[index][None],
            clean_MTCHW=clean[index][None],
        )
        for index, group in enumerate(rollout.groups)
    ]
    energy = 0.0
    rows = [Member(group, 0) for group in groups]
    with torch.no_grad(), replay_context(setup.generator, rows, texts, tape) as replay:
        for block, context in enumerate(replay.contexts):
            only = [replace(group, states_MPSFCHW=group.states_MPSFCHW[:, block : block + 1],
                            velocities_MPSFCHW=group.velocities_MPSFCHW[:, block : block + 1])
                    for group in groups]  # fmt: skip
            members_of_block = [Member(group, 0) for group in only]
            velocity = replay_velocities(
                setup.generator, members_of_block, replace(replay, contexts=(context,)), 1
            )
            energy = max(energy, float(branch_residuals(members_of_block, velocity).max()))
    rollout.release()
    return energy


def default_route_max_difference(setup: Setup, prompts: Sequence[VideoPrompt]) -> float:
    """Largest difference between unrouted generation and a route that names the most recent frames: 0."""
    fork, fitted = shared_fork(setup, prompts)
    one = replace(fitted, blocks=1, tail_blocks=0, rows=0)
    texts, tape = setup.texts(prompts), setup.tape("checks")
    rollout = grow_roots(setup.generator, prompts, fork, texts, tape, one)
    past = setup.generator.deployment.local_past
    first = setup.generator.deployment.sink
    if past is not None:
        first = max(first, fork - past)
    route = tuple(range(first, fork - one.recent))
    plain = [(index, None) for index in range(len(prompts))]
    routed = [(index, [tuple(RoutedFrame(index, frame) for frame in route)]) for index in range(len(prompts))]
    expected = run_members(setup.generator, rollout, plain, texts, tape)
    found = run_members(setup.generator, rollout, routed, texts, tape)
    rollout.release()
    return max(float((a - b).abs().max()) for a, b in zip(expected, found, strict=True))
