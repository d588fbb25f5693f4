import json
import math
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.app.named_rewards import UserReward
from kvpo.engine.rollout import Rollout
from kvpo.prompts import VideoPrompt
from kvpo.training.checks import first_ratio_max_deviation, ratio_tolerance
from kvpo.training.collection import explore, plan_rollout
from kvpo.training.metrics_log import MetricsLog
from kvpo.training.run import Run
from kvpo.training.trainer import Trainer, learning_rate_factor
from tests.metrics import read_metrics
from tests.tiny_world import ToyScorer, tiny_config, toy_setup


def trainer_of(base: Path, scorer: Any = None, **settings: Any) -> Trainer:
    return Trainer(toy_setup(tiny_config(base, **settings), scorer))


def snapshot(trainer: Trainer) -> dict[str, Tensor]:
    tensors, _ = trainer.tensors_and_state()
    return {name: value.clone() for name, value in tensors.items()}


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


RANK = {"lora": 2, "full": 0}


@pytest.mark.parametrize("train", ["lora", "full"])
def test_an_update_trains_and_the_average_follows(tiny_base: Path, train: str) -> None:
    trainer = trainer_of(tiny_base, optim__lora_rank=RANK[train], optim__ema_decay=0.75)
    frozen = {n: p.clone() for n, p in trainer.setup.model.named_parameters() if not p.requires_grad}
    assert trainer.sharing is trainer.setup.ranks
    before = snapshot(trainer)
    numbers = trainer.step()
    after = snapshot(trainer)
    assert numbers["learning_rate"] == trainer.setup.config.optim.lr * 0.2
    assert numbers["ratio_deviation"] == 0.0 and numbers["velocity_kl"] == 0.0
    forks = numbers.pop("forks")
    planned = plan_rollout(trainer.setup, 0)
    assert sum(forks.values()) == 2 and {str(fork.frame) for fork in planned.forks} == set(forks)
    assert numbers["gradient_norm"] > 0 and all(map(math.isfinite, numbers.values()))
    for name in trainer.policy.parameters:
        old, new = before[f"parameters.{name}"], after[f"parameters.{name}"]
        torch.testing.assert_close(after[f"average.{name}"], 0.1 * old + 0.9 * new)  # its decay warms up
    assert any(not torch.equal(before[f"parameters.{n}"], after[f"parameters.{n}"])
               for n in trainer.policy.parameters)  # fmt: skip
    for name, value in trainer.setup.model.named_parameters():
        if name in frozen:
            assert torch.equal(value, frozen[name]), name
    moved = trainer.step()  # from the start; each rollout is by the policy that is trained on it
    assert moved["velocity_kl"] > 0 and moved["ratio_mean"] == 1.0


def test_the_loss_falls_where_the_update_went(tiny_base: Path) -> None:
    """A second pass over the same rollout finds better branches more likely: the surrogate has improved."""
    small = 2e-3  # of a longer step the first order says little
    one = trainer_of(tiny_base, optim__lr=small, optim__inner_epochs=1).step()
    two = trainer_of(tiny_base, optim__lr=small, optim__inner_epochs=2).step()
    assert one["ratio_deviation"] == 0.0 and two["ratio_deviation"] > 0.0
    assert abs(one["policy_loss"]) < 1e-6  # centred advantages at ratio 1
    assert two["policy_loss"] < -1e-4


def test_rollouts_of_one_policy_are_on_policy_only_at_first(tiny_base: Path) -> None:
    trainer = trainer_of(tiny_base, optim__rollouts_per_refresh=2, optim__updates=4)
    boundaries, deviations = [], []
    for _ in range(4):
        deviations.append(trainer.step()["ratio_deviation"] > 0)
        boundaries.append(trainer.at_boundary())
    assert deviations == [False, True, False, True]
    assert boundaries == [False, True, False, True]


def test_a_run_made_longer_stays_off_policy_where_it_is(tiny_base: Path) -> None:
    """Three updates with two rollouts per refresh leave the fourth on a rollout of its own."""
    short = trainer_of(tiny_base, optim__rollouts_per_refresh=2, optim__updates=3)
    for _ in range(3):
        short.step()
    assert short.at_boundary()
    longer = trainer_of(tiny_base, optim__rollouts_per_refresh=2, optim__updates=6)
    longer.restore(*short.tensors_and_state())
    assert [longer.step()["ratio_deviation"] > 0 for _ in range(3)] == [False, True, False]


