"""The gradient of every method, against autograd on its whole loss at once; float64 throughout."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.engine.noise import keyed_generator
from kvpo.engine.rollout import Group
from kvpo.method.evidence import Credit
from kvpo.method.methods import METHODS
from kvpo.prompts import VideoPrompt
from kvpo.training.collection import explore, plan_rollout
from kvpo.training.gradients import (
    Learner,
    Lesson,
    accumulate_gradients,
    lesson_of,
    micro_batches,
    table_of,
)
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer
from tests.tiny_world import in_float64, tiny_config, toy_setup, with_weights
from tests.training.by_definition import LOSSES, Fork, kvpo_energies, velocity_drift, whole_loss

TOLERANCE = 1e-10
"""Relative to the largest gradient element."""
ROWS = (0, 1, 4, 12)
"""No limit; then micro-batches of a block, a branch (two blocks of two steps), and three branches."""


@dataclass(frozen=True)
class Explored:
    """Lessons that a trainer has collected, whose policy has moved on since."""

    trainer: Trainer
    groups: list[Group]
    lessons: list[Lesson]
    old_tables: list[Tensor]
    old: dict[str, Tensor]
    """Parameters of the policy that the method calls the old one."""

    @property
    def learner(self) -> Learner:
        return self.trainer.learner

    def forks(self, *, on_policy: bool = False) -> list[Fork]:
        """For the definitions, which need nothing of the lessons but their credit."""
        old = None if on_policy and self.trainer.setup.config.method != "nft" else self.old
        return [
            Fork(self.trainer, group, lesson.credit, old)
            for group, lesson in zip(self.groups, self.lessons, strict=True)
        ]


def values_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in trainer.policy.parameters.items()}


def nudge(values: Mapping[str, Tensor], scale: float, seed: int = 5) -> None:
    """Move parameters away from where they are."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for value in values.values():
            value.add_(scale * torch.randn(value.shape, generator=generator).to(value))


def explored_by(setup: Setup, moved: float) -> Explored:
    trainer = Trainer(in_float64(setup))
    # The rollout policy is not the starting policy, and the average is neither.
    nudge(trainer.policy.parameters, 0.5 * moved, seed=6)
    nudge(trainer.average.values, 0.2 * moved, seed=7)
    ((rollout, _),) = explore(trainer.setup, [0])
    trainer.collect()
    (item,) = trainer.collected
    assert len(item.lessons) == 2
    averaged = trainer.learner.method.averaged_old(trainer.learner.settings)
    old = dict(trainer.average.values) if averaged else values_of(trainer)
    nudge(trainer.policy.parameters, moved)
    lessons, old_tables = list(item.lessons.values()), list(item.old_tables.values())
    return Explored(trainer, rollout.groups, lessons, old_tables, old)


RANK = {"lora": 2, "full": 0}
CASES: dict[str, dict[str, Any]] = {
    "velocity energy": {},
    "mixed energy": {"kvpo__anchor_state_weight": 0.5},
    "anchor-state energy": {"kvpo__anchor_state_weight": 1.0},
    "both KLs": {"kvpo__simplex_kl": 0.7, "objective__velocity_kl": 0.3},
    "anchor in the pool": {"kvpo__anchor_share": 0.4},
    "fixed temperature": {"objective__temperature": 1e-3, "kvpo__simplex_kl": 0.2},
    "latent distance on routes": {"method": "latent-distance"},
    "latent distance on neighbours": {"method": "latent-distance", "exploration__explorer": "neighbour"},
    "distance of velocities": {"method": "latent-distance", "latent_distance__space": "velocity"},
    "flow-grpo": {"method": "flow-grpo"},
    "cm-grpo": {"method": "cm-grpo"},
    "nft": {"method": "nft", "nft__beta": 0.6},
    "nft on the average": {"method": "nft", "nft__old": "average", "nft__beta": 0.6},
    "nft with selective KL": {"method": "nft", "nft__selective_kl": 0.5},
    "nft on routes": {"method": "nft", "exploration__explorer": "routes"},
    "rvm": {"method": "rvm"},
    "self-distill": {"method": "self-distill"},
}
METHOD_CASES = [name for name, case in CASES.items() if name in METHODS] + [
    "both KLs",
    "latent distance on routes",
]


@pytest.fixture(scope="module")
def explored(tiny_base: Path) -> Callable[..., Explored]:
    @cache
    def of(name: str, train: str = "lora") -> Explored:
        # Farther away all parameters' log-ratios are so large that they amplify rounding.
        moved = 0.05 if train == "lora" else 0.01
        config = tiny_config(tiny_base, optim__lora_rank=RANK[train], optim__inner_epochs=2, **CASES[name])
        return explored_by(toy_setup(config), moved)

    return of


def gradients(
    explored: Explored, learner: Learner, lessons: Sequence[Lesson], old: Sequence[Tensor] | None
) -> dict[str, Tensor]:
    return gradients_after(explored.trainer, lambda: accumulated(learner, lessons, old))


