import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import yaml

from kvpo.app.align import _demand_own
from kvpo.app.configuration import (
    assign,
    flat,
    parse_flags,
    preset,
    read_settings,
    resolve,
    resolve_resumed,
    resolve_run,
    sections,
    settings,
)
from kvpo.app.old_settings import OLD
from kvpo.app.presets import PRESETS
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.method.methods import METHODS
from kvpo.models.geometry import GEOMETRIES, fields_of


def message(call) -> str:
    with pytest.raises(ConfigurationError) as caught:
        call()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_later_sources_win(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 1e-3, updates: 7}\nseed: 5\n")
    config = resolve("demo", file, {"optim.lr": "2e-5"})
    assert (config.optim.lr, config.optim.updates, config.seed) == (2e-5, 7, 5)
    assert config.optim.ema_decay == PRESETS["demo"]().optim.ema_decay


def test_the_file_names_the_preset_unless_a_flag_does(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("preset: memflow-1.3b\noptim.updates: 3\n")
    assert resolve(None, file, {}).stream.bank == ("memflow",)
    config = resolve("longlive-1.3b", file, {})
    assert (config.preset, config.stream.bank, config.optim.updates) == ("longlive-1.3b", (), 3)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_valid_and_survive_yaml(name: str, tmp_path: Path) -> None:
    config = PRESETS[name]()
    check(config)
    assert config.preset == name
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(yaml.safe_load(yaml.safe_dump(_lists(asdict(config))))))
    assert resolve(None, file, {}) == config


def test_public_sizes() -> None:
    model = PRESETS["longlive-1.3b"]().model
    frames, height, width = model.patch_size
    tokens = (model.latent_height // height) * (model.latent_width // width)
    assert (tokens, model.dim // model.num_heads) == (1560, 128)
    large = PRESETS["wan-14b"]().model
    assert (large.dim, large.num_heads, large.num_layers, large.ffn_dim) == (5120, 40, 40, 13824)
    assert large.dim // large.num_heads == 128


def test_flags_of_every_type() -> None:
    texts = {
        "optim.lr": "1e-4",
        "stream.window": "-1",
        "stream.schedule": "1,0.5",
        "objective.clip": "[0.3, 0.4]",
        "optim.checkpointing": "true",
        "objective.temperature": "none",
        "rewards.scorers": "flicker,my.module:reward",
        "rewards.weights": "colour=1,motion=0.5",
        "rewards.sources": "hpsv3.weights=/models/a: b.safetensors,hpsv3.base=owner/name",
    }
    config = assign(Config(), parse_flags(texts))
    assert config.stream.schedule == (1.0, 0.5)
    assert config.stream.window == -1
    assert config.objective.clip == (0.3, 0.4)
    assert config.optim.checkpointing is True
    assert config.objective.temperature is None
    assert config.rewards.scorers == ("flicker", "my.module:reward")
    assert config.rewards.weights == {"colour": 1.0, "motion": 0.5}
    assert config.rewards.sources == {
        "hpsv3.weights": "/models/a: b.safetensors",
        "hpsv3.base": "owner/name",
    }
    assert assign(Config(), parse_flags({"objective.temperature": "0.5"})).objective.temperature == 0.5


@pytest.mark.parametrize(
    ("path", "text", "words"),
    [
        ("optim.lr", "abc", ["optim.lr", "'abc'", "number"]),
        ("optim.lr", "nan", ["optim.lr", "nan"]),
        ("optim.lr", "true", ["optim.lr", "True"]),
        ("stream.size", "1.5,2", ["stream.size", "1.5", "whole number"]),
        ("optim.checkpointing", "3", ["optim.checkpointing", "3", "true or false"]),
        ("objective.advantages", "randm", ["objective.advantages", "'randm'", "'random'"]),
        ("objective.clip", "0.9", ["objective.clip", "list of 2"]),
        ("stream.schedule", "1,[", ["stream.schedule", "1,["]),
        ("rewards.weights", "motion", ["rewards.weights"]),
        ("rewards.sources", "hpsv3.base", ["rewards.sources", "hpsv3.base", "each value text"]),
        ("rewards.scorer", "flicker", ["rewards.scorer", "'rewards.scorers'"]),
        ("optim.lrr", "3", ["optim.lrr", "'3'", "'optim.lr'"]),
        ("seed", "1:30", ["seed", "'1:30'", "whole number"]),
        ("optim.lr", "1:30", ["optim.lr", "'1:30'", "number"]),
        ("lr", "3", ["'lr'", "'optim.lr'"]),
        ("mode.branches", "3", ["mode.branches", "'exploration.branches'"]),
    ],
)
def test_a_wrong_flag_names_field_value_and_what_fits(path: str, text: str, words: list[str]) -> None:
    said = message(lambda: resolve("demo", None, {path: text}))
    assert all(word in said for word in words), said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"optim: {lrr: 3}", ["optim.lrr", "3", "'optim.lr'"]),
        (b"optimm: {lr: 3}", ["optimm", "optim"]),
        (b"optim: 3", ["optim", "section", "3"]),
        (b"optim:\n  lr: [1", ["line"]),
        (b"seed: 1\nseed: 2", ["'seed'", "twice", "line 2"]),
        (b"- seed", ["sections"]),
        (b"\xff\xfe\x00", ["UTF-8"]),
        (b"a: \x01", ["YAML"]),
        (b"preset: dmo", ["'dmo'", "'demo'"]),
        (b"seed: '3'", ["seed", "'3'", "whole number"]),
        (b"stream.size: [1, 2, 3]", ["stream.size", "2"]),
        (b"seed: 1:30", ["seed", "'1:30'", "whole number"]),
        (b"optim: {lr: 1:30.5}", ["optim.lr", "'1:30.5'", "number"]),
        (b"optim: {lr: 0.5}\noptim.lr: 0.25", ["optim.lr", "twice", "0.5", "0.25"]),
        (b"optim.lr: 0.25\noptim: {lr: 0.5}", ["optim.lr", "twice", "0.5", "0.25"]),
    ],
)
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, content: bytes, words: list[str]) -> None:
    file = tmp_path / "run.yaml"
    file.write_bytes(content)
    said = message(lambda: resolve(None, file, {}))
    assert all(word in said for word in words), said


