"""The exactness checks of a run measure what they say, and can fail."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.engine.explorers import Member
from kvpo.engine.replay import ReplayRow
from kvpo.engine.rollout import Ran, Rollout
from kvpo.training import checks
from kvpo.training.checks import (
    anchor_energy_at_old,
    default_route_max_difference,
    first_ratio_max_deviation,
    ratio_tolerance,
)
from kvpo.training.gradients import Lesson
from tests.training.test_trainer import trainer_of

IDENTITIES = {
    "first ratio": (first_ratio_max_deviation, checks, "streamed_table"),
    "anchor energy": (
        lambda t: anchor_energy_at_old(t.setup, t.setup.training_prompts(0)),
        checks,
        "replay_context",
    ),
    "recent route": (
        lambda t: default_route_max_difference(t.setup, t.setup.training_prompts(0)),
        Rollout,
        "run",
    ),
}
"""What measures it, and the function that it calls after a rollout, or twice."""


@pytest.mark.parametrize("name", IDENTITIES)
@pytest.mark.parametrize("train", ["lora", "full"])
def test_identities_of_a_run_are_exact_and_can_fail(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, name: str, train: str
) -> None:
    measure, owner, step = IDENTITIES[name]
    trainer = trainer_of(tiny_base, optim__lora_rank={"lora": 2, "full": 0}[train])
    tolerance = ratio_tolerance(trainer.setup.config) if name == "first ratio" else 0.0
    assert measure(trainer) <= tolerance
    original = vars(owner)[step]

    def after_a_nudge(*arguments: Any, **named: Any) -> Any:
        with torch.no_grad():
            for value in trainer.policy.parameters.values():
                value.add_(0.01)
        return original(*arguments, **named)

    monkeypatch.setattr(owner, step, after_a_nudge)
    assert measure(trainer) > tolerance


def test_a_single_number_that_differs_on_the_recent_route_is_found(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, original = trainer_of(tiny_base), Rollout.run

    def nudged(rollout: Rollout, members: Sequence[Member], **named: Any) -> Iterator[Ran]:
        for one in original(rollout, members, **named):
            if members[0].routes is not None:
                one.velocities_PSFCHW[-1, 0, 0, 0, 0, 0] += 0.25
            yield one

    monkeypatch.setattr(Rollout, "run", nudged)
    found = default_route_max_difference(trainer.setup, trainer.setup.training_prompts(0))
    assert found == pytest.approx(0.25, rel=1e-4)


STREAMS: dict[str, dict[str, Any]] = {
    "one step": {"stream__schedule": (1.0,), "objective__grad_steps": 1},
    "other steps first": {"stream__schedule": (1.0, 0.5), "stream__schedule_first": (1.0, 0.75, 0.5, 0.25)},
    "single frames": {"stream__block": 1, "stream__schedule": (1.0, 0.5)},
    "soft transitions": {"stream__transition_blocks": 3},
}


@pytest.mark.parametrize("kind", STREAMS)
def test_identities_hold_however_a_generator_is_deployed(tiny_base: Path, kind: str) -> None:
    trainer = trainer_of(tiny_base, **STREAMS[kind])
    prompts = trainer.setup.training_prompts(0)
    first = trainer.step()
    assert first["ratio_deviation"] == 0 and first["gradient_norm"] > 0
    assert first_ratio_max_deviation(trainer) <= ratio_tolerance(trainer.setup.config)
    assert anchor_energy_at_old(trainer.setup, prompts) == 0
    assert default_route_max_difference(trainer.setup, prompts) == 0


@pytest.mark.parametrize("method", ["kvpo", "flow-grpo", "cm-grpo"])
def test_the_first_ratio_notices_a_replay_in_the_anchors_context(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """Branches' own blocks encoded from the anchor's latents: two replays would agree on that."""
    trainer = trainer_of(tiny_base, method=method)
    assert first_ratio_max_deviation(trainer) <= ratio_tolerance(trainer.setup.config)
    original = Lesson.row

    def of_anchors(lesson: Lesson, query: int) -> ReplayRow:
        return replace(original(lesson, query), past_PFCHW=lesson.past_MPFCHW[-1])

    monkeypatch.setattr(Lesson, "row", of_anchors)
    assert first_ratio_max_deviation(trainer) > 10 * ratio_tolerance(trainer.setup.config)


def test_the_anchors_energy_is_of_every_solver_step(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A replay that is wrong at the last step alone is noticed."""
    trainer = trainer_of(tiny_base)
    last = trainer.setup.generator.sigmas[-1]
    original = checks.replay_velocities

    def wrong_at_the_last(generator: Any, *arguments: Any) -> Tensor:
        return original(generator, *arguments) + (1.0 if generator.sigmas[0] == last else 0.0)

    monkeypatch.setattr(checks, "replay_velocities", wrong_at_the_last)
    assert anchor_energy_at_old(trainer.setup, trainer.setup.training_prompts(0)) == pytest.approx(1.0)


def test_the_ratio_is_checked_on_two_groups_without_their_tails(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[int]] = []
    original = checks.roll_out

    def roll_out(generator: Any, planned: Any, *arguments: Any, **options: Any) -> Any:
        assert len(planned.prompts) == len(planned.forks)
        seen.append([fork.exploration.tail_blocks for fork in planned.forks])
        return original(generator, planned, *arguments, **options)

    monkeypatch.setattr(checks, "roll_out", roll_out)
    trainer = trainer_of(tiny_base, optim__prompts_per_update=3)
    assert (first_ratio_max_deviation(trainer) or 0.0) < 1e-4
    assert seen == [[0, 0]]
