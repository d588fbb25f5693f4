"""The hacking radar: its rule on made-up readings, and in runs that are really hacked."""

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpo.rewards.protocol import Declaration
from kvpo.rewards.reward import Reward
from kvpo.training.checkpoint import best_checkpoint, checkpoint_update
from kvpo.training.evaluation import Evaluation, Judges, comparison, paired_gain
from kvpo.training.radar import (
    Reading,
    describe_verdict,
    drifted,
    judge,
    loaded,
    measured,
    pooled_sets,
    rank_agreement,
    rank_correlation,
    reading,
    saved,
    verdict_numbers,
)
from tests.metrics import read_metrics
from tests.tiny_world import ToyScorer
from tests.training.test_resume import ToyRun

PROMPTS = 40
"""Of every made-up reading."""


def noise(seed: int, scale: float = 0.01) -> torch.Tensor:
    return scale * torch.randn(PROMPTS, generator=torch.Generator().manual_seed(seed))


def readings(trained: list[float], **watchers: list[float]) -> list[Reading]:
    """A history of mean scores by update, five apart, every prompt with its own small noise."""
    return [
        Reading(
            5 * step,
            mean + noise(step),
            {name: means[step] + noise(100 * step + len(name)) for name, means in watchers.items()},
        )
        for step, mean in enumerate(trained)
    ]


def test_hacking_is_called_after_some_validations_in_a_row() -> None:
    history = readings([0.5, 0.6, 0.7, 0.8], fair=[0.5, 0.5, 0.4, 0.3])
    verdicts = [judge(history[: n + 1], 3.0, 2) for n in range(4)]
    assert [verdict.in_a_row for verdict in verdicts] == [0, 0, 1, 2]
    assert [verdict.hacked for verdict in verdicts] == [False, False, False, True]
    assert judge(history, 3.0, 1).hacked and not judge(history, 3.0, 3).hacked


def test_a_fall_counts_from_where_the_watcher_was_highest() -> None:
    """It first rose with the trained reward: worse than its best, though better than the base."""
    history = readings([0.5, 0.6, 0.7, 0.8], fair=[0.5, 0.62, 0.58, 0.56])
    (alarm,) = judge(history, 3.0, 2).alarms
    assert alarm.since == 5
    assert alarm.fall == paired_gain(history[1].watchers["fair"], history[3].watchers["fair"])
    assert alarm.trained == paired_gain(history[1].trained_N, history[3].trained_N)


@pytest.mark.parametrize(
    ("trained", "fair"),
    [
        ([0.5, 0.6, 0.7], [0.5, 0.6, 0.6]),  # both rise
        ([0.5, 0.4, 0.3], [0.5, 0.4, 0.3]),  # both fall: bad, and no hacking
        ([0.5, 0.5, 0.5], [0.5, 0.4, 0.3]),  # the trained reward stays
        ([0.5, 0.6, 0.7], [0.5, 0.499, 0.499]),  # a fall within the noise
    ],
)
def test_what_is_no_hacking(trained: list[float], fair: list[float]) -> None:
    assert judge(readings(trained, fair=fair), 3.0, 2).alarms == ()


def test_a_fallen_scorer_rules_a_checkpoint_out_before_there_is_an_alarm() -> None:
    """The trained reward does not rise yet, or falls too; what has recovered may be the best again."""
    history = readings(
        [0.5, 0.5, 0.4, 0.5, 0.9], fair=[0.5, 0.4, 0.3, 0.5, 0.2], calm=[0.5, 0.5, 0.6, 0.6, 0.6]
    )
    verdicts = [judge(history[: n + 1], 3.0, 2) for n in range(5)]
    assert [verdict.fallen for verdict in verdicts] == [(), ("fair",), ("fair",), (), ("fair",)]
    assert [bool(verdict.alarms) for verdict in verdicts] == [False, False, False, False, True]
    assert describe_verdict(history[:2], verdicts[1]).endswith(
        "no alarm, but fair fell below the best so far"
    )
    assert describe_verdict(history[:4], verdicts[3]).endswith("no alarm")


