"""Ranks that have groups in common, with and without spread weights: the run of one process."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kvpo.training import gradients
from kvpo.training.ranks import RankError, Ranks, Teams, teams_of
from tests.ranks import on_ranks
from tests.training.test_ranks_of_a_run import assert_same, trained, trainer_on

ONE_BY_ONE = {"exploration__rows": 1, "optim__replay_rows": 4, "optim__prompts_per_update": 3}
"""A trajectory per pass, so that what is computed together does not depend on the ranks."""
METHODS: dict[str, dict[str, Any]] = {
    "kvpo": {"optim__rollouts_per_refresh": 2, "objective__keep": (1, 1)},
    "latent-distance": {},
    "self-distill": {},
    "nft": {"nft__old": "average"},
}


@pytest.mark.parametrize(("method", "count", "size"), [
    ("kvpo", 2, 2), ("kvpo", 4, 2), ("latent-distance", 3, 3), ("self-distill", 2, 2), ("nft", 3, 3),
])  # fmt: skip
def test_branches_over_ranks_are_the_run_of_one_process(
    method: str, count: int, size: int, tiny_base: Path, tmp_path: Path
) -> None:
    """Teams of two and three, one team and two; groups that no team has and ranks without a branch."""
    settings = {"method": method, **ONE_BY_ONE, **METHODS[method]}
    (alone,) = on_ranks(1, tmp_path, trained, tiny_base, 2, settings)
    settings |= {"distributed__branch_ranks": size}
    for found in on_ranks(count, tmp_path / "ranks", trained, tiny_base, 2, settings):
        assert_same(found, alone)


def test_batches_that_ranks_share_differ_by_rounding(tiny_base: Path, tmp_path: Path) -> None:
    settings = {"optim__prompts_per_update": 2}
    (alone,) = on_ranks(1, tmp_path, trained, tiny_base, 3, settings)
    settings |= {"distributed__branch_ranks": 2}
    one, other = on_ranks(2, tmp_path / "ranks", trained, tiny_base, 3, settings)
    assert json.dumps(one[1]) == json.dumps(other[1])
    for name, value in alone[0].items():
        assert (one[0][name] - value).norm() <= 1e-4 * value.norm() + 1e-6, name


def teams(ranks: Ranks, size: int) -> Teams:
    found = teams_of(ranks, size)
    assert found.team.gather(ranks.rank, "counting")[found.team.rank] == ranks.rank
    return found.index, found.count, found.team.gather(ranks.rank, "counting"), found.team.deal(range(3))


def test_teams_are_neighbours_and_every_rank_is_dealt_as_much(tmp_path: Path) -> None:
    found = on_ranks(4, tmp_path / "two", teams, 3)  # three do not divide four
    assert found == [(0, 2, [0, 1], [0, 2]), (0, 2, [0, 1], [1, 2]),
                     (1, 2, [2, 3], [0, 2]), (1, 2, [2, 3], [1, 2])]  # fmt: skip
    assert on_ranks(1, tmp_path, teams, 8) == [(0, 1, [0], [0, 1, 2])]


def failing(ranks: Ranks, base: Path, settings: Mapping[str, Any]) -> None:
    trainer = trainer_on(ranks, base, **settings)
    if ranks.rank == 3:
        trainer.setup = replace(trainer.setup, judges=replace(trainer.setup.judges, scorer=Broken()))
    trainer.step()


def failing_replay(ranks: Ranks, base: Path, settings: Mapping[str, Any]) -> None:
    if ranks.rank == 3:
        original = gradients.whole_velocities

        def broken(*given: Any) -> Any:
            raise ValueError(f"out of order {original}")

        gradients.whole_velocities = broken
    trainer_on(ranks, base, **settings).step()


class Broken:
    """A reward that fails."""

    components = ("redness", "calm")

    def __call__(self, *clips: Any) -> Any:
        raise ValueError("the reward is out of order")


@pytest.mark.parametrize("work", [failing, failing_replay])
def test_a_failure_in_one_team_is_named_in_the_others(work: Any, tiny_base: Path, tmp_path: Path) -> None:
    settings = {**ONE_BY_ONE, "distributed__branch_ranks": 2}
    *others, own = on_ranks(4, tmp_path / "ranks", work, tiny_base, settings)
    assert isinstance(own, ValueError) and not isinstance(own, RankError) and "out of order" in str(own)
    for error in others:
        assert isinstance(error, RankError) and str(error).startswith("stopped with rank 3, which failed")
        assert "out of order" in str(error) and str(error).count("stopped") == 1
