"""Everything a user can get wrong, through the command line: one line that names it, and nothing lost."""

import hashlib
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import kvpo
from kvpo.app.cli import main
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.models.geometry import fields_of
from kvpo.training.checkpoint import resume_point, save_checkpoint
from kvpo.training.run_directory import RunDirectory
from kvpo.training.trainer import Trainer, architecture
from tests.tiny_world import SETTINGS, tiny_config, toy_setup
from tests.training.test_checkpoint import Planted

REWARD = """
import torch

def raises(video, prompts):
    raise KeyError("no such look")

def nan(video, prompts):
    return torch.full((len(prompts),), float("nan"))

def misshapen(video, prompts):
    return torch.zeros(len(prompts), 2)

def text(video, prompts):
    return "splendid"
"""


@pytest.fixture
def refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """Run ``kvpo`` in an empty directory; the one line that it refuses with."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str | Path) -> str:
        assert main([str(argument) for argument in arguments]) in (1, 2)
        errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("kvpo: error: ")]
        assert len(errors) == 1
        return errors[0]

    return run


@pytest.fixture
def settings(tiny_base: Path, tmp_path: Path) -> Path:
    """A configuration file of the tiny generator."""
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump({**lists, "backbone.checkpoint": str(tiny_base)}))
    return file


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--preset demoo", ["'demoo'", "'demo'"]),
        ("--optim.lrr 3", ["--optim.lrr", "'3'", "'--optim.lr'"]),
        ("--optim.lr fast", ["optim.lr", "'fast'", "a number"]),
        ("--exploration.resident_frames 8", ["exploration.resident_frames", "pool of 2 frames", "got 8"]),
        ("--stream.block 4", ["stream.block", "divide the 30 and 60 frames", "got 4"]),
        ("--prompts mine.txt", ["prompts.file: mine.txt: no such prompt file"]),
        (
            "--backbone.checkpoint nowhere.safetensors",
            ["backbone.checkpoint: nowhere.safetensors is not a file", "kvpo pretrain"],
        ),
        (
            "--backbone.checkpoint run.yaml",
            ["backbone.checkpoint: run.yaml: neither a torch nor a safetensors file", "kvpo pretrain"],
        ),
        ("--backbone.checkpoint evil.pt", ["backbone.checkpoint: evil.pt", "kvpo pretrain"]),
        ("--backbone.geometry world", ["backbone.checkpoint: ", "dim is 32 there, 160 here"]),
    ],
)
def test_settings(refused: Any, settings: Path, tmp_path: Path, flags: str, words: list[str]) -> None:
    mark = tmp_path / "executed"
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Planted(mark)))
    said = refused("align", "--config", settings, "--out", "run", *flags.split())
    assert all(word in said for word in words), said
    assert not mark.exists()
    assert not list((tmp_path / "run").glob("checkpoints/*"))


PROMPTS: dict[str, tuple[str, bytes, str]] = {
    "empty": ("p.txt", b"", "p.txt: the file holds no prompts"),
    "undecodable": ("p.txt", b"a\nb\xe4r", "line 2: not UTF-8 text (byte 0xe4 at position 2); save the"),
    "segments": ("p.jsonl", b'{"segments": ["a", "b"]}', "2 segments need 1 switch frames"),
    "switches": ("p.jsonl", b'{"segments": ["a", "b"], "switches": [999]}', "[999] must increase"),
}  # fmt: skip


@pytest.mark.parametrize("case", PROMPTS)
def test_prompt_files(refused: Any, settings: Path, tmp_path: Path, case: str) -> None:
    name, content, words = PROMPTS[case]
    (tmp_path / name).write_bytes(content)
    assert words in refused("generate", "--config", settings, "--out", "videos", "--prompts", name)
    said = refused("align", "--preset", "longlive-1.3b", "--device", "cpu", "--out", "run", "--prompts", name)
    assert "prompts.file: " in said and words in said
    assert not (tmp_path / "videos").exists() and not list(tmp_path.glob("run/checkpoints/*"))


def test_a_missing_prompt_file_and_videos_too_short_to_fork(refused: Any, tmp_path: Path) -> None:
    align = ("align", "--preset", "longlive-1.3b", "--device", "cpu", "--out", "run", "--prompts")
    assert "prompts.file: no.txt: no such prompt file" in refused(*align, "no.txt")
    lines = [json.dumps({"segments": [f"video {n}"], "num_frames": 12}) + "\n" for n in range(5)]
    (tmp_path / "short.jsonl").write_text("".join(lines))
    counts = ("--evaluation.validation_prompts", "2", "--evaluation.test_prompts", "2")
    said = refused(*align, "short.jsonl", *counts)
    assert (
        "prompts.file: short.jsonl: prompts " in said and "of 12 latent frames cannot fork anywhere" in said
    )
    assert "a pool of 3 frames" in said and "lengthen the videos or lower exploration.branches" in said


@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("raises", "reward 'mine:raises' failed: KeyError: 'no such look'"),
        ("nan", "reward component 'nan' is nan for clip 0 of 2"),
        ("misshapen", "reward component 'misshapen': expected 2 scores, got shape [2, 2]"),
        ("text", "reward 'mine:text' failed: "),
        ("missing", "module 'mine' has no 'missing'"),
    ],
)
def test_rewards(refused: Any, settings: Path, tmp_path: Path, function: str, words: str) -> None:
    (tmp_path / "mine.py").write_text(REWARD)
    said = refused("align", "--config", settings, "--out", "run", "--rewards.scorers", f"mine:{function}")
    assert words in said


@pytest.fixture
def run(tiny_base: Path, tmp_path: Path) -> Path:
    """A run directory with the checkpoints of two updates that changed nothing."""
    config = tiny_config(tiny_base)
    with RunDirectory(tmp_path / "run", config) as directory:
        trainer = Trainer(toy_setup(config))
        for update in (1, 2):
            trainer.update = update
            tensors, state = trainer.tensors_and_state()
            state |= {"best": None, "radar": []}
            save_checkpoint(
                directory.checkpoints,
                update,
                tensors,
                state,
                architecture=architecture(trainer.setup.backbone.weights),
            )
    return directory.path


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-5])


def tamper(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def plant(path: Path) -> None:
    path.write_bytes(pickle.dumps(Planted(path.parents[3] / "executed")))
    record = json.loads((path.parent / "state.json").read_text())
    record |= {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    del record["record_sha256"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (path.parent / "state.json").write_text(json.dumps(record | {"record_sha256": digest}))


DAMAGES: list[tuple[Callable[[Path], None], str]] = [
    (truncate, "is truncated: "),
    (tamper, "was changed after it was saved: state.safetensors fails its SHA-256"),
    (plant, "state.safetensors is not a safetensors file"),
]


def test_damaged_checkpoints(
    refused: Any, run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = run / "checkpoints" / "update-000002"
    whole = {file: file.read_bytes() for file in path.iterdir()}
    for damage, words in DAMAGES:
        for file, content in whole.items():
            file.write_bytes(content)
        damage(path / "state.safetensors")
        said = refused("generate", "--run", run, "--checkpoint", path, "--out", "videos")
        assert str(path) in said and words in said
        assert not (tmp_path / "videos").exists() and not (tmp_path / "executed").exists()
        caplog.clear()
        assert resume_point(path.parent) == path.with_name("update-000001")
        assert any("skipped: checkpoint" in line for line in caplog.messages)
    assert main(["align", "--resume", "--out", str(run)]) == 0  # it is passed over for the one before
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_another_architecture_or_a_pickle(refused: Any, run: Path, tmp_path: Path) -> None:
    config = run / "config.yaml"
    saved = config.read_text()
    config.write_text(saved.replace("lora_rank: 2", "lora_rank: 3"))
    said = refused("generate", "--run", run, "--out", "videos")
    assert "is of another architecture: adapter is " in said
    assert "is of another architecture: adapter is " in refused("align", "--resume", "--out", run)
    config.write_text(saved)
    (tmp_path / "evil.pt").write_bytes(pickle.dumps(Planted(tmp_path / "executed")))
    said = refused("generate", "--run", run, "--checkpoint", "evil.pt", "--out", "videos")
    assert "evil.pt is not a kvpo checkpoint directory and was not opened: a pickle can run code" in said
    assert not (tmp_path / "executed").exists()


def test_an_output_directory_in_use_or_holding_a_run(refused: Any, settings: Path, run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name[0] != "."}
    assert "already holds a run; add --resume to continue it" in refused(
        "align", "--config", settings, "--out", run
    )
    with RunDirectory(run, tiny_config(settings.parent), resume=True):
        (run / "config.yaml").write_bytes(before[run / "config.yaml"])
        for more in ((), ("--resume",)):
            said = refused("align", "--config", settings, "--out", run, *more)
            assert "is in use by process" in said and "choose another --out" in said
    assert before == {path: path.read_bytes() for path in before}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--threads", "1000000"), "threads: must be 0 to 1024, got 1000000"),  # torch crashes
        (("--device", ""), "device: '' cannot be used here"),
        (("--device", "gpu"), "device: 'gpu' cannot be used here"),
        (("--device", "meta"), "device: 'meta' cannot be used here (it holds no data)"),
        (("--preset", ""), "unknown preset ''"),
        (("--rewards.noise_floors", "typo=0.1"), "rewards.noise_floors: 'typo' is not a component"),
        (("--optim.lr", "1" + "0" * 400), "optim.lr: expected a number, got 1000"),
    ],
)
def test_settings_that_end_in_a_crash_or_in_another_preset(
    refused: Callable[..., str], settings: Path, words: tuple[str, str], said: str
) -> None:
    assert said in refused("align", "--config", settings, "--out", "out", *words)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "words",
    [
        "score a.mp4 --reward flicker",
        "calibrate flicker",
        "learn-reward study --out r.safetensors",
        "reward-server --reward flicker",
    ],
)
def test_reward_commands_refuse_devices_that_cannot_be_used(refused: Callable[..., str], words: str) -> None:
    for device in ("foo", "meta", ""):
        said = refused(*words.split(), "--device", device)
        assert f"--device: {device!r} cannot be used here" in said and "--device cpu always can" in said


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--backbone.kind wan", "backbone.kind: kvpo pretrain needs world, got wan"),
        (
            "--stream.size 16,16",
            "stream.size: kvpo pretrain needs (8, 8), got (16, 16)",
        ),
        (
            "--backbone.geometry GEOMETRY",
            "backbone.geometry: text_dim: kvpo pretrain needs 64, got 32",
        ),
        (
            "--backbone.geometry 1.3b",
            "backbone.geometry: channels: kvpo pretrain needs 8, got 16",
        ),
        ("--optim.lr 0.1", "optim.lr: kvpo pretrain does not read it; leave it out"),
    ],
)
def test_no_base_is_made_that_the_embedded_world_cannot_use(
    refused: Callable[..., str], tmp_path: Path, flags: str, said: str
) -> None:
    fields = fields_of(replace(Config().model, text_dim=32))
    (tmp_path / "geometry.json").write_text(json.dumps(fields))
    words = flags.replace("GEOMETRY", str(tmp_path / "geometry.json")).split()
    assert said in refused("pretrain", "--steps", "0", "--out", "new/base.safetensors", *words)
    assert not Path("new").exists()


def test_fewer_than_no_steps_are_refused(refused: Callable[..., str]) -> None:
    assert "--steps: must be 0 or more, got -5" in refused(
        "pretrain", "--steps=-5", "--out", "base.safetensors"
    )


def test_choices_of_the_python_functions_are_checked_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ConfigurationError, match="split: must be test or final, got 'foo'"):
        kvpo.evaluate(tmp_path / "no-run", split="foo", out=tmp_path / "x.json")  # type: ignore[arg-type]
    with pytest.raises(ConfigurationError, match="track: unknown 'wandbb'; there are wandb, trackio"):
        kvpo.align(kvpo.preset("demo"), tmp_path / "run", track="wandbb")
    assert list(tmp_path.iterdir()) == []
    seen: list[Any] = []
    monkeypatch.setattr("kvpo.app.align.train", lambda *rest, track, **named: seen.append(track))
    monkeypatch.setattr("kvpo.app.align.say_what_is_needed", lambda *rest, **named: None)
    kvpo.align(kvpo.preset("demo"), tmp_path / "run", track="wandb")
    assert seen == [("wandb",)]