def test_the_same_scorer_has_to_alarm_in_a_row() -> None:
    taking_turns = readings([0.5, 0.6, 0.7], one=[0.5, 0.4, 0.5], other=[0.5, 0.5, 0.4])
    verdict = judge(taking_turns, 3.0, 2)
    assert [alarm.watcher for alarm in verdict.alarms] == ["other"] and verdict.in_a_row == 1
    recovered = readings([0.5, 0.6, 0.7, 0.8], fair=[0.5, 0.4, 0.5, 0.4])
    assert judge(recovered, 3.0, 2).in_a_row == 1


def test_no_watcher_and_no_validation_give_no_alarm() -> None:
    assert judge(readings([0.5, 0.9, 1.3]), 3.0, 1).in_a_row == 0
    assert judge(readings([0.5], fair=[0.5]), 3.0, 1).alarms == ()


def test_noise_alone_is_rarely_called_hacking() -> None:
    """Held-out scores that only wobble around one mean, with a trained reward that really rises: the best
    of ten wobbles looks high, so the default asks for three standard errors, twice."""
    generator = torch.Generator().manual_seed(0)
    hacked = {errors: 0 for errors in (2.0, 3.0)}
    for _ in range(100):
        history = [
            Reading(step, 0.05 * step + torch.randn(30, generator=generator) / 100, {"fair": wobble})
            for step, wobble in enumerate(torch.randn(11, 30, generator=generator))
        ]
        for errors in hacked:
            hacked[errors] += any(judge(history[: n + 1], errors, 2).hacked for n in range(11))
    assert hacked[3.0] <= 3 < hacked[2.0]


def test_a_verdict_in_words() -> None:
    history = readings([0.5, 0.6, 0.7, 0.8], fair=[0.5, 0.5, 0.4, 0.3])
    words = verdict_numbers(history, judge(history, 3.0, 2))
    json.dumps(words)
    assert words["hacked"] and words["alarms"]["fair"]["since"] in (0, 5)
    assert "while watcher fair -0.2" in words["verdict"]
    assert "2 validations in a row" in words["verdict"]
    calm = verdict_numbers(history[:2], judge(history[:2], 3.0, 2))["verdict"]
    assert "trained reward +0.1" in calm and "no alarm" in calm
    alone = readings([0.5, 0.6])
    assert "no watcher" in verdict_numbers(alone, judge(alone, 3.0, 2))["verdict"]


def test_readings_survive_json_exactly() -> None:
    history = readings([0.5, 0.6, 0.7], fair=[0.5, 0.4, 0.3])
    again = loaded(json.loads(json.dumps(saved(history))))
    assert [r.update for r in again] == [0, 5, 10]
    for before, after in zip(history, again, strict=True):
        assert torch.equal(before.trained_N, after.trained_N)
        assert torch.equal(before.watchers["fair"], after.watchers["fair"])