def test_numbers_that_begin_with_a_zero_are_decimal(tmp_path: Path) -> None:
    texts = {"seed": "010", "optim.lr": "0100", "stream.size": "08,010", "stream.window": "-012"}
    file = tmp_path / "run.yaml"
    file.write_text("seed: 010\noptim.lr: 0100\nstream: {size: [08, 010], window: -012}\n")
    for config in (assign(Config(), parse_flags(texts)), assign(Config(), read_settings(file))):
        assert (config.seed, config.optim.lr, config.stream.size) == (10, 100.0, (8, 10))
        assert config.stream.window == -12
    assert parse_flags({"seed": "0x10"}) == {"seed": 16}


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "no.yaml") in message(lambda: resolve(None, tmp_path / "no.yaml", {}))
    assert str(tmp_path) in message(lambda: resolve(None, tmp_path, {}))


def test_an_empty_file_or_section_changes_nothing(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim:\n# nothing yet\n")
    assert resolve(None, file, {}) == Config()


def test_every_field_has_a_docstring_and_a_flag() -> None:
    assert set(settings()) == set(flat(asdict(Config())))
    assert all(setting.doc.endswith(".") for setting in settings().values())
    assert all(kind.__doc__ for kind in sections().values())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"backbone.geometry": "wrld"}, ["backbone.geometry", "'wrld'", "world, 1.3b"]),
        ({"stream.bank": "sparse"}, ["stream.bank", "sparse", "memflow"]),
        ({"stream.bank": "memflo"}, ["stream.bank", "memflow"]),
        ({"stream.size": "7,8"}, ["stream.size", "[7, 8]", "2 x 4"]),
        ({"stream.window": "5", "stream.sink": "3", "stream.block": "3"}, ["stream.window", "5", "6"]),
        ({"stream.schedule": "0.5,0.75"}, ["stream.schedule"]),
        (
            {"exploration.resident_frames": "8", "exploration.recent": "3", "stream.sink": "3"},
            ["exploration.resident_frames", "8", "pool of 2"],
        ),
        ({"exploration.distinct": "9", "exploration.routed": "3"}, ["exploration.distinct", "9"]),
        ({"exploration.donor": "1", "optim.prompts_per_update": "1"}, ["exploration.donor"]),
        ({"objective.grad_steps": "5", "stream.schedule": "1,0.5"}, ["objective.grad_steps", "5", "2"]),
        ({"objective.keep": "1,0"}, ["objective.keep", "[1, 0]"]),
        ({"objective.keep": "-1,3"}, ["objective.keep", "[-1, 3]"]),
        ({"objective.clip": "1,0.2"}, ["objective.clip", "[1.0, 0.2]"]),
        ({"optim.lr": "-1"}, ["optim.lr", "-1"]),
        ({"optim.ema_decay": "1"}, ["optim.ema_decay"]),
        ({"evaluation.test_prompts": "1"}, ["evaluation.test_prompts", "1"]),
        ({"rewards.scorers": ""}, ["rewards.scorers", "none"]),
        ({"rewards.scorers": "flicker,flicker"}, ["rewards.scorers", "flicker, flicker"]),
        ({"rewards.weights": "flicker=-1"}, ["rewards.weights.flicker", "-1"]),
    ],
)
def test_settings_that_contradict_are_refused(flags: dict[str, str], words: list[str]) -> None:
    said = message(lambda: resolve("demo", None, flags))
    assert all(word in said for word in words), said


