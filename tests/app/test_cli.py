import logging
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpo.app import arguments, commands, run_commands
from kvpo.app.cli import main
from kvpo.app.commands import COMMANDS
from kvpo.config import Config
from kvpo.training.ranks import launched


@pytest.fixture
def resolved(monkeypatch: pytest.MonkeyPatch) -> list[Config]:
    """The configurations that `kvpo pretrain` would use, without running it."""
    seen: list[Config] = []
    command = commands.Command(
        "pretrain",
        "rebuild",
        commands._pretrain_arguments,
        lambda arguments: seen.append(commands.configuration(arguments)),
        configured=True,
    )
    monkeypatch.setattr("kvpo.app.cli.COMMANDS", (command,))
    return seen


@pytest.mark.parametrize("arguments", [["--help"], *([command.name, "--help"] for command in COMMANDS)])
def test_help_is_quick_and_light(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom kvpo.app.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit as stop:\n    assert stop.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'peft', 'matplotlib'} & sys.modules.keys()\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "usage: kvpo" in done.stdout
    # CPU seconds, since the wall clock also counts whatever else the machine is busy with
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.9


def test_help_shows_docstrings_and_the_presets_values(capsys: pytest.CaptureFixture[str]) -> None:
    for preset, rate in (("demo", Config().optim.lr), ("wan-14b", 1e-5)):
        with pytest.raises(SystemExit):
            main(["align", "--preset", preset, "--help"])
        text = " ".join(capsys.readouterr().out.split())
        assert f"Peak learning rate of AdamW, reached in the fifth update. [{rate}]" in text


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("align", "preference:FILE NAME@openai:URL#MODEL .csv"),
        ("score", "preference:FILE NAME@openai:URL#MODEL docs/evaluation.md"),
        ("calibrate", "docs/evaluation.md"),
    ],
)
def test_help_names_every_kind_of_reward_and_prompt_file(
    command: str, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert not [word for word in words.split() if word not in text]


@pytest.mark.parametrize(
    ("command", "usage"),
    [
        ("align", "align --out DIR [--preset NAME] [options]"),
        ("pretrain", "pretrain --out FILE [--preset NAME] [options]"),
        ("doctor", "doctor [--out DIR] [--preset NAME] [options]"),
        ("plan", "plan [--preset NAME] [options]"),
        ("prompts", "prompts FILE [FILE ...] [--extended FILE] [--out FILE] [--hold-out INT] [options]"),
    ],
)
def test_usage_says_what_is_required(command: str, usage: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    assert capsys.readouterr().out.startswith(f"usage: kvpo {usage}\n")


def test_flags_with_dashes_switches_and_negative_numbers(resolved: list[Config]) -> None:
    arguments = "pretrain --out x --optim.lora-rank 4 --optim.checkpointing --stream.window -1 --seed=3"
    assert main(arguments.split()) == 0
    (config,) = resolved
    assert (config.optim.lora_rank, config.optim.checkpointing, config.stream.window, config.seed) == (
        4,
        True,
        -1,
        3,
    )


def test_preset_file_and_flags_in_that_order(resolved: list[Config], tmp_path: Path) -> None:
    file = tmp_path / "run.yaml"
    file.write_text("optim: {lr: 0.5, updates: 9}\n")
    assert (
        main(["pretrain", "--out", "x", "--preset", "wan-14b", "--config", str(file), "--optim.lr", "0.25"])
        == 0
    )
    (config,) = resolved
    assert (config.model.dim, config.optim.lr, config.optim.updates) == (5120, 0.25, 9)


def test_advantages_is_short_for_the_field(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    monkeypatch.setattr(arguments, "resolve", lambda preset, file, flags: seen.append((preset, flags)))
    monkeypatch.setitem(sys.modules, "kvpo.app.align", _Align)
    main(["align", "--preset", "demo", "--advantages", "random", "--out", str(tmp_path / "run")])
    main(["align", "--preset", "demo", "--out", str(tmp_path / "run")])
    assert seen == [("demo", {"objective.advantages": "random"}), ("demo", {})]


class _Align:
    @staticmethod
    def align(config: Config, out: Path, **given: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("algn", ["'algn'", "'align'"]),
        ("", ["COMMAND"]),
        ("align", ["--out"]),
        ("align --out x --preset dmo", ["'dmo'", "'demo'"]),
        ("align --out x --optim.lrr 3", ["--optim.lrr", "'3'", "'--optim.lr'"]),
        ("align --out x --optim.lrr=3", ["--optim.lrr", "'3'", "'--optim.lr'"]),
        ("align --out x --resum", ["--resum", "'--resume'"]),
        ("align --out x --optim.lr abc", ["optim.lr", "'abc'", "number"]),
        ("align --out x --advantages best", ["objective.advantages", "'best'", "anchor, group, random"]),
        ("align --out x --config nowhere.yaml", ["nowhere.yaml"]),
        ("align --out x --seed", ["--seed"]),
        ("report", ["RUN"]),
        ("report a b", ["unknown argument b"]),
        ("generate --out x --weights raw", ["--weights: raw needs --run"]),
        ("generate --out x --by flicker", ["--by: needs --best-of"]),
        ("generate --out x --branches fresh", ["--branches: needs --best-of"]),
        ("generate --out x --per video", ["--per: needs --best-of"]),
        ("evaluate x --seconds 60", ["--seconds: sets the length of the streams of --drift; add --drift"]),
        ("evaluate x --optim.lr 1", ["--optim.lr: kvpo evaluate takes the run's own settings; leave it out"]),
        (
            "suite check x --optim.lora-rank=1",
            ["--optim.lora_rank: kvpo suite takes no settings; leave it out"],
        ),
        ("evaluate x --lr 1", ["unknown argument --lr (value '1')\n"]),
        ("compare --out x --methods foo", ["--methods: unknown 'foo'; there are kvpo"]),
        ("evaluate x", ["x holds no run (no config.yaml); give the directory"]),
        ("suite check x --out y.json", ["--out: kvpo suite check writes no file"]),
    ],
)
def test_wrong_usage_is_one_line_and_status_2(
    arguments: str,
    words: list[str],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments.split()) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("kvpo: error: ") and captured.err.count("\n") == 1
    assert all(word in captured.err for word in words), captured.err
    assert list(tmp_path.iterdir()) == []  # nothing was created


def test_names_in_a_list_may_have_spaces_around_them(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[Any] = []
    monkeypatch.setattr("kvpo.app.generate.generate", lambda *a, best, **b: given.append(best.rewards) or [])
    suite = lambda *a, dimensions, **b: given.append(dimensions) or []  # noqa: E731
    monkeypatch.setattr("kvpo.app.suites.generate_suite", suite)
    assert main(["generate", "--out", "x", "--best-of", "2", "--by", "world, flicker"]) == 0
    assert main(["generate", "--out", "x", "--suite", "vbench", "--dimensions", "color, scene"]) == 0
    assert given == [("world", "flicker"), ["color", "scene"]]
    assert arguments.names("a ,b,", " c") == ["a", "b", "c"]


def test_library_errors_are_one_line_unless_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments) -> None:
        raise ValueError("prompts file x.txt is empty:\n  add a line")

    failing = commands.Command("report", "fails", run_commands.report_arguments, broken)
    monkeypatch.setattr("kvpo.app.cli.COMMANDS", (failing,))
    assert main(["report", "x"]) == 1
    monkeypatch.setenv("KVPO_TRACEBACK", "1")
    with pytest.raises(ValueError, match="add a line"):
        main(["report", "x"])


@pytest.mark.parametrize(
    "fill",
    [
        lambda: torch.empty(1 << 60, dtype=torch.uint8),
        lambda: _raise(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        lambda: _raise(RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be ...")),
        lambda: _raise(MemoryError()),
    ],
)
def test_full_memory_is_one_line_that_says_what_lowers_the_need(
    fill: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full = commands.Command("report", "fails", run_commands.report_arguments, lambda arguments: fill())
    monkeypatch.setattr("kvpo.app.cli.COMMANDS", (full,))
    assert main(["report", "x"]) == 1
    said = capsys.readouterr().err
    assert said.startswith("kvpo: error: ") and said.count("\n") == 1
    assert "memory" in said.partition("; `kvpo plan` (docs/memory.md) says what a run needs")[0]
    assert said.endswith("nvidia-smi whether another process holds memory\n")
    monkeypatch.setenv("KVPO_TRACEBACK", "1")
    with pytest.raises((RuntimeError, MemoryError)):
        main(["report", "x"])


def test_other_errors_of_torch_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments) -> None:
        raise RuntimeError("shapes differ")

    wrong = commands.Command("report", "fails", run_commands.report_arguments, broken)
    monkeypatch.setattr("kvpo.app.cli.COMMANDS", (wrong,))
    with pytest.raises(RuntimeError, match="shapes differ"):
        main(["report", "x"])


def _raise(error: Exception) -> None:
    raise error


@pytest.mark.parametrize(("count", "rank"), [("2", None), ("", None), ("many", None), ("2", "1")])
def test_errors_are_one_line_whatever_a_launcher_left_in_the_environment(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], count: str, rank: str | None
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", count)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "")
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert main(["align", "--out", "x", "--preset", "dmo"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("kvpo: rank 1: error: " if rank else "kvpo: error: ") and "'dmo'" in said
    if count and rank is None:
        with pytest.raises(ValueError, match=rf"WORLD_SIZE = {count} and RANK = unset.*torchrun, or unset"):
            launched()
    else:
        assert launched() == (count == "2")


def test_only_our_own_messages_begin_with_our_name(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def speaks(arguments) -> None:
        for name in ("kvpo.part", "another"):
            logging.getLogger(name).warning("from %s", name)

    ours = logging.getLogger("kvpo")
    for logger in (ours, logging.getLogger()):
        monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(ours, "propagate", True)
    command = commands.Command("report", "speaks", run_commands.report_arguments, speaks)
    monkeypatch.setattr("kvpo.app.cli.COMMANDS", (command,))
    assert main(["report", "x"]) == main(["report", "x"]) == 0
    assert capsys.readouterr().err.splitlines() == ["kvpo: from kvpo.part", "from another"] * 2


def test_defects_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(arguments) -> None:
        raise KeyError("defect")

    monkeypatch.setattr(
        "kvpo.app.cli.COMMANDS", (commands.Command("report", "fails", run_commands.report_arguments, broken),)
    )
    with pytest.raises(KeyError):
        main(["report", "x"])


def test_interrupt_and_closed_pipe(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(
        "kvpo.app.cli.COMMANDS",
        (commands.Command("report", "stops", run_commands.report_arguments, interrupted),),
    )
    assert main(["report", "x"]) == 130
    shell = f"set -o pipefail; '{sys.executable}' -m kvpo.app.cli align --help | head -1"
    done = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, env=dict(os.environ))
    assert "Traceback" not in done.stderr
