"""`kvpo learn-reward`: votes to a reward, its worth, and the loop from raters to a fresh round."""

import hashlib
import json
from dataclasses import dataclass, replace
from math import log
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from kvpo.app.align import align
from kvpo.app.arena import open_study, report
from kvpo.app.configuration import assign
from kvpo.app.generate import generate
from kvpo.app.learn_reward import features_of, learn_reward, table, votes_of, worth_of
from kvpo.app.named_rewards import named_rewards
from kvpo.arena.intake import record_ranking
from kvpo.arena.judgements import Judgement, Ranking
from kvpo.arena.store import Study
from kvpo.arena.study import Question
from kvpo.prompts import ClipPrompt, VideoPrompt
from kvpo.report.video import read_video
from kvpo.rewards.preference import PIXELS, Task, load_preference, pixel_features
from kvpo.rewards.protocol import Declaration
from kvpo.training.checkpoint import latest_checkpoint
from tests.app.finished import QUICK, command
from tests.app.test_arena import folder
from tests.arena.raters import vote_all
from tests.tiny_world import tiny_config

RED = PIXELS.index("red")
PROMPTS = [
    f"A {size} {colour} {shape} drifts left."
    for size in ("small", "large")
    for colour in ("red", "blue", "green")
    for shape in ("circle", "square")
]


def redness(path: Path) -> float:
    """The hidden taste: how red a video is, compared with how green."""
    frames, _ = read_video(path)
    return float(frames[..., 0].mean() - frames[..., 1].mean())


def by_taste(study: Study, seed: int = 0, noise: float = 0.1):
    """Answers of a rater who prefers red, and errs where videos are nearly alike."""
    generator = np.random.default_rng(seed)

    def say(ballot) -> str:
        if ballot.videos[0] == ballot.videos[1]:
            return "same"
        left, right = (redness(study.video_path(video)) for video in ballot.videos)
        return "left" if left - right + noise * generator.logistic() > 0 else "right"

    return say


def videos_of(base: Path, out: Path, count: int, seed: int) -> Path:
    """A folder of short videos of the tiny generator: the same prompts, noise of its own."""
    prompts = [VideoPrompt(n, (PROMPTS[n],), (), 9) for n in range(count)]
    generate(tiny_config(base, seed=seed, **QUICK), out, prompts=prompts)
    return out


def test_worth_of_a_known_taste_and_of_coins():
    generator = np.random.default_rng(0)
    table = torch.from_numpy(generator.standard_normal((300, 4)))
    pairs = [(n, n + 1) for n in range(0, 300, 2)]

    def votes(taste: float) -> list[Task]:
        leads = taste * (table[0::2, 1] - table[1::2, 1]).numpy() + generator.logistic(size=150)
        return [Task(pair if lead > 0 else pair[::-1], (0, 1), f"prompt {n // 3}")
                for n, (pair, lead) in enumerate(zip(pairs, leads, strict=True))]  # fmt: skip

    sure = worth_of(table, votes(4.0), 0)
    assert sure.accuracy.value > 0.8 and sure.accuracy.low > 0.7 and sure.loss < 0.45
    assert all(abs(one.predicted - one.observed) < 0.2 for one in sure.calibration if one.pairs > 20)
    assert (sure.votes, sure.prompts) == (150, 50)
    coin = worth_of(table, votes(0.0), 0)
    assert coin.accuracy.low < 0.5 < coin.accuracy.high and coin.ridge >= 0.1 and coin.loss > 0.66


def test_loss_and_number_of_votes_count_an_answer_for_neither_once_and_a_coin_by_what_was_asked():
    """Features that tell nothing lose what a coin does; folds differ in how many of either they hold."""
    same = [Task(pair, (0, 1), f"same {n}", 0.5) for n in range(10) for pair in ((0, 1), (1, 0))]
    chosen = [Task(tuple(range(6)), (0, 1, 1, 1, 1, 1), f"choice {n}") for n in range(10)]
    found = worth_of(torch.zeros(6, 2), [*same, *chosen], 0)
    assert found.votes == 20
    assert found.loss == pytest.approx(found.coin) == pytest.approx((log(2) + log(6)) / 2)
    few = worth_of(torch.zeros(6, 2), chosen[:5], 0)
    assert "(too few prompts)" in table(few) and f"(a coin: {log(6):.3f})" in table(few)