def accumulated(
    learner: Learner, lessons: Sequence[Lesson], old: Sequence[Tensor] | None
) -> tuple[list[dict[str, float]], float]:
    """The metrics of some lessons and the mean of their drift, once their gradients are added up."""
    found = [
        accumulate_gradients(learner, lesson, None if old is None else old[n], len(lessons))
        for n, lesson in enumerate(lessons)
    ]
    return [dict(metrics) for metrics, _ in found], sum(drift for _, drift in found) / len(found)


def gradients_after(trainer: Trainer, backward: Callable[[], object]) -> dict[str, Tensor]:
    parameters = trainer.policy.parameters
    for value in parameters.values():
        value.grad = None
    backward()
    return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


def direct(explored: Explored, *, on_policy: bool = False) -> dict[str, Tensor]:
    forks = explored.forks(on_policy=on_policy)
    return gradients_after(explored.trainer, lambda: whole_loss(forks).backward())


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


def assert_exact(explored: Explored) -> None:
    """Whatever the micro-batches, off policy and on it, the gradient is that of the whole loss."""
    lessons = explored.lessons
    for on_policy in (False, True):
        expected = direct(explored, on_policy=on_policy)
        old = None if on_policy else explored.old_tables
        for rows in ROWS:
            learner = replace(explored.learner, rows=rows)
            batches = [micro_batches(learner, lesson) for lesson in lessons]
            assert max(map(len, batches)) > 1 or rows in (0, 12) or len(lessons[0].evidence.past_Q) == 1
            assert_equal(gradients(explored, learner, lessons, old), expected)


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_is_that_of_the_whole_loss(explored: Callable[..., Explored], name: str) -> None:
    assert_exact(explored(name))


@pytest.mark.parametrize("name", METHOD_CASES)
def test_the_gradient_of_all_parameters_is_that_of_the_whole_loss(
    explored: Callable[..., Explored], name: str
) -> None:
    assert_exact(explored(name, "full"))


def test_every_method_has_a_case() -> None:
    assert {case.get("method", "kvpo") for case in CASES.values()} == set(METHODS) == set(LOSSES)
    assert {CASES[name].get("method", "kvpo") for name in METHOD_CASES} == set(METHODS)


def test_the_selective_kl_has_a_branch_to_hold_back(explored: Callable[..., Explored]) -> None:
    """Without one its velocity KL is not 0 but unknown."""
    one = explored("nft with selective KL")
    assert any(lesson.drift_rows for lesson in one.lessons)
    agreed = replace(one.lessons[0].credit, gap_G=torch.zeros(len(one.lessons[0].credit.branches)))
    none = lesson_of(one.learner, one.groups[0], agreed, keyed_generator("evidence", 0, 0, 0))
    for lesson in (*one.lessons, none):
        assert math.isnan(accumulate_gradients(one.learner, lesson, None, 1)[1]) == (not lesson.drift_rows)
    assert not none.drift_rows


@pytest.mark.parametrize("name", METHOD_CASES)
def test_activation_checkpointing_changes_nothing(explored: Callable[..., Explored], name: str) -> None:
    one = explored(name)
    learner = replace(one.learner, rows=4)
    expected = gradients(one, learner, one.lessons, one.old_tables)
    with checkpointed(one):
        assert_equal(gradients(one, learner, one.lessons, one.old_tables), expected)
        assert_equal(gradients(one, one.learner, one.lessons, one.old_tables), expected)


@dataclass(frozen=True)
class Uneven:
    """Videos whose forks, and with them windows and histories, differ in length."""

    def __call__(self, update: int) -> list[VideoPrompt]:
        return [
            VideoPrompt(n, ("a red circle", "a blue one"), (switch,), 27) for n, switch in enumerate((12, 18))
        ]


@pytest.mark.parametrize(
    ("name", "window"), [*((name, 12) for name in METHOD_CASES), ("both KLs", -1), ("flow-grpo", -1)]
)
def test_groups_that_fork_apart_add_up_to_the_gradient_of_the_whole_loss(
    tiny_base: Path, name: str, window: int
) -> None:
    config = tiny_config(
        tiny_base,
        exploration__blocks=3,
        stream__window=window,
        stream__sink=0,
        exploration__resident_frames=0,
        optim__inner_epochs=2,
        **CASES[name],
    )
    setup = replace(toy_setup(config), training_prompts=Uneven())
    for seed in range(20):
        setup = with_weights(setup, config=replace(config, seed=seed))
        if len({(fork.frame, fork.exploration.blocks) for fork in plan_rollout(setup, 0).forks}) == 2:
            break
    one = explored_by(setup, 0.05)
    assert len({(group.fork, group.blocks) for group in one.groups}) == 2
    assert_exact(one)


