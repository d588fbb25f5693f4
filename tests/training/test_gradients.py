"""The policy gradient, against autograd on the whole objective at once; float64 throughout."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.config import ObjectiveConfig
from kvpo.engine.replay import Member, replay_context, replay_kind, replay_velocities
from kvpo.prompts import VideoPrompt
from kvpo.training.credit import Credit
from kvpo.training.gradients import (
    Replayer,
    Trained,
    accumulate_gradients,
    energies_of,
    group_batches,
    micro_batches,
    temperature_of,
)
from kvpo.training.trainer import Trainer
from tests.tiny_world import in_float64, tiny_config, toy_setup

TOLERANCE = 1e-10
"""Relative to the largest gradient element."""


@dataclass(frozen=True)
class Explored:
    """A scored rollout of the starting policy, and a trainer whose policy has moved on since."""

    trainer: Trainer
    replayer: Replayer
    trained: list[Trained]
    old: list[Tensor]


def nudge(trainer: Trainer, scale: float) -> None:
    """Move the trained parameters away from where they are."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for value in trainer.policy.parameters.values():
            value.add_(scale * torch.randn(value.shape, generator=generator).to(value))


def explore(base: Path, moved: float = 0.05, **settings: Any) -> Explored:
    return explored_by(Trainer(in_float64(toy_setup(tiny_config(base, **settings)))), moved)


def explored_by(trainer: Trainer, moved: float = 0.05) -> Explored:
    rollout, scores, texts = trainer.explore(0)
    trained, _ = trainer.credit(0, rollout, scores)
    assert len(trained) == 2
    replayer = trainer.replayer(texts)
    old = energies_of(replayer, trained)
    nudge(trainer, moved)
    return Explored(trainer, replayer, trained, old)


@pytest.fixture(scope="module")
def lora(tiny_base: Path) -> Explored:
    return explore(tiny_base)


@pytest.fixture(scope="module")
def full(tiny_base: Path) -> Explored:
    # Every parameter counts here; farther away the log-ratios are so large that they amplify rounding.
    return explore(tiny_base, moved=0.01, optim__train="full")


def gradients(explored: Explored, replayer: Replayer, old: list[Tensor] | None) -> dict[str, Tensor]:
    parameters = explored.trainer.policy.parameters
    for value in parameters.values():
        value.grad = None
    accumulate_gradients(replayer, explored.trained, old)
    return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


