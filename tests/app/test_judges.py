"""Held-out scorers by name, and what a whole run makes of them."""

import json
from pathlib import Path

import pytest

from kvpo.app.align import align
from kvpo.app.configuration import assign, preset
from kvpo.app.judges import build_watchers
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.world.reward import DEFAULT_WEIGHTS
from tests.tiny_world import opposite, tiny_config

OPPOSITE = "tests.tiny_world:opposite"
assert opposite  # two modules have it: names in reports must differ all the same


def watched_by(*names: str) -> Config:
    return assign(Config(), {"rewards.scorers": ["flicker"], "evaluation.watchers": list(names)})


def test_each_name_is_a_number_and_shared_models_are_built_once() -> None:
    motion, world, own = build_watchers(
        watched_by("motion_smoothness", "world", "dynamic_degree", OPPOSITE), 8.0
    )
    each = ("motion_smoothness", "dynamic_degree")
    assert motion.numbers() == {name: {name: 1.0} for name in each} and motion.components == each
    assert world.numbers() == {"world": dict(DEFAULT_WEIGHTS)}
    assert own.numbers() == {"opposite": {"opposite": 1.0}}
    assert build_watchers(Config(), 8.0) == ()


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["sharpness"], "evaluation.watchers: unknown reward 'sharpness'"),
        (["tests.tiny_world:nothing"], "evaluation.watchers: module 'tests.tiny_world' has no 'nothing'"),
        ([OPPOSITE, "tests.app.test_judges:opposite"], "two rewards are called 'opposite'"),
    ],
)
def test_names_that_cannot_be_used(names: list[str], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        build_watchers(watched_by(*names), 8.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"evaluation.watchers": ["flicker", "world"]}, "watchers: must be rewards that are not trained on"),
        ({"evaluation.watchers": ["world@http://127.0.0.1:9"]}, "watchers: must be rewards that are not"),
        ({"evaluation.watchers": ["flicker", "flicker"]}, "evaluation.watchers: must be each named once"),
    ],
)
def test_settings_that_contradict_each_other(changes: dict, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        preset("demo", changes)


def test_parts_of_build_watchers_are_sources_like_any_other(tmp_path: Path) -> None:
    config = watched_by("motion_smoothness")
    config = assign(config, {"rewards.sources": {"motion_smoothness.raft": str(tmp_path / "raft.pth")}})
    check(config)
    with pytest.raises(ValueError, match="raft"):
        build_watchers(config, 8.0)


def test_a_stopped_run_says_so_in_its_summary_and_its_report(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvpo.training.radar.STANDARD_ERRORS", 0.01)  # two prompts tell nothing beyond noise
    monkeypatch.setattr("kvpo.training.radar.FALLS_IN_A_ROW", 1)
    config = tiny_config(
        tiny_base,
        optim__updates=8,
        rewards__scorers=("tests.tiny_world:toy",),
        evaluation__watchers=(OPPOSITE,),
        evaluation__every=1,
    )
    summary = align(config, tmp_path / "run")
    assert summary is not None and json.loads((tmp_path / "run" / "summary.json").read_text()) == summary
    radar = summary["radar"]
    assert radar["hacked"] and radar["watchers"] == ["opposite"] and radar["stopped_at"] < 8
    assert radar["best"] < radar["stopped_at"] and "while watcher opposite" in radar["verdict"]
    assert set(radar["test"]) == {"trained", "watchers", "unseen", "drift", "agreement"}
    page = (tmp_path / "run" / "report.html").read_text()
    assert f"Stopped after update {radar['stopped_at']}." in page
    assert f"<dt>updates</dt><dd>{radar['stopped_at']}</dd>" in page, "those that it made"
    assert align(config, tmp_path / "run", resume=True) == summary
