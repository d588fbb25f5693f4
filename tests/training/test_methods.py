"""Every method end to end on the tiny generator: it learns what is rewarded, and resumes bit for bit."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.method.methods import METHODS
from kvpo.prompts import VideoPrompt
from kvpo.training.collection import credits_of, explore, lessons_of
from kvpo.training.evaluation import PairedGain, evaluate_policy, paired_gain
from kvpo.training.gradients import accumulate_gradients
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer
from tests.tiny_world import tiny_config, toy_setup
from tests.training.test_resume import ToyRun

SEEDS = range(3)
UPDATES = 10
FREE: dict[str, Any] = {"objective__velocity_kl": 0.0, "optim__updates": UPDATES}
LEARNS: dict[str, dict[str, Any]] = {
    "kvpo": {**FREE, "objective__velocity_kl": 20.0, "exploration__branches": 6, "optim__lr": 0.03},
    "latent-distance": {
        **FREE, "objective__velocity_kl": 5.0, "exploration__branches": 6, "optim__lr": 0.03,
    },
    "flow-grpo": {**FREE, "exploration__branches": 12, "optim__lr": 0.05},
    "cm-grpo": {**FREE, "exploration__branches": 32, "objective__grad_steps": 1, "optim__lr": 0.03},
    "nft": {**FREE, "exploration__branches": 6, "optim__lr": 0.03},
    "rvm": {**FREE, "exploration__branches": 6, "optim__lr": 0.03},
}  # fmt: skip
"""Settings with which ten updates are enough for redness alone to rise."""


class LatentColours:
    """The first three channels of a latent frame as its colours: what is rewarded is plain to see."""

    frames_per_latent = 1
    frames_per_second = 8.0

    def decode(self, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
        return (0.5 + latents_BTCHW[:, :, :3] / 4).clamp(0, 1)


@pytest.fixture(scope="module")
def red(tiny_base: Path) -> Callable[..., Trainer]:
    """Trainers that are rewarded for redness and for nothing else."""

    def trainer(method: str, **settings: Any) -> Trainer:
        setup = toy_setup(tiny_config(tiny_base, method=method, evaluation__test_prompts=8, **settings))
        judges = replace(setup.judges, weights_K=torch.tensor([1.0, 0.0]))
        backbone = replace(setup.backbone, codec=LatentColours())
        return Trainer(replace(setup, judges=judges, backbone=backbone))

    return trainer


def redness(setup: Setup) -> Tensor:
    """Redness [N] of the held-out videos on their fixed tape."""
    prompts = setup.test["short"]
    with torch.no_grad():
        return evaluate_policy(setup.backbone, prompts, setup.evaluation_tape(), setup.judges).components_KN[
            0
        ]


def gain_of(trainer: Trainer) -> PairedGain:
    before = redness(trainer.setup)
    for _ in range(UPDATES):
        trainer.step()
    return paired_gain(before, redness(trainer.setup))


@pytest.mark.parametrize(
    "method",
    [name if name == "kvpo" else pytest.param(name, marks=pytest.mark.slow) for name in LEARNS],
)
def test_what_is_rewarded_rises_and_chance_does_not(red: Callable[..., Trainer], method: str) -> None:
    """Held-out videos share one policy, so chance shows between seeds, not between videos."""
    gains = {
        advantages: [
            gain_of(red(method, seed=seed, objective__advantages=advantages, **LEARNS[method]))
            for seed in SEEDS
        ]
        for advantages in ("group", "random")
    }
    assert all(gain.mean > 3 * gain.standard_error for gain in gains["group"])
    rewarded, dealt = (torch.tensor([gain.mean for gain in own]) for own in gains.values())
    nothing = torch.zeros(len(SEEDS))
    chance, learned, more = (
        paired_gain(*pair) for pair in ((nothing, dealt), (nothing, rewarded), (dealt, rewarded))
    )
    assert chance.mean <= 3 * chance.standard_error
    assert learned.mean > 3 * learned.standard_error and more.mean > 3 * more.standard_error


def test_the_best_branch_alone_is_imitated(red: Callable[..., Trainer]) -> None:
    trainer = red("rvm", objective__keep=(1, 0), **{**LEARNS["rvm"], "exploration__branches": 4})
    parameters = trainer.learner.policy.parameters
    before = {name: value.detach().clone() for name, value in parameters.items()}
    metrics = trainer.step()
    assert metrics["skipped_fraction"] < 1 and metrics["gradient_norm"] > 0
    assert any(not torch.equal(value, parameters[name]) for name, value in before.items())


def test_self_distillation_comes_closer_to_its_teacher(red: Callable[..., Trainer]) -> None:
    """On forks that it never trained on."""
    pages = {"exploration__recent": 0, "exploration__routed": 3, "exploration__branches": 6}
    trainer = red("self-distill", optim__lr=0.03, **pages, **FREE)

    def losses() -> Tensor:
        found = []
        for update in range(100, 104):
            ((rollout, scores),) = explore(trainer.setup, [update])
            credits = credits_of(trainer.setup, update, dict(enumerate(scores)), None)
            lessons = lessons_of(trainer.setup, trainer.learner, update, rollout, credits).values()
            found += [accumulate_gradients(trainer.learner, lesson, None, 1)[0] for lesson in lessons]
        trainer.optimizer.zero_grad(set_to_none=True)
        return torch.tensor([metrics["loss"] for metrics in found])

    before = losses()
    for _ in range(UPDATES):
        trainer.step()
    fall = paired_gain(losses(), before)
    assert fall.mean > 3 * fall.standard_error


def test_every_method_is_seen_to_learn() -> None:
    assert {*LEARNS, "self-distill"} == set(METHODS)


RATIO = {"optim__inner_epochs": 2, "optim__rollouts_per_refresh": 2}
RESUMED: dict[str, dict[str, Any]] = {
    **{name: {"method": name, **RATIO} for name in METHODS},
    "nft on the average": {"method": "nft", "nft__old": "average", "nft__selective_kl": 0.5, **RATIO},
    "distances of neighbours": {"method": "latent-distance", "exploration__explorer": "neighbour", **RATIO},
}


@pytest.mark.parametrize("name", RESUMED)
def test_stopped_after_any_update_every_method_ends_the_same(
    tiny_base: Path, tmp_path: Path, name: str
) -> None:
    settings = {"optim__updates": 5, "evaluation__every": 0, **RESUMED[name]}
    whole, parts = (ToyRun(tiny_base, tmp_path / part, **settings) for part in ("whole", "parts"))
    for run in (whole, parts):
        run.directory.mkdir()
    assert whole.go()
    stops = 0
    while not parts.go(stop_after=1):
        stops += 1
    assert stops == 3, "with a refresh at every second of five updates; the last one is heard, too"
    assert parts.result() == whole.result()


@dataclass(frozen=True)
class Acts:
    """Videos of one prompt, or of three that fall inside and after a window."""

    count: int

    def __call__(self, update: int) -> list[VideoPrompt]:
        segments = ("a red circle", "a blue one", "nothing at all")[: self.count]
        switches = (9, 15)[: self.count - 1]
        return [VideoPrompt(2 * update + n, segments, switches, 27) for n in range(2)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("acts", [1, 3])
def test_every_method_trains_on_videos_of_one_prompt_and_of_several(
    red: Callable[..., Trainer], method: str, acts: int
) -> None:
    trainer = red(method, optim__inner_epochs=2)
    trainer = Trainer(replace(trainer.setup, training_prompts=Acts(acts)))
    before = {name: value.detach().clone() for name, value in trainer.policy.parameters.items()}
    numbers = trainer.step()
    assert numbers["gradient_norm"] > 0 and numbers["gradient_coverage"] > 0
    assert set(METHODS[method].metrics) <= set(numbers)
    assert numbers["velocity_kl"] > 0, "the second pass sees the first one's step"
    if "ratio_deviation" in METHODS[method].metrics:
        assert numbers["ratio_deviation"] > 0
    assert any(not torch.equal(before[name], value) for name, value in trainer.policy.parameters.items())
