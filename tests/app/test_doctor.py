"""`kvpo doctor`: a line for everything that can stand in the way, and an exit status by the worst."""

import importlib.metadata
import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpo.app import doctor
from kvpo.app.cli import main
from kvpo.app.configuration import assign, preset
from kvpo.app.doctor import Finding, exchanges, worst
from kvpo.training.ranks import Ranks
from tests.ranks import on_ranks

HEALTHY = {"versions", "device", "bfloat16", "host memory", "disk", "write speed", "prompts", "rewards"}


def test_a_healthy_machine_is_ok_line_by_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["doctor", "--out", str(tmp_path / "new"), "--json", str(tmp_path / "found.json")])
    (found,) = json.loads((tmp_path / "found.json").read_text())
    levels = {item["subject"]: item["level"] for item in found}
    assert HEALTHY | {"ranks", "dry update"} <= levels.keys()
    assert status == worst([[Finding(**item) for item in found]]) and "fail" not in levels.values()
    lines = capsys.readouterr().out.splitlines()
    assert lines == [Finding(**item).line() for item in found]
    assert not list(tmp_path.glob(".kvpo-doctor*"))


def test_extras_that_make_leaves_out_may_be_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    makefile = (Path(__file__).resolve().parents[2] / "Makefile").read_text()
    (installed,) = re.findall(r"^\.venv/\.complete: EXTRAS = \[(.+)\]$", makefile, re.MULTILINE)
    left_out = {
        re.split("[<>=;]", line)[0]: extra[1]
        for line in importlib.metadata.requires("kvpo") or ()
        if (extra := re.search(r"extra == .(\w+)", line)) and extra[1] not in installed.split(",")
    }

    def version(name: str) -> str:
        if name in left_out:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(importlib.metadata, "version", version)
    levels = {item.subject: item.level for item in doctor.versions()}
    extras = {f"extra {name}" for name in left_out.values()}
    assert "extra trackers" in extras and levels == dict.fromkeys({"versions", *extras}, "ok")


def subjects(check: Any, *arguments: Any) -> dict[str, Finding]:
    return {finding.subject: finding for finding in doctor._examined("it", lambda: check(*arguments))}


def test_what_is_wrong_is_named_with_a_way_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    away = preset("demo", {"rewards.scorers": ["world@http://127.0.0.1:9"]})

    def unreachable(config: Any) -> None:
        raise ValueError(config.rewards.scorers[0])

    with monkeypatch.context() as patched:
        patched.setattr(doctor, "reach_servers", unreachable)
        assert subjects(doctor.rewards, away)["it"].line() == "fail  it: ValueError: world@http://127.0.0.1:9"
    for field in ("rewards.scorers", "evaluation.watchers"):
        unknown = subjects(doctor.rewards, preset("demo", {field: ["hpsv33"]}))["it"]
        assert unknown.level == "fail" and f"{field}: unknown reward 'hpsv33'" in unknown.found
    assert subjects(doctor.rewards, preset("demo"))["rewards"].level == "ok"
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for file in files:
        file.touch()
    adapters = assign(preset("longlive-1.3b"), {"backbone.lora": ",".join(map(str, files))})
    assert subjects(doctor.files, adapters)["backbone.lora"].level == "ok"
    lost = assign(preset("demo"), {"prompts.file": str(tmp_path / "none.txt")})
    found = subjects(doctor.files, lost)
    assert found["prompts.file"].level == "warn" and found["prompts"].level == "fail"
    assert "no such prompt file" in found["prompts"].found
    monkeypatch.setattr(doctor, "ENOUGH_DISK", 1e18)
    monkeypatch.setattr(doctor, "ENOUGH_MEMORY", 1e18)
    monkeypatch.setattr(doctor, "SLOW_DISK", 1e18)
    monkeypatch.setattr(doctor, "BFLOAT16", "raise SystemExit(4)")
    poor = subjects(doctor.output, tmp_path) | subjects(doctor.memory, preset("demo"))
    poor |= subjects(doctor.precision, preset("demo"))
    assert {item.subject: item.level for item in poor.values()} == dict.fromkeys(
        ("disk", "write speed", "host memory", "bfloat16"), "warn"
    )
    assert all(item.way_out for item in poor.values())
    absent = subjects(doctor.device, preset("demo", {"device": "cuda:7"}))
    if not torch.cuda.is_available():
        assert absent["it"].level == "fail" and "--device cpu" in absent["it"].found
    assert worst([[poor["disk"]], []]) == 1 and worst([[poor["disk"]], [absent["it"]]]) == 2


def test_memory_that_only_caches_files_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 64000000 kB\nMemFree: 1000 kB\nMemAvailable: 50000000 kB\n")
    monkeypatch.setattr(doctor, "MEMINFO", tmp_path / "meminfo")
    assert subjects(doctor.memory, preset("demo"))["host memory"].line() == "ok    host memory: 51.2 GB free"
    (tmp_path / "meminfo").unlink()
    assert "what is free is not known" in subjects(doctor.memory, preset("demo"))["host memory"].line()


def examined_by_ranks(ranks: Ranks, shared: Path) -> list[Finding]:
    unshared = shared / "of rank 1"
    return exchanges(ranks, preset("demo"), unshared if unshared.exists() and ranks.rank else shared)


@pytest.mark.parametrize("shared", [True, False])
def test_ranks_examine_their_exchanges_and_their_directory(shared: bool, tmp_path: Path) -> None:
    if not shared:
        (tmp_path / "of rank 1").mkdir()
    every = on_ranks(2, tmp_path / "ranks", examined_by_ranks, tmp_path)
    for rank, own in enumerate(every):
        assert [item.subject for item in own] == ["ranks", "gradients", "clocks", "shared directory"]
        wrong = [] if shared or not rank else ["shared directory"]
        assert [item.subject for item in own if item.level != "ok"] == wrong
    assert not list(tmp_path.glob(".kvpo-doctor*"))
