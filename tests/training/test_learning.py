"""A run that learns nothing, or does not improve on its base, says so and says why."""

import json
import logging
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.app.align import align
from kvpo.app.evaluate import evaluate
from kvpo.app.export import export
from kvpo.app.generate import generate
from kvpo.config import WORLD_NOISE_FLOOR, Config
from kvpo.method.evidence import no_credit
from kvpo.training.checkpoint import best_checkpoint, latest_checkpoint, load_checkpoint
from kvpo.training.held_out import evaluate_base
from kvpo.training.learning import why_nothing_is_learned
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.policy import MovingAverage, policy_of
from kvpo.training.run import Run, load_aligned
from kvpo.training.trainer import Trainer
from tests.tiny_world import tiny_config, toy_setup


def trainer_of(base: Path, scorer: Any = None, **settings: Any) -> Trainer:
    return Trainer(toy_setup(tiny_config(base, **settings), scorer))


@dataclass(frozen=True)
class Constant:
    """A reward that sees nothing."""

    components: tuple[str, ...] = ("constant",)

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
        return {"constant": torch.full((len(prompts),), 0.5)}


def said_by(trainer: Trainer, updates: int, caplog: pytest.LogCaptureFixture) -> list[tuple[int, str]]:
    """Warnings that nothing was learned, each with the update after which it came."""
    found = []
    for update in range(1, updates + 1):
        caplog.clear()
        with caplog.at_level("WARNING", "kvpo"):
            trainer.step()
        words = [record.getMessage() for record in caplog.records]
        found += [(update, text) for text in words if "nothing was learned" in text]
    return found


@pytest.mark.parametrize(
    ("scorer", "settings", "why"),
    [
        (
            Constant(),
            {},
            r"up to update 3: the reward \(world\) gives every member of a group the same score",
        ),
        (
            None,
            {"rewards__noise_floors": {"total": 9.0}},
            r"largest reward spread [\d.e-]+ being within the noise floor",
        ),
    ],
    ids=["constant reward", "noise floor"],
)
def test_updates_without_a_trained_group_are_told_once(
    tiny_base: Path, caplog: pytest.LogCaptureFixture, scorer: Any, settings: dict[str, Any], why: str
) -> None:
    trainer = trainer_of(tiny_base, scorer, optim__updates=5, **settings)
    ((update, text),) = said_by(trainer, 5, caplog)
    assert update == 3
    assert re.search(why, text), text


@pytest.mark.parametrize(
    ("spreads", "floors", "advantage", "value", "why"),
    [
        ((0.0, 0.0), {}, None, 1.0, "every member of a group the same score"),
        ((0.0, 2e-4), {}, None, 1.0, "spread 0.0002 .* total = " + f"{WORLD_NOISE_FLOOR:g}"),
        ((0.5, 0.25), {"total": 9.0, "coarse": 7.0}, None, 1.0, r"spread 0\.5 .* total = 9\)"),
        ((0.5, 0.25), {"coarse": 7.0}, None, 1.0, r"coarse = 7, total = " + f"{WORLD_NOISE_FLOOR:g}"),
        ((0.5, 0.25), {}, 0.0, 0.0, "all trained tensors are zero"),
        ((0.5, 0.25), {}, 0.0, 1.0, "all advantages are zero"),
        ((0.5, 0.25), {}, 1.0, 1.0, "the gradient of every trained tensor is exactly zero"),
    ],
)
def test_the_reason_is_the_first_that_holds(
    spreads: tuple[float, ...], floors: dict[str, float], advantage: float | None, value: float, why: str
) -> None:
    credits = [] if advantage is None else [replace(no_credit(2), advantages_G=torch.full((2,), advantage))]
    config = replace(Config(), rewards=replace(Config().rewards, noise_floors=floors))
    found = [{"reward_spread": spread} for spread in spreads]
    said = why_nothing_is_learned(credits, found, {"b": torch.zeros(2), "a": torch.full((2,), value)}, config)
    assert re.search(why, said), said