def test_a_resumed_run_keeps_its_settings(tmp_path: Path) -> None:
    saved = tmp_path / "config.yaml"
    config = resolve("demo", None, {"optim.lr": "3e-4", "seed": "4", "optim.updates": "50"})
    saved.write_text(yaml.safe_dump(_lists(asdict(config))))
    assert resolve_resumed(saved, None, None, {}) == config
    assert resolve_resumed(saved, "demo", None, {"optim.lr": "3e-4"}) == config
    longer = resolve_resumed(saved, None, None, {"optim.updates": "999"})
    assert longer == replace(config, optim=replace(config.optim, updates=999))
    public = resolve("longlive-1.3b", None, {"backbone.checkpoint": "a/base.pt"})
    saved_public = tmp_path / "public.yaml"
    saved_public.write_text(yaml.safe_dump(_lists(asdict(public))))
    moved = resolve_resumed(saved_public, None, None, {"backbone.checkpoint": "b.pt"})
    assert moved == replace(public, backbone=replace(public.backbone, checkpoint="b.pt"))
    said = message(lambda: resolve_resumed(saved_public, None, None, {"backbone.encoders": "other"}))
    assert "backbone.encoders is" in said
    said = message(lambda: resolve_resumed(saved, None, None, {"optim.lr": "1e-5"}))
    assert "optim.lr is 0.0003 there, 1e-05 here" in said
    assert "preset" in message(lambda: resolve_resumed(saved, "wan-14b", None, {}))


def test_a_run_is_used_again_after_its_geometry_has_moved(tmp_path: Path) -> None:
    before, now = tmp_path / "before.json", tmp_path / "now.json"
    before.write_text(json.dumps(fields_of(PRESETS["longlive-1.3b"]().model)))
    here = {"device": "cpu", "backbone.geometry": str(now)}
    config = resolve("longlive-1.3b", None, here | {"backbone.geometry": str(before)})
    saved = tmp_path / "config.yaml"
    saved.write_text(yaml.safe_dump(_lists(asdict(config))))
    before.rename(now)
    moved = replace(config, backbone=replace(config.backbone, geometry=str(now)))
    assert resolve_resumed(saved, None, None, here) == resolve_run(tmp_path, here) == moved
    assert str(before) in message(lambda: resolve_run(tmp_path))
    _demand_own(tmp_path, moved, resume=True)


def _lists(value):
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, tuple | list) else value


@pytest.mark.parametrize("keep", [0, 1, 2])
def test_a_share_that_no_temperature_gives_the_anchor_is_refused_at_the_start(keep: int) -> None:
    members = (2 * keep or 8) + 1
    settings = {"objective.keep": (keep, keep)}
    for share in (0.05, 1 / members):
        said = message(lambda share=share: check(assign(Config(), {**settings, "kvpo.anchor_share": share})))
        assert all(word in said for word in ("kvpo.anchor_share", f"{share}", f"above 1 / {members}"))
    check(assign(Config(), {**settings, "kvpo.anchor_share": 1.01 / members}))
    fixed = {"kvpo.anchor_share": 0.05, "objective.temperature": 1.0}
    check(assign(Config(), {**settings, **fixed}))


def test_an_infinite_temperature_is_refused() -> None:
    objective = replace(Config().objective, temperature=float("inf"))
    said = message(lambda: check(replace(Config(), objective=objective)))
    assert "objective.temperature" in said and "finite" in said


@pytest.mark.parametrize(
    ("switches", "hidden"), [((40, 145), 3), ((146,), 2), ((40, 41), 2), ((1, 3, 60), 2), ((147,), None)]
)
def test_configured_switches_that_hide_a_segment_are_refused(
    switches: tuple[int, ...], hidden: int | None
) -> None:
    """The last block of 147 frames in blocks of 3 starts at 144."""
    config = PRESETS["longlive-1.3b"]()
    said = message(lambda: check(assign(config, {"prompts.frames": (*switches, 147)})))
    assert "prompts.frames" in said and (hidden is None or f"segment {hidden} of" in said)
    check(assign(config, {"prompts.frames": (39, 75, 144, 147)}))