def test_rank_correlation_in_closed_form() -> None:
    rising = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    assert rank_correlation(rising, rising.exp()) == pytest.approx(1)
    assert rank_correlation(rising, -rising) == pytest.approx(-1)
    # Spearman without ties is 1 - 6 sum d^2 / (n (n^2 - 1)).
    swapped = torch.tensor([2.0, 1.0, 3.0, 5.0, 4.0])
    assert rank_correlation(rising, swapped) == pytest.approx(1 - 6 * 4 / (5 * 24))
    # With ties it is Pearson's correlation of mean ranks: here (1, 2.5, 2.5, 4) and (1, 2, 3, 4).
    tied = rank_correlation(torch.tensor([0.0, 1.0, 1.0, 2.0]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert tied == pytest.approx(4.5 / (4.5 * 5) ** 0.5)
    assert rank_correlation(rising, torch.ones(5)) is None


def test_agreement_names_every_pair_once() -> None:
    up, down = torch.arange(4.0), -torch.arange(4.0)
    assert rank_agreement({"a": up, "b": down}, {"held": up}) == {
        "a": {"b": pytest.approx(-1), "held": pytest.approx(1)},
        "b": {"held": pytest.approx(-1)},
    }


TEXTS = (("a",), ("b",), ("c",))


def test_what_the_radar_measures() -> None:
    scorer = ToyScorer()
    declared = [
        Declaration(name, 0.0, 1.0, False, 1, 1, weight=weight)
        for name, weight in zip(scorer.components, (0.0, 2.0), strict=True)
    ]
    watcher = Reward("own:calm_twice", scorer, tuple(declared))
    judges = Judges(scorer, torch.tensor([1.0, 0.5]), None, (watcher,))
    assert judges.watcher_names == ("calm_twice",)
    base = Evaluation(torch.zeros(2, 3), None, torch.zeros(1, 3), torch.tensor([[0.1, 0.2, 0.3]] * 4), TEXTS)
    gains = torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.2, 0.1]])
    aligned = Evaluation(
        gains, None, -gains[:1], base.looks_LN + torch.tensor([[0.5], [0.0], [0.01], [0.04]]), TEXTS
    )
    numbers = measured(base, aligned, judges)
    assert numbers["trained"]["gain"] == pytest.approx(0.3)
    assert numbers["watchers"]["calm_twice"]["gain"] == pytest.approx(-0.2)
    assert numbers["watchers"]["calm_twice"]["se"] == pytest.approx(0.1 / 3**0.5)
    assert numbers["drift"]["brightness"]["gain"] == pytest.approx(0.5)
    assert numbers["drift"]["brightness"]["spread"] == pytest.approx(0.1)
    assert numbers["agreement"]["redness"] == {"calm": pytest.approx(-1), "calm_twice": pytest.approx(-1)}
    assert drifted(numbers, 3.0) == ["brightness"]  # the others move less than half of what prompts differ
    assert "unseen" not in numbers
    judged = replace(base, unseen_N=torch.zeros(3)), replace(aligned, unseen_N=torch.tensor([0.1, 0.3, 0.2]))
    assert "unseen" not in measured(base, judged[1], judges) | measured(judged[0], aligned, judges)
    with_unseen = measured(*judged, judges)
    assert with_unseen["unseen"]["gain"] == pytest.approx(0.2)
    assert with_unseen["agreement"]["redness"]["unseen scorer"] == pytest.approx(0.5)
    numbers["drift"]["brightness"] |= {"gain": 0.0, "se": 0.0, "spread": 0.0}
    assert drifted(numbers, 3.0) == [], "a look that never changes has not drifted"
    for gain, far in ((0.049, False), (0.051, True), (-0.051, True)):  # half the spread, up or down
        numbers["drift"]["brightness"] |= {"gain": gain, "se": 0.001, "spread": 0.1}
        assert drifted(numbers, 3.0) == ["brightness"] * far
    numbers["drift"]["brightness"] |= {"gain": 0.06, "se": 0.021}
    assert drifted(numbers, 3.0) == [] and drifted(numbers, 2.8) == ["brightness"]
    both = pooled_sets([base, aligned])
    torch.testing.assert_close(both.components_KN, torch.cat([torch.zeros(2, 3), gains], 1))
    assert reading(7, both, judges).watchers["calm_twice"].shape == (6,)


WATCHED: dict[str, Any] = {
    "evaluation__watchers": ("tests.tiny_world:opposite",),
    "evaluation__every": 1,
    "optim__updates": 8,
}


def run(base: Path, directory: Path, **settings: Any) -> ToyRun:
    directory.mkdir()
    return ToyRun(base, directory, **{**WATCHED, **settings})


def validations(directory: Path) -> list[dict[str, Any]]:
    return [record for record in read_metrics(directory / "metrics.jsonl") if record["kind"] == "validation"]


