"""The score cache in a run: what a second run need not score, and that the metrics say so."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.app.build import build_setup
from kvpo.app.configuration import assign, preset
from kvpo.app.judges import build_judges, build_scorer, build_watchers
from kvpo.config import Config
from kvpo.rewards.cache import Counts, score_cache
from kvpo.rewards.preference import Preference, save_preference
from kvpo.rewards.reward import Reward
from kvpo.training.collection import explore
from kvpo.training.held_out import evaluate_base, evaluate_prompts
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.run import Run
from kvpo.training.trainer import Trainer
from tests.metrics import read_metrics
from tests.tiny_world import ToyScorer, tiny_config, toy_setup

ME = "tests.app.test_cached_run"


def calm(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """A reward whose author says when it changes."""
    return video_BTCHW.mean((1, 2, 3, 4))


calm.version = "1"  # type: ignore[attr-defined]


def unknown(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """A reward that says nothing of its version."""
    return calm(video_BTCHW, prompts)


def versions(tmp_path: Path, *scorers: str, **changes: Any) -> list[str]:
    """Versions of the scorers of a run, in the order of their names."""
    values = {name.replace("__", "."): value for name, value in changes.items()}
    config = assign(Config(), {"rewards.scorers": list(scorers), **values})
    scorer, _ = build_scorer(config, 8.0, score_cache(str(tmp_path)))
    parts = scorer.scorers if len(scorers) > 1 else [scorer]
    return [part.version for part in parts]


def test_a_version_is_known_of_all_but_functions_that_do_not_say(tmp_path: Path) -> None:
    names = ["flicker", "world", f"{ME}:calm", f"{ME}:unknown"]
    found = versions(tmp_path, *names)
    assert all(found[:3]) and len(set(found)) == 4 and found[3] == ""
    assert versions(tmp_path, *names) == found
    assert versions(tmp_path, "flicker", rewards__top_share=0.5)[0] != found[0]
    calm.version = "2"  # type: ignore[attr-defined]
    try:
        assert versions(tmp_path, f"{ME}:calm")[0] not in found
    finally:
        calm.version = "1"  # type: ignore[attr-defined]


def test_a_change_of_a_rewards_file_is_told_even_without_a_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Results that an interrupted process kept must not be compared with scores of the changed function."""
    monkeypatch.syspath_prepend(tmp_path)
    config = assign(Config(), {"rewards.scorers": ["flicker", "changing:own"]})
    found = []
    for value in (1, 2, 1):
        (tmp_path / "changing.py").write_text(f"def own(video_BTCHW, prompts):\n    return [{value}.0]\n")
        sys.modules.pop("changing", None)
        found.append(build_judges(config, 8.0, score_cache("")).identity)
    sys.modules.pop("changing")
    assert found[0] == found[2] != found[1]


def test_the_version_of_a_learned_reward_is_that_of_what_it_looks_at_too(tmp_path: Path) -> None:
    def version(*features: str) -> str:
        numbers = Preference(*(torch.ones(1, dtype=torch.float64) for _ in range(3)))
        save_preference(tmp_path / "liked.safetensors", numbers, {"features": features, "sources": {}})
        return versions(tmp_path, f"preference:{tmp_path / 'liked.safetensors'}")[0]

    found = [version(), version("flicker"), version(f"{ME}:calm")]
    assert all(found) and len(set(found)) == 3 and version(f"{ME}:unknown") == ""
    calm.version = "2"  # type: ignore[attr-defined]
    try:
        assert version(f"{ME}:calm") not in found
    finally:
        calm.version = "1"  # type: ignore[attr-defined]
    assert version(f"{ME}:calm") == found[2]


def test_a_second_run_scores_nothing_and_finds_the_same(tiny_base: Path, tmp_path: Path) -> None:
    config = tiny_config(
        tiny_base,
        rewards__scorers=["flicker", f"{ME}:calm"],
        rewards__cache=str(tmp_path / "scores"),
        evaluation__watchers=["world"],
    )
    results = []
    for _ in range(2):
        setup = build_setup(config)
        ((_, scores),) = explore(setup, [0])
        results.append((scores, evaluate_prompts(setup, setup.test["short"], setup.ranks), setup.scored))
    (first, fresh, cold), (second, again, warm) = results
    assert cold.hits == 0 and cold.misses > 0
    assert warm == Counts(hits=cold.misses, repeats=cold.repeats)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one.local_KM, other.local_KM) and torch.equal(one.global_KM, other.global_KM)
    assert torch.equal(fresh.components_KN, again.components_KN)
    assert torch.equal(fresh.watchers_HN, again.watchers_HN)


def test_metrics_count_what_was_known(tiny_base: Path, tmp_path: Path) -> None:
    config = tiny_config(tiny_base, optim__updates=2, evaluation__every=2)
    lines = []
    for turn in range(2):
        cache = score_cache(str(tmp_path))
        setup = toy_setup(config, Reward("toy", ToyScorer(), version="toy 1", cache=cache))
        setup = replace(setup, scored=cache.counts)
        trainer = Trainer(setup)
        base = evaluate_base(setup, trainer, setup.validation)
        with MetricsLog(tmp_path / f"{turn}.jsonl", tmp_path / f"tensorboard-{turn}") as metrics:
            Run(setup, trainer, tmp_path / f"{turn}", metrics, lambda *a: None, base).train(lambda: False)
        lines.append(read_metrics(tmp_path / f"{turn}.jsonl"))
    assert [line["kind"] for line in lines[0]] == ["update", "update", "validation"]
    for cold, warm in zip(*lines, strict=True):
        assert cold["reward_cache_hits"] == warm["reward_cache_misses"] == 0
        assert cold["reward_cache_misses"] == warm["reward_cache_hits"] > 0
        if cold["kind"] == "update":
            assert cold["reward_mean"] == warm["reward_mean"] and cold["loss"] == warm["loss"]


@dataclass(frozen=True)
class Networked:
    """The mean of a clip, by a scorer that holds a network."""

    network: torch.nn.Module
    components: tuple[str, ...] = ("mean",)

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
        return {"mean": video_BTCHW.mean((1, 2, 3, 4))}


def test_what_is_known_moves_no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moved: list[Any] = []

    @contextmanager
    def watched(networks: Any, device: Any) -> Iterator[None]:
        moved.append((list(networks), device))
        yield

    monkeypatch.setattr("kvpo.rewards.reward.on_device", watched)
    scorer = Networked(torch.nn.Linear(1, 1))
    reward = Reward("mean", scorer, version="1", cache=score_cache(str(tmp_path))).offloaded("cpu")
    clips, prompts = torch.rand(2, 3, 3, 4, 4), ["a", "b"]
    first = reward(clips, prompts)["mean"]
    assert moved == [([scorer.network], "cpu")] and torch.equal(first, clips.mean((1, 2, 3, 4)))
    assert torch.equal(reward(clips, prompts)["mean"], first) and len(moved) == 1


def test_all_rewards_of_a_run_share_its_cache(tmp_path: Path) -> None:
    scorer, _ = build_scorer(preset("demo"), 8.0, score_cache(str(tmp_path)))
    assert isinstance(scorer, Reward) and scorer.cache is not None and scorer.offloaded("cpu") is scorer
    config = assign(Config(), {"evaluation.watchers": ["flicker"]})
    assert build_watchers(config, 8.0, scorer.cache)[0].cache is scorer.cache