def test_features_of_a_story_are_those_of_its_segments_by_their_length(tmp_path):
    one = folder(tmp_path / "one", {"1.mp4": "a"}, 20)
    other = folder(tmp_path / "other", {"1.mp4": "a"}, 120)
    scene = open_study([str(one), str(other)], tmp_path / "study").design.scenes[0]
    seen = []

    def spy(video, prompts):
        seen.append((video.shape[1], str(prompts[0])))
        return pixel_features(video, prompts)

    needs = Declaration("pixels", 0, 1, False, 1, 10**6)
    story = replace(scene, segments=("a", "b"), starts=(0.0, 0.25))
    found = features_of(one / "1.mp4", story, spy, needs)
    assert seen == [(1, "a"), (3, "b")] and found[0, RED] == pytest.approx(20 / 255, abs=0.02)
    with pytest.raises(ValueError, match="9 frames that are needed|needs at least 9"):
        features_of(one / "1.mp4", scene, spy, replace(needs, min_frames=9))


def test_the_loop_closes_from_votes_to_a_reward_to_a_run_to_a_fresh_round(tiny_base, tmp_path, capsys):
    one = videos_of(tiny_base, tmp_path / "one", 12, seed=1)
    other = videos_of(tiny_base, tmp_path / "other", 12, seed=2)
    study = open_study([str(one), str(other)], tmp_path / "study")
    for seed, name in enumerate(("ann", "ben")):
        vote_all(study, name, by_taste(study, seed))
    out = tmp_path / "liked.safetensors"
    assert command("learn-reward", study.directory, "--out", out) == 0
    said = capsys.readouterr().out
    assert "held-out accuracy" in said and f"--rewards.scorers preference:{out}" in said
    preference, record = load_preference(out)
    assert record["features"] == [] and record["worth"]["prompts"] == 12
    assert json.loads(out.with_suffix(".json").read_text())["noise_floor"] > 0

    (reward,) = named_rewards([f"preference:{out}"], prompts=True)
    assert reward.components == ("liked",) and reward.version
    red, green = torch.zeros(2, 1, 4, 3, 32, 32).unbind(0)
    red[:, :, 0], green[:, :, 1] = 0.5, 0.5
    scores = reward(torch.cat([red, green]), [ClipPrompt("a")] * 2)["liked"]
    assert scores[0] > scores[1], "the taste is found, though nobody told it"

    config = tiny_config(
        tiny_base,
        **{
            **QUICK,
            "rewards__scorers": (f"preference:{out}",),
            "rewards__noise_floors": {"liked": str(out.with_suffix(".noise.json"))},
            "evaluation__watchers": ("flicker",),
            "evaluation__every": 2,
        },
    )
    measured = json.loads(out.with_suffix(".noise.json").read_text())["components"]["liked"]["noise_floor"]
    assert config.rewards.noise_floors["liked"] == pytest.approx(measured)
    # So small a generator differs by about that floor: whether a group exceeds it is the processor's choice.
    config = assign(config, {"rewards.noise_floors": {"total": 0.0}})
    summary = align(config, tmp_path / "run")
    assert summary is not None and "radar" in json.dumps(summary)
    latest = latest_checkpoint(tmp_path / "run" / "checkpoints")
    fresh = open_study([f"{tmp_path / 'run'}:base", f"new={latest}"], tmp_path / "fresh", pairs=2)
    vote_all(fresh, "ann", by_taste(fresh))
    _, result = report(fresh.directory, close=True)
    assert result.questions[0].pairings[0].counted is not None

    # A run goes on with the reward that it was made with, or not at all.
    learned = out.read_bytes()
    for content, reason in (
        (None, f"rewards.scorers: {out}: no such file"),
        (learned + b" ", hashlib.sha256(learned + b" ").hexdigest()),
        (learned + b" ", hashlib.sha256(learned).hexdigest()),
    ):
        out.unlink() if content is None else out.write_bytes(content)
        capsys.readouterr()
        assert command("align", "--resume", "--out", tmp_path / "run", "--optim.updates", 3) == 2
        assert reason in capsys.readouterr().err


def test_rankings_and_choices_at_forks_are_learned_from_too(tiny_base, tmp_path):
    made = videos_of(tiny_base, tmp_path / "made", 6, seed=1)
    videos = sorted(made.glob("*.mp4"))
    for n in range(0, 6):
        group = [videos[(n + k) % len(videos)] for k in range(3)]
        best = max(range(3), key=lambda k: redness(group[k]))
        shown = [one.read_bytes() for one in group]
        record_ranking(tmp_path / "live", [f"prompt {n}"], shown, [best], rater="me")
    out = tmp_path / "live.safetensors"
    worth = learn_reward([tmp_path / "live"], out)
    assert (worth.votes, worth.prompts) == (6, 6)
    study = Study(tmp_path / "live")
    assert len(votes_of([study], study.design.questions[0].name)[0]) == 6
    assert votes_of([study], "another question") == ([], []), "a ranking answers the first question"
    table = torch.cat([pixel_features(torch.from_numpy(read_video(path)[0]).movedim(-1, 1)[None] / 255, [])
                       for path in videos])  # fmt: skip
    preference, _ = load_preference(out)
    reds = table[:, RED] - table[:, RED + 1]
    assert torch.corrcoef(torch.stack([preference(table), reds.double()]))[0, 1] > 0.5