def test_an_adapter_of_zeros_is_told_and_has_no_coverage(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = trainer_of(tiny_base, optim__updates=4)
    with torch.no_grad():
        for value in trainer.policy.parameters.values():
            value.zero_()
    numbers = trainer.step()
    assert numbers["gradient_coverage"] == 0 == numbers["gradient_norm"] and numbers["idle_updates"] == 1
    ((update, text),) = said_by(trainer, 3, caplog)
    assert update == 2 and "all trained tensors are zero, and an adapter whose A and B are both zero" in text


def test_gradient_coverage_is_the_share_of_trained_tensors_with_a_gradient(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Only B of a fresh adapter has one: A's is multiplied by B, which is 0 until the first step."""
    trainer = trainer_of(tiny_base)
    coverage = [trainer.step()["gradient_coverage"] for _ in range(3)]
    layers = len(trainer.policy.parameters) // 2
    assert coverage[0] <= 0.5 and coverage[0] == pytest.approx(round(coverage[0] * 2 * layers) / (2 * layers))
    assert coverage[1] > coverage[0] and coverage[2] <= 1
    assert said_by(trainer, 0, caplog) == []


def test_an_adapter_that_binds_no_layer_is_refused(tiny_base: Path) -> None:
    model = toy_setup(tiny_config(tiny_base)).model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"nothing to train: the adapter binds no layer.*backbone\.lora"):
        policy_of(model)


def test_the_decay_of_the_average_warms_up() -> None:
    """A steady drift of 1 per update: by recursion with the decay written out, and far from the start."""
    value = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    average, expected = MovingAverage({"a": value}, 0.999), 0.0
    for n in range(100):
        with torch.no_grad():
            value.add_(1)
        average.update({"a": value})
        decay = min(0.999, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * (n + 1)
    assert float(average.values["a"]) == pytest.approx(expected, rel=1e-12)
    assert expected > 0.85 * 100  # without the warm-up 5 of 100
    average.updates = 10**6
    with torch.no_grad():
        value.add_(1e6)
    average.update({"a": value})
    assert float(average.values["a"]) == pytest.approx(0.999 * expected + 0.001 * (100 + 1e6), rel=1e-9)


def test_a_resumed_average_goes_on_warming_up(tiny_base: Path) -> None:
    settings = {"optim__ema_decay": 0.999, "optim__updates": 4}
    whole, first, second = (trainer_of(tiny_base, **settings) for _ in range(3))
    for _ in range(4):
        whole.step()
    for _ in range(2):
        first.step()
    second.restore(*first.tensors_and_state())
    assert second.average.updates == 2
    for _ in range(2):
        second.step()
    assert all(torch.equal(second.average.values[n], v) for n, v in whole.average.values.items())


@pytest.mark.parametrize(("decay", "alike"), [(0.9, False), (0.0, True)])
def test_validation_judges_the_moving_average(tiny_base: Path, decay: float, alike: bool) -> None:
    """Without decay these are the weights of the last update."""
    trainer = trainer_of(tiny_base, optim__ema_decay=decay)
    trainer.step()
    average = {name: value.clone() for name, value in trainer.average.values.items()}
    with trainer.sides.aligned():
        seen = {name: value.detach().clone() for name, value in trainer.policy.parameters.items()}
    assert all(torch.equal(seen[name], value) for name, value in average.items())
    assert all(torch.equal(seen[n], p) for n, p in trainer.policy.parameters.items()) == alike


def test_a_base_that_is_never_beaten_stays_the_best(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_base, optim__updates=3, evaluation__every=1)
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as metrics:
        base = evaluate_base(trainer.setup, trainer, trainer.setup.validation)
        run = Run(trainer.setup, trainer, tmp_path / "checkpoints", metrics, lambda *numbers: None, base)
        monkeypatch.setattr(run, "validate", lambda: -0.01)
        with caplog.at_level("WARNING", "kvpo"):
            assert run.train(lambda: False)
    best = best_checkpoint(tmp_path / "checkpoints")
    assert best == (tmp_path / "checkpoints" / "update-000000", 0.0) and not run.improved
    assert "no improvement: no validation beat the base" in caplog.text
    kept = sorted(path.name for path in (tmp_path / "checkpoints").glob("update-*"))
    assert kept == ["update-000000", "update-000002", "update-000003"]
    tensors, _ = load_checkpoint(best[0])
    assert all(not value.any() for name, value in tensors.items() if "average" in name and "lora_B" in name)


def test_only_the_base_is_the_best_without_a_validation(tiny_base: Path, tmp_path: Path) -> None:
    """A state that names no best checkpoint, and is of a later update, is continued as it is."""
    trainer = trainer_of(tiny_base, optim__updates=2)
    trainer.step()
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as metrics:
        base = evaluate_base(trainer.setup, trainer, trainer.setup.validation)
        run = Run(trainer.setup, trainer, tmp_path / "checkpoints", metrics, lambda *numbers: None, base)
        run.resume({"best": None, "radar": []})
        assert not run.train(lambda: True)
    assert run.best is None and latest_checkpoint(tmp_path / "checkpoints") is None


def test_every_command_knows_the_base_and_the_weights(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose best checkpoint is its base: what summary, report, evaluate, generate and export say."""
    monkeypatch.setattr(Run, "validate", lambda self: -0.01)
    config = tiny_config(
        tiny_base,
        rewards__scorers=("tests.tiny_world:toy",),
        optim__updates=2,
        stream__schedule=(1.0, 0.5),
    )
    run = tmp_path / "run"
    summary = align(config, run)
    assert summary is not None and summary["improved"] is False
    assert summary["checked"] == {"update": 0, "weights": "average", "ratio_tolerance": 1e-3}
    assert summary["checks"]["first_ratio_max_deviation"] <= 1e-3
    assert "No improvement: no validation beat the base" in (run / "report.html").read_text()
    with caplog.at_level(logging.WARNING, "kvpo"):
        numbers = evaluate(run)
    assert numbers["held_out"] == summary["held_out"] and "no improvement: no validation of" in caplog.text
    caplog.clear()
    with pytest.raises(ValueError, match="no improvement: .*; --checkpoint latest takes the trained weights"):
        export(run, tmp_path / "refused", layout="peft")
    with pytest.raises(ValueError, match="update-000000: its adapter changes nothing of what is generated"):
        export(run, tmp_path / "refused", layout="peft", checkpoint="0")
    export(run, tmp_path / "base.pt", layout="pt", checkpoint="0")

    # What was trained, averaged and raw, differs in every command.
    files = [
        export(run, tmp_path / f"{w}.pt", layout="pt", checkpoint="latest", weights=w)
        for w in ("average", "raw")
    ]
    one, other = (torch.load(file, weights_only=True)["generator"] for file in files)
    assert any(not torch.equal(one[name], other[name]) for name in one)
    gains = [evaluate(run, checkpoint="latest", weights=weights) for weights in ("raw", "average")]
    assert [numbers["weights"] for numbers in gains] == ["raw", "average"]
    assert gains[0]["held_out"] != gains[1]["held_out"]
    with pytest.raises(ValueError, match="weights: must be average or raw, got 'mean'"):
        evaluate(run, checkpoint="latest", weights="mean")
    latents = []
    for weights in ("average", "raw"):
        out = tmp_path / f"{weights}-videos"
        generate(
            tiny_config(tiny_base, stream__schedule=(1.0, 0.5)),
            out,
            run=run,
            checkpoint="latest",
            weights=weights,
        )
        latents.append((tmp_path / f"{weights}-videos/latents.safetensors").read_bytes())
    assert latents[0] != latents[1] and "no improvement" not in caplog.text
    trainer = Trainer(toy_setup(config))
    path = run / "checkpoints/update-000002"
    raw = load_aligned(toy_setup(config).backbone.weights, trainer.policy, path, "raw")
    saved, _ = load_checkpoint(run / "checkpoints/update-000002")
    assert all(torch.equal(value, saved[f"parameters.{name}"]) for name, value in raw.items())
    assert json.loads((run / "evaluation.json").read_text())["weights"] == "average"
