"""Weights that are spread over ranks: the run of whole weights, saved whole, read by any number of ranks."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from torch import Tensor

from kvpo.app.build import build_setup
from kvpo.config import Config
from kvpo.training.background_saving import BackgroundSaving
from kvpo.training.checkpoint import TENSORS, latest_checkpoint, save_checkpoint
from kvpo.training.held_out import evaluate_base
from kvpo.training.kept_results import KeptResults
from kvpo.training.ranks import Ranks
from kvpo.training.run import restore
from kvpo.training.sharding import local, sharded
from kvpo.training.trainer import Trainer, architecture
from tests.ranks import on_ranks
from tests.tiny_wan import tiny_wan
from tests.tiny_world import in_float64, tiny_config, toy_setup

SETTINGS = {"exploration__rows": 2, "optim__replay_rows": 4, "optim__prompts_per_update": 2}


def spread(ranks: Ranks, config: Config) -> Config:
    own = replace(config.distributed, branch_ranks=ranks.count, shard=ranks.count > 1)
    return replace(config, distributed=own)


def toy_trainer(ranks: Ranks, config: Config) -> Trainer:
    setup = toy_setup(spread(ranks, config))
    return Trainer(replace(setup if config.optim.autocast != "none" else in_float64(setup), ranks=ranks))


def wan_trainer(ranks: Ranks, config: Config) -> Trainer:
    return Trainer(build_setup(spread(ranks, config), ranks))


def continued(ranks: Ranks, build: Any, config: Config, directory: Path, updates: int) -> list[float]:
    """Some more updates of the run in a directory, which are saved there.

    Held-out scores of the base, and the share of tensors that the last update's gradients reached.
    """
    trainer = build(ranks, config)
    assert sharded(trainer.policy.parameters.values()) == trainer.sharded == (ranks.count > 1)
    point = ranks.once("looking", lambda: latest_checkpoint(directory))
    if point is not None:
        restore(trainer, point)
    coverage = [trainer.step()["gradient_coverage"] for _ in range(updates)]
    if trainer.sharded:
        tensors, _ = trainer.tensors_and_state()
        kinds = {name.partition(".")[0] for name in tensors}
        assert kinds >= {"parameters", "average", "optimizer"}
        for kind in kinds:
            own = [value for name, value in tensors.items() if name.startswith(kind) and value.dim()]
            held = sum(local(value).numel() for value in own)
            assert held < 0.75 * sum(value.numel() for value in own), kind  # two rows do not part in three
    trainer.demand_equal_ranks()
    found = evaluate_base(trainer.setup, trainer, trainer.setup.validation)
    if trainer.sharded:
        saving = BackgroundSaving(trainer)
        saving.begin(directory, {}, lambda: None)
        assert saving.settle(wait=True) == trainer.update and saving.settle(wait=True) is None
    else:
        tensors, state = trainer.tensors_and_state()
        kind = architecture(trainer.setup.backbone.weights)
        save_checkpoint(directory, trainer.update, tensors, state, architecture=kind)
    return [*(float(one.components_KN.sum()) for one in found.values()), coverage[-1]]


def saved(directory: Path) -> dict[str, Tensor]:
    latest = latest_checkpoint(directory)
    assert latest is not None
    return load_file(latest / TENSORS)


def run_of(
    counts: list[int], updates: list[int], build: Any, config: Config, directory: Path
) -> tuple[dict[str, Tensor], list[float]]:
    """A run on some ranks after another, and its numbers, see ``continued``."""
    (directory / "checkpoints").mkdir(parents=True)
    for turn, (count, more) in enumerate(zip(counts, updates, strict=True)):
        every = on_ranks(
            count, directory / f"turn {turn}", continued, build, config, directory / "checkpoints", more
        )
        for found in every:
            assert isinstance(found, list), found
            assert found == every[0]
        latest = latest_checkpoint(directory / "checkpoints")
        assert latest is not None and all(path.is_file() for path in latest.iterdir())  # no parts are left
    return saved(directory / "checkpoints"), every[0]


def assert_near(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], share: float = 1e-6) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].shape == value.shape and found[name].dtype == value.dtype, name
        apart = (found[name] - value).double().norm()
        assert apart <= share * value.double().norm() + 1e-12, (name, float(apart))


@pytest.mark.parametrize("rank", [pytest.param(2, marks=pytest.mark.slow), 0])
def test_a_run_of_spread_weights_is_that_of_whole_ones(rank: int, tiny_base: Path, tmp_path: Path) -> None:
    """An adapter, and all parameters; two ranks, then one, then three, among which nothing divides evenly."""
    config = tiny_config(tiny_base, **SETTINGS, optim__lora_rank=rank)
    expected, numbers = run_of([1], [3], toy_trainer, config, tmp_path / "whole")
    found, again = run_of([2, 1, 3], [1, 1, 1], toy_trainer, config, tmp_path / "spread")
    assert_near(found, expected)
    assert again == pytest.approx(numbers, rel=1e-9) and again[-1] == 1


def evaluated_twice(ranks: Ranks, config: Config, folder: Path) -> list[float]:
    """Scores of the base, kept between two evaluations in files that only rank 0 still sees."""
    trainer, own = toy_trainer(ranks, config), folder / str(ranks.rank)
    found: list[float] = []
    for _ in range(2):
        kept = KeptResults(own, "base", ranks)
        every = evaluate_base(trainer.setup, trainer, trainer.setup.validation, kept=kept)
        found.append(sum(float(one.components_KN.sum()) for one in every.values()))
        if not ranks.main:
            kept.remove()
    return found


def test_kept_results_that_one_rank_does_not_see_yet_are_those_of_all(
    tiny_base: Path, tmp_path: Path
) -> None:
    config = tiny_config(tiny_base, **SETTINGS)
    (first, again), other = on_ranks(2, tmp_path / "ranks", evaluated_twice, config, tmp_path, short=20.0)
    assert first == again and other == [first, again]


def test_a_public_generator_in_bfloat16_with_an_adapter_in_float32(tmp_path: Path) -> None:
    changes = {"optim__autocast": "bfloat16", "optim__checkpointing": True, "optim__updates": 3}
    config = tiny_wan("memflow-1.3b", tmp_path, **SETTINGS, **changes, optim__lr=1e-3)
    expected, numbers = run_of([1], [3], wan_trainer, config, tmp_path / "whole")
    found, again = run_of([2], [3], wan_trainer, config, tmp_path / "spread")
    assert_near(found, expected, 1e-4)
    assert again == pytest.approx(numbers, rel=1e-3) and again[-1] == 1
