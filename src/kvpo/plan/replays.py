"""Counts of an update's replays, taken from the method's own evidence."""

from dataclasses import dataclass

import torch

from kvpo.config import Config
from kvpo.method.evidence import Trajectories, no_credit
from kvpo.method.flow import few_step_sigmas
from kvpo.method.methods import METHODS
from kvpo.training.gradients import blocks_together, trajectories_together


@dataclass(frozen=True)
class Replays:
    """The replays of one pass over a rollout's groups."""

    trajectories: int
    """Q, the trajectories replayed per group."""
    rows: int
    """N, the rows of a group's table, each with a target."""
    routed: int
    """Rows that are also replayed under routed history."""
    old: bool
    """True if the old policy's velocities are needed, once per rollout."""
    blocks: int
    steps: int
    kept_steps: int
    """Solver steps whose states and velocities a rollout keeps."""
    together: int
    """Trajectories per micro-batch."""
    states: int
    """States per forward pass."""
    apart: bool
    """True if a group's table does not fit one forward pass, but its loss needs the whole table first."""


def replays_of(config: Config) -> Replays:
    """The replays of a configuration. Raises ValueError if its method cannot learn from its branches."""
    method, exploration, objective = METHODS[config.method], config.exploration, config.objective
    sigmas = tuple(few_step_sigmas(config.stream.schedule, config.stream.shift).tolist())
    kept = min(objective.grad_steps + method.arrivals, len(sigmas))
    chosen = sum(objective.keep) if method.rewarded else 0
    draws = torch.Generator().manual_seed(0)
    # One number stands for a block's latents.
    members = torch.rand(exploration.branches + 1, exploration.blocks, kept, 1, 1, 1, 1, generator=draws)
    trajectories = Trajectories(members, members, members[:, :, 0], sigmas, exploration.noise)
    credit = no_credit(chosen or exploration.branches)
    evidence, _ = method.asks(trajectories, credit, config.method_settings, draws)
    each, steps = len(evidence.past_Q), evidence.states_QPSFCHW.shape[2]
    rows, blocks = config.optim.replay_rows, exploration.blocks
    together = min(trajectories_together(rows, blocks, objective.grad_steps) or each, each)
    part = blocks_together(rows, blocks, steps)
    return Replays(
        trajectories=each,
        rows=len(evidence.query_N),
        routed=sum(teacher == "routed" for teacher in evidence.teacher_N),
        old="old" in evidence.teachers,
        blocks=blocks,
        steps=steps,
        kept_steps=kept,
        together=together,
        states=together * part * steps,
        apart=(together < each or part < blocks) and not method.linear,
    )
