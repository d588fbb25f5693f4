"""Benchmarks from their command line at the smallest size: what they measure is written and printed."""

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from kvpo.app.cli import main as kvpo
from kvpo.app.configuration import preset
from tests.tiny_world import tiny_config


@pytest.fixture
def measured(tmp_path: Path) -> Any:
    """Runs a benchmark's command; the numbers that it writes."""

    def run(name: str, *words: str) -> Any:
        importlib.import_module(name).main(["--json", str(tmp_path / "found.json"), *words])
        return json.loads((tmp_path / "found.json").read_text())

    return run


def test_votes_are_stored_under_load(measured: Any) -> None:
    found = measured("arena", "--raters", "2", "--pairs", "1")
    assert all(found[f"{n} at once: votes a second"] > 0 for n in (1, 2))


def test_live_sessions_are_measured(measured: Any, monkeypatch: pytest.MonkeyPatch, tiny_base: Path) -> None:
    live = importlib.import_module("live")
    monkeypatch.setattr(live, "preset", lambda name: tiny_config(tiny_base))
    found = measured("live", "--quick")
    assert found["first frame, s"] > 0 and found["frames a second, all arms"] > 0
    assert found["2 sessions: one more is refused (busy)"] == 1
    assert 0 <= found["2 watchers: blocks in time"] <= 1


def test_rollouts_of_8_bits_are_beside_the_same_in_float32(measured: Any, tiny_words: list[str]) -> None:
    found = measured("quantised", "--repeats", "1", *tiny_words)["rollouts"]
    gaps = {arm: one["gap"] for arm, one in found.items()}
    assert gaps["same"] < 1e-4 < min(gaps[arm] for arm in gaps if arm != "same")
    assert all(one["cpu_s"] > 0 for one in found.values())


@pytest.mark.slow
def test_what_runs_share_is_scored_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    score_cache, codes = importlib.import_module("score_cache"), []
    monkeypatch.setattr(score_cache, "kvpo", lambda *words: codes.append(kvpo(list(words))))
    score_cache.main(["--out", str(tmp_path / "out"), "--updates", "1", *tiny_words])
    assert codes == [0] * 5
    (repeated,) = (line for line in capsys.readouterr().out.splitlines() if "first run once more" in line)
    assert repeated.endswith("| 100% |")


def test_routes_and_noise_are_compared(measured: Any, tiny_words: list[str]) -> None:
    found = measured("exploration", "--stories", "2", "--settings", "routed=3,distinct=2", *tiny_words)
    (setting,) = found["routes"].values()
    assert set(setting) == {"routed", "noise", "difference"} and setting["noise"]["pixel_distance"] > 0
    for name in ("valid_differences", "valid_share", "broken_share"):
        routed, noise, difference = (setting[kind][name] for kind in ("routed", "noise", "difference"))
        assert difference == pytest.approx(routed - noise)


def test_who_comes_back_is_counted(
    measured: Any, monkeypatch: pytest.MonkeyPatch, tiny_words: list[str]
) -> None:
    causality = importlib.import_module("causality")
    monkeypatch.setattr(causality.Observed, "telling", True)  # random weights show whatever they show
    found = measured("causality", "--stories", "2", "--draws", "1", *tiny_words)
    assert found["stories"] == found["stories_shown"] == 2
    assert len(found["act2_by_routed_frames"]) == causality.ROUTED + 1


def test_bases_are_compared(measured: Any, tiny_base: Path, tiny_words: list[str]) -> None:
    found = measured("bases", f"one={tiny_base}", "--stories", "2", *tiny_words)
    assert found["stories"] == 2 and set(found["bases"]["one"]) == {"sha256", "short", "long"}


@pytest.mark.slow
def test_structure_is_counted(measured: Any) -> None:
    found = measured("structure", "--blocks", "2")
    assert found["compiled"]["blocks"] == 2 and len(found) == 3


def test_the_run_that_is_killed_can_be_configured() -> None:
    measuring, kills = (importlib.import_module(name) for name in ("measuring", "kills"))
    given = measuring.given_settings(kills.SETTINGS)
    assert preset(given.pop("preset"), given)
