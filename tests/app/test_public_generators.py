"""Public generators, shrunk, through the command line: align, resume, generate, evaluate, export, reload."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvpo.app.build import build_setup
from kvpo.app.cli import main
from kvpo.app.configuration import resolve_saved
from kvpo.app.live import theatre_of
from kvpo.config import Config
from kvpo.engine.stream import stream_latents
from kvpo.live.scheduler import SessionLimits
from kvpo.prompts import ClipPrompt
from kvpo.report.video import read_video
from kvpo.training.checkpoint import latest_checkpoint
from kvpo.training.collection import explore
from kvpo.training.trainer import Trainer
from tests import tiny_wan as tiny_wan_module
from tests.live.live_server import serving
from tests.tiny_wan import brightness, tiny_flags, tiny_wan

PRESETS = ("longlive-1.3b", "memflow-1.3b", "self-forcing-1.3b", "wan-14b")
MERGED = 1e-5
"""Bound on latents made with merged weights, which round W + B A once where the policy adds two products."""


def run(*words: object) -> None:
    """`kvpo` with these arguments, which must succeed."""
    assert main([str(word) for word in words]) == 0


def saved(directory: Path) -> dict[str, Tensor]:
    """The tensors of a run's last checkpoint."""
    latest = latest_checkpoint(directory / "checkpoints")
    assert latest is not None
    return load_file(latest / "state.safetensors")


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def videos(directory: Path) -> dict[str, Tensor]:
    return load_file(directory / "latents.safetensors")


