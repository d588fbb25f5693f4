"""Parts of a comparison: its arms and trials, its statistics, and its numbers on results made by hand."""

import json
import subprocess
from functools import partial
from pathlib import Path

import pytest
import torch

from kvpo.app.compare_commands import METHODS_COMPARED
from kvpo.app.comparison import command as comparison_command
from kvpo.app.comparison.arms import (
    CONTROLS,
    OWN,
    TRIAL_SEED,
    TrainingArm,
    chosen_arms,
    configured,
    grid,
    trials,
)
from kvpo.app.comparison.measuring import PretrainingTrainer, trainer_of
from kvpo.app.comparison.plan import MethodComparison
from kvpo.app.comparison.results import summarise
from kvpo.app.comparison.statistics import least_p, permutation_p, relabelling_p, sign_flip_p
from kvpo.app.sources import world
from kvpo.config import Config
from kvpo.method.methods import METHODS
from kvpo.report.comparison import verdict
from kvpo.training.ranks import ALONE
from kvpo.world.snippets import SnippetSettings
from tests.tiny_world import tiny_config


def test_arms_are_given_as_words_or_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "arms.yaml"
    file.write_text(
        "steep: {optim.lr: 2e-3, objective: {keep: [0, 0]}}\nwide: {method: nft, nft.beta: 0.1}\n"
    )
    arms = chosen_arms(["kvpo", "null"], ["deep:exploration.blocks=3,objective.keep=0,0", str(file)])
    assert [(arm.name, arm.method) for arm in arms] == [
        ("kvpo", "kvpo"), ("null", "kvpo"), ("deep", "kvpo"), ("steep", "kvpo"), ("wide", "nft"),
    ]  # fmt: skip
    assert arms[2].changes == {"exploration.blocks": 3, "objective.keep": [0, 0]}
    config = configured(Config(), arms[3], {"optim.lr": 5e-4, "exploration.blocks": 3}, 7)
    assert (config.optim.lr, config.objective.keep, config.exploration.blocks, config.seed) == (
        2e-3,
        (0, 0),
        3,
        7,
    )
    wide = configured(Config(), arms[4], {}, 0)
    assert wide.method == "nft" and wide.exploration.explorer == "fresh" and wide.nft.beta == 0.1


def test_every_arm_that_is_compared_unless_said_otherwise_can_run() -> None:
    arms = chosen_arms(METHODS_COMPARED.split(","), [])
    configs = {arm.name: configured(Config(), arm, {}, 3) for arm in arms}
    assert configs["best-of-n"].objective.keep == (1, 0) and configs["best-of-n"].method == "rvm"
    assert configs["null"].objective.advantages == "random"


@pytest.mark.parametrize("method", [*METHODS, "pretraining"])
def test_every_method_is_tried_equally_often_in_other_settings(method: str) -> None:
    arm = CONTROLS.get(method) or TrainingArm(method, method)
    tried = trials(Config(), arm, 5)
    configs = [configured(Config(), arm, settings, TRIAL_SEED) for settings in tried]
    assert tried[0] == {} and len(tried) == 5
    assert all(one != other for n, one in enumerate(configs) for other in configs[:n])
    assert tried == trials(Config(), arm, 5)


