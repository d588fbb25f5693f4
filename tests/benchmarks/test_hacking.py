"""The hacking benchmark: its arms run, and its table says what they gave."""

from pathlib import Path

import pytest

from kvpo.config_checks import ConfigurationError

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def hacking(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent))
    import benchmarks.hacking

    return benchmarks.hacking


def test_an_arm_runs_and_its_result_is_a_row(hacking, monkeypatch, tiny_base, tmp_path):
    from tests.tiny_world import SETTINGS

    small = SETTINGS | {"backbone.checkpoint": str(tiny_base), "optim.updates": 2, "evaluation.every": 1}
    small |= {"evaluation.validation_prompts": 2, "evaluation.test_prompts": 3}
    monkeypatch.setattr(hacking, "COMMON", hacking.COMMON | small)
    result = hacking.align("stopped", 0, tmp_path / "run")
    assert result["test"]["watchers"].keys() == {"legibility", "flicker"}
    assert result["updates"] <= 2 and result["best"] <= result["updates"]
    gains = hacking.numbers(result)
    assert list(gains) == ["trained reward", "brightness", "world", "legibility", "flicker", "unseen scorer"]
    assert gains["trained reward"] == pytest.approx(3 * gains["brightness"] + gains["world"], abs=1e-5)
    (tmp_path / "run" / "result.json").unlink()
    assert hacking.align("stopped", 0, tmp_path / "run") == result  # killed runs go on
    monkeypatch.setattr(hacking, "aligned", None)
    assert hacking.align("stopped", 0, tmp_path / "run") == result  # finished runs are read
    monkeypatch.setattr(hacking, "COMMON", hacking.COMMON | {"optim.lr": 0.5})
    with pytest.raises(ConfigurationError, match="optim.lr is 0.05 there, 0.5 here"):
        hacking.align("stopped", 0, tmp_path / "run")


def test_the_table_has_means_and_deviations_over_seeds(hacking):
    def result(gain: float, called: int | None) -> dict:
        change = {"gain": gain}
        components = dict.fromkeys(["brightness", *hacking.DEFAULT_WEIGHTS], change)
        test = {"trained": change, "watchers": {"fair": change}, "unseen": change}
        return {"updates": 8, "called": called, "best": 0, "test": test, "components": components}

    table = hacking.compared({"free": [result(0.1, 4), result(0.3, None)]})
    head, _, row = table.splitlines()
    assert head.count("|") == row.count("|")
    assert "+0.200 ± 0.141" in row and "| 4, - | 8, 8 | 0, 0 |" in row