def interrupted_and_resumed(flags: list[str], out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run whose reward fails after its first update, then is resumed."""

    def failing(video: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
        if (out / "checkpoints/update-000001").exists():
            raise RuntimeError("out of order")
        return brightness(video, prompts)

    with monkeypatch.context() as patched:
        patched.setattr(tiny_wan_module, "brightness", failing)
        assert main(["align", *flags, "--out", str(out)]) == 1
    assert not (out / "summary.json").exists()
    elsewhere = shutil.copy(out.parent / "base.pt", out.parent / "elsewhere.pt")
    run("align", "--resume", "--out", out, "--checkpoint", elsewhere)


def uninterrupted(config: Config) -> dict[str, Tensor]:
    """The state after the same updates in one go."""
    trainer = Trainer(build_setup(config))
    for _ in range(config.optim.updates):
        trainer.step()
    return trainer.tensors_and_state()[0]


def end_to_end(name: str, segments: int, out: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> None:
    """One preset from its files to a run, and from the run to files that give the same videos again."""
    flags = tiny_flags(name, out, segments=segments, **changes)
    interrupted_and_resumed(flags, out / "run", monkeypatch)
    assert_same(saved(out / "run"), uninterrupted(tiny_wan(name, out, segments=segments, **changes)))

    latest = ("--checkpoint", "latest")  # the best one may be the base, where no validation beats it
    run("generate", "--run", out / "run", *latest, "--out", out / "videos")
    made = videos(out / "videos")
    base = {key.removesuffix("-base"): value for key, value in made.items() if key.endswith("-base")}
    aligned = {key.removesuffix("-aligned"): made[f"{key.removesuffix('-aligned')}-aligned"] for key in base}
    assert len(base) == 2 and not torch.equal(base["000"], aligned["000"])
    assert (out / "videos/000-side-by-side.mp4").stat().st_size > 0
    run("generate", *flags, "--out", out / "base")
    assert_same(videos(out / "base"), base)

    run("evaluate", out / "run")
    evaluation = json.loads((out / "run/evaluation.json").read_text())
    summary = json.loads((out / "run/summary.json").read_text())
    assert evaluation["held_out"] == summary["held_out"]
    assert evaluation["verdict"] == summary["verdict"]
    assert summary["checks"]["first_ratio_max_deviation"] <= summary["checked"]["ratio_tolerance"]
    assert summary["checks"]["anchor_energy_at_old"] == 0
    assert summary["checks"]["default_route_max_difference"] == 0

    adapted = changes.get("optim__lora_rank") != 0
    alone = adapted and changes.get("backbone__lora_start") != "merge"
    targets = {"pt": "merged.pt", "diffusers": "merged"}
    adapters = ("peft", "diffusers-lora") if alone else ()
    if not alone:  # an adapter of weights that no file holds, or none at all
        assert main(["export", str(out / "run"), "--out", str(out / "refused")]) == 2
    (out / "vae").rename(out / "not needed")
    for layout in (*adapters, *targets):
        run("export", out / "run", *latest, "--layout", layout, "--out", out / targets.get(layout, layout))
    (out / "not needed").rename(out / "vae")
    for layout in adapters:
        run(
            "generate", *flags, "--backbone.lora", out / layout, "--backbone.lora_start=continue",
            "--out", out / f"{layout}-videos",
        )  # fmt: skip
        assert_same(videos(out / f"{layout}-videos"), aligned)
    for layout, target in targets.items():
        run(
            "generate", *flags, "--backbone.checkpoint", out / target, "--backbone.lora=",
            "--out", out / f"{target}-videos",
        )  # fmt: skip
        for key, latents in videos(out / f"{target}-videos").items():
            assert (latents - aligned[key]).abs().max() <= (MERGED if adapted else 0), (layout, key)
    assert main(["export", str(out / "run"), "--layout=pt", "--out", str(out / "merged.pt")]) == 1


def directed_live(run: Path, out: Path) -> None:
    """The run's arms through the live server: as the engine streams them, forked, exported, continued."""
    config, limits = resolve_saved(run / "config.yaml"), SessionLimits(sessions=1, frames=60)
    theatre = theatre_of(config, out, run=run, checkpoint="latest", weights="raw", limits=limits)
    with serving(out, theatre=theatre) as served, served.connect() as client:
        assert theatre.notice("the dog jumps " * 3) == "10 tokens, 8 are read: 2 are cut"
        assert client.start("a red ball", seed=3, speed=0)["arms"] == ["base", "aligned"]
        first = client.until("video.block")
        assert {name: len(sizes) for name, sizes in first["frames"].items()} == {"base": 9, "aligned": 9}
        client.ask("session.prompt_update", prompt="the dog jumps")
        client.until("video.block", prompt="the dog jumps")
        client.ask("session.pause")
        (show,) = served.scheduler.shows.values()
        session, stage = show.session, served.scheduler.stage
        prompt = session.script.shown(session.start)
        shown = {name: arm.spool.read(0, session.start) for name, arm in session.arms.items()}
        with torch.no_grad(), served.scheduler.sides["base"]():
            again = stream_latents(stage.generator, [prompt], stage.embed(prompt.segments), session.tape)
        assert torch.equal(shown["base"], again[0]) and not torch.equal(shown["base"], shown["aligned"])

        client.send("session.fork", branches=2, blocks=1)
        fork = client.until("session.fork.accepted")
        assert [len(sizes) for sizes in fork["frames"]] == [12, 12, 12]
        client.ask("session.choose", branch=1)
        client.ask("session.pause", paused=False)
        assert client.until("video.block", start=fork["frame"])["sees"]["routed"] == fork["routes"][1]
        client.ask("session.pause")
        frames, rate = read_video(out / "exports" / client.ask("session.export", what="mp4")["file"])
        assert len(frames) == 4 * session.start - 3 and rate == 16
        name, continued = client.ask("session.snapshot")["snapshot"], session.start
        client.send("session.stop")
        client.until("session.done")
        assert client.start("", snapshot=name)["frame"] == continued


def test_a_run_resumes_exports_loads_again_and_is_directed_live(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_to_end("longlive-1.3b", 2, tmp_path, monkeypatch)
    directed_live(tmp_path / "run", tmp_path / "live")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("segments", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_end_to_end(
    name: str, segments: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    end_to_end(name, segments, tmp_path, monkeypatch)


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("start", ["continue", "merge"])
def test_a_given_adapter_end_to_end(start: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    changes = {"backbone__lora": str(tmp_path / "lora.pt"), "backbone__lora_start": start}
    end_to_end("longlive-1.3b", 2, tmp_path, monkeypatch, **changes)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_parameters_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    end_to_end("longlive-1.3b", 1, tmp_path, monkeypatch, optim__lora_rank=0, optim__lr=1e-3)


@pytest.mark.parametrize(
    ("start", "precision"),
    [
        ("fresh", "bfloat16"),
        ("continue", "bfloat16"),
        ("continue", "none"),
        ("merge", "bfloat16"),
        ("full", "bfloat16"),
        ("full", "none"),
    ],
)
def test_the_kl_to_the_starting_policy_begins_at_zero(start: str, precision: str, tmp_path: Path) -> None:
    tiny_wan("longlive-1.3b", tmp_path)
    changes: dict[str, Any] = {"optim__autocast": precision, "optim__checkpointing": True, "seed": 3}
    if start in ("continue", "merge"):
        changes |= {"backbone__lora": str(tmp_path / "lora.pt"), "backbone__lora_start": start}
    if start == "full":
        changes["optim__lora_rank"] = 0
    trainer = Trainer(build_setup(tiny_wan("longlive-1.3b", tmp_path, segments=2, **changes)))
    first, second = trainer.step(), trainer.step()
    assert first["simplex_kl"] == 0 and first["velocity_kl"] == 0 and first["ratio_deviation"] == 0
    assert first["gradient_norm"] > 0 and second["velocity_kl"] > 0


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_compiled_layers_train_alike(tmp_path: Path) -> None:
    """One update through the application, layers compiled or not: rounding is all that differs.

    What is divided by the spread of the rewards is left out: this reward's is a few roundings wide.
    """
    results = []
    for compiled in (False, True):
        changes = {"optim__compile": compiled, "optim__checkpointing": True}
        trainer = Trainer(build_setup(tiny_wan("longlive-1.3b", tmp_path, segments=2, **changes)))
        ((rollout, _),) = explore(trainer.setup, [0])
        latents = rollout.groups[0].clean_MTCHW
        rollout.release()
        results.append((latents, trainer.step()))
    (latents, plain), (compiled_latents, found) = results
    assert (compiled_latents - latents).abs().max() <= 1e-5
    assert found["ratio_deviation"] == 0 and found["velocity_kl"] < 1e-10
    for name in ("reward_mean", "branch_distance", "energy_mean", "entropy"):
        assert found[name] == pytest.approx(plain[name], rel=1e-4), name
    for name in ("energy_std", "temperature"):  # a difference of energies has their rounding
        assert found[name] == pytest.approx(plain[name], abs=1e-5 * plain["energy_mean"]), name
