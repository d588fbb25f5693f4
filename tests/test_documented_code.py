"""Code in the documents: the parser accepts every command, and those that can run at a tiny size do."""

import json
import re
import shlex
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvpo
from kvpo.app import cli, commands, configuration
from kvpo.app.commands import COMMANDS, Command
from kvpo.config import Config
from kvpo.models.checkpoints import load_transformer_state
from kvpo.models.export import save_diffusers_transformer
from tests.tiny_wan import tiny_flags, tiny_wan
from tests.tiny_world import SETTINGS, tiny_config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(document: Path, language: str) -> list[str]:
    return [code for kind, code in BLOCK.findall(document.read_text(encoding="utf-8")) if kind == language]


def documented() -> Iterator[tuple[str, str]]:
    """Every `kvpo` command, in a block or inline with arguments, and its document."""
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        lines = [line.removeprefix("$ ") for code in blocks(document, "")
                 for line in code.replace("\\\n", " ").splitlines()]  # fmt: skip
        lines += re.findall(r"`(kvpo [a-z-]+ [^`…]+)`", text)
        yield from ((document.name, " ".join(line.split())) for line in lines if line.startswith("kvpo "))


COMMAND_LINES = list(documented())
PARSED_ONLY = (
    "reward-server",
    "hpsv3",
    "raft-things",
    "@http",
    "@openai",
    "...",
    "kvpo plan",
    "kvpo arena",
    "kvpo compare",
    "kvpo live",
    "calibrate rewards",
    "runs/demo",
    "runs/null",
    "runs/watched",
)
"""Marks of commands not run here: they need a service or other weights, are cut or long, or run elsewhere."""
WORLD = [
    line
    for name, line in COMMAND_LINES
    if name in ("README.md", "rewards.md") and not any(mark in line for mark in PARSED_ONLY)
]
PUBLIC = [
    line
    for name, line in COMMAND_LINES
    if name == "backbones.md" and "--help" not in line and "self-forcing" not in line
]


def words_of(line: str) -> list[str]:
    """The arguments of a command; an ellipsis stands for the output directory."""
    words = shlex.split(line, comments=True)[1:]
    return [word for word in words if word != "..."] + ["--out=run"] * (
        "..." in words and "--out" not in words
    )


