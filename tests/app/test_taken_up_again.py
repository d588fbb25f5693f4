"""A run taken up again: it stays the run it is, on the prompts and with the files that it was made with."""

import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch

import kvpo.app.align
import kvpo.app.evaluate
from kvpo.app.align import align
from kvpo.app.build import source_of
from kvpo.app.cli import main
from kvpo.app.configuration import PLACES_OF_A_RUN, resolve, resolve_run
from kvpo.app.evaluate import evaluate
from kvpo.app.presets import PRESETS
from kvpo.app.taken import claimed
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.files import TEMPORARY_PREFIX
from kvpo.prompt_files import repeats
from kvpo.prompts import VideoPrompt
from kvpo.training import evaluation
from kvpo.training.checkpoint import CheckpointError, checkpoints
from kvpo.training.device import computing
from kvpo.training.evaluation import Evaluation
from kvpo.training.run_directory import RunDirectory
from tests.app.finished import QUICK, command, contents
from tests.tiny_wan import SENTENCES, tiny_wan
from tests.tiny_world import tiny_config, write_base


@pytest.mark.parametrize("name", PRESETS)
def test_the_documented_command_resumes_every_preset_without_naming_it(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed before its first checkpoint, a run has left its configuration and nothing else."""
    config = replace(PRESETS[name](), seed=7)
    with RunDirectory(tmp_path, config):
        pass
    seen: list[Config] = []
    monkeypatch.setattr(kvpo.app.align, "align", lambda config, out, **_: seen.append(config))
    with pytest.raises(KeyboardInterrupt):
        kvpo.app.commands._align(_parsed("align", "--resume", "--out", tmp_path))
    assert seen == [config]
    assert resolve(None, tmp_path / "config.yaml", {}) == config


def _parsed(*words: object) -> Any:
    from kvpo.app.cli import _parsers

    return _parsers(Config())[0].parse_args([str(word) for word in words])


def test_without_a_checkpoint_a_run_starts_from_its_saved_configuration_and_says_so(
    tiny_base: Path, finished: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tiny_base, **QUICK)
    with RunDirectory(tmp_path, config):
        pass
    assert command("align", "--resume", "--out", tmp_path) == 0
    assert "holds no checkpoint: it starts from its saved configuration" in caplog.text
    assert resolve(None, tmp_path / "config.yaml", {}) == config
    whole, here = (json.loads((at / "summary.json").read_text()) for at in (finished, tmp_path))
    assert here["held_out"] == whole["held_out"] and here["threads"] == 1


@pytest.mark.parametrize("kept", [0, 0.5])
def test_an_emptied_or_shortened_configuration_is_not_filled_up_from_a_preset(
    kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunDirectory(tmp_path, PRESETS["longlive-1.3b"]()):
        pass
    saved = tmp_path / "config.yaml"
    lines = saved.read_text().splitlines(keepends=True)
    saved.write_text("".join(lines[: int(kept * len(lines))]))
    before = contents(tmp_path)
    new = ("--out", tmp_path / "new")
    resumed = ("align", "--resume", "--out", tmp_path)
    for words in (
        resumed,
        ("evaluate", tmp_path),
        ("generate", "--run", tmp_path, *new),
        ("export", tmp_path, *new),
    ):
        assert command(*words) == 2
        assert f"{saved} is not the whole configuration of a run" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_resuming_where_there_is_no_run_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A mistyped directory would get a demo run."""
    assert command("align", "--resume", "--out", tmp_path / "typo") == 2
    assert "holds no run; name its directory, or give --preset" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()


def test_a_checkpoint_of_update_0_is_there_before_anything_is_generated(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    there: list[str] = []

    def fails(*arguments: Any, **how: Any) -> Any:
        there.extend(path.name for path in checkpoints(tmp_path / "run" / "checkpoints"))
        raise ValueError("out of memory")

    monkeypatch.setattr(kvpo.app.align, "evaluate_base", fails)
    with pytest.raises(ValueError, match="out of memory"):
        align(tiny_config(tiny_base, **QUICK), tmp_path / "run")
    assert there == ["update-000000"]
    assert not (tmp_path / "run").exists()


def test_the_library_too_continues_nothing_but_the_same_run(tiny_base: Path, run: Path) -> None:
    before = contents(run)
    for changes in ({"seed": 5}, {"optim__lr": 0.5, "optim__updates": 4}):
        with pytest.raises(ConfigurationError, match="continues with its saved settings, but"):
            align(tiny_config(tiny_base, **{**QUICK, **changes}), run, resume=True)
    assert contents(run) == before


def test_fewer_updates_than_were_made_are_refused(
    tiny_base: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    for updates in (0, 1):
        assert command("align", "--resume", "--out", run, "--optim.updates", updates) == 2
        said = f"optim.updates: {updates}, but {run} has already made 2; give 2 or more"
        assert said in capsys.readouterr().err
    assert contents(run) == before


def test_a_run_that_cannot_go_on_keeps_its_configuration(tiny_base: Path, run: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    other.write_bytes(tiny_base.read_bytes() + b" ")
    (run / "summary.json").unlink()
    before = contents(run)
    config = resolve(None, run / "config.yaml", {})
    with pytest.raises(ValueError, match=r"other\.safetensors"):
        align(replace(config, backbone=replace(config.backbone, checkpoint=str(other))), run, resume=True)
    assert contents(run) == before


@pytest.mark.parametrize("name", ["evaluate", "export", "resume"])
def test_weights_that_moved_are_found_where_they_are_now_and_no_others(
    name: str, tiny_base: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gone, moved, other = (str(tmp_path / f"{word}.safetensors") for word in ("gone", "moved", "other"))
    shutil.copy(tiny_base, moved)
    write_base(Path(other), seed=9)
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_base), gone))
    words: dict[str, tuple[object, ...]] = {
        "evaluate": ("evaluate", run),
        "export": ("export", run, "--layout", "pt", "--out", tmp_path / "merged.pt"),
        "resume": ("align", "--resume", "--out", run, "--optim.updates", 3),
    }
    assert command(*words[name]) != 0
    assert f"backbone.checkpoint: {gone} is not a file" in capsys.readouterr().err
    assert command(*words[name], "--backbone.checkpoint", other) == 1
    assert "another architecture: base is" in capsys.readouterr().err
    assert command(*words[name], f"--backbone.checkpoint={moved}") == 0


def test_a_run_is_evaluated_with_its_own_settings(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command("evaluate", run, "--evaluation.test_prompts", 4) == 2
    assert "--evaluation.test_prompts: kvpo evaluate takes the run's own settings" in capsys.readouterr().err
    with pytest.raises(ConfigurationError, match="evaluation.test_prompts is 2 there, 4 here"):
        evaluate(run, places={"evaluation.test_prompts": 4})
    assert all(kvpo.app.configuration.settings()[path] for path in PLACES_OF_A_RUN)


def test_an_evaluation_continues_where_it_failed(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = evaluate(run, out=run / "whole.json")
    original, made = evaluation._evaluated, []

    def fails_third(*arguments: Any) -> Evaluation:
        made.append(1)
        if len(made) == 3:
            raise ValueError("the reward server is gone")
        return original(*arguments)

    monkeypatch.setattr(evaluation, "_evaluated", fails_third)
    with pytest.raises(ValueError, match="the reward server is gone"):
        evaluate(run)
    with claimed(run / "evaluation.json.parts"):
        assert command("evaluate", run) == 1
    assert "another process is writing to" in capsys.readouterr().err
    assert len(made) == 3 and not (run / "evaluation.json").exists()
    assert evaluate(run)["held_out"] == whole["held_out"]
    assert len(made) == 5, "base and aligned, short and long, the third twice"
    assert not list(run.glob("*.parts"))

    (run / "evaluation.json.parts").mkdir()
    (run / "evaluation.json.parts" / "notes.txt").write_text("not kvpo's")
    (run / "evaluation.json.parts" / f"{TEMPORARY_PREFIX}left").touch()
    evaluate(run)
    assert [file.name for file in (run / "evaluation.json.parts").iterdir()] == ["notes.txt"]


def test_null_runs_stay_with_a_run(run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run that is resumed, and its evaluation, are compared with those that it was given."""
    config = resolve_run(run)
    chance = replace(config, objective=replace(config.objective, advantages="random"))
    runs = [{"seed": n, "short": n / 100, "long": 0.0} for n in range(2)]
    given = tmp_path / "given.json"
    given.write_text(json.dumps({"settings": asdict(chance), "runs": runs}))
    tested = json.loads((run / "summary.json").read_text())
    assert align(config, run, resume=True, null=given) == tested
    assert f"kvpo report {run} --null {given} compares a finished run" in caplog.text
    (run / "summary.json").unlink()  # as if it had been stopped after its last update
    again = align(config, run, resume=True, null=given)
    given.unlink()
    assert again is not None and again["held_out"] == tested["held_out"]
    assert again["null"] == {"short": [0.0, 0.01], "long": [0.0, 0.0]}
    elsewhere = str(shutil.copy(config.backbone.checkpoint, tmp_path / "elsewhere.safetensors"))
    assert evaluate(run, places={"backbone.checkpoint": elsewhere})["null"] == again["null"]
    assert "null" not in evaluate(run, weights="raw"), "null runs have other weights"


def test_the_final_split_is_of_stories_and_noise_that_no_run_has(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    numbers = evaluate(run, split="final")
    saved = json.loads((run / "final.json").read_text())
    tested = json.loads((run / "summary.json").read_text())
    assert saved == numbers and numbers["split"] == "final"
    assert set(numbers["held_out"]) == {"short", "long", "beyond"}
    for name, found in tested["held_out"].items():
        assert numbers["held_out"][name]["base_mean"] != found["base_mean"]
    assert command("evaluate", run, "--split", "final", "--drift") == 2
    assert "--split: --drift streams the test prompts, got final" in capsys.readouterr().err


def test_the_page_of_a_run_needs_no_weights(tiny_base: Path, run: Path) -> None:
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(str(tiny_base), "/nowhere/base.safetensors"))
    assert command("report", run) == 0


def global_state() -> tuple[Any, ...]:
    return (
        torch.get_num_threads(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.utils.deterministic.fill_uninitialized_memory,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.get_rng_state().tolist(),
        random.getstate(),
        [part.tolist() if isinstance(part, numpy.ndarray) else part for part in numpy.random.get_state()],
        dict(os.environ),
    )


@pytest.mark.parametrize("fails", [False, True])
def test_a_run_leaves_the_process_as_it_was(tiny_base: Path, tmp_path: Path, fails: bool) -> None:
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        before = global_state()
        changes = {"rewards__scorers": ("tests.tiny_world:nothing",)} if fails else {}
        config = replace(tiny_config(tiny_base, **{**QUICK, "optim__updates": 1, **changes}), threads=1)
        try:
            summary = align(config, tmp_path / "run")
            assert summary is not None and summary["threads"] == 1
            evaluate(tmp_path / "run")
        except ConfigurationError:
            assert fails
        assert global_state() == before
    finally:
        torch.set_num_threads(threads)


def test_threads_are_one_on_a_cpu_unless_said_otherwise() -> None:
    threads = torch.get_num_threads()
    for config, inside in (
        (Config(), 1),
        (replace(Config(), threads=3), 3),
        (replace(Config(), device="cuda"), threads),
    ):
        with computing(config):
            assert torch.get_num_threads() == inside
            assert torch.are_deterministic_algorithms_enabled()
        assert torch.get_num_threads() == threads
    with pytest.raises(ConfigurationError, match="threads: must be 0 to 1024"):
        resolve("demo", None, {"threads": "-1"})


@pytest.mark.parametrize(("given", "inside"), [([], 1), (["--threads", "3"], 3)])
def test_pretraining_takes_as_many_threads_as_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, given: list[str], inside: int
) -> None:
    threads, seen = torch.get_num_threads(), []
    monkeypatch.setattr("kvpo.world.pretrain.pretrain", lambda *_, **__: seen.append(torch.get_num_threads()))
    try:
        torch.set_num_threads(2)
        assert main(["pretrain", "--out", str(tmp_path / "base.safetensors"), *given]) == 0
        assert seen == [inside] and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_the_command_waits_passively_and_a_caller_s_environment_is_left_alone() -> None:
    code = (
        "import os, sys\nfrom kvpo.app.cli import main\n"
        "main(['report', '/nowhere'])\nassert 'OMP_WAIT_POLICY' not in os.environ\n"
        "sys.argv = ['kvpo', 'report', '/nowhere']\nmain()\nprint(os.environ['OMP_WAIT_POLICY'])\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "OMP_WAIT_POLICY"}
    for given, expected in (({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")):
        script = code if not given else code.replace("assert 'OMP_WAIT_POLICY' not in os.environ\n", "")
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, env=environment | given
        )
        assert done.stdout.strip() == expected, done.stderr


# Prompt files of public generators.


def kinds(config: Config) -> dict[str, list[tuple[str, ...]]]:
    training, validation, test = source_of(config).split(config)
    sets = {"training": training, "validation": validation["short"], "test": test["short"]}
    return {name: [prompt.segments for prompt in own] for name, own in sets.items()}


@pytest.mark.parametrize(
    "again",
    [
        "CAFÉ ball",
        "cafe\u0301  ball",
        "café\u00a0ball",
        "ｃａｆé ball",
        "caf\u00adé\u200b ball",
        "\u2060café ball",
    ],
)
def test_prompts_that_read_alike_are_one_prompt(again: str) -> None:
    prompts = [VideoPrompt(n, (text,), (), 9) for n, text in enumerate(["café ball", again, "cafe ball"])]
    assert [[prompt.id for prompt in same] for same in repeats(prompts)] == [[0, 1], [2]]


def test_a_repeated_prompt_is_never_on_both_sides(tmp_path: Path) -> None:
    config = tiny_wan("longlive-1.3b", tmp_path)
    once = kinds(config)
    file = Path(config.prompts.file)
    file.write_text("\n".join([*SENTENCES, *(f"  {text.upper()}" for text in SENTENCES), *SENTENCES]) + "\n")
    for name, texts in kinds(config).items():
        assert {text.casefold() for (text,) in texts} == {text for (text,) in once[name]}
        assert len(texts) == len(once[name]) * (3 if name == "training" else 1)
    file.write_text("\n".join([SENTENCES[0]] * 9) + "\n")
    with pytest.raises(
        ConfigurationError, match="has 1 distinct video of one prompt; the .* hold out leave none"
    ):
        source_of(config).split(config)


def test_held_out_prompts_do_not_move(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_wan("longlive-1.3b", tmp_path, optim__updates=1)
    file, out = Path(config.prompts.file), tmp_path / "run"
    before = hashlib.sha256(file.read_bytes()).hexdigest()
    assert align(config, out) is not None
    kept = json.loads((out / "provenance.json").read_text())["prompts"]
    assert kept["sha256"] == before
    _, validation, test = source_of(config).split(config)
    assert [p["segments"][0] for p in kept["test"]["short"]] == [p.segments[0] for p in test["short"]]
    assert len(kept["training"]) == 2 and len(kept["validation"]["short"]) == len(validation["short"])

    moved = tmp_path / "elsewhere.txt"
    shutil.copy(file, moved)
    file.write_text(file.read_text().replace(SENTENCES[2], "a cat"))
    after = hashlib.sha256(file.read_bytes()).hexdigest()
    commands: list[Callable[[], tuple[object, ...]]] = [
        lambda: ("align", "--resume", "--out", out, "--optim.updates", 2),
        lambda: ("evaluate", out),
        lambda: ("generate", "--run", out, "--out", tmp_path / "videos"),
    ]
    saved = contents(out)
    for words in commands:
        assert command(*words()) == 2
        said = capsys.readouterr().err
        assert before in said and after in said and "--prompts.file FILE" in said, said
    assert contents(out) == saved
    for words in reversed(commands):
        assert command(*words(), "--prompts.file", moved) == 0
    assert json.loads((out / "summary.json").read_text())["resumed_at"] == 1
    assert "<dt>wall time since update 1</dt>" in (out / "report.html").read_text()


def test_the_split_itself_is_compared(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = run / "provenance.json"
    stored = json.loads(record.read_text())
    stored["prompts"]["test"]["long"].reverse()
    record.write_text(json.dumps(stored))
    assert command("evaluate", run) == 2
    assert "the test prompts of" in capsys.readouterr().err
    record.write_text("{")
    assert command("evaluate", run) == 2
    assert "is damaged" in capsys.readouterr().err
    record.unlink()
    assert command("evaluate", run) == 0
    words = ("--evaluation.test_prompts", 3, "--out", run / "videos")
    assert command("generate", "--run", run, *words) == 0, "nothing is recorded that would differ"


def test_a_text_encoder_or_vae_that_moved_is_checked_by_content(tmp_path: Path) -> None:
    config = tiny_wan("longlive-1.3b", tmp_path / "files", optim__updates=1)
    out, moved = tmp_path / "run", tmp_path / "moved"
    assert align(config, out) is not None
    for part in ("text_encoder", "tokenizer", "vae"):
        shutil.copytree(tmp_path / "files" / part, moved / part)
    summary = json.loads((out / "summary.json").read_text())
    assert evaluate(out, places={"backbone.encoders": str(moved)})["held_out"] == summary["held_out"]
    with (moved / "vae" / "config.json").open("a") as file:
        file.write(" ")
    with pytest.raises(ConfigurationError, match="backbone.encoders: its files have the digest"):
        evaluate(out, places={"backbone.encoders": str(moved)})
    with pytest.raises(CheckpointError, match="another architecture: base is"):
        other = tmp_path / "files" / "other.pt"
        tensors = torch.load(config.backbone.checkpoint)
        tensors["generator"]["model.head.head.bias"] += 1
        torch.save(tensors, other)
        evaluate(out, places={"backbone.checkpoint": str(other)})


def test_a_run_streams_for_long_and_says_what_drifts(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = shutil.copytree(finished, tmp_path / "run")
    monkeypatch.setattr(kvpo.app.evaluate, "SPAN_SECONDS", 0.5)
    assert command("evaluate", "--drift", run, "--seconds", "1.7") == 0
    numbers = json.loads((run / "drift.json").read_text())
    span = numbers["seconds"][0]
    assert numbers["seconds"] == pytest.approx([span * (n + 1) for n in range(int(1.7 / span))])
    for side in ("base", "aligned"):
        measures = {
            "reward",
            "reward/redness",
            "reward/calm",
            "brightness",
            "saturation",
            "motion",
            "confidence",
        }
        assert measures | {"unseen"} <= set(numbers[side])
        assert all(len(spans) == len(numbers["seconds"]) for spans in numbers[side].values())
        assert all(len(values) == 4 for values in numbers[side]["reward"])
    assert numbers["base"]["brightness"] != numbers["aligned"]["brightness"]
    assert (run / "drift.png").read_bytes().startswith(b"\x89PNG")
    for seconds in ("0.1", "nan", "inf"):
        assert command("evaluate", "--drift", run, "--seconds", seconds) == 1
        assert "--seconds: must be at least" in capsys.readouterr().err
    assert command("evaluate", "--drift", run, "--out", tmp_path / "x.json") == 2
