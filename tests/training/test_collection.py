"""Rollouts of updates: what is drawn for each, and scoring beside generation."""

import time
import weakref
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.engine.background import in_background
from kvpo.engine.forks import Fork
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.pages import cache_pages
from kvpo.engine.scoring import score_group
from kvpo.prompts import VideoPrompt
from kvpo.training.collection import credit_of, explore, generate_rollout, plan_rollout
from kvpo.training.ranks import ALONE
from tests.tiny_world import ToyScorer, tiny_config, toy_setup, with_weights
from tests.training.test_trainer import equal, snapshot, trainer_of


def same_prompts(update: int) -> list[VideoPrompt]:
    """The same long video twice, in every update: only keys make a difference."""
    return [VideoPrompt(n, ("a red circle",), (), 45) for n in range(2)]


def test_every_seed_and_every_update_forks_for_itself(tiny_base: Path) -> None:
    def forks(seeds: range, updates: range) -> set[tuple[int, ...]]:
        setup = toy_setup(tiny_config(tiny_base))
        seeded = [replace(setup.config, seed=seed) for seed in seeds]
        setups = [
            replace(with_weights(setup, config=config), training_prompts=same_prompts) for config in seeded
        ]
        planned = [plan_rollout(one, update) for one in setups for update in updates]
        return {tuple(fork.frame for fork in one.forks) for one in planned}

    assert forks(range(1), range(1)) == forks(range(1), range(1))
    assert len(forks(range(1), range(12))) > 3
    assert len(forks(range(12), range(1))) > 3
    assert len({fork - other for fork, other in forks(range(1), range(12))}) > 3, "groups fork for themselves"


def test_members_are_replayed_together_by_the_shortest_window_of_a_rollout(tiny_base: Path) -> None:
    setup = toy_setup(tiny_config(tiny_base, exploration__blocks=3, optim__replay_rows=12))
    found = {
        tuple(sorted(fork.exploration.blocks for fork in planned.forks)): planned.replayed
        for planned in (plan_rollout(setup, update) for update in range(60))
    }
    assert any(len(set(blocks)) > 1 for blocks in found)
    assert all(together == 12 // (2 * blocks[0]) for blocks, together in found.items())


def test_every_group_of_every_seed_and_update_draws_its_own_routes_and_noise(tiny_base: Path) -> None:
    setup = replace(toy_setup(tiny_config(tiny_base, exploration__branches=4)), training_prompts=same_prompts)

    def groups(seed: int, update: int) -> list[Any]:
        seeded = with_weights(setup, config=replace(setup.config, seed=seed))
        planned = replace(plan_rollout(seeded, update), forks=[Fork(24, setup.config.exploration)] * 2)
        with in_background() as submit:
            cache = seeded.generator.new_cache(cache_pages(seeded.generator, [planned]))
            return generate_rollout(seeded, update, planned, submit, cache, ALONE)[0].groups

    found = [*groups(0, 0), *groups(0, 1), *groups(1, 0)]
    assert len({group.routes for group in found}) == len(found) == 6
    anchors = [group.clean_MTCHW[-1] for group in found]
    same = {(a, b) for b in range(6) for a in range(b) if torch.equal(anchors[a], anchors[b])}
    assert same == {(0, 2), (1, 3)}, "the noise goes with the seed and the video, whatever the update"


def test_every_group_of_every_seed_and_update_is_dealt_its_own_permutation(tiny_base: Path) -> None:
    setup = toy_setup(tiny_config(tiny_base, exploration__branches=6, objective__advantages="random"))
    ((_, scores),) = explore(setup, [0])

    def dealt(seed: int, update: int) -> list[tuple[float, ...]]:
        seeded = with_weights(setup, config=replace(setup.config, seed=seed))
        credits = [credit_of(seeded, update, index, scores[0], None) for index in range(2)]
        return [tuple(credit.all_advantages_G.tolist()) for credit in credits if credit]

    found = [*dealt(0, 0), *dealt(0, 1), *dealt(1, 0)]
    assert len(set(found)) == len(found) == 6
    assert len({tuple(sorted(row)) for row in found}) == 1


class Watched(ToyScorer):
    """Counts the blocks that were generated when each of its calls began, and the clips that are alive."""

    def __init__(self) -> None:
        super().__init__()
        vars(self).update(generated=[0], at_calls=[], alive=[], most_alive=[0])

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
        self.at_calls.append(self.generated[0])
        self.alive.append(weakref.ref(video_BTCHW))
        self.most_alive[0] = max(self.most_alive[0], sum(ref() is not None for ref in self.alive))
        time.sleep(0.02)  # longer than a block takes
        return super().__call__(video_BTCHW, prompts)


@pytest.mark.parametrize("refresh", [1, 2])
def test_scoring_overlaps_generation_and_changes_no_number(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, refresh: int
) -> None:
    scorer = Watched()
    trainer = trainer_of(
        tiny_base,
        scorer,
        exploration__rows=2,
        optim__prompts_per_update=3,
        optim__rollouts_per_refresh=refresh,
    )
    velocity = StreamingGenerator.velocity

    def counted(*arguments: Any) -> Tensor:
        scorer.generated[0] += 1
        return velocity(*arguments)

    monkeypatch.setattr(StreamingGenerator, "velocity", counted)
    if refresh == 1:
        ((rollout, scores),) = explore(trainer.setup, [0])
        codec, block = trainer.setup.backbone.codec, trainer.setup.generator.block
        alone = [score_group(group, codec, ToyScorer(), block=block) for group in rollout.groups]
        for found, expected in zip(scores, alone, strict=True):
            assert torch.equal(found.local_KM, expected.local_KM)
            assert torch.equal(found.global_KM, expected.global_KM)
    else:
        trainer.collect()
    assert (
        scorer.at_calls[0] < scorer.generated[0]
    )  # the first group was scored before the last was generated
    assert scorer.most_alive[0] == 1


@pytest.mark.parametrize("rows", [0, 3])
def test_a_run_with_overlap_is_the_run_without(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    settings = {"exploration__rows": rows, "optim__rollouts_per_refresh": 2, "optim__updates": 4}
    overlapped, plain = trainer_of(tiny_base, **settings), trainer_of(tiny_base, **settings)
    numbers = [overlapped.step() for _ in range(4)]

    @contextmanager
    def at_once() -> Iterator[Any]:
        def submit(call: Any) -> Future[Any]:
            future: Future[Any] = Future()
            future.set_result(call())
            return future

        yield submit

    monkeypatch.setattr("kvpo.training.collection.in_background", at_once)
    assert [plain.step() for _ in range(4)] == numbers
    assert equal(snapshot(overlapped), snapshot(plain))