@pytest.mark.parametrize("share", [-0.1, 1.1])
def test_the_share_of_the_anchor_state_energy_is_a_share(share: float) -> None:
    said = message(lambda: check(assign(Config(), {"kvpo.anchor_state_weight": share})))
    assert "kvpo.anchor_state_weight" in said and f"{share}" in said


def test_there_are_few_settings() -> None:
    assert len(settings()) <= 80


def test_what_old_settings_say_is_about_present_ones() -> None:
    assert not set(OLD) & set(settings())
    for way_out in OLD.values():
        named = re.findall(r"\b(?:backbone|stream|objective|optim|kvpo|rewards|exploration)\.\w+", way_out)
        assert set(named) <= set(settings()), way_out


@pytest.mark.parametrize("old", OLD)
def test_a_setting_that_is_gone_says_what_to_use(old: str, tmp_path: Path) -> None:
    """As a flag, in a file, in a dictionary, and in the config.yaml of a run of an earlier version."""
    saved = tmp_path / "config.yaml"
    section, _, name = old.rpartition(".")
    saved.write_text(yaml.safe_dump({"preset": "demo", **({section: {name: 2}} if section else {name: 2})}))
    ways = (
        lambda: resolve("demo", None, {old: "2"}),
        lambda: resolve(None, saved, {}),
        lambda: preset("demo", {old: 2}),
        lambda: resolve_resumed(saved, None, None, {}),
        lambda: resolve_run(tmp_path),
    )
    for way in ways:
        assert re.match(rf"{old} \(value '?2'?\) is no longer a setting: ", said := message(way))
        assert said.endswith(OLD[old])


@pytest.mark.parametrize("method", METHODS)
def test_a_method_brings_its_explorer_and_what_it_starts_from(method: str, tmp_path: Path) -> None:
    config = resolve("demo", None, {"method": method})
    own = config.own_settings
    assert config.method == method and config.exploration.explorer == own.EXPLORERS[0]
    values = flat(asdict(config))
    assert all(values[path] == value for path, value in own.STARTS_FROM.items())
    assert preset("demo", {"method": method}) == config
    file = tmp_path / "run.yaml"
    file.write_text(f"method: {method}\n")
    assert resolve("demo", file, {}) == config
    file.write_text(yaml.safe_dump(_lists(asdict(config))))
    assert resolve_resumed(file, None, None, {}) == config


def test_what_the_user_says_wins_over_what_a_method_starts_from(tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("method: nft\nexploration: {explorer: neighbour, noise: 0.3}\n")
    config = resolve("demo", file, {"exploration.noise": "0.4"})
    assert (config.method, config.exploration.explorer, config.exploration.noise) == ("nft", "neighbour", 0.4)
    config = resolve(
        "demo", file, {"method": "flow-grpo", "objective.clip": "0.1,0.1", "exploration.explorer": "sde"}
    )
    assert (config.method, config.objective.clip) == ("flow-grpo", (0.1, 0.1))
    config = resolve("demo", file, {"method": "rvm"})
    assert config.exploration.explorer == "neighbour", "the file's"
    assert preset("demo", {"method": "flow-grpo", "exploration.noise": 0.2}).exploration.noise == 0.2


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"exploration.explorer": "fresh"}, ["exploration.explorer", "routes for method kvpo", "fresh"]),
        ({"method": "cm-grpo", "stream.step_rule": "ode"}, ["stream.step_rule", "renoise", "cm-grpo", "ode"]),
        ({"method": "flow-grpo", "stream.step_rule": "renoise"}, ["stream.step_rule", "ode", "flow-grpo"]),
        ({"method": "flow-grpo", "stream.schedule": "1", "objective.grad_steps": "1"}, ["stream.schedule"]),
        (
            {"method": "nft", "exploration.explorer": "sde"},
            ["exploration.explorer", "fresh or neighbour", "sde"],
        ),
        ({"method": "self-distill", "exploration.donor": "1"}, ["exploration.donor", "self-distill"]),
        (
            {"method": "rvm", "exploration.explorer": "neighbour", "exploration.noise": "1.5"},
            ["noise", "1.5"],
        ),
        ({"method": "nft", "nft.beta": "0"}, ["nft.beta", "positive"]),
        ({"method": "nft", "nft.selective_kl": "2"}, ["nft.selective_kl", "2"]),
        ({"method": "kvp"}, ["method", "'kvp'", "'kvpo'"]),
    ],
)
def test_a_method_that_cannot_learn_as_it_is_told_is_refused(flags: dict[str, str], words: list[str]) -> None:
    said = message(lambda: resolve("demo", None, flags))
    assert all(word in said for word in words), said


def test_one_named_geometry_has_relative_positions() -> None:
    assert [name for name, shape in GEOMETRIES.items() if shape.relative_positions] == ["1.3b-relative"]
