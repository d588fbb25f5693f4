"""From `kvpo calibrate` to a run that skips what is within the noise."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from kvpo.app.build import build_setup
from kvpo.app.cli import main
from kvpo.app.configuration import assign, preset, resolve, resolve_resumed
from kvpo.app.judges import build_judges, build_scorer
from kvpo.app.noise_files import read_floor
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.rewards.cache import ScoreCache
from kvpo.training.trainer import Trainer
from tests.tiny_world import tiny_config

ME = "tests.app.test_noise_files"


def coarse(video_BTCHW: Tensor, prompts: Any) -> Tensor:
    """A reward that jumps on the large clips it is measured on, far more than on the small ones of a run."""
    scale = 1e4 if video_BTCHW.shape[-1] > 32 else 1.0
    return scale * video_BTCHW.mean((1, 2, 3, 4))


def test_groups_within_the_measured_noise_are_skipped_and_counted(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "coarse.json"
    assert main(["calibrate", f"{ME}:coarse", "--clips", "2", "--out", str(file)]) == 0
    assert f"--rewards.noise_floors coarse={file}" in capsys.readouterr().out
    floor = read_floor(file, "coarse")
    for floors, skipped in (({"coarse": str(file)}, 1.0), ({"total": 0.0}, 0.0)):
        config = tiny_config(tiny_base, rewards__scorers=[f"{ME}:coarse"], rewards__noise_floors=floors)
        numbers = Trainer(build_setup(config)).step()
        assert numbers["skipped_fraction"] == skipped and 0 < numbers["reward_spread"] < floor


def test_a_floor_is_a_number_or_a_file_that_is_read_once(tmp_path: Path) -> None:
    file = tmp_path / "parts.json"
    parts = {"a": {"noise_floor": 1}, "b": {"noise_floor": 2.0}, "total": {"noise_floor": 3.0}}
    file.write_text(json.dumps({"components": parts}))
    config = preset("demo", {"rewards.noise_floors": {"a": str(file), "b": 0.5, "total": str(file)}})
    assert config.rewards.noise_floors == {"a": 1.0, "b": 0.5, "total": 3.0}
    assert resolve("demo", None, {"rewards.noise_floors": f"a={file}, b=5e-1,total={file}"}) == config
    with pytest.raises(ConfigurationError, match="noise_floors.c: .*parts.json holds no such component; it"):
        preset("demo", {"rewards.noise_floors": {"c": str(file)}})
    for text in (f"a={file},a=1", "a=true"):
        with pytest.raises(ConfigurationError, match="rewards.noise_floors"):
            resolve("demo", None, {"rewards.noise_floors": text})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot read .*: no such file"),
        ("{", "cannot read .*: not JSON"),
        ("[]", "was not written by `kvpo calibrate`"),
        ('{"components": {}}', "was not written by `kvpo calibrate`"),
        ('{"components": {"a": {"noise_floor": -1}}}', "no noise floor of 0 or more, but -1"),
        ('{"components": {"a": {"noise_floor": NaN}}}', "no noise floor of 0 or more, but nan"),
        ('{"components": {"a": {"noise_floor": true}}}', "but True"),
        ('{"components": {"a": 3}}', "but None"),
    ],
)
def test_files_that_cannot_be_used(tmp_path: Path, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / "noise.json").write_text(content)
    with pytest.raises(ConfigurationError, match=f"rewards.noise_floors.a: .*{message}"):
        preset("demo", {"rewards.noise_floors": {"a": str(tmp_path / "noise.json")}})


def test_the_saved_settings_hold_what_was_measured(tmp_path: Path) -> None:
    file, saved = tmp_path / "noise.json", tmp_path / "config.yaml"
    file.write_text(json.dumps({"components": {"flicker": {"noise_floor": 0.5}}}))
    flags = {"rewards.noise_floors": f"flicker={file}"}
    config = resolve("demo", None, {"rewards.scorers": "flicker", **flags})
    saved.write_text(json.dumps(asdict(config)))
    assert resolve_resumed(saved, None, None, flags) == config
    file.write_text(json.dumps({"components": {"flicker": {"noise_floor": 0.6}}}))
    with pytest.raises(
        ConfigurationError, match="noise_floors is {'flicker': 0.5} there, {'flicker': 0.6} here"
    ):
        resolve_resumed(saved, None, None, flags)
    file.unlink()
    assert resolve_resumed(saved, None, None, {}) == config


@pytest.mark.parametrize(
    ("settings", "announced"),
    [
        ({}, ""),
        ({"rewards.scorers": ["flicker", f"{ME}:coarse"]}, "flicker, coarse"),
        ({"rewards.scorers": ["world", "flicker"]}, "flicker"),
        ({"rewards.scorers": ["flicker"], "rewards.noise_floors": {"flicker": 0.01}}, ""),
        ({"rewards.scorers": ["flicker"], "rewards.noise_floors": {"total": 0.01}}, ""),
        ({"rewards.scorers": ["world", "flicker"], "rewards.weights": {"flicker": 0.0}}, ""),
    ],
)
def test_the_worlds_noise_floor_is_not_taken_for_another_rewards_in_silence(
    settings: dict[str, Any], announced: str, caplog: pytest.LogCaptureFixture
) -> None:
    config = assign(Config(), settings)
    build_scorer(config, 8.0)  # choosing among candidates compares them without a floor
    assert not caplog.messages
    build_judges(config, 8.0, ScoreCache())
    said = [message for message in caplog.messages if "no noise floor was measured" in message]
    assert len(said) == bool(announced)
    assert all(
        f"measured for {announced}: 0.002 is that of the embedded world's" in message for message in said
    )