def test_a_method_without_a_grid_of_its_own_is_tried_in_the_shared_settings(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for method in ("nft", "self-distill"):
        monkeypatch.delitem(OWN, method)
        assert len(trials(Config(), TrainingArm(method, method), 4)) == 4


def test_the_velocity_kl_is_tried_at_none_and_around_what_a_method_starts_from() -> None:
    names = ("kvpo", "flow-grpo", "nft", "rvm")
    weights = {name: grid(Config(), name)["objective.velocity_kl"] for name in names}
    assert weights["kvpo"] == weights["flow-grpo"] == (0.0, 2.5, 10.0)
    assert weights["nft"] == weights["rvm"] == (0.0, 0.025, 0.1)


def test_relabelled_runs_count_every_way_to_deal_the_labels() -> None:
    assert relabelling_p([1.0, 2.0], [3.0, 4.0]) == pytest.approx(least_p(2)) == pytest.approx(2 / 6)
    apart = relabelling_p([1.0, 2.0, 3.0, 4.0, 5.0], [6.0, 7.0, 8.0, 9.0, 10.0])
    assert apart == pytest.approx(least_p(5)) == pytest.approx(2 / 252)
    assert relabelling_p([1.0, 4.0], [2.0, 3.0]) == 1.0
    many = relabelling_p([float(n) for n in range(12)], [n + 0.5 for n in range(12)])
    assert 0.7 < many <= 1.0  # of 2.7 million relabellings, some


def test_signs_of_prompts_are_flipped() -> None:
    assert sign_flip_p(torch.ones(4)) == pytest.approx(2 / 16, abs=0.02)
    assert sign_flip_p(torch.tensor([1.0, -1.0])) == 1.0
    assert sign_flip_p(torch.ones(40)) < 1e-3


def test_a_difference_has_to_hold_over_runs_and_over_prompts() -> None:
    generator = torch.Generator().manual_seed(0)
    noise_SN = torch.randn(5, 64, generator=generator)
    # One lucky run of each five: prompt by prompt it seems sure, run by run it is not.
    lucky = noise_SN + torch.tensor([0.0, 0.0, 0.0, 0.0, 20.0])[:, None]
    assert sign_flip_p(lucky.mean(0) - noise_SN.mean(0)) < 1e-3 < 0.3 < permutation_p(lucky, noise_SN)
    # One prompt that every run gains on: run by run it seems sure.
    peak = torch.zeros(5, 64) + torch.linspace(0, 0.01, 5)[:, None]
    assert permutation_p(peak + torch.eye(64)[0], peak) == 1.0
    assert permutation_p(noise_SN + 9, noise_SN) == pytest.approx(2 / 252)


def test_more_pretraining_trains_the_same_parameters_without_a_reward(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(world, "SnippetSettings", partial(SnippetSettings, videos=1))
    world.pretraining_batches.cache_clear()
    trainer = trainer_of(CONTROLS["pretraining"], tiny_config(tiny_base, optim__lr=1e-2), ALONE)
    assert isinstance(trainer, PretrainingTrainer) and not trainer.setup.validation
    before = {name: value.detach().clone() for name, value in trainer.policy.parameters.items()}
    found = [trainer.step() for _ in range(2)]
    assert trainer.update == 2 and trainer.at_boundary()
    assert all(one["loss"] > 0 and one["gradient_norm"] > 0 for one in found)
    assert all(not torch.equal(value, before[name]) for name, value in trainer.policy.parameters.items())
    assert any(not torch.equal(value, before[name]) for name, value in trainer.average.values.items())
    world.pretraining_batches.cache_clear()


def test_the_best_trial_is_taken_and_a_diverged_one_passed_over(tmp_path: Path) -> None:
    comparison = MethodComparison(Config(), [TrainingArm("kvpo", "kvpo")], 1, 1.0, 3, tmp_path)
    (tmp_path / "pieces").mkdir()
    tried = comparison.trials_of("kvpo")
    for gains, chosen in (((0.1, 0.3, 0.2), 1), ((None, 0.1, 0.2), 2), ((None, None, None), 0)):
        for n, gain in enumerate(gains):
            comparison.result_file(f"trial-kvpo-{n}").write_text(json.dumps({"gain": gain}))
        assert comparison.tuned("kvpo") == tried[chosen]


def test_the_commit_is_that_of_a_checkout_of_this_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An installed package inside somebody else's repository has none."""
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    installed = tmp_path / "venv" / "command.py"
    installed.parent.mkdir()
    installed.touch()
    monkeypatch.setattr(comparison_command, "__file__", str(installed))
    assert comparison_command.source_commit() == "unknown"
    subprocess.run([*git, "add", "-f", str(installed)], check=True)
    assert len(comparison_command.source_commit().rstrip("+")) == 40


@pytest.mark.parametrize("kind", ["short", "long"])
def test_the_final_stories_are_in_no_test_set_however_large(kind: str) -> None:
    """Of 400 short ones two would be where only the first 256 test stories are left out."""
    final = {prompt.segments for prompt in world.final_prompts(400)[kind].prompts}
    tested = {prompt.segments for prompt in world.world_prompts("test", 400, 202, 0)[kind]}
    assert len(final) == 400 and not final & tested


def scores(totals: list[float], unseen: float = 0.0) -> dict:
    halves = [value / 2 for value in totals]
    return {"totals": totals, "components": {"a": halves, "b": halves}, "unseen": [unseen] * len(totals)}


def test_the_numbers_of_arms_are_those_of_their_pieces(tmp_path: Path) -> None:
    arms = [
        TrainingArm("kvpo", "kvpo"),
        CONTROLS["null"],
        TrainingArm("deep", "kvpo", {"stream.step_rule": "renoise"}),
    ]
    comparison = MethodComparison(Config(), arms, 2, 10.0, 0, tmp_path)
    (tmp_path / "pieces").mkdir()
    comparison.plan_file.write_text('{"commit": "abc"}')
    base, renoised = [0.0, 0.0, 0.2, 0.2], [0.1, 0.1, 0.1, 0.1]
    pieces: dict[str, dict] = {
        "base-final": {"results": {"short": scores(base), "diversity": {}}, "base_sha256": "def"},
        "base-step_rule-final": {"results": {"short": scores(renoised), "diversity": {}}},
        "best-of-8": {"results": {"short": scores([0.5, 0.3], 0.2)}},
    }
    gains = {"kvpo": (0.1, 0.3), "null": (0.0, 0.1), "deep": (0.2, 0.2)}
    for arm, own in gains.items():
        before = renoised if arm == "deep" else base
        for seed, gain in enumerate(own):
            pieces[f"run-{arm}-{seed}"] = {
                "results": {"short": scores([value + gain for value in before], 0.1), "diversity": {}},
                "base": "base-step_rule" if arm == "deep" else "base",
                "settings": {}, "cpu_s": 9.0, "updates": 3, "cpu_s_per_update": 3.0,
            }  # fmt: skip
    for name, content in pieces.items():
        comparison.result_file(name).write_text(json.dumps(content))
    summary = summarise(comparison, ["best-of-8"])
    kvpo, null, deep = (summary["methods"][arm]["short"] for arm in gains)
    own, chance = (torch.tensor(gains[arm])[:, None].expand(2, 4) for arm in ("kvpo", "null"))
    assert kvpo["p_against_null"] == pytest.approx(permutation_p(own, chance))
    assert kvpo["gains"] == pytest.approx([0.1, 0.3]) and kvpo["mean"] == pytest.approx(0.2)
    assert kvpo["std"] == pytest.approx(0.02**0.5) and kvpo["components"]["a"] == pytest.approx(0.1)
    assert kvpo["unseen"] == pytest.approx([0.1, 0.1]) and kvpo["p_against_kvpo"] is None
    # The best of eight gains 0.4 on the two prompts that it was measured on.
    assert summary["floors"]["best-of-8"]["short"]["gain"] == pytest.approx(0.4)
    assert kvpo["gap_closed"] == pytest.approx(0.2 / 0.4)
    # The ceiling is of the base as it is deployed, so of another one's gap nothing is known.
    assert deep["gap_closed"] is None and deep["mean"] == pytest.approx(0.2)
    assert summary["methods"]["deep"]["base"] == "base-step_rule"
    assert [own["short"] for own in summary["bases"].values()] == pytest.approx([0.1, 0.1])
    assert kvpo["above_every_null"] == 1 and "above_every_null" not in null
    assert deep["mean"] == pytest.approx(0.2) and deep["difference_to_kvpo"] == pytest.approx(0, abs=1e-9)
    assert null["difference_to_kvpo"] == pytest.approx(-0.15)
    assert (summary["commit"], summary["base_sha256"]) == ("abc", "def")
    comparison.result_file("run-null-1").write_text(json.dumps(pieces["run-null-1"] | {"commit": "abd"}))
    assert summarise(comparison, ["best-of-8"])["commit"] == "abc, abd"
    # What is left of an arm that failed under one seed is no sample of its runs.
    diverged = {"base": "base", "settings": {}, "failed": "update 2: the gradient is not finite"}
    comparison.result_file("run-deep-1").write_text(json.dumps(diverged))
    for seed in range(2):
        comparison.result_file(f"run-null-{seed}").write_text(json.dumps(diverged))
    summary = summarise(comparison, ["best-of-8"])
    assert {arm: list(of_seeds) for arm, of_seeds in summary["failed"].items()} == {
        "null": ["0", "1"],
        "deep": ["1"],
    }
    deep = summary["methods"]["deep"]["short"]
    assert "null" not in summary["methods"] and deep["p_against_kvpo"] is None
    comparison.result_file("run-null-0").write_text(json.dumps(pieces["run-null-0"]))
    kept = summarise(comparison, ["best-of-8"])["methods"]
    assert kept["kvpo"]["short"]["p_against_null"] is None is kept["deep"]["short"]["p_against_null"]
    assert kept["null"]["short"]["p_against_kvpo"] is None
    assert deep["gains"] == pytest.approx([0.2]) and deep["difference_to_kvpo"] == pytest.approx(0, abs=1e-9)
    assert any("deep: 1 of 2 runs ended with numbers that are not finite" in n for n in verdict(summary)[1])
    for arm in gains:
        for seed in range(2):
            comparison.result_file(f"run-{arm}-{seed}").write_text(json.dumps(diverged))
    with pytest.raises(ValueError, match="no run of .* ended with finite numbers.*update 2: the gradient"):
        summarise(comparison, ["best-of-8"])
    for damage in ("{", "[]", "{}"):
        comparison.result_file("run-null-1").write_text(damage)
        with pytest.raises(ValueError, match=r"run-null-1\.json.*; remove it, and the same command makes it"):
            summarise(comparison, ["best-of-8"])


def numbers(gains: list[float], p: float | None, difference: float | None) -> dict:
    return {
        "gains": gains, "mean": sum(gains) / len(gains), "std": 0.01, "standard_errors": [0.02] * len(gains),
        "p_against_kvpo": p, "difference_to_kvpo": difference, "p_against_null": 0.5, "above_every_null": 1,
    }  # fmt: skip


def test_the_verdict_names_sure_differences_alone_and_gives_both_errors() -> None:
    kinds = ("short", "long")
    methods = {
        "kvpo": {kind: numbers([0.1] * 5, None, None) for kind in kinds},
        "nft": {"short": numbers([0.05] * 5, 0.009, -0.05), "long": numbers([0.2] * 5, 0.02, 0.1)},
        "null": {kind: numbers([0.0] * 5, 0.009, -0.1) for kind in kinds},
    }
    summary = {
        "seeds": list(range(5)),
        "methods": methods,
        "least_p": 2 / 252,
        "failed": {},
        "prompts": dict.fromkeys(kinds, 9),
    }
    sentence, notes = verdict(summary)
    assert sentence.split(": ")[1] == (
        "on short videos kvpo is above nft, null, below none; on long videos kvpo is above null, below none."
    )
    assert "± 0.010 over seeds, ± 0.020 over the prompts of a run; 5 runs with advantages dealt" in notes[0]
    assert "1 of 5 runs lie above all" in notes[0]
    assert notes[-1].startswith("4 differences were tested") and "about 0.04 would" in notes[-1]
    failed = {"null": {"3": "not finite"}, "kvpo": dict.fromkeys("01234", "not finite")}
    some = {"kvpo": {kind: methods["kvpo"][kind] | {"p_against_null": None} for kind in kinds}}
    _, notes = verdict(summary | {"failed": {"null": failed["null"]}, "methods": methods | some})
    assert notes[0].startswith("null: 1 of 5 runs") and notes[1].endswith(
        "1 of 5 runs lie above all of them."
    )
    without = {arm: own for arm, own in methods.items() if arm != "kvpo"}
    sentence, _ = verdict(summary | {"failed": failed, "methods": without})
    assert sentence == "kvpo has no run that ended, so nothing is compared with it."
    few, notes = verdict(summary | {"seeds": [0, 1], "least_p": 1 / 3})
    assert few == "Two seeds decide nothing: this is a rehearsal." and "p below 0.33" in notes[0]
