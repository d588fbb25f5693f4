"""`kvpo compare`: a tiny comparison from its command to its page, stopped and gone on with."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kvpo.app.cli import main
from kvpo.app.comparison.arms import chosen_arms
from kvpo.app.comparison.command import _check
from kvpo.app.configuration import preset, resolve_saved
from kvpo.app.sources import world
from kvpo.training.checkpoint import find_checkpoint
from tests.tiny_world import SETTINGS

QUICK = {
    "rewards.scorers": "tests.tiny_world:toy",
    "stream.schedule": "1.0,0.5",
    "evaluation.test_prompts": 3,
    "rewards.noise_floors": "total=0",
    "optim.prompts_per_update": 1,
}


def command(base: Path, out: Path, *more: str) -> list[str]:
    """A comparison of seconds."""
    settings = {**SETTINGS, **QUICK, "backbone.checkpoint": str(base)}
    texts = {name: ",".join(map(str, v)) if isinstance(v, tuple) else v for name, v in settings.items()}
    given = [f"--{name}={text}" for name, text in texts.items()]
    return ["compare", "--methods=kvpo,null", "--seeds=2", "--budget=0.25", "--trials=2", f"--out={out}",
            *given, *more]  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def few_used_stories() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(world, "MOST_TESTED", 4)
        world.final_prompts.cache_clear()
        yield
    world.final_prompts.cache_clear()


@pytest.fixture(scope="module")
def compared(tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("comparisons") / "compared"
    assert main(command(tiny_base, out)) == 0
    return out


def summary_of(out: Path) -> dict[str, Any]:
    return json.loads((out / "summary.json").read_text(encoding="utf-8"))


def test_every_run_takes_the_budget_and_ends_where_it_is_nearest(compared: Path) -> None:
    summary = summary_of(compared)
    assert set(summary["methods"]) == {"kvpo", "null"} and summary["tuning_trials"] == 2
    for name, own in summary["methods"].items():
        for seed, (cpu_s, updates) in enumerate(zip(own["cpu_s"], own["updates"], strict=True)):
            run = compared / "runs" / f"run-{name}-{seed}"
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            spent = [line["cpu_s"] for line in lines if line["kind"] == "update"]
            assert len(spent) == updates and sum(spent) == pytest.approx(cpu_s)
            # One more update would have gone farther beyond the budget than the run falls short of it.
            assert cpu_s + cpu_s / updates / 2 >= summary["budget_cpu_s"]
            config = resolve_saved(run / "config.yaml")
            assert config.optim.updates == updates and config.threads == 1
            assert (config.objective.advantages == "random") == (name == "null")
            # Nothing was validated, so whoever takes the run gets what was trained, and not its base as best.
            assert find_checkpoint(run / "checkpoints", None).name == f"update-{updates:06d}"


def test_to_choose_among_arms_validation_prompts_are_enough(tiny_base: Path, tmp_path: Path) -> None:
    """An arm whose numbers are not finite ends neither the others nor the page."""
    given = ["--split=validation", "--trials=0", "--seeds=1", "--evaluation.validation_prompts=2"]
    given += ["--arms", "wild:optim.lr=9e29"]
    assert main(command(tiny_base, tmp_path / "chosen", *given)) == 0
    summary = summary_of(tmp_path / "chosen")
    assert set(summary["methods"]) == {"kvpo", "null"} and set(summary["failed"]["wild"]) == {"0"}
    assert summary["prompts"] == {"short": 2, "long": 2} and summary["split"] == "validation"
    assert summary["floors"] == {} and len(summary["methods"]["kvpo"]["short"]["unseen"]) == 1
    page = (tmp_path / "chosen/report.html").read_text(encoding="utf-8")
    assert "on validation prompts, to choose among arms" in page
    assert "wild: 1 of 1 runs ended with numbers that are not finite" in page


def test_arms_start_from_the_best_trial_under_a_seed_that_is_not_reported(compared: Path) -> None:
    summary = summary_of(compared)
    tried = summary["trials"]["kvpo"]
    assert len(tried) == 2 and tried[0]["settings"] == {} != tried[1]["settings"]
    best = max(tried, key=lambda one: one["gain"])["settings"]
    assert summary["methods"]["kvpo"]["settings"] == best
    assert summary["methods"]["null"]["settings"] == best | {"objective.advantages": "random"}
    seed = resolve_saved(compared / "runs" / "trial-kvpo-0" / "config.yaml").seed
    assert summary["seeds"] == [0, 1] and seed not in summary["seeds"]


def test_the_summary_keeps_its_contract(compared: Path) -> None:
    summary = summary_of(compared)
    assert {"commit", "base_sha256", "budget_cpu_s", "tuning_trials", "methods"} <= set(summary)
    assert set(summary["floors"]) == {"best-of-8", "steps-8", "steps-16"}
    for own in summary["methods"].values():
        assert own["cpu_s_per_update"] > 0
        assert 0 <= own["diversity"]["attribute_diversity"] <= 1
        for kind in ("short", "long", "beyond"):
            assert len(own[kind]["gains"]) == len(own[kind]["unseen"]) == len(own[kind]["mismatched"]) == 2
            assert set(own[kind]["components"]) == {"redness", "calm"}
    assert summary["methods"]["kvpo"]["short"]["p_against_kvpo"] is None
    assert summary["methods"]["null"]["short"]["p_against_kvpo"] >= summary["least_p"] == 2 / 6
    # Selecting by the trained reward cannot lower it, and the first of the videos is the base's own.
    assert all(line["gain"] >= 0 for line in summary["floors"]["best-of-8"].values())


def test_the_page_says_that_two_seeds_decide_nothing(compared: Path) -> None:
    page = (compared / "report.html").read_text(encoding="utf-8")
    assert "Two seeds decide nothing" in page and "best-of-8" in page
    assert (compared / "comparison.png").read_bytes().startswith(b"\x89PNG")


def test_a_comparison_goes_on_where_it_was(
    tiny_base: Path,
    compared: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    out = shutil.copytree(compared, tmp_path / "stopped")
    before = summary_of(out)
    for name in ("summary.json", "report.html", "pieces/run-null-1.json", "pieces/steps-8.json"):
        (out / name).unlink()
    kept = {path: path.stat().st_mtime_ns for path in (out / "pieces").glob("*.json")}
    monkeypatch.setattr("kvpo.app.comparison.command.source_commit", lambda: "another")
    assert main(command(tiny_base, out)) == 0
    assert "what is still to do is done at another" in caplog.text
    assert summary_of(out) == before | {"commit": f"{before['commit']}, another"}
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())


def test_another_comparison_is_refused_in_the_same_directory(
    tiny_base: Path, compared: Path, capsys: pytest.CaptureFixture
) -> None:
    assert main(command(tiny_base, compared, "--budget=9")) == 1
    assert "another comparison (budget_cpu_s differ" in capsys.readouterr().err


def test_no_comparison_takes_over_a_run_or_a_study_and_no_run_a_comparison(
    tiny_base: Path, compared: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for file, kind in (("config.yaml", "run"), ("summary.json", "run"), ("study.sqlite", "study")):
        (out := tmp_path / file.partition(".")[0]).mkdir()
        (out / file).touch()
        assert main(command(tiny_base, out)) == 1
        assert f"{out} holds a {kind}; choose another --out for the comparison" in capsys.readouterr().err
        assert [path.name for path in out.iterdir()] == [file]
    before = {path.name for path in compared.iterdir()}
    assert main(["align", "--out", str(compared)]) == 1
    assert f"{compared} holds a comparison; choose another --out for the run" in capsys.readouterr().err
    assert {path.name for path in compared.iterdir()} == before


def test_the_first_cpu_is_the_cpu() -> None:
    _check(preset("demo", {"device": "cpu:0"}), chosen_arms(["kvpo"], []), 1, 1.0, 0)


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--methods=kvpo,nftt"], "--methods: unknown 'nftt' (did you mean 'nft'?)"),
        (["--seeds=0"], "--seeds: must be at least 1"),
        (["--budget=0"], "--budget: must be more than 0"),
        (["--methods="], "--methods: empty"),
        (["--arms", "deep:optim.lrr=1"], "--arms: deep: unknown field 'optim.lrr'"),
        (["--arms", "deep:optim.lr=abc"], "--arms: deep: optim.lr: expected a number, got 'abc'"),
        (["--arms", "deep"], "--arms: 'deep' is neither NAME:setting=value,... nor a YAML file"),
        (["--arms", "deep:"], "write NAME:setting=value"),
        (["--arms", "../up:optim.lr=1"], "names files"),
        (["--device=meta"], "the budget is counted in CPU-seconds"),
        (["--budget=nan"], "--budget: must be more than 0"),
        (["--budget=inf"], "--budget: must be more than 0"),
        (["--arms", "deep:seed=5"], "--arms: deep: seed is the same for all arms"),
        (["--arms", "deep:rewards.weights=calm=2"], "deep: rewards.weights is the same for all arms"),
        (["--arms", "deep:backbone.checkpoint=x"], "deep: backbone.checkpoint is the same for all arms"),
        (["--methods=pretraining", "--backbone.kind=wan"], "pretraining needs the data"),
        (["--arms", "no-arms.yaml"], "no-arms.yaml holds no arm"),
    ],
)
def test_what_cannot_be_compared_is_refused_before_anything_is_written(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture, more: list[str], said: str
) -> None:
    (tmp_path / "no-arms.yaml").write_text("# all of them are commented out\n")
    more = [str(tmp_path / word) if word == "no-arms.yaml" else word for word in more]
    assert main(command(tiny_base, tmp_path / "out", *more)) == 2
    assert said in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_killed_again_and_again_it_ends_all_the_same(tiny_base: Path, tmp_path: Path) -> None:
    out, environment = tmp_path / "killed", os.environ | {"OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "kvpo", *command(tiny_base, out, "--checkpoint.every=1")]
    for seconds in (6, 9, 12):
        process = subprocess.Popen(words, env=environment, stderr=subprocess.DEVNULL)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
    # Two processes share what is left.
    together = [subprocess.Popen(words, env=environment) for _ in range(2)]
    assert [process.wait(timeout=600) for process in together] == [0, 0]
    assert set(summary_of(out)["methods"]) == {"kvpo", "null"}
