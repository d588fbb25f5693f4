"""Exactness checks of a run, measured on its own generator with the weights that it has then."""

from collections.abc import Sequence
from dataclasses import replace
from itertools import product

import torch
from torch import Tensor

from kvpo.config import Config, ExplorationConfig
from kvpo.engine.forks import plan_forks
from kvpo.engine.noise import Tape
from kvpo.engine.replay import (
    Member,
    branch_residuals,
    replay_context,
    replay_velocities,
    window_part,
)
from kvpo.engine.rollout import Group, RoutedFrame, collect, grow_roots, run_members
from kvpo.engine.stream import TextTable, append_block, commit_banks, text_of
from kvpo.method.energy import velocity_residual
from kvpo.method.objective import policy_ratio
from kvpo.method.policy import branch_log_probs
from kvpo.models.deployment import deployment_context
from kvpo.prompts import VideoPrompt
from kvpo.training.credit import no_credit
from kvpo.training.gradients import Trained, energies_of, temperature_of
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer

RATIO_TOLERANCE = {"none": 1e-4, "bfloat16": 0.05}
"""By autocast: some thirty times what float32 shows on a CPU (4e-6)."""


def streamed_energies(setup: Setup, group: Group, texts: TextTable, tape: Tape) -> Tensor:
    """Energies ``[G]`` of a group's branches over all solver steps, with one row, block and step at a time.

    Each branch is a stream of its own that is given the branch's stored latents, as deployment would be:
    nothing of the replay's batching is used.
    """
    generator, energies = setup.generator, []
    for branch in range(group.branches):
        stream = group.root.fork()
        text = text_of([stream], texts)
        clean_PFCHW = group.clean_MTCHW[branch, : group.window_frames].unflatten(0, (group.blocks, -1))
        terms = []
        for block, clean_FCHW in enumerate(clean_PFCHW):
            commit_banks(generator, [stream], text)
            context = deployment_context(generator.deployment, [stream.history])
            for step, sigma in enumerate(generator.sigmas):
                state_FCHW = group.states_MPSFCHW[branch, block, step]
                level = torch.tensor([sigma], device=state_FCHW.device)
                velocity = generator.velocity(state_FCHW[None], level, text, context)[0]
                terms.append(velocity_residual(group.velocities_MPSFCHW[branch, block, step], velocity))
            if block + 1 < group.blocks:
                noise = None
                if generator.context_noise:
                    at = stream.start // generator.block
                    noise = tape(stream.prompt.id, at, "context")[None].to(clean_FCHW)
                append_block(generator, [stream], clean_FCHW[None], text, context, noise)
        stream.history.release()
        energies.append(torch.stack(terms).sum())
    return torch.stack(energies)


def first_ratio_max_deviation(trainer: Trainer) -> float:
    """Largest |pi_theta / pi_old - 1| at theta = theta_old: 0 but for rounding (``ratio_tolerance``).

    One probability comes from the replay in training's batches, the other from ``streamed_energies``, both
    against the velocities that the rollout stored, over all solver steps. The branches of the first two
    groups of a rollout take part, whatever their rewards.
    """
    setup, config = trainer.setup, trainer.setup.config
    planned = trainer.planned(0)
    forks = [
        replace(fork, exploration=replace(fork.exploration, tail_blocks=0)) for fork in planned.forks[:2]
    ]
    planned = replace(planned, prompts=planned.prompts[:2], forks=forks)
    texts, tape = setup.texts(planned.prompts), setup.tape("training")
    cache = trainer.new_cache([planned])
    key = (config.seed, 0)
    rollout = collect(setup.generator, planned.prompts, forks, texts, tape, key, cache=cache)
    replayer = trainer.replayer(texts)
    replayer = replace(
        replayer,
        config=replace(config.objective, grad_steps=len(setup.generator.sigmas), anchor_state_weight=0),
    )
    batched = energies_of(replayer, [Trained(group, no_credit(group.branches)) for group in rollout.groups])
    deviation = 0.0
    with torch.no_grad():
        for group, old in zip(rollout.groups, batched, strict=True):
            temperature = temperature_of(old, config.objective)
            streamed = streamed_energies(setup, group, texts, tape)
            ratio = policy_ratio(branch_log_probs(streamed, temperature), branch_log_probs(old, temperature))
            deviation = max(deviation, float((ratio - 1).abs().max()))
    rollout.release()
    return deviation


def shared_fork(setup: Setup, prompts: Sequence[VideoPrompt]) -> tuple[int, ExplorationConfig]:
    """A fork at which most of the exploration fits in every prompt, and that exploration."""
    roomiest = plan_forks(prompts, setup.config.exploration, setup.generator.deployment).roomiest
    fork = roomiest[len(roomiest) // 2]
    return fork.frame, fork.exploration


def ratio_tolerance(config: Config) -> float:
    """What rounding may add to a first ratio where two batches sum in different orders."""
    return RATIO_TOLERANCE[config.optim.autocast]


def anchor_energy_at_old(setup: Setup, prompts: Sequence[VideoPrompt]) -> float:
    """Largest residual of anchors against the policy that made them, at any solver step: exactly 0.

    The replay's velocities are compared with those that the rollout stored, step by step in a batch with the
    rows of the rollout's batch, so that both sum in the same order.
    """
    generator = setup.generator
    fork, fitted = shared_fork(setup, prompts)
    texts, tape = setup.texts(prompts), setup.tape("checks")
    exploration = replace(fitted, tail_blocks=0, rows=0)
    rollout = grow_roots(generator, prompts, fork, texts, tape, exploration)
    members = [(index, None) for index in range(len(prompts))]
    states, velocities, clean = run_members(generator, rollout, members, texts, tape)
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
    with torch.no_grad(), replay_context(generator, rows, texts, tape) as replay:
        for block, step in product(range(exploration.blocks), range(len(generator.sigmas))):
            here = [Member(_one_step(group, block, step), 0) for group in groups]
            at_step = replace(generator, sigmas=generator.sigmas[step:])
            velocity = replay_velocities(at_step, here, replay.of(range(block, block + 1)), 1)
            energy = max(energy, float(branch_residuals(here, velocity).max()))
    rollout.release()
    return energy


def _one_step(group: Group, block: int, step: int) -> Group:
    """The group with one block and one solver step for its window."""
    part = window_part(group, range(block, block + 1))
    return replace(
        part,
        states_MPSFCHW=part.states_MPSFCHW[:, :, step : step + 1],
        velocities_MPSFCHW=part.velocities_MPSFCHW[:, :, step : step + 1],
    )


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