@pytest.mark.parametrize("name", METHOD_CASES)
def test_what_is_reported_does_not_depend_on_the_batches(
    explored: Callable[..., Explored], name: str
) -> None:
    """The drift is the mean over all groups, also where groups or their members come apart."""
    one = explored(name)
    with torch.no_grad():
        each = [float(velocity_drift(fork)) for fork in one.forks()]
        energies = [float(kvpo_energies(fork).mean()) for fork in one.forks()]
    assert abs(each[0] - each[1]) > 1e-6 * sum(each)
    whole, _ = accumulated(one.learner, one.lessons, one.old_tables)
    for rows in (*ROWS, 16):
        learner = replace(one.learner, rows=rows)
        found, drift = accumulated(learner, one.lessons, one.old_tables)
        assert drift == pytest.approx(sum(each) / 2, rel=1e-9)
        for metrics, expected in zip(found, whole, strict=True):
            assert metrics == pytest.approx(expected, rel=1e-9, abs=1e-12)
    if name == "both KLs":
        assert [metrics["energy_mean"] for metrics in whole] == pytest.approx(energies, rel=1e-9)


def test_the_velocity_kl_sees_the_anchors_states_of_the_first_steps(tiny_base: Path) -> None:
    found = []
    for steps in (1, 2):
        one = explored_by(toy_setup(tiny_config(tiny_base, objective__grad_steps=steps)), 0.05)
        with torch.no_grad():
            apart = [float(velocity_drift(fork)) for fork in one.forks()]
        assert one.lessons[0].steps == steps
        found.append(accumulated(one.learner, one.lessons, None)[1])
        assert found[-1] == pytest.approx(sum(apart) / 2, rel=1e-9)
    assert abs(found[0] - found[1]) > 1e-3 * found[0]


@pytest.mark.parametrize("name", METHOD_CASES)
def test_only_selected_branches_are_trained_on(explored: Callable[..., Explored], name: str) -> None:
    """Leaving a branch out equals learning from a group that never had it."""
    one = explored(name)
    group, credit = one.groups[0], one.lessons[0].credit
    chosen = Credit((0, 2), torch.tensor([1.0, -1.0]), credit.all_advantages_G, torch.zeros(2))
    keep, trajectories = [0, 2, group.branches], group.trajectories
    smaller = replace(
        group,
        routes=tuple(group.routes[n] for n in (0, 2)),
        trajectories=replace(
            trajectories,
            states_MPSFCHW=trajectories.states_MPSFCHW[keep],
            velocities_MPSFCHW=trajectories.velocities_MPSFCHW[keep],
            clean_MPFCHW=trajectories.clean_MPFCHW[keep],
        ),
        clean_MTCHW=group.clean_MTCHW[keep],
    )

    def lessons(of: Group, credit: Credit) -> list[Lesson]:
        draws = keyed_generator("evidence", one.trainer.setup.config.seed, 0, group.index)
        return [lesson_of(one.learner, of, credit, draws)]

    found, alone = lessons(group, chosen), lessons(smaller, replace(chosen, branches=(0, 1)))
    assert_equal(gradients(one, one.learner, found, None), gradients(one, one.learner, alone, None))
    some, everyone = table_of(one.learner, found[0]), table_of(one.learner, one.lessons[0])
    if name != "nft":  # whose targets depend on the advantages
        torch.testing.assert_close(some[:2], everyone[[0, 2]], rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    "name", ["anchor-state energy", "latent distance on routes", "distance of velocities", "self-distill"]
)
def test_methods_that_ask_at_the_anchors_states_replay_anchors_alone(
    explored: Callable[..., Explored], name: str
) -> None:
    one = explored(name)
    assert [lesson.evidence.past_Q for lesson in one.lessons] == [(3,), (3,)]
    assert [micro_batches(one.learner, lesson) for lesson in one.lessons] == [[range(1)], [range(1)]]


@pytest.mark.parametrize("name", METHOD_CASES)
@pytest.mark.parametrize("train", ["lora", "full"])
def test_kl_is_exactly_zero_and_the_ratio_exactly_one_before_the_first_step(
    tiny_base: Path, train: str, name: str
) -> None:
    settings = {**CASES[name], "optim__lora_rank": RANK[train], "optim__inner_epochs": 2}
    trainer = Trainer(toy_setup(tiny_config(tiny_base, **settings)))
    trainer.collect()
    lessons = list(trainer.collected[0].lessons.values())
    stored = list(trainer.collected[0].old_tables.values())
    exact = {"simplex_kl", "ratio_deviation"} & set(trainer.learner.method.metrics)
    for rows in (0, 4):
        learner = replace(trainer.learner, rows=rows)
        found, drift = accumulated(learner, lessons, None if rows else stored)
        assert drift == 0.0
        assert all(metrics[metric] == 0.0 for metrics in found for metric in exact)
    nudge(trainer.policy.parameters, 0.05)
    found, drift = accumulated(trainer.learner, lessons, stored)
    assert drift > 0 and all(metrics[metric] > 0 for metrics in found for metric in exact)