@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_restored_trainer_holds_every_number_that_was_saved(tiny_base: Path, train: str) -> None:
    """Each tensor is another one than in the trainer that is restored, and so is each count."""
    settings = {"optim__lora_rank": RANK[train], "optim__inner_epochs": 1}
    trained, fresh = trainer_of(tiny_base, **settings), trainer_of(tiny_base, **settings)
    trained.step()
    tensors, state = trained.tensors_and_state()
    other = {name: value + 0.25 for name, value in tensors.items()}
    state |= {"update": 7, "averaged": 5, "idle": 2}
    fresh.restore(other, state)
    found, counts = fresh.tensors_and_state()
    assert equal(found, other) and counts == state
    assert any(name.startswith("starting.") for name in found) == (train == "full")


def test_the_parameters_follow_adamw_with_the_settings(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the update rule written out: warm-up, clipping of the joint norm, moments, decoupled decay."""
    constants = {"WARMUP_UPDATES": 2, "BETAS": (0.5, 0.7), "WEIGHT_DECAY": 0.3, "GRADIENT_NORM": 0.25}
    for constant, value in constants.items():
        monkeypatch.setattr(f"kvpo.training.trainer.{constant}", value)
    trainer = trainer_of(tiny_base, optim__lr=0.1, optim__prompts_per_update=1)
    parameters = trainer.policy.parameters
    draws = torch.Generator().manual_seed(3)
    given: list[dict[str, Tensor]] = []

    def known(*arguments: Any) -> Any:
        scale = [1.0, 1e-4, 1.0][len(given)]  # clipped, small enough as it is, clipped
        given.append({name: scale * torch.randn(p.shape, generator=draws) for name, p in parameters.items()})
        for name, value in parameters.items():
            assert value.grad is None
            value.grad = given[-1][name].clone()
        return dict.fromkeys(trainer.learner.method.metrics, 0.0), 0.0

    monkeypatch.setattr("kvpo.training.trainer.accumulate_gradients", known)
    expected = {name: value.detach().double() for name, value in parameters.items()}
    first = {name: torch.zeros_like(value) for name, value in expected.items()}
    second = {name: torch.zeros_like(value) for name, value in expected.items()}
    for update, rate in enumerate((0.05, 0.1, 0.1), start=1):
        numbers = trainer.step()
        norm = sum(float(value.double().square().sum()) for value in given[-1].values()) ** 0.5
        assert numbers["gradient_norm"] == pytest.approx(norm)
        for name, value in expected.items():
            gradient = given[-1][name].double() * min(1.0, 0.25 / norm)
            first[name] = 0.5 * first[name] + 0.5 * gradient
            second[name] = 0.7 * second[name] + 0.3 * gradient.square()
            mean, square = first[name] / (1 - 0.5**update), second[name] / (1 - 0.7**update)
            expected[name] = (1 - rate * 0.3) * value - rate * mean / (square.sqrt() + 1e-8)
            torch.testing.assert_close(parameters[name].double(), expected[name], rtol=1e-4, atol=1e-5)


def test_warm_up_trains_from_the_first_update() -> None:
    assert [learning_rate_factor(n) for n in range(7)] == [0.2, 0.4, 0.6, 0.8, 1, 1, 1]


@dataclass(frozen=True)
class Flat:
    """All clips score the same, except those of the prompts with an odd number."""

    components: tuple[str, ...] = ("flat",)

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
        odd = torch.tensor([float(any(c in prompt for c in "13579")) for prompt in prompts])
        return {"flat": 0.5 + odd * ToyScorer()(video_BTCHW, prompts)["redness"]}


def test_groups_of_noise_are_skipped_and_counted(tiny_base: Path) -> None:
    trainer = trainer_of(tiny_base, Flat(), optim__prompts_per_update=3)
    trainer.collect()
    (item,) = trainer.collected
    assert [lesson.root.prompt.id for lesson in item.lessons.values()] == [1]
    assert [found["reward_spread"] > 0 for found in item.found] == [False, True, False]
    ((rollout, _),) = explore(trainer.setup, [0])
    for group, found in zip(rollout.groups, item.found, strict=True):
        *branches, anchor = group.clean_MTCHW[:, : group.window_frames]
        far = [(branch - anchor).square().mean().sqrt() for branch in branches]
        apart = [(a - b).square().mean().sqrt() for a, b in combinations(branches, 2)]
        assert found["anchor_distance"] == pytest.approx(float(torch.stack(far).mean()), rel=1e-4)
        assert found["branch_distance"] == pytest.approx(float(torch.stack(apart).mean()), rel=1e-4)
    before = snapshot(trainer)
    assert trainer.step()["skipped_fraction"] == pytest.approx(2 / 3)
    assert not equal(before, snapshot(trainer))


def test_an_update_of_noise_changes_nothing_and_writes_valid_metrics(tiny_base: Path, tmp_path: Path) -> None:
    trainer = trainer_of(tiny_base, rewards__noise_floors={"total": 1e9})
    with torch.no_grad():  # parameters away from their average, so that a moving average would move
        for value in trainer.policy.parameters.values():
            value.add_(0.01)
    before = snapshot(trainer)
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as metrics:
        for _ in range(2):
            numbers = trainer.step()
            metrics.write(trainer.update, {"kind": "update", **numbers})
    assert equal(before, snapshot(trainer)) and trainer.update == 2
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["skipped_fraction"] for record in records] == [1.0, 1.0]
    assert all(record["loss"] is None and record["gradient_norm"] == 0 for record in records)
    assert all(record["velocity_kl"] is None for record in records), "nothing was measured"
    assert all(math.isfinite(record["reward_mean"]) for record in records)


def test_shuffled_advantages_are_the_same_rollouts_with_the_same_advantages(tiny_base: Path) -> None:
    plain = trainer_of(tiny_base, exploration__branches=4)
    shuffled = trainer_of(tiny_base, exploration__branches=4, objective__advantages="random")
    expected, found, again = [], [], []
    for trainer, result in ((plain, expected), (shuffled, found), (shuffled, again)):
        trainer.collect()
        result += [credit.all_advantages_G for credit in trainer.collected.pop().credits.values()]
    assert all(map(torch.equal, found, again))
    assert not all(map(torch.equal, found, expected))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.sort().values, other.sort().values)


def test_a_gradient_that_is_not_finite_stops_before_the_parameters_change(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = trainer_of(tiny_base)

    def poisoned(*arguments: Any) -> Any:
        for value in trainer.policy.parameters.values():
            value.grad = torch.full_like(value, math.nan)
        return dict.fromkeys(trainer.learner.method.metrics, 0.0), 0.0

    monkeypatch.setattr("kvpo.training.trainer.accumulate_gradients", poisoned)
    before = snapshot(trainer)
    with pytest.raises(ValueError, match=r"update 1: the gradient is not finite; lower optim\.lr"):
        trainer.step()
    assert equal(before, snapshot(trainer))


def test_the_velocity_kl_is_that_of_the_groups_that_measure_it(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer, drifts = trainer_of(tiny_base), iter([math.nan, 0.5])

    def known(*arguments: Any) -> Any:
        for value in trainer.policy.parameters.values():
            value.grad = torch.zeros_like(value)
        return dict.fromkeys(trainer.learner.method.metrics, 0.0), next(drifts)

    monkeypatch.setattr("kvpo.training.trainer.accumulate_gradients", known)
    assert trainer.step()["velocity_kl"] == 0.5


@pytest.mark.parametrize("when", ["average", "release"])
def test_an_interrupt_leaves_numbers_and_their_count_together(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """Within the update all is undone, the average too; after it the update counts."""
    trainer = trainer_of(tiny_base, optim__ema_decay=0.5)
    trainer.step()
    before = trainer.update, trainer.average.updates, snapshot(trainer)

    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    moved = trainer.average.update
    if when == "average":
        monkeypatch.setattr(trainer.average, "update", lambda values: interrupted(moved(values)))
    else:
        monkeypatch.setattr(Rollout, "release", interrupted)
    with pytest.raises(KeyboardInterrupt):
        trainer.step()
    undone = equal(before[2], snapshot(trainer))
    assert (undone, trainer.update) == ((True, 1) if when == "average" else (False, 2))
    assert trainer.average.updates == before[1] + (not undone)


@pytest.mark.parametrize(
    ("epochs", "refresh", "kept"),
    [(1, 1, [False]), (1, 2, [False, True]), (2, 1, [True]), (2, 2, [True] * 2)],
)
def test_energies_under_the_old_policy_are_taken_where_a_later_step_needs_them(
    tiny_base: Path, epochs: int, refresh: int, kept: list[bool]
) -> None:
    trainer = trainer_of(tiny_base, optim__inner_epochs=epochs, optim__rollouts_per_refresh=refresh)
    trainer.collect()
    assert [bool(item.old_tables) for item in trainer.collected] == kept


def test_a_step_gives_every_page_back(tiny_base: Path) -> None:
    trainer = trainer_of(tiny_base)
    trainer.collect()
    cache = trainer.collected[0].rollout.cache
    assert cache.pages_in_use > 0
    trainer.step()
    assert cache.pages_in_use == 0


@pytest.mark.parametrize(
    ("settings", "in_pool"),
    [
        ({}, False),
        ({"kvpo__anchor_share": 0.4}, True),
        ({"kvpo__anchor_share": 0.4, "method": "latent-distance"}, False),
    ],
)
def test_the_anchor_is_in_the_pool_of_a_policy_that_gives_it_a_share(
    tiny_base: Path, settings: dict[str, Any], in_pool: bool
) -> None:
    assert toy_setup(tiny_config(tiny_base, **settings)).blend().anchor_in_pool is in_pool


def test_the_checks_ask_no_reward(tiny_base: Path) -> None:
    reward = Moody()
    trainer = trainer_of(tiny_base, UserReward("mine:moody", ("moody",), reward))
    first_ratio_max_deviation(trainer)
    assert reward.calls == 0


@dataclass
class Moody:
    """A reward that raises once it was called often enough."""

    patience: float = math.inf
    calls: int = 0

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> Tensor:
        self.calls += 1
        if self.calls > self.patience:
            raise ZeroDivisionError("no such scale")
        return ToyScorer()(video_BTCHW, prompts)["redness"]


def test_a_reward_that_fails_costs_no_update(tiny_base: Path, tmp_path: Path) -> None:
    """It fails while the third rollout is scored: the two updates before it are saved."""
    probe = Moody()
    explore(trainer_of(tiny_base, UserReward("mine:moody", ("moody",), probe)).setup, [0])
    reward = UserReward("mine:moody", ("moody",), Moody(patience=2.5 * probe.calls))
    trainer = trainer_of(tiny_base, reward, optim__updates=4, evaluation__every=0, checkpoint__every=3)
    checkpoints = tmp_path / "checkpoints"
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as metrics:
        run = Run(trainer.setup, trainer, checkpoints, metrics, lambda *numbers: None, {})
        with pytest.raises(ValueError, match=r"reward 'mine:moody' failed: ZeroDivisionError: no such scale"):
            run.train(lambda: False)
    assert sorted(path.name for path in checkpoints.glob("update-*")) == ["update-000000", "update-000002"]
    assert [record["update"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]


def test_a_run_under_a_budget_shows_how_much_of_it_is_spent(tiny_base: Path, tmp_path: Path) -> None:
    setup = toy_setup(tiny_config(tiny_base, optim__updates=10_000))
    trainer = Trainer(replace(setup, validation={}))
    shown: list[tuple[Any, ...]] = []
    show = lambda *numbers: shown.append(numbers[:3])  # noqa: E731
    run = Run(trainer.setup, trainer, tmp_path, None, show, {}, budget_cpu_s=1e-3)
    assert run.train(lambda: False) and trainer.update == 1
    assert shown[-1] == ("aligning (CPU-seconds)", min(int(run.cpu_s), 1), 1)


@dataclass(frozen=True)
class ShortClips:
    """Two-act videos with fewer frames in some updates."""

    frames: tuple[int, ...]

    def __call__(self, update: int) -> list[VideoPrompt]:
        length = self.frames[update]
        return [VideoPrompt(2 * update + n, ("a red circle", "a blue one"), (12,), length) for n in range(2)]


def test_short_clips_shrink_the_exploration_and_say_so_once(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tiny_base, exploration__blocks=3, optim__updates=4)
    setup = replace(toy_setup(config), training_prompts=ShortClips((24, 18, 15, 18)))
    trainer = Trainer(setup)
    with caplog.at_level("WARNING", "kvpo"):
        lines = [trainer.step() for _ in range(4)]
    # The window before the switch at 12 is one block; 12 leaves room for four in the longest, without a tail.
    names = ("forks", "blocks", "tail_blocks")
    assert [{name: n[name] for name in names if name in n} for n in lines] == [
        {"forks": {"12": 1, "15": 1}, "tail_blocks": 0.5},
        {"forks": {"12": 2}, "blocks": 2.0, "tail_blocks": 0.0},
        {"forks": {"9": 1, "12": 1}, "blocks": 1.0, "tail_blocks": 0.5},
        {"forks": {"9": 1, "12": 1}, "blocks": 1.5, "tail_blocks": 0.5},
    ]
    assert [n["switch_forks"] for n in lines] == [0.5, 1.0, 0.5, 0.5]
    said = [record.getMessage() for record in caplog.records if "more than fits" in record.getMessage()]
    assert len(said) == 2, "one warning for each kind of shrinking"
    assert said[0].startswith("exploration.blocks = 3 is more than fits the videos of update 2, which")
    assert first_ratio_max_deviation(trainer) <= ratio_tolerance(config)


@pytest.mark.parametrize(
    "stream",
    [
        dict(keep_sink_at_switch=False),
        dict(window=-1, sink=0),
        dict(sink=0),
        dict(bank=["memflow"]),
        dict(bank=["memflow", "sparse"]),
    ],
    ids=["sink reset", "everything", "rolling", "bank", "sparse bank"],
)
def test_the_first_ratio_is_exactly_one_on_every_history(tiny_base: Path, stream: dict[str, Any]) -> None:
    settings = {f"stream__{name}": value for name, value in stream.items()}
    numbers = trainer_of(tiny_base, **settings).step()
    assert numbers["ratio_deviation"] == 0.0 and numbers["velocity_kl"] == 0.0
    assert numbers["gradient_norm"] > 0
