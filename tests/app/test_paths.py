"""Where a command writes: what is no place, and what is there already."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpo.app.align import align
from kvpo.app.cli import main
from kvpo.config import Config
from tests.app.finished import QUICK, command, contents
from tests.tiny_world import SETTINGS


@pytest.mark.parametrize("words", ["align", "generate", "pretrain", "export RUN", "evaluate RUN", "score x"])
def test_an_empty_output_is_no_directory(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command(*words.split(), "--out", "") == 2
    assert "--out: empty; name a file or directory" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ValueError, match="out: empty"):
        align(Config(), "")


def test_a_tilde_is_the_home_directory(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    shutil.copy(tiny_base, tmp_path / "home" / "base.safetensors")
    config = {"backbone.checkpoint": "~/base.safetensors", "optim.updates": 0}
    (tmp_path / "home" / "run.yaml").write_text(yaml.safe_dump(_typed_settings() | config))
    assert command("align", "--config=~/run.yaml", "--out=~/run") == 0
    assert (tmp_path / "home" / "run" / "report.html").exists()
    assert command("evaluate", "~/run") == 0
    assert [path.name for path in tmp_path.iterdir()] == ["home"]
    assert command("align", "--out=~nobody-of-this-name/x") == 2
    assert "~nobody-of-this-name/x" in capsys.readouterr().err


def _typed_settings() -> dict[str, Any]:
    values = {**SETTINGS, **{name.replace("__", "."): value for name, value in QUICK.items()}}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


def test_new_videos_are_not_put_beside_old_ones(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "videos"
    assert command("generate", "--run", run, "--out", out) == 0
    made = contents(out)
    (tmp_path / "one.txt").write_text("A red circle moves left.\n")
    words = ("generate", "--run", run, "--prompts", tmp_path / "one.txt", "--out")
    assert command(*words, out) == 1
    assert "already holds 12 videos, such as 000-aligned.mp4; remove them" in capsys.readouterr().err
    assert contents(out) == made
    assert command(*words, tmp_path / "others") == 0


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("evaluate RUN --out RUN", "out: RUN is a directory; name a file in it"),
        ("evaluate RUN --out FILE/x.json", "out: FILE is a file; name a directory"),
        ("pretrain --out FILE/x.safetensors", "--out: FILE is a file; name a directory"),
        ("align --out FILE", "--out: FILE is a file; name a directory"),
        ("align --out FILE/run", "cannot create FILE/run: Not a directory; choose another --out"),
        ("plan --json RUN", "--json: RUN is a directory"),
        ("export RUN --out FILE", "FILE: already exists; export to a new place"),
        ("export RUN --out RUN --layout diffusers", "RUN: already exists; export to a new place"),
        ("generate --run RUN --out FILE", "cannot save videos in FILE: it is a file"),
    ],
)
def test_what_cannot_be_written_is_known_before_the_work(
    words: str, said: str, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    def begins(*arguments: Any, **named: Any) -> None:
        raise AssertionError("the work has begun")

    for work in ("evaluate.build_setup", "export.source_of", "generate.load_backbone"):
        monkeypatch.setattr(f"kvpo.app.{work}", begins)
    monkeypatch.setattr("kvpo.world.pretrain.pretrain", begins)
    file = tmp_path / "file"
    file.write_text("mine")

    def named(text: str) -> str:
        return text.replace("RUN", str(run)).replace("FILE", str(file))

    assert main(named(words).split()) == 1
    assert named(said) in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.parametrize("content", ["{", "[]", '{"seed": 0}'])
def test_a_damaged_summary_is_named(content: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").write_text(content)
    assert command("align", "--resume", "--out", run) == 1
    said = capsys.readouterr().err
    assert str(run / "summary.json") in said and said.count("\n") == 1