@dataclass
class Votes:
    """A study's votes, without its videos."""

    answers: list[Judgement]
    ranked: list[Ranking]

    def __post_init__(self) -> None:
        questions = [Question(name, name) for name in ("overall", "motion")]
        scene = SimpleNamespace(prompt="p")
        self.design = SimpleNamespace(questions=questions, scenes=[scene])
        self.judgements, self.rankings = lambda: self.answers, lambda: self.ranked
        self.check_videos, self.video_path = lambda: None, Path


def test_raters_whom_the_report_flags_do_not_count_whatever_is_learned() -> None:
    """A rater always votes left on the first question; the second is learned, or the first with rankings."""

    def answer(rater: str, question: str, winner: str, n: int) -> Judgement:
        arms = ("a", "b") if n % 4 < 2 else ("b", "a")
        return Judgement(rater, "p", question, *arms, winner, video_a=f"{n}", video_b=f"{n + 1}")

    careless = [answer("left", "overall", "model_a", n) for n in range(20)]
    fair = [answer("fair", "overall", ("model_a", "model_b")[n % 2], n) for n in range(20)]
    on_motion = [answer(rater, "motion", "model_b", 0) for rater in ("left", "fair")]
    rankings = [Ranking(rater, "p", ("0", "1"), (None, None), (0, 1)) for rater in ("left", "fair", "new")]
    study = Votes([*careless, *fair, *on_motion], rankings)
    assert [len(votes_of([study], question)[0]) for question in ("overall", "motion", "other")] == [22, 1, 0]


def test_a_kill_leaves_no_numbers_of_another_reward(tmp_path, monkeypatch):
    """Killed while its noise floor is measured, a new reward has none yet, nor the worth of the old one."""
    module, out = "kvpo.app.learn_reward", tmp_path / "r.safetensors"
    shown = [(tmp_path / f"{n}.mp4", None) for n in range(16)]
    tasks = [Task((2 * n, 2 * n + 1), (0, 1), f"prompt {n}") for n in range(8)]
    monkeypatch.setattr(f"{module}.Study", lambda place: place)
    monkeypatch.setattr(f"{module}.votes_of", lambda *given: (tasks, shown))
    monkeypatch.setattr(f"{module}.features_of", lambda path, *given: torch.eye(16)[int(path.stem)][None])

    def measured(out: Path, *given: object) -> float:
        if out.with_suffix(".json").exists() or out.with_suffix(".noise.json").exists():
            pytest.fail("the new reward has numbers of the old one")
        out.with_suffix(".noise.json").write_text("{}")
        return 1.0

    monkeypatch.setattr(f"{module}._noise_floor", measured)
    for _ in range(2):
        learn_reward([tmp_path], out)
        assert {path.name for path in tmp_path.iterdir()} == {"r.safetensors", "r.json", "r.noise.json"}


def test_what_cannot_be_learned_from_is_refused_in_one_line(tmp_path, capsys):
    prompts = {f"{n}.mp4": f"prompt {n}" for n in range(6)}
    one, other = folder(tmp_path / "a", prompts, 20), folder(tmp_path / "b", prompts, 99)
    study = open_study([str(one), str(other)], tmp_path / "study")
    out = tmp_path / "liked.safetensors"
    for words, reason in (
        (
            [study.directory, "--out", out],
            "only 0 prompts have votes that decide 'overall'; at least 5 are needed",
        ),
        (
            [study.directory, "--out", out, "--question", "foo"],
            "--question: the study has no question 'foo'; there are overall",
        ),
        ([tmp_path / "a", "--out", out], "holds no study"),
        ([study.directory, "--out", tmp_path / "liked.pt"], "must be a .safetensors file"),
        ([study.directory, "--out", out, "--features", "nothing"], "unknown reward 'nothing'"),
    ):
        status = command("learn-reward", *words)
        error = capsys.readouterr().err
        assert status in (1, 2) and reason in error, (words, error)
    assert not out.exists()
    wrong = tmp_path / "wrong.safetensors"
    wrong.write_text("x")
    page = tmp_path / "s.html"
    assert command("score", tmp_path / "a", "--reward", f"preference:{wrong}", "--out", page) in (1, 2)
    assert "not a learned preference" in capsys.readouterr().err