def test_a_hacked_run_stops_and_keeps_a_checkpoint_from_before(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hacked = run(tiny_base, tmp_path / "hacked")
    with caplog.at_level(logging.INFO):
        assert hacked.go()
    found = validations(hacked.directory)
    radar = [record["radar"] for record in found]
    assert 2 <= len(found) < 8 and [one["hacked"] for one in radar] == [False] * (len(found) - 1) + [True]
    assert set(radar[-1]["alarms"]) == set(radar[-2]["alarms"]) == {"opposite"}
    gain, opposite = radar[-1]["trained"], radar[-1]["watchers"]["opposite"]
    assert opposite["gain"] == pytest.approx(-gain["gain"], abs=1e-6)
    assert set(radar[-1]["agreement"]["redness"]) == {"calm", "opposite"}
    assert set(radar[-1]["drift"]) == {"brightness", "saturation", "sharpness", "motion"}
    best = best_checkpoint(hacked.directory / "checkpoints")
    assert best is not None
    innocent = [record["mean_gain"] for record in found if not record["radar"]["fallen"]]
    assert best[1] == max([0.0, *innocent])
    assert best[1] < found[-1]["mean_gain"]  # the trained reward alone would have chosen a hacked one
    said = [f"hacking radar, update {one['update']}: {one['radar']['verdict']}" for one in found]
    assert set(said) <= set(caplog.messages)
    kept = checkpoint_update(best[0])
    stop = f"stopped after update {len(found)}, reward hacking: the best checkpoint is update {kept}"
    assert stop in caplog.messages
    for one in found:
        drift = f"update {one['update']}: the look of the videos drifts: {', '.join(one['radar']['drifted'])}"
        assert (drift in caplog.messages) == bool(one["radar"]["drifted"])

    stopped_for_good = hacked.result()
    assert hacked.go() and hacked.result() == stopped_for_good


def test_interrupted_after_any_update_the_verdict_is_the_same(tiny_base: Path, tmp_path: Path) -> None:
    whole, parts = run(tiny_base, tmp_path / "whole"), run(tiny_base, tmp_path / "parts")
    assert whole.go()
    while not parts.go(stop_after=1):
        pass
    assert parts.result() == whole.result()


def test_without_a_say_the_radar_only_reports(tiny_base: Path, tmp_path: Path) -> None:
    free = run(tiny_base, tmp_path / "free", evaluation__stop_on_hacking=False)
    assert free.go()
    found = validations(free.directory)
    assert len(found) == 8 and any(record["radar"]["hacked"] for record in found)
    best = best_checkpoint(free.directory / "checkpoints")
    assert best is not None and best[1] == max(record["mean_gain"] for record in found)


def test_a_repeated_prompt_counts_once() -> None:
    """Two prompts with gains 0.1 and 0.5, the second one shown three times."""
    judges = Judges(ToyScorer(), torch.tensor([1.0, 0.0]), None)
    texts = (("a",), ("b",), ("b",), ("b",))
    base = Evaluation(torch.zeros(2, 4), torch.zeros(4), torch.zeros(0, 4), torch.zeros(4, 4), texts)
    gains = torch.tensor([[0.1, 0.3, 0.5, 0.7], [0.0, 0.0, 0.0, 0.0]])
    aligned = replace(base, components_KN=gains)
    numbers = comparison(base, aligned, judges)
    assert numbers["prompts"] == 2
    assert numbers["paired_gain"] == pytest.approx(0.3)
    assert numbers["paired_se"] == pytest.approx(0.2)  # sd of (0.1, 0.5) over sqrt(2)
    trained = measured(pooled_sets([base]), pooled_sets([aligned]), judges)["trained"]
    assert (trained["gain"], trained["se"]) == (pytest.approx(0.3), pytest.approx(0.2))
    unseen_D = replace(base, unseen_N=torch.tensor([0.1, 0.3, 0.5, 0.7])).by_prompt().unseen_N
    assert torch.allclose(unseen_D, torch.tensor([0.1, 0.5])) and base.by_prompt().unseen_N is not None
    distinct = replace(base, texts_N=(("a",), ("b",), ("c",), ("d",)))
    assert distinct.by_prompt() is distinct
