"""A run is a function of its configuration: on one to four ranks it is the same run, bit for bit."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.training import gradients
from kvpo.training.checkpoint import latest_checkpoint, save_checkpoint
from kvpo.training.held_out import evaluate_prompts
from kvpo.training.ranks import RankError, Ranks
from kvpo.training.run import restore
from kvpo.training.trainer import Trainer, architecture
from tests.ranks import on_ranks
from tests.tiny_world import ToyScorer, tiny_config, toy_setup, with_weights

Outcome = tuple[dict[str, Tensor], list[dict[str, float]]]
ONE_BY_ONE = {"exploration__rows": 4}
"""A group at a time."""


class OneAlike(ToyScorer):
    """All clips of every update's second prompt are alike, so that its group is skipped as noise."""

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        told_B = torch.tensor(["take 1" not in str(prompt) for prompt in prompts])
        return {name: score * told_B for name, score in super().__call__(video_BTCHW, prompts).items()}


def trainer_on(ranks: Ranks, base: Path, scorer: Any = None, **settings: Any) -> Trainer:
    return Trainer(replace(toy_setup(tiny_config(base, **settings), scorer), ranks=ranks))


def trained(ranks: Ranks, base: Path, updates: int, settings: Mapping[str, Any]) -> Outcome:
    """Everything that a trainer holds after some updates, and their metrics."""
    trainer = trainer_on(ranks, base, OneAlike(), **settings)
    metrics = [trainer.step() for _ in range(updates)]
    trainer.demand_equal_ranks()
    return trainer.tensors_and_state()[0], metrics


def assert_same(one: Outcome, other: Outcome) -> None:
    for name, value in one[0].items():
        assert torch.equal(value, other[0][name]), name
    assert json.dumps(one[1]) == json.dumps(other[1])


@pytest.mark.parametrize(("groups", "counts"), [(1, (2,)), (2, (3,)), (3, (2,)), (4, (3,)), (5, (2, 4))])
def test_groups_over_ranks_are_the_run_of_one_process(
    groups: int, counts: tuple[int, ...], tiny_base: Path, tmp_path: Path
) -> None:
    """Any number of groups on any number of ranks, some groups skipped, some ranks without work."""
    settings = {"optim__prompts_per_update": groups, **ONE_BY_ONE}
    (alone,) = on_ranks(1, tmp_path, trained, tiny_base, 2, settings)
    assert groups == 1 or any(numbers["skipped_fraction"] for numbers in alone[1])
    for count in counts:
        for found in on_ranks(count, tmp_path / str(count), trained, tiny_base, 2, settings):
            assert_same(found, alone)


