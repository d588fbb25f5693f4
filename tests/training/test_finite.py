"""Non-finite numbers stop a run at the border where they appear, and what was trained until then is kept."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvpo.app.sources.world import build_backbone
from kvpo.engine import generator
from kvpo.models.adapters import adapter_state, check_adapter
from kvpo.models.finite import NonFiniteError, first_non_finite, magnitudes
from kvpo.training import gradients
from kvpo.training import trainer as training
from kvpo.training.checkpoint import CheckpointError, load_checkpoint, save_checkpoint
from kvpo.training.held_out import evaluate_base
from kvpo.training.interrupt import StopAtOnce
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.run import Run
from kvpo.training.trainer import Trainer
from tests.tiny_world import tiny_config, toy_setup


def trainer_of(base: Path, **settings: Any) -> Trainer:
    return Trainer(toy_setup(tiny_config(base, **settings)))


def state_of(trainer: Trainer) -> tuple[dict[str, Tensor], dict[str, Any]]:
    tensors, state = trainer.tensors_and_state()
    return {name: value.clone() for name, value in tensors.items()}, state


def assert_same(one: tuple[dict[str, Tensor], Any], other: tuple[dict[str, Tensor], Any]) -> None:
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][name], other[0][name]) for name in one[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_one_bad_number_among_many_is_found(dtype: torch.dtype, bad: float) -> None:
    good = torch.linspace(-3, 2, 4099).to(dtype)
    poisoned = good.clone()
    poisoned[2049] = bad
    named = {"good": good, "none": torch.empty(0), "ids": torch.arange(3), "poisoned": poisoned}
    assert first_non_finite(named) == ("poisoned", "NaN" if math.isnan(bad) else "infinity")
    assert first_non_finite({"good": good}) is None and magnitudes([good]).tolist() == [3.0]
    assert first_non_finite({"large": torch.full((9,), torch.finfo(dtype).max, dtype=dtype)}) is None


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_bad_numbers_of_eight_bits_are_found(dtype: torch.dtype) -> None:
    numbers = torch.tensor([[1.0, -3.0]]).to(dtype)
    assert magnitudes([numbers]).tolist() == [3.0]
    numbers[0, 0] = math.nan
    assert first_non_finite({"x": numbers}) == ("x", "NaN")


def test_weights_are_refused_by_name_when_they_are_loaded(tiny_base: Path, tmp_path: Path) -> None:
    with safe_open(tiny_base, framework="pt") as file:
        metadata = file.metadata()
    tensors, name = load_file(tiny_base), "transformer.blocks.0.ffn.2.weight"
    tensors[name][1, 2] = math.nan
    save_file(tensors, tmp_path / "nan.safetensors", metadata=metadata)
    with pytest.raises(NonFiniteError, match=rf"nan\.safetensors: {name} holds NaN; the file is damaged"):
        build_backbone(tiny_config(tmp_path / "nan.safetensors"))


def test_an_adapter_is_refused_by_the_name_of_its_tensor(tiny_base: Path) -> None:
    backbone = build_backbone(tiny_config(tiny_base))
    adapter = adapter_state(backbone.weights.model)
    name = next(iter(adapter.tensors))
    adapter.tensors[name][0, 0] = math.inf
    with pytest.raises(NonFiniteError, match=f"{name} holds infinity"):
        whole = build_backbone(tiny_config(tiny_base, optim__lora_rank=0))
        check_adapter(whole.weights.model, adapter)


def test_a_checkpoint_is_refused_by_the_name_of_its_tensor(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 3, {"average.a": torch.tensor([1.0, math.nan])}, {}, architecture={})
    with pytest.raises(CheckpointError, match=r"update-000003: average\.a holds NaN"):
        load_checkpoint(path)


def test_latents_name_block_prompt_step_and_layer(tiny_base: Path) -> None:
    trainer = trainer_of(tiny_base)
    with torch.no_grad():
        trainer.setup.model.blocks[0].ffn[2].base_layer.weight[1, 2] = math.nan
    words = r"update 1: block 1 of prompt 0, 1: the latents are not finite from solver step 1 of 4 on"
    with pytest.raises(NonFiniteError, match=rf"{words}, first behind layer blocks\.0\.ffn\.2;"):
        trainer.step()


def test_latents_that_turn_bad_late_name_the_step(tiny_base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = trainer_of(tiny_base)
    third, original = trainer.setup.generator.sigmas[2], generator.StreamingGenerator.velocity

    def velocity(self: Any, x: Tensor, sigma_R: Tensor, *arguments: Any) -> Tensor:
        found = original(self, x, sigma_R, *arguments)
        return found + math.inf if float(sigma_R[0]) == pytest.approx(third) else found

    monkeypatch.setattr(generator.StreamingGenerator, "velocity", velocity)
    with pytest.raises(NonFiniteError, match="not finite from solver step 3 of 4 on; check"):
        trainer.step()


def bad_pixels(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = type(trainer.setup.backbone.codec).decode

    def one_bad(*arguments: Any) -> Tensor:
        pixels = decode(*arguments).clone()
        pixels[1, -1, 2, 0, 0] = math.nan
        return pixels

    monkeypatch.setattr(type(trainer.setup.backbone.codec), "decode", one_bad)


def bad_residuals(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    original = gradients.residual_table
    monkeypatch.setattr(gradients, "residual_table", lambda *given: original(*given) * math.inf)


def bad_gradient(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    original = training.accumulate_gradients

    def poisoned(*arguments: Any) -> Any:
        found = original(*arguments)
        list(trainer.policy.parameters.values())[3].grad[0, 0] = math.nan
        return found

    monkeypatch.setattr(training, "accumulate_gradients", poisoned)


def bad_parameters(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trainer.optimizer.step

    def overflowing() -> None:
        step()
        with torch.no_grad():
            list(trainer.policy.parameters.values())[3][0, 0] = math.inf

    monkeypatch.setattr(trainer.optimizer, "step", overflowing)


def bad_moments(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trainer.optimizer.step

    def overflowing() -> None:  # the square of a large gradient: the parameter would never move again
        step()
        list(trainer.optimizer.state.values())[3]["exp_avg_sq"][0, 0] = math.inf

    monkeypatch.setattr(trainer.optimizer, "step", overflowing)


def second_interrupt(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    step = trainer.optimizer.step

    def interrupted() -> None:
        step()
        raise KeyboardInterrupt("pressed twice")

    monkeypatch.setattr(trainer.optimizer, "step", interrupted)


def out_of_memory(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(training, "accumulate_gradients", fails)


FAILURES: dict[str, tuple[Callable[[Trainer, pytest.MonkeyPatch], None], str]] = {
    "pixels": (bad_pixels, r"update 3: decoded pixels: video 2 of 4 holds NaN"),
    "residuals": (bad_residuals, r"update 3: replayed residuals.*: prompt \d+ holds infinity"),
    "gradient": (bad_gradient, r"update 3: the gradient is not finite; lower optim\.lr = 0\.05 \(.*lora_B"),
    "parameters": (bad_parameters, r"update 3: parameters after the step: .*lora_B.* holds infinity; lower"),
    "moments": (
        bad_moments,
        r"update 3: optimiser's state after the step: .*lora_B.*exp_avg_sq holds infinity",
    ),
    "interrupt": (second_interrupt, "pressed twice"),
    "memory": (out_of_memory, "no memory left"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_an_update_that_fails_keeps_the_updates_before_it(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """Whatever fails, and however far the update had come: its second pass over the rollout fails here."""
    poison, words = FAILURES[name]
    settings = {"optim__inner_epochs": 2, "optim__updates": 5, "checkpoint__every": 9, "evaluation__every": 0}
    alone = trainer_of(tiny_base, **settings)
    alone.step(), alone.step()
    expected = state_of(alone)

    trainer = trainer_of(tiny_base, **settings)
    passes, original = [0], training.accumulate_gradients

    def counted(*arguments: Any) -> Any:
        passes[0] += 1
        if passes[0] == 12 and name not in ("pixels", "residuals"):
            poison(trainer, monkeypatch)
            return training.accumulate_gradients(*arguments)
        return original(*arguments)

    monkeypatch.setattr(training, "accumulate_gradients", counted)
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as metrics:
        base = evaluate_base(trainer.setup, trainer, trainer.setup.validation)

        def progress(stage: str, done: int, *rest: Any) -> None:
            if done == 2 and name in ("pixels", "residuals"):
                poison(trainer, monkeypatch)

        run = Run(trainer.setup, trainer, tmp_path / "checkpoints", metrics, progress, base)
        with pytest.raises((ValueError, torch.OutOfMemoryError, KeyboardInterrupt), match=words):
            run.train(lambda: False)
    assert_same(state_of(trainer), expected)
    tensors, state = load_checkpoint(tmp_path / "checkpoints" / "update-000002")
    assert_same((tensors, {key: state[key] for key in expected[1]}), expected)
    # In the same process the run can go on from there: the rollout of the failed update is still at hand.
    monkeypatch.undo()
    trainer.step(), alone.step()
    assert_same(state_of(trainer), state_of(alone))


@pytest.mark.parametrize("ends", ["at once", "disk full"])
def test_updates_that_are_lost_are_named(
    tiny_base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    ends: str,
) -> None:
    trainer = trainer_of(tiny_base, optim__updates=5, checkpoint__every=9, evaluation__every=0)
    original = training.accumulate_gradients

    def third(*arguments: Any) -> Any:
        if trainer.update == 2:
            if ends == "disk full":
                monkeypatch.setattr(run, "_save", lambda update: (_ for _ in ()).throw(OSError("disk full")))
            raise StopAtOnce if ends == "at once" else KeyboardInterrupt
        return original(*arguments)

    monkeypatch.setattr(training, "accumulate_gradients", third)
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as metrics:
        run = Run(trainer.setup, trainer, tmp_path / "checkpoints", metrics, lambda *numbers: None, {})
        with pytest.raises((StopAtOnce, OSError)):
            run.train(lambda: False)
    assert [path.name for path in (tmp_path / "checkpoints").glob("update-*")] == ["update-000000"]
    assert "lost: updates 1 to 2, made since the last checkpoint" in caplog.text


def test_a_learning_rate_that_diverges_stops_with_one_line(tiny_base: Path) -> None:
    trainer = trainer_of(tiny_base, optim__lr=1e25)
    trainer.step()
    before = state_of(trainer)
    with pytest.raises(NonFiniteError, match=r"^update 2: [^\n]*$"):
        trainer.step()
    assert_same(state_of(trainer), before)