def assert_equal(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    largest = max(float(value.abs().max()) for value in expected.values())
    assert largest > 1e-6, "a vanishing gradient would make any comparison pass"
    for name, value in expected.items():
        assert value.dtype == torch.float64
        assert float((found[name] - value).abs().max()) <= TOLERANCE * largest, name


@contextmanager
def checkpointed(explored: Explored) -> Iterator[None]:
    model = explored.trainer.setup.model
    model.checkpointing = True
    try:
        yield
    finally:
        model.checkpointing = False


OBJECTIVES: dict[str, dict[str, Any]] = {
    "velocity energy": {},
    "mixed energy": {"anchor_state_weight": 0.5},
    "anchor-state energy": {"anchor_state_weight": 1.0},
    "both KLs": {"simplex_kl": 0.7, "velocity_kl": 0.3},
    "anchor in the pool": {"anchor_in_pool": True, "anchor_share": 0.4},
    "fixed temperature": {"temperature": 1e-3, "simplex_kl": 0.2},
}


def with_objective(explored: Explored, name: str, rows: int = 0) -> Replayer:
    return replace(explored.replayer, config=replace(explored.replayer.config, **OBJECTIVES[name]), rows=rows)


def assert_exact(explored: Explored, name: str) -> None:
    """One batch, and micro-batches of a block, a branch and three, give the whole objective's gradient."""
    whole = with_objective(explored, name)
    # The stored energies are those of the paper's energy; with another one, start from the policy as it is.
    on_policy = whole.config.anchor_state_weight > 0
    now = [energy.detach() for energy in direct_energies(explored, whole)[0]]
    expected = direct_gradient(explored, whole, now if on_policy else explored.old)
    for rows in (0, 1, 4, 12):  # a branch has two blocks of two steps
        replayer = replace(whole, rows=rows)
        batches = [micro_batches(replayer, batch) for batch in group_batches(replayer, explored.trained)]
        assert sum(map(len, batches)) > 1 or rows in (0, 12)
        assert_equal(gradients(explored, replayer, None if on_policy else explored.old), expected)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_the_gradient_is_that_of_the_whole_objective(lora: Explored, name: str) -> None:
    assert_exact(lora, name)


def test_the_gradient_of_all_parameters_is_that_of_the_whole_objective(full: Explored) -> None:
    assert_exact(full, "both KLs")


def test_the_gradient_is_the_same_on_policy(lora: Explored) -> None:
    (now, _), replayer = direct_energies(lora, lora.replayer), lora.replayer
    expected = direct_gradient(lora, replayer, [energy.detach() for energy in now])
    assert_equal(gradients(lora, replace(replayer, rows=4), None), expected)


def test_activation_checkpointing_changes_nothing(lora: Explored) -> None:
    replayer = with_objective(lora, "both KLs", rows=4)
    expected = gradients(lora, replayer, lora.old)
    with checkpointed(lora):
        assert_equal(gradients(lora, replayer, lora.old), expected)
        assert_equal(gradients(lora, replace(replayer, rows=0), lora.old), expected)


@dataclass(frozen=True)
class Uneven:
    """Videos whose forks, and with them windows and histories, differ in length."""

    def __call__(self, update: int) -> list[VideoPrompt]:
        return [
            VideoPrompt(n, ("a red circle", "a blue one"), (switch,), 27) for n, switch in enumerate((12, 18))
        ]


@pytest.mark.parametrize("window", [12, -1])
def test_groups_that_fork_apart_add_up_to_the_whole_objectives_gradient(tiny_base: Path, window: int) -> None:
    config = tiny_config(
        tiny_base,
        exploration__blocks=3,
        stream__window=window,
        stream__sink=0,
        exploration__resident_frames=0,
    )
    setup = replace(toy_setup(config), training_prompts=Uneven())
    explored = None
    for seed in range(20):
        trainer = Trainer(in_float64(replace(setup, config=replace(config, seed=seed))))
        forks = trainer.planned(0).forks
        if len({(fork.frame, fork.exploration.blocks) for fork in forks}) == 2:
            explored = explored_by(trainer)
            break
    assert explored is not None
    kinds = {replay_kind(trainer.setup.generator, item.group) for item in explored.trained}
    assert len(group_batches(explored.replayer, explored.trained)) == len(kinds)
    assert_exact(explored, "both KLs")


def direct_energies(explored: Explored, replayer: Replayer) -> tuple[list[Tensor], list[Tensor]]:
    """Energies and anchor velocities of every group in one graph, from the definitions."""
    energies, anchors = [], []
    weight, steps = replayer.config.anchor_state_weight, replayer.config.grad_steps
    sigma = torch.tensor(replayer.generator.sigmas[:steps], dtype=torch.float64)[:, None, None, None, None]
    for item in explored.trained:
        group = item.group
        members = [Member(group, index) for index in range(group.branches + 1)]
        with replay_context(replayer.generator, members, replayer.texts, replayer.tape) as replay:
            velocity = replay_velocities(replayer.generator, members, replay, steps)
        own = group.trajectories.velocities_MPSFCHW[:-1, :, :steps]
        energy = (own - velocity[:-1]).square().flatten(3).mean(-1).sum((1, 2))
        states = group.trajectories.states_MPSFCHW[-1, :, :steps]
        clean = group.clean_MTCHW[:-1, : group.window_frames].unflatten(1, (group.blocks, -1))[:, :, None]
        # The straight line from the anchor's state at level sigma to a branch's clean latents.
        target = (states - clean) / sigma
        at_anchor = (target - velocity[-1]).square().flatten(3).mean(-1).sum((1, 2))
        energies.append((1 - weight) * energy + weight * at_anchor)
        anchors.append(velocity[-1])
    return energies, anchors


def direct_gradient(explored: Explored, replayer: Replayer, old: list[Tensor]) -> dict[str, Tensor]:
    """Autograd on L = mean over groups of -(1/G) sum min(rho A, clip(rho) A) + KLs, all in one graph."""
    config: ObjectiveConfig = replayer.config
    with explored.trainer.policy.reference():
        reference, reference_anchors = direct_energies(explored, replayer)
    energies, anchors = direct_energies(explored, replayer)
    loss = torch.zeros((), dtype=torch.float64)
    for n, item in enumerate(explored.trained):
        advantages = item.credit.advantages_G.double()
        log_policy = log_probabilities(energies[n], old[n], config)
        log_old = log_probabilities(old[n], old[n], config)
        log_reference = log_probabilities(reference[n], old[n], config)
        count = len(advantages)
        ratio = (log_policy - log_old)[:count].exp()
        clipped = ratio.clamp(1 - config.clip_low, 1 + config.clip_high)
        loss = loss - torch.minimum(ratio * advantages, clipped * advantages).mean()
        loss = loss + config.simplex_kl * (log_policy.exp() * (log_policy - log_reference)).sum()
        loss = loss + config.velocity_kl * (anchors[n] - reference_anchors[n]).square().mean()
    parameters = explored.trainer.policy.parameters
    for value in parameters.values():
        value.grad = None
    (loss / len(explored.trained)).backward()
    return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


def log_probabilities(energy: Tensor, old: Tensor, config: ObjectiveConfig) -> Tensor:
    pool = torch.cat([energy, energy.new_zeros(1)]) if config.anchor_in_pool else energy
    return torch.log_softmax(-pool / temperature_of(old, config), 0)


def test_what_is_reported_does_not_depend_on_the_batches(lora: Explored) -> None:
    """The drift is the mean over all groups, also where groups or their members come apart."""
    replayer = with_objective(lora, "both KLs")
    with torch.no_grad():
        now, anchors = direct_energies(lora, replayer)
        with lora.trainer.policy.reference():
            _, reference = direct_energies(lora, replayer)
    each = [float((a - r).square().mean()) for a, r in zip(anchors, reference, strict=True)]
    assert abs(each[0] - each[1]) > 1e-6 * sum(each)
    for rows in (0, 1, 4, 12, 16):
        found, drift = accumulate_gradients(replace(replayer, rows=rows), lora.trained, lora.old)
        assert drift == pytest.approx(sum(each) / 2, rel=1e-9)
        means = [item.energy_mean for item in found]
        assert means == pytest.approx([float(energy.mean()) for energy in now], rel=1e-9)


def test_the_velocity_kl_sees_the_anchors_states_of_the_first_steps(lora: Explored) -> None:
    found = []
    for steps in (1, 2):
        replayer = replace(lora.replayer, config=replace(lora.replayer.config, grad_steps=steps))
        with torch.no_grad(), lora.trainer.policy.reference():
            reference = direct_energies(lora, replayer)[1]
        with torch.no_grad():
            anchors = direct_energies(lora, replayer)[1]
        apart = [(a - b).square().mean() for a, b in zip(anchors, reference, strict=True)]
        assert anchors[0].shape[1] == steps
        found.append(accumulate_gradients(replayer, lora.trained, None)[1])
        assert found[-1] == pytest.approx(float(sum(apart)) / 2, rel=1e-9)
    assert abs(found[0] - found[1]) > 1e-3 * found[0]


def test_only_selected_branches_are_trained_on(lora: Explored) -> None:
    """Leaving a branch out equals replaying a group that never had it."""
    item = lora.trained[0]
    chosen = Credit((0, 2), torch.tensor([1.0, -1.0]), item.credit.all_advantages_G)
    some = replace(lora, trained=[Trained(item.group, chosen)])
    (energies,) = energies_of(lora.replayer, some.trained)
    (everyone,) = energies_of(lora.replayer, [item])
    torch.testing.assert_close(energies, everyone[[0, 2]], rtol=1e-12, atol=0)
    keep = [0, 2, item.group.branches]
    smaller = replace(
        item.group,
        routes=tuple(item.group.routes[n] for n in (0, 2)),
        states_MPSFCHW=item.group.trajectories.states_MPSFCHW[keep],
        velocities_MPSFCHW=item.group.trajectories.velocities_MPSFCHW[keep],
        clean_MTCHW=item.group.clean_MTCHW[keep],
    )
    alone = replace(lora, trained=[Trained(smaller, replace(chosen, branches=(0, 1)))])
    found = gradients(some, lora.replayer, None)
    assert_equal(found, gradients(alone, lora.replayer, None))


def test_the_pure_anchor_state_energy_replays_anchors_only(lora: Explored) -> None:
    replayer = with_objective(lora, "anchor-state energy")
    pairs = [pair for batch in micro_batches(replayer, lora.trained) for pair in batch]
    assert pairs == [(0, 3), (1, 3)]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_kl_is_exactly_zero_and_the_ratio_exactly_one_before_the_first_step(
    tiny_base: Path, train: str
) -> None:
    trainer = Trainer(toy_setup(tiny_config(tiny_base, optim__train=train, objective__simplex_kl=1.0)))
    rollout, scores, texts = trainer.explore(0)
    trained, _ = trainer.credit(0, rollout, scores)
    replayer = trainer.replayer(texts)
    stored = energies_of(replayer, trained)
    for rows in (0, 4):
        found, drift = accumulate_gradients(
            replace(replayer, rows=rows), trained, stored if not rows else None
        )
        assert drift == 0.0
        assert [item.simplex_kl for item in found] == [0.0, 0.0]
        assert [item.ratio_deviation for item in found] == [0.0, 0.0]
    nudge(trainer, 0.05)
    found, drift = accumulate_gradients(replayer, trained, stored)
    assert drift > 0 and all(item.simplex_kl > 0 and item.ratio_deviation > 0 for item in found)
