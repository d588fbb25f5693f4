"""Held-out scores against sums over segments written out, and comparisons in closed form."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.engine.noise import SeededTape
from kvpo.progress import counter
from kvpo.prompts import ClipPrompt, VideoPrompt
from kvpo.rewards.reward import Reward
from kvpo.training import evaluation
from kvpo.training.evaluation import (
    Evaluation,
    Judges,
    accuracies,
    comparison,
    evaluate_policy,
    mean_gain,
    paired_gain,
    swapped_captions,
)
from kvpo.training.kept_results import KeptResults
from kvpo.training.setup import Setup
from tests.tiny_world import FRAMES, tiny_config, toy_setup

PROMPTS = [
    VideoPrompt(1, ("1", "2"), (12,), FRAMES),
    VideoPrompt(2, ("4",), (), FRAMES),
    VideoPrompt(3, ("8", "16", "32"), (6, 15), FRAMES),
]
"""Texts are the scores of their clips; segments of 12 and 9, of 21, and of 6, 9 and 6 of 21 frames."""
MEANS = [(12 * 1 + 9 * 2) / 21, 4.0, (6 * 8 + 9 * 16 + 6 * 32) / 21]


@dataclass(frozen=True)
class Literal:
    """Scores a clip by its text, and remembers the leads and the frames that it was shown."""

    components: tuple[str, ...] = ("text", "doubled")
    leads: list[int] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        self.leads.extend(prompt.switch for prompt in prompts)
        self.shown.extend([video_BTCHW.shape[1]] * len(prompts))
        score = torch.tensor([float(prompt) for prompt in prompts])
        return {"text": score, "doubled": 2 * score}


def judged(base: Path, rows: int = 32) -> tuple[Evaluation, Literal, Literal, Setup]:
    setup = toy_setup(tiny_config(base))
    scorer, unseen = Literal(), Literal()
    judges = Judges(scorer, torch.tensor([1.0, 0.5]), unseen)
    found = evaluate_policy(setup.backbone, PROMPTS, setup.backbone.tape("test"), judges, rows=rows)
    return found, scorer, unseen, setup


@pytest.mark.parametrize("rows", [2, 32])
def test_a_segment_counts_by_its_frames(tiny_base: Path, rows: int) -> None:
    found, *_ = judged(tiny_base, rows)
    expected = torch.tensor(MEANS)
    torch.testing.assert_close(found.components_KN, torch.stack([expected, 2 * expected]))
    assert found.unseen_N is not None
    torch.testing.assert_close(found.unseen_N, expected)


def test_scored_videos_are_counted_as_they_are_done(tiny_base: Path) -> None:
    setup = toy_setup(tiny_config(tiny_base))
    shown: list[tuple[Any, ...]] = []
    report = counter(lambda *step: shown.append(step), "videos", 2 * len(PROMPTS))
    for _ in range(2):
        judges, tape = Judges(Literal(), torch.ones(2), None), setup.backbone.tape("test")
        evaluate_policy(setup.backbone, PROMPTS, tape, judges, rows=2, report=report)
    assert shown == [("videos", done, 6) for done in (0, 1, 3, 4, 6)]
    report(5)  # with several ranks, the last share counts for as many videos as the others
    assert shown[-1] == ("videos", 6, 6)


def test_kept_results_are_not_made_again(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    setup = toy_setup(tiny_config(tiny_base))
    judges = Judges(Literal(), torch.tensor([1.0, 0.5]), None, exam=Literal())
    prompts, tape = [*PROMPTS, replace(PROMPTS[0], id=4)], setup.backbone.tape("test")
    made: list[int] = []
    original = evaluation._evaluated

    def counted(backbone: Any, own: Sequence[VideoPrompt], *others: Any) -> Evaluation:
        made.append(len(own))
        return original(backbone, own, *others)

    monkeypatch.setattr(evaluation, "_evaluated", counted)

    def found(policy: str = "base", own: Sequence[VideoPrompt] = prompts, **how: Any) -> Evaluation:
        kept = KeptResults(tmp_path / "kept", policy)
        how = {"tape": tape, "judges": judges, "rows": 2} | how
        return evaluate_policy(setup.backbone, own, **how, kept=kept)

    videos: list[int] = []
    first = found()
    assert made == [2, 2]
    again = found(report=videos.append)
    assert made == [2, 2] and videos == [2, 2]
    assert again.texts_N == first.texts_N and again.unseen_N is None
    assert first.tensors.keys() == again.tensors.keys() > {"components_KN", "watchers_HN", "exam_AN"}
    assert all(torch.equal(value, again.tensors[name]) for name, value in first.tensors.items())

    files = sorted((tmp_path / "kept").iterdir())
    files[0].unlink()
    found()
    assert made == [2, 2, 2] and sorted((tmp_path / "kept").iterdir()) == files
    files[1].write_bytes(b"damaged")
    found()
    assert made == [2] * 4 and "made again" in caplog.text
    others: list[dict[str, Any]] = [
        {"policy": "aligned"},
        {"own": prompts[::-1]},
        {"tape": setup.backbone.tape("another")},
        {"first": 3},
        {"rows": 1},
        {"judges": replace(judges, scorer=Reward("own", Literal(), code="as it was"))},
        {"judges": replace(judges, scorer=Reward("own", Literal(), code="changed"))},
    ]
    for other in others:
        made.clear()
        found(**other)
        assert sum(made) == len(prompts), other


def test_demands_are_counted_over_all_segments_of_each_prompt(tiny_base: Path) -> None:
    setup, exam = toy_setup(tiny_config(tiny_base)), Literal()
    judges = Judges(Literal(), torch.ones(2), None, exam=exam)
    found = evaluate_policy(setup.backbone, PROMPTS, setup.backbone.tape("test"), judges, rows=2)
    sums = torch.tensor([1.0 + 2, 4, 8 + 16 + 32])
    assert found.exam_AN is not None and torch.equal(found.exam_AN, torch.stack([sums, 2 * sums]))
    assert exam.leads == [0] * 6
    compared: Any = comparison(found, found, judges)
    assert compared["accuracy"] == {"text": {"base": 0.5, "aligned": 0.5, "n": 126}}


def test_accuracies_are_shares_of_all_demands_and_have_their_number() -> None:
    asked = torch.tensor([[2.0, 4.0], [0.0, 0.0]])
    base, aligned = (torch.cat([met, asked]) for met in torch.tensor([[[1.0, 2], [0, 0]], [[2, 4], [0, 0]]]))
    found = accuracies(("colour", "leave", "asked colour", "asked leave"), base, aligned)
    assert found == {"colour": {"base": 0.5, "aligned": 1.0, "n": 6}}, "nothing is said of what nobody asks"


def test_only_the_reward_sees_what_was_before_a_switch(tiny_base: Path) -> None:
    _, scorer, unseen, setup = judged(tiny_base)
    block, rate = setup.generator.block, setup.backbone.codec.frames_per_latent
    own = torch.tensor([12, 9, 21, 6, 9, 6])
    lead = torch.tensor([0, block, 0, 0, block, block])
    assert sorted(scorer.leads) == sorted((rate * lead).tolist())
    assert sorted(scorer.shown) == sorted((rate * (own + lead)).tolist())
    assert unseen.leads == [0] * 6
    assert sorted(unseen.shown) == sorted((rate * own).tolist())


def test_a_wrong_caption_is_another_prompts_of_as_many_segments(tiny_base: Path) -> None:
    pairs = [VideoPrompt(n, texts, (12,), FRAMES) for n, texts in enumerate((("1", "2"), ("4", "8")))]
    same, alone = VideoPrompt(7, ("1", "2"), (9,), FRAMES), VideoPrompt(8, ("16",), (), FRAMES)
    swapped = swapped_captions([*pairs, same])
    assert swapped is not None
    assert [one.segments for one in swapped] == [("4", "8"), ("1", "2"), ("4", "8")]
    assert [one.switches for one in swapped] == [(12,), (12,), (9,)]
    assert swapped_captions([*pairs, alone]) is None
    setup, judges = toy_setup(tiny_config(tiny_base)), Judges(Literal(), torch.tensor([1.0, 0.5]), None)
    for rows in (1, 32):
        found = evaluate_policy(
            setup.backbone, pairs, setup.backbone.tape("test"), judges, rows=rows, mismatched=True
        )
        assert found.mismatched_KN is not None
        torch.testing.assert_close(found.mismatched_KN, found.components_KN.flip(1))
    both: Any = comparison(found, found, judges)
    assert both["wrong_caption_gain"] == both["wrong_caption_se"] == 0.0
    assert "wrong_caption_gain" not in comparison(*[judged(tiny_base)[0]] * 2, judges)


def test_only_what_is_shown_from_a_frame_on_is_scored(tiny_base: Path) -> None:
    setup, judges = toy_setup(tiny_config(tiny_base)), Judges(Literal(), torch.tensor([1.0, 0.5]), None)
    found = evaluate_policy(setup.backbone, PROMPTS, setup.backbone.tape("test"), judges, first=9)
    expected = torch.tensor([(3 * 1 + 9 * 2) / 12, 4.0, (6 * 16 + 6 * 32) / 12])
    torch.testing.assert_close(found.components_KN[0], expected)


def test_a_gain_in_closed_form() -> None:
    gain = paired_gain(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([2.0, 2.0, 1.0, 9.0]))
    assert gain.mean == pytest.approx(1.0)
    variance = (0 + 1 + 9 + 16) / 3  # of the gains 1, 0, -2 and 5
    assert gain.standard_error == pytest.approx((variance / 4) ** 0.5)
    assert gain.improved == 0.5


def test_every_run_is_evaluated_on_the_same_noise(tiny_base: Path) -> None:
    tapes = [toy_setup(tiny_config(tiny_base, seed=seed)).evaluation_tape() for seed in (0, 1)]
    fixed = SeededTape(("evaluation", 0), tapes[0].shape)
    for tape in tapes:
        assert torch.equal(tape(3, 1, "initial"), fixed(3, 1, "initial"))


def test_a_comparison_weights_its_components() -> None:
    def held_out(shift: float) -> Evaluation:
        table = torch.tensor([[1.0, 2.0, 4.0], [10.0, 10.0, 40.0]])
        table[0] += shift * torch.tensor([1.0, 2.0, 6.0])
        none, texts = torch.zeros(0, 3), (("one",), ("two",), ("three",))
        return Evaluation(table, shift + torch.arange(3.0), none, none, texts)

    judges: Any = Judges(Literal(), torch.tensor([1.0, 0.5]), None)  # type: ignore[arg-type]
    numbers: Any = comparison(held_out(0.0), held_out(1.0), judges)
    assert numbers["prompts"] == 3
    assert numbers["base_mean"] == pytest.approx((6 + 7 + 24) / 3)
    assert numbers["aligned_mean"] - numbers["base_mean"] == pytest.approx(numbers["paired_gain"])
    assert numbers["paired_gain"] == pytest.approx(3.0) and numbers["improved_fraction"] == 1.0
    assert numbers["paired_se"] == pytest.approx((7 / 3) ** 0.5)
    assert (numbers["unseen_scorer_base"], numbers["unseen_scorer_gain"]) == pytest.approx((1.0, 1.0))
    assert numbers["unseen_scorer_se"] == pytest.approx(0.0)
    text, doubled = numbers["components"]["text"], numbers["components"]["doubled"]
    assert (text["base"], text["gain"], text["se"]) == pytest.approx((7 / 3, 3.0, (7 / 3) ** 0.5))
    assert (doubled["base"], doubled["aligned"], doubled["gain"]) == pytest.approx((20.0, 20.0, 0.0))
    assert mean_gain({"one": numbers, "other": {"paired_gain": 0.0}}) == pytest.approx(1.5)
