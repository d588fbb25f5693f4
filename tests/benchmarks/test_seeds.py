"""Seeds of every arm: what is finished is read, what is kept gives the tables, null runs go to reports."""

import importlib
import json
import shutil
from dataclasses import asdict
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import yaml

from kvpo.app.configuration import preset
from kvpo.report.null_runs import read_null

SCRIPTS = Path(__file__).resolve().parents[2] / "benchmarks"
GAINS = {"paper": 0.06, "random": 0.01}


def test_the_committed_null_runs_have_the_settings_of_the_demo() -> None:
    """`make demo` names them; after a change of the preset they are other runs, to be made again."""
    found = read_null(SCRIPTS / "results/null.json", asdict(preset("demo", {"seed": 5})))
    assert {name: len(gains) for name, gains in found.items()} == {"short": 8, "long": 8}
    assert "--null benchmarks/results/null.json" in (SCRIPTS.parent / "Makefile").read_text()


@pytest.fixture
def seeds() -> ModuleType:
    """The script, which imports what it shares with others by plain name."""
    return importlib.import_module("seeds")


def summary(arm: str, seed: int) -> dict[str, Any]:
    """What a run leaves behind."""
    gain = GAINS[arm] + seed / 1000
    found = {
        "base_mean": 0.6, "paired_gain": gain, "paired_se": 0.007, "improved_fraction": 0.8,
        "unseen_scorer_gain": gain / 2, "unseen_scorer_se": 0.005, "wrong_caption_gain": gain / 5,
        "components": {"colour": {"gain": 2 * gain}},
        "accuracy": {"return": {"base": 0.25, "aligned": 0.25 + gain, "n": 40}},
    }  # fmt: skip
    return {
        "seed": seed, "updates": 40, "wall_s": 500.0, "cpu_s": 300.0, "peak_rss_mb": 900.0, "improved": True,
        "held_out": {"short": found, "long": found}, "diversity": {},
    }  # fmt: skip


@pytest.fixture
def started(seeds: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Commands of runs that are not finished; each ends at once and leaves its summary and page."""
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> None:
        out = Path(command[command.index("--out") + 1])
        arm, seed = out.name.split("-")
        if out.exists():
            saved = yaml.safe_load((out / "command.yaml").read_text())
            if saved != command:
                raise ChildProcessError("other settings")
            return
        commands.append(command)
        out.mkdir()
        (out / "command.yaml").write_text(yaml.safe_dump(command))
        (out / "summary.json").write_text(json.dumps(summary(arm, int(seed))))
        kind = {"advantages": "random" if arm == "random" else "group"}
        saved = {"seed": int(seed), "optim": {"updates": 40}, "objective": kind}
        (out / "config.yaml").write_text(yaml.safe_dump(saved))
        (out / "report.html").touch()

    monkeypatch.setattr(seeds, "subprocess", SimpleNamespace(run=run))
    return commands


def test_finished_runs_are_read_and_tables_come_from_the_file(
    seeds: ModuleType,
    started: list[list[str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kept, null, out = tmp_path / "seeds.json", tmp_path / "null.json", tmp_path / "runs"
    words = ["seeds.py", f"--out={out}", "--seeds", "0", "1", "--arms", "paper", "random", f"--json={kept}"]
    monkeypatch.setattr("sys.argv", [*words, f"--null={null}", "--optim.lr", "0.002"])
    monkeypatch.setattr(seeds, "source_commit", lambda: "c0ffee")
    seeds.main()
    said = capsys.readouterr().out
    assert len(started) == 4 and all(command[-2:] == ["--optim.lr", "0.002"] for command in started)
    assert "| paper | short | 2 | 0.600 | +0.0605 ± 0.0007 | 0.0070 | 15.1% | +0.0121 (0.20) |" in said
    assert "| 2 of 2 |" in said, "above every null run"
    assert "| paper | long | 0.25 → 0.31 |" in said and "| random 1 | +0.011 (0.007) |" in said
    assert read_null(null, {"optim": {"updates": 40}}) == {"short": [0.01, 0.011], "long": [0.01, 0.011]}

    monkeypatch.setattr(seeds, "source_commit", lambda: "decade")
    seeds.main()
    assert capsys.readouterr().out == said and len(started) == 4
    monkeypatch.setattr("sys.argv", [*words, f"--null={null}", "--optim.lr", "0.1"])
    with pytest.raises(ChildProcessError):
        seeds.main()
    assert json.loads(kept.read_text())["settings"] == ["--optim.lr", "0.002"]

    shutil.rmtree(out / "random-1")  # killed
    monkeypatch.setattr("sys.argv", [*words, f"--null={null}", "--optim.lr", "0.002"])
    seeds.main()
    said = said.replace("Commit c0ffee.", "Commit c0ffee, decade.")
    assert len(started) == 5 and started[-1][started[-1].index("--out") + 1] == str(out / "random-1")
    assert capsys.readouterr().out == said
    monkeypatch.setattr("sys.argv", ["seeds.py", f"--tables={kept}"])
    seeds.main()
    assert capsys.readouterr().out == said and len(started) == 5


def test_a_number_is_left_out_where_a_run_lacks_it(seeds: ModuleType) -> None:
    run = summary("paper", 0)
    other = summary("paper", 1)
    other["held_out"]["long"] = {**other["held_out"]["long"], "accuracy": {}}
    assert seeds.inside({"paper": [run, other]}, "accuracy", "change").endswith("| paper | long |  |")


def test_every_arm_is_a_run_that_can_be_configured(seeds: ModuleType) -> None:
    from kvpo.app.configuration import resolve

    for words in seeds.ARMS.values():
        given = dict(zip((word.removeprefix("--") for word in words[::2]), words[1::2], strict=True))
        given = {"objective.advantages" if path == "advantages" else path: v for path, v in given.items()}
        assert resolve("demo", None, given)