OTHERS: dict[str, dict[str, Any]] = {
    "all parameters, two epochs, two rollouts": {
        "optim__lora_rank": 0,
        "optim__inner_epochs": 2,
        "optim__rollouts_per_refresh": 2,
    },
    "one scale for the collection": {"method": "rvm"},
    "the old policy's velocities": {"method": "nft"},
    "donor histories": {"exploration__donor": 1},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_runs_are_the_same_on_two_ranks(name: str, tiny_base: Path, tmp_path: Path) -> None:
    settings = {"optim__prompts_per_update": 3, **ONE_BY_ONE, **OTHERS[name]}
    (alone,) = on_ranks(1, tmp_path, trained, tiny_base, 2, settings)
    for found in on_ranks(2, tmp_path / "two", trained, tiny_base, 2, settings):
        assert_same(found, alone)


def test_without_a_limit_of_rows_ranks_differ_by_rounding(tiny_base: Path, tmp_path: Path) -> None:
    settings = {"optim__prompts_per_update": 3, "exploration__rows": 0}
    (alone,) = on_ranks(1, tmp_path, trained, tiny_base, 1, settings)
    one, other = on_ranks(2, tmp_path / "two", trained, tiny_base, 1, settings)
    assert_same(one, other)
    for name in ("reward_mean", "gradient_norm", "energy_mean"):
        assert one[1][0][name] == pytest.approx(alone[1][0][name], rel=1e-4)


def continued(
    ranks: Ranks, base: Path, directory: Path, updates: int, settings: Mapping[str, Any]
) -> Outcome:
    """Some more updates of the run in a directory, saved there by rank 0."""
    trainer = trainer_on(ranks, base, OneAlike(), **settings)
    point = ranks.once("looking", lambda: latest_checkpoint(directory))
    if point is not None:
        restore(trainer, point)
    metrics = [trainer.step() for _ in range(updates)]
    tensors, state = trainer.tensors_and_state()
    kind = architecture(trainer.setup.backbone.weights)
    ranks.once(
        "saving", lambda: save_checkpoint(directory, trainer.update, tensors, state, architecture=kind)
    )
    return tensors, metrics


@pytest.mark.parametrize("counts", [(1, 2, 1), (4, 3, 2)])
def test_a_run_resumes_on_other_numbers_of_ranks(
    counts: tuple[int, ...], tiny_base: Path, tmp_path: Path
) -> None:
    settings = {"optim__prompts_per_update": 2, "exploration__rows": 4}
    (alone,) = on_ranks(1, tmp_path, trained, tiny_base, 3, settings)
    directory, metrics = tmp_path / "checkpoints", []
    directory.mkdir()
    for turn, count in enumerate(counts):
        found = on_ranks(count, tmp_path / f"turn {turn}", continued, tiny_base, directory, 1, settings)
        metrics += found[-1][1]
    assert_same((found[-1][0], metrics), alone)


def held_out(ranks: Ranks, base: Path) -> dict[str, Tensor]:
    setup = trainer_on(ranks, base, evaluation__validation_prompts=7, exploration__rows=3).setup
    found = evaluate_prompts(setup, setup.validation["short"], ranks)
    return {name: value for name, value in vars(found).items() if isinstance(value, Tensor)}


def test_held_out_numbers_do_not_depend_on_the_ranks(tiny_base: Path, tmp_path: Path) -> None:
    (alone,) = on_ranks(1, tmp_path, held_out, tiny_base)
    for found in on_ranks(3, tmp_path / "ranks", held_out, tiny_base):
        assert found.keys() == alone.keys() and all(torch.equal(found[name], alone[name]) for name in alone)


def differing(ranks: Ranks, base: Path, other_base: Path, what: str) -> None:
    """A run whose second rank is not where it should be."""
    second = ranks.rank == 1
    trainer = trainer_on(ranks, base, seed=int(second and what == "seed"))
    if second and what == "base":
        trainer.setup = with_weights(trainer.setup, base_sha256=str(other_base))
    if what == "checkpoint":
        trainer.step()
        tensors, state = trainer.tensors_and_state()
        directory = other_base.parent / f"rank {ranks.rank}"
        kind = architecture(trainer.setup.backbone.weights)
        if second:
            tensors = {name: value + 1e-3 * name.startswith("average.") for name, value in tensors.items()}
        directory.mkdir()
        restore(trainer, save_checkpoint(directory, 1, tensors, state, architecture=kind))
    if second and what == "adapter":
        with torch.no_grad():
            next(iter(trainer.policy.parameters.values()))[0, 0] += 1e-6
    trainer.demand_equal_ranks()


@pytest.mark.parametrize(
    ("what", "named"),
    [("seed", "settings of seed"), ("base", "base"), ("adapter", "weights"), ("checkpoint", "weights")],
)
def test_a_rank_that_is_not_where_the_others_are_is_named(
    what: str, named: str, tiny_base: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    for error in on_ranks(2, tmp_path / "ranks", differing, tiny_base, other, what):
        assert isinstance(error, RankError) and "rank 1 differs from rank 0 in its " in str(error)
        assert named in str(error)


def failing_on_one(ranks: Ranks, base: Path, what: str) -> tuple[str, bool]:
    """The error of an update that fails on rank 1, and whether the trainer is as it was."""
    trainer = trainer_on(ranks, base, exploration__rows=4)
    trainer.step()
    before = {name: value.clone() for name, value in trainer.tensors_and_state()[0].items()}
    if ranks.rank == 1 and what == "reward":
        trainer.setup = replace(trainer.setup, judges=replace(trainer.setup.judges, scorer=Broken()))
    if ranks.rank == 1 and what == "residuals":
        original = gradients.residual_table
        gradients.residual_table = lambda *given: original(*given) * math.inf
    try:
        trainer.step()
    except ValueError as error:
        after = trainer.tensors_and_state()[0]
        return str(error), all(torch.equal(value, after[name]) for name, value in before.items())
    return "", False


class Broken:
    """A reward that fails."""

    components = ("redness", "calm")

    def __call__(self, *clips: Any) -> dict[str, Tensor]:
        raise ValueError("the reward is out of order")


@pytest.mark.parametrize(("what", "why"), [("reward", "out of order"), ("residuals", "replayed residuals")])
def test_what_fails_on_one_rank_stops_all_where_they_were(
    what: str, why: str, tiny_base: Path, tmp_path: Path
) -> None:
    (other, same), (own, same_there) = on_ranks(2, tmp_path / "ranks", failing_on_one, tiny_base, what)
    assert why in own and why in other and other.startswith("stopped with rank 1")
    assert same and same_there
