"""Rollouts of 8 bits in training: what they change, what they leave alone, how far they may go."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kvpo.app import align, doctor
from kvpo.app.configuration import assign
from kvpo.app.sources import common
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.method.diagnostics import meanings
from kvpo.method.evidence import no_credit
from kvpo.models.quantised import QuantisedLinear, quantised_layers
from kvpo.training import collection
from kvpo.training.checks import (
    anchor_energy_at_old,
    default_route_max_difference,
    first_ratio_max_deviation,
    ratio_tolerance,
)
from kvpo.training.collection import demand_small_gap, explore, lessons_of, policy_gap
from kvpo.training.gradients import accumulate_gradients
from kvpo.training.trainer import Trainer
from tests.tiny_world import tiny_config
from tests.training.test_trainer import equal, snapshot, trainer_of

RANK = {"lora": 2, "full": 0}


@pytest.fixture(autouse=True)
def no_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights may round by more than trained ones."""
    monkeypatch.setattr(collection, "LARGEST_GAP", float("inf"))


def trainer_with(base: Path, precision: str = "int8", **settings: object) -> Trainer:
    settings = {"optim__prompts_per_update": 1, "optim__rollout_precision": precision, **settings}
    return trainer_of(base, **settings)


def test_the_gap_is_rounding_alone_unless_rollouts_are_quantised(tiny_base: Path) -> None:
    gaps = {}
    for precision in ("same", "int8", "fp8"):
        trainer = trainer_with(tiny_base, precision)
        ((rollout, _),) = explore(trainer.setup, [0])
        gaps[precision] = policy_gap(trainer.setup.generator, rollout.groups[0])
    assert gaps["same"] < 1e-9 < gaps["int8"] and gaps["same"] < 1e-9 < gaps["fp8"]


@pytest.mark.parametrize("train", RANK)
def test_a_rollout_leaves_every_weight_and_what_is_not_a_rollout_as_it_was(
    tiny_base: Path, train: str
) -> None:
    trainer = trainer_with(tiny_base, optim__lora_rank=RANK[train])
    other = trainer_with(tiny_base, "same", optim__lora_rank=RANK[train])
    before = {name: value.clone() for name, value in trainer.setup.model.state_dict().items()}
    ((rollout, _),), ((expected, _),) = (explore(one.setup, [0]) for one in (trainer, other))
    assert equal(trainer.setup.model.state_dict(), before)
    assert not torch.equal(rollout.groups[0].clean_MTCHW, expected.groups[0].clean_MTCHW)
    prompts = trainer.setup.validation["short"]
    videos = [one.setup.backbone.latents(prompts, one.setup.evaluation_tape()) for one in (trainer, other)]
    assert torch.equal(*videos)


def test_gradients_at_the_states_of_a_rollout_do_not_know_how_it_was_made(tiny_base: Path) -> None:
    made, other = trainer_with(tiny_base), trainer_with(tiny_base, "same")
    ((rollout, _),) = explore(made.setup, [0])
    credit = no_credit(rollout.groups[0].branches)
    credit.advantages_G.copy_(torch.tensor([1.0, -0.5, -0.5]))
    lesson = lessons_of(made.setup, made.learner, 0, rollout, {0: credit})[0]
    gradients: list[dict[str, Tensor]] = []
    for trainer in (made, other):
        accumulate_gradients(trainer.learner, lesson, None, 1)
        parameters = trainer.policy.parameters
        gradients.append({name: p.grad for name, p in parameters.items() if p.grad is not None})
    assert equal(*gradients) and any(bool(value.any()) for value in gradients[0].values())


def test_updates_report_the_gap_and_quantise_the_weights_of_each(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Tensor] = []

    @contextmanager
    def watched(model: nn.Module, precision: str) -> Iterator[None]:
        with quantised_layers(model, precision):
            layers = [one for one in model.modules() if isinstance(one, QuantisedLinear)]
            seen.append(torch.cat([one.weight_OI.flatten() * one.scale_O1[0] for one in layers]))
            yield

    monkeypatch.setattr(common, "quantised_layers", watched)
    trainer = trainer_with(tiny_base)
    numbers = [trainer.step() for _ in range(2)]
    assert len(seen) == 2 and not torch.equal(*seen)
    assert all(one["rollout_gap"] > 0 and one["ratio_deviation"] == 0 for one in numbers)
    assert not any("8" in str(value.dtype) for value in trainer.tensors_and_state()[0].values())
    assert "quantised" in meanings({})["Update"]["rollout_gap"]
    monkeypatch.undo()
    assert "rollout_gap" not in trainer_with(tiny_base, "same").step()


def test_a_run_whose_rollouts_are_too_far_from_its_policy_is_refused(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "LARGEST_GAP", 1e-12)
    trainer = trainer_with(tiny_base)
    before = snapshot(trainer)
    message = (
        r"optim\.rollout_precision: int8 has a policy gap of \S+, more than 1e-12: start again with same"
    )
    with pytest.raises(ValueError, match=f"^{message}"):
        trainer.step()
    assert equal(snapshot(trainer), before) and trainer.update == 0


@pytest.mark.parametrize(("precision", "way_out"), [("int8", "same"), ("fp8", "same, or with int8, which")])
def test_the_way_out_of_a_large_gap_is_not_the_precision_that_has_it(
    precision: str, way_out: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(collection, "LARGEST_GAP", 0.1)
    setup: Any = SimpleNamespace(config=assign(Config(), {"optim.rollout_precision": precision}))
    with pytest.raises(ValueError, match=f"{precision} has .*: start again with {way_out}( rounds less)?$"):
        demand_small_gap(setup, [{"rollout_gap": 0.2}])


def test_the_identities_hold_but_for_what_the_rollout_rounds(tiny_base: Path) -> None:
    trainer = trainer_with(tiny_base)
    prompts = trainer.setup.training_prompts(0)
    assert first_ratio_max_deviation(trainer) <= ratio_tolerance(trainer.setup.config)
    assert anchor_energy_at_old(trainer.setup, prompts) > 0
    assert default_route_max_difference(trainer.setup, prompts) == 0


def test_what_cannot_be_quantised_is_refused_before_a_run_begins(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sharded = {"distributed__shard": True, "distributed__branch_ranks": 2}
    with pytest.raises(ConfigurationError, match="rollout_precision: must be same while distributed.shard"):
        check(tiny_config(tiny_base, optim__rollout_precision="int8", **sharded))

    def refuse(precision: str, device: str, shape: object) -> None:
        raise ValueError(f"{precision} on {device}")

    config = tiny_config(tiny_base, optim__rollout_precision="fp8")
    for module in (align, doctor):
        monkeypatch.setattr(module, "check_rollouts", refuse)
    with pytest.raises(ValueError, match="^fp8 on cpu$"):
        align.align(config, tmp_path / "run")
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    with pytest.raises(ValueError, match="^fp8 on cpu$"):
        doctor.precision(config)
