"""The same code on a CUDA device: it agrees with the CPU, keeps what is exact exact, and runs end to end."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.app.build import build_setup
from kvpo.app.cli import main
from kvpo.app.configuration import preset
from kvpo.config import Config
from kvpo.models.quantised import QuantisedLinear
from kvpo.rewards.service.messages import eight_bit
from kvpo.training.collection import LARGEST_GAP, credits_of, explore, lessons_of, policy_gap
from kvpo.training.gradients import accumulate_gradients
from kvpo.training.trainer import Trainer
from tests.tiny_wan import tiny_flags, tiny_wan

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PRESETS = ("longlive-1.3b", "memflow-1.3b", "self-forcing-1.3b")
ROUNDING = 1e-4
"""Relative bound on float32 results whose sums are taken in another order."""


def run(*words: object) -> None:
    assert main([str(word) for word in words]) == 0


def metrics_of(directory: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if line["kind"] == "update"]


def difference(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value; 0 where both are 0."""
    apart = float((found.cpu() - expected.cpu()).abs().max())
    return apart and apart / float(expected.abs().max())


def explored(config: Config) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Latents and scores of a rollout, and the gradient that fixed advantages give.

    The tiny generator's own scores differ by less than rounding, so that their advantages would be noise.
    """
    trainer = Trainer(build_setup(config))
    ((rollout, scores),) = explore(trainer.setup, [0])
    credits = credits_of(trainer.setup, 0, dict(enumerate(scores)), None)
    lessons = lessons_of(trainer.setup, trainer.learner, 0, rollout, credits).values()
    advantages = torch.tensor([1.0, -0.5, 0.25])
    trained = [replace(item, credit=replace(item.credit, advantages_G=advantages)) for item in lessons]
    with torch.no_grad():  # a fresh adapter's second half is zero, and so is the gradient of its first half
        draws = torch.Generator().manual_seed(0)
        for parameter in trainer.policy.parameters.values():
            parameter += 0.02 * torch.randn(parameter.shape, generator=draws).to(parameter.device)
    for lesson in trained:
        accumulate_gradients(trainer.learner, lesson, None, len(trained))
    gradients = {name: p.grad.cpu() for name, p in trainer.policy.parameters.items()}
    return rollout.groups[0].clean_MTCHW.cpu(), scores[0].local_KM, gradients


@pytest.mark.parametrize("name", PRESETS)
def test_float32_agrees_with_the_cpu(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # on by default: ten bits of mantissa
    changes = {"optim__updates": 1, "segments": 1 if name == "self-forcing-1.3b" else 2}
    latents, scores, gradients = explored(tiny_wan(name, tmp_path, **changes))
    on_cuda = explored(tiny_wan(name, tmp_path, device="cuda", **changes))
    assert difference(on_cuda[0], latents) < ROUNDING
    assert difference(on_cuda[1], scores) < ROUNDING
    largest = max(float(gradient.abs().max()) for gradient in gradients.values())
    assert largest > 0
    for key, gradient in gradients.items():
        assert float((on_cuda[2][key] - gradient).abs().max()) < 1e-3 * largest, key


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", ["longlive-1.3b", "memflow-1.3b"])
def test_what_is_exact_is_exact_in_bfloat16(name: str, compiled: bool, tmp_path: Path) -> None:
    precision = {"optim__autocast": "bfloat16", "optim__checkpointing": True, "optim__compile": compiled}
    config = tiny_wan(name, tmp_path, device="cuda", segments=2, **precision)
    numbers = Trainer(build_setup(config)).step()
    assert numbers["ratio_deviation"] == 0.0
    assert numbers["gradient_norm"] > 0


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_a_run_from_files_to_files(autocast: str, tmp_path: Path) -> None:
    changes = {"device": "cuda", "optim__autocast": autocast, "backbone__offload": autocast == "bfloat16"}
    flags = tiny_flags("longlive-1.3b", tmp_path, segments=2, **changes)
    run("align", *flags, "--out", tmp_path / "run")
    updates = metrics_of(tmp_path / "run")
    assert len(updates) == 2 and all(line["device_peak_gb"] > 0 for line in updates)
    assert all(line["ratio_deviation"] == 0.0 for line in updates)
    run("generate", "--run", tmp_path / "run", "--out", tmp_path / "videos")
    assert list((tmp_path / "videos").glob("**/*.mp4"))
    run("export", tmp_path / "run", "--out", tmp_path / "exported")


@pytest.mark.parametrize("precision", ["int8", "fp8"])
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_rollouts_of_eight_bits_stay_near_the_policy(precision: str, autocast: str) -> None:
    few = {"optim.prompts_per_update": 1, "exploration.branches": 4, "device": "cuda"}
    config = preset("demo", {"optim.rollout_precision": precision, "optim.autocast": autocast, **few})
    layer = torch.nn.Linear(256, 512, device="cuda")
    made, x = QuantisedLinear(layer, precision), torch.randn(3, 50, 256, device="cuda")
    with torch.no_grad(), torch.autocast("cuda", torch.bfloat16, enabled=autocast == "bfloat16"):
        assert made(x).dtype == layer(x).dtype
        assert difference(made(x).float(), layer(x).float()) < 0.1
    setup = build_setup(config)
    ((rollout, _),) = explore(setup, [0])
    assert 0 < policy_gap(setup.generator, rollout.groups[0]) < LARGEST_GAP


def test_the_demo_aligns_and_resumes(tmp_path: Path) -> None:
    few = ["--evaluation.validation_prompts", 2, "--evaluation.test_prompts", 2,
           "--optim.prompts_per_update", 2]  # fmt: skip
    out = tmp_path / "run"
    run("align", "--device", "cuda", "--optim.updates", 2, *few, "--out", out)
    run("align", "--resume", "--optim.updates", 3, "--out", out)
    assert [line["update"] for line in metrics_of(out)] == [1, 2, 3]
    assert (out / "report.html").is_file()


def test_eight_bits_are_those_of_the_cpu() -> None:
    video = torch.rand(2, 3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert torch.equal(eight_bit(video.cuda()).cpu(), eight_bit(video))