@pytest.fixture
def parsed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Make commands only resolve their configuration; returns the names of those called."""
    seen: list[str] = []

    def recorder(command: Command) -> Callable[[Namespace], None]:
        def run(arguments: Namespace) -> None:
            if command.configured and not vars(arguments).get("run"):
                commands.configuration(arguments)
            seen.append(command.name)

        return run

    monkeypatch.setattr(cli, "COMMANDS", [replace(c, run=recorder(c)) for c in COMMANDS])
    return seen


@pytest.mark.parametrize("line", [line for _, line in COMMAND_LINES])
def test_every_command_is_one_that_the_parser_takes(
    line: str, parsed: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("flicker", "warmth", "preference"):
        file = tmp_path / ("rewards.warmth.noise.json" if name == "warmth" else f"{name}.noise.json")
        file.write_text(f'{{"components": {{"{name}": {{"noise_floor": 0.1}}}}}}')
    words = words_of(line)
    if "--help" in words:
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        return
    assert cli.main(words) == 0, capsys.readouterr().err
    assert parsed == [words[0]]


def test_the_parser_refuses_what_is_not_documented(parsed: list[str]) -> None:
    assert cli.main(words_of("kvpo align --out x --optim.lrr 3")) == 2
    assert not parsed and len(COMMAND_LINES) > 25 and len(WORLD) > 7 and len(PUBLIC) > 6


def run_all(lines: list[str], flags: list[str], capsys: Any) -> None:
    """Run every command as written; commands that start a run get ``flags`` before their own.

    Status 1 of the doctor counts as success: it warns about the machine, for example of a slow disk.
    """
    for line in lines:
        name, *words = words_of(line)
        starts = name == "align" and "--resume" not in words
        status = cli.main([name, *(flags if starts else []), *words])
        assert status in ((0, 1) if name == "doctor" else (0,)), (line, *capsys.readouterr())


@pytest.mark.slow
def test_the_commands_and_code_of_the_embedded_world_run(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    Path("rewards.py").write_text("\n".join(blocks(ROOT / "docs/rewards.md", "python")))
    Path("prompts.txt").write_text("a red circle\n")
    tiny = {**SETTINGS, "backbone.checkpoint": str(tiny_base), "optim.updates": 1}
    flags = [f"--{name}={','.join(map(str, v)) if isinstance(v, tuple) else v}" for name, v in tiny.items()]
    run_all(WORLD, flags, capsys)
    assert {path.name for path in Path("runs").iterdir()} >= {"one", "warm"}
    assert Path("scores.json").exists() and list(Path("videos").glob("*.mp4"))
    changes = []

    def preset(name: str, given: dict[str, Any]) -> Config:
        changes.append(configuration.preset(name, given))
        return tiny_config(tiny_base, optim__updates=1)

    monkeypatch.setattr(kvpo, "preset", preset, raising=False)
    (code,) = (code for code in blocks(ROOT / "README.md", "python") if "import kvpo" in code)
    exec(code, {})
    assert [config.optim.updates for config in changes] == [20]
    assert Path("runs/notebook/report.html").exists() and list(Path("clips").glob("*.mp4"))


def test_the_excerpt_of_the_update_is_the_examples_code() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    excerpt = readme.split("<!-- one update -->")[1].split("<!-- /one update -->")[0]
    example = (ROOT / "examples/one_update.py").read_text(encoding="utf-8")
    code = {line.split("  #")[0].strip() for line in example.splitlines()}
    lines = [
        line.split("  #")[0].strip() for _, block in BLOCK.findall(excerpt) for line in block.splitlines()
    ]
    assert not [line for line in lines if not line.startswith("#") and line not in code] and len(lines) > 9


@pytest.mark.slow
def test_the_commands_and_code_of_public_generators_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    flags = tiny_flags("longlive-1.3b", tmp_path, segments=3, **{"optim__updates": 1})
    (tmp_path / "prompts-3.jsonl").rename("prompts.jsonl")
    (tmp_path / "VBench/vbench").mkdir(parents=True)
    entry = {"prompt_en": "a red ball rolls left", "dimension": ["scene"]}
    (tmp_path / "VBench/vbench/VBench_full_info.json").write_text(json.dumps([entry]))
    # The documented run names files of the hub and its own frames; replace them with the tiny generator's.
    base, adapter = "Efficient-Large-Model/LongLive-1.3B/models/longlive_base.pt", "lora.pt"
    Path(base).parent.mkdir(parents=True)
    (tmp_path / "base.pt").rename(base)
    (tmp_path / adapter).rename(Path(base).with_name(adapter))
    changes = (("--prompts.frames 39,75,147", "--prompts.frames 6,12,18"),
               ("--rewards.sources hpsv3.template=data_collator_qwen.py", ""))  # fmt: skip
    lines = PUBLIC
    for documented_words, words in changes:
        assert documented_words in lines[0]
        lines = [line.replace(documented_words, words) for line in lines]
    run_all(lines, flags, capsys)

    config = tiny_wan("longlive-1.3b", tmp_path, segments=3)
    theirs = Path("Wan-AI/Wan2.1-T2V-1.3B-Diffusers/transformer")
    save_diffusers_transformer(theirs, load_transformer_state(base).tensors, config.model)
    (code,) = blocks(ROOT / "docs/backbones.md", "python")
    names: dict[str, Any] = {}
    exec(code, names)
    assert any("lora_A" in name for name, _ in names["base"].named_parameters())
    assert names["merged"].blocks[0].attn1.to_q.weight.dtype == torch.bfloat16
