"""Intervals cover what is known to be true; biased raters are found and move nothing; closed forms hold."""

from dataclasses import replace
from itertools import pairwise
from statistics import NormalDist

import numpy as np
import pytest

from kvpo.arena import analysis
from kvpo.arena.analysis import (
    agreement,
    binomial_tail,
    bootstrap,
    bradley_terry,
    compare,
    counts_by_prompt,
    gsb,
    krippendorff,
    prompts_needed,
    reliability,
    strengths,
    student,
    trusted,
    win_rate,
    wins_by_prompt,
)
from kvpo.arena.judgements import NO_RATER, Judgement, Ranking, as_judgements
from kvpo.arena.report import in_words
from tests.arena.raters import honest, judged, leftist, scenes_of

DRAWS = 1000
ARMS = ("base", "aligned")


def votes_on_prompts(prompts: int, raters: int, mean: float, spread: float, generator) -> np.ndarray:
    """Good, same and bad votes [P, 3] on prompts whose own lead varies: votes on one are not independent."""
    lead_P = np.clip(mean + spread * generator.standard_normal(prompts), -0.85, 0.85)
    shares_P3 = np.stack([(0.9 + lead_P) / 2, np.full(prompts, 0.1), (0.9 - lead_P) / 2], 1).clip(0)
    return generator.multinomial(raters, shares_P3 / shares_P3.sum(1, keepdims=True)).astype(float)


@pytest.mark.parametrize(("prompts", "raters", "mean", "spread"), [(20, 5, 0.0, 0.3), (40, 1, 0.5, 0.0)])
def test_intervals_over_prompts_cover_the_truth_in_95_per_cent(prompts, raters, mean, spread, monkeypatch):
    monkeypatch.setattr(analysis, "RESAMPLES", 500)
    generator = np.random.default_rng(5)
    everyone = votes_on_prompts(500_000, raters, mean, spread, generator).sum(0)
    covered = np.zeros(2)
    for _ in range(DRAWS):
        counts = votes_on_prompts(prompts, raters, mean, spread, generator)
        for n, statistic in enumerate((gsb, win_rate)):
            found = bootstrap(statistic, counts, generator)
            covered[n] += found.low <= statistic(everyone) <= found.high
    assert np.all(np.abs(covered / DRAWS - 0.95) <= 0.02), covered / DRAWS


@pytest.mark.parametrize(("prompts", "truth"), [(8, 0.9), (20, 0.9), (20, 0.95)])
def test_intervals_cover_a_win_rate_near_one_where_votes_are_often_unanimous(prompts, truth, monkeypatch):
    monkeypatch.setattr(analysis, "RESAMPLES", 300)
    generator, covered = np.random.default_rng(9), 0
    for _ in range(DRAWS):
        won_P = generator.random(prompts) < truth
        counts = np.stack([won_P, np.zeros(prompts), ~won_P], 1).astype(float)
        found = bootstrap(win_rate, counts, generator)
        covered += found.low <= truth <= found.high
    assert covered / DRAWS >= 0.93


@pytest.mark.parametrize(("prompts", "preferred"), [(4, False), (5, False), (6, True)])
def test_unanimous_votes_prefer_an_arm_where_a_coin_would_seldom_be_unanimous(prompts, preferred):
    votes = [Judgement("a", f"p{n}", "overall", "x", "y", "model_a") for n in range(prompts)]
    assert ("x is preferred" in in_words("x", "y", compare(votes, "x", 0.1))) == preferred
    assert (binomial_tail(prompts, prompts) < 0.05) == preferred


def test_votes_that_are_all_alike_leave_as_much_open_as_goes_unseen():
    generator, prompts = np.random.default_rng(0), 10
    unseen = 1 - 0.025 ** (1 / prompts)
    for row, low, high in (([3, 0, 0], 1 - 2 * unseen, 1), ([0, 0, 1], -1, 2 * unseen - 1),
                           ([0, 2, 0], -unseen, unseen)):  # fmt: skip
        found = bootstrap(gsb, np.array([row] * prompts, float), generator)
        assert (found.low, found.high) == pytest.approx((low, high))


def test_an_interval_that_ignored_prompts_would_not_cover():
    generator = np.random.default_rng(6)
    truth, covered = 0.0, 0
    for _ in range(300):
        good, same, bad = votes_on_prompts(20, 8, 0.0, 0.5, generator).sum(0)
        value, count = (good - bad) / (good + same + bad), good + same + bad
        error = np.sqrt(((good + bad) / count - value**2) / count)
        covered += abs(value - truth) <= NormalDist().inv_cdf(0.975) * error
    assert covered / 300 < 0.85


def test_strengths_cover_the_truth_in_95_per_cent():
    truth_M, generator, prompts = np.array([-0.5, 0.0, 0.5]), np.random.default_rng(7), 30
    wins = np.zeros((DRAWS, prompts, 3, 3))
    for one in range(3):
        for other in range(one + 1, 3):
            chance = 1 / (1 + np.exp(truth_M[other] - truth_M[one]))
            won = generator.binomial(4, chance, size=(DRAWS, prompts))
            wins[..., one, other], wins[..., other, one] = won, 4 - won
    values, errors = bradley_terry(wins)
    covered_M = (np.abs(values - truth_M) <= student(0.975, prompts - 1) * errors).mean(0)
    assert np.all(np.abs(covered_M - 0.95) <= 0.02), covered_M


def test_strengths_of_two_models_are_the_log_odds_and_one_that_always_won_stays_finite():
    wins = np.array([[[0.0, 29.5], [9.5, 0.0]]])
    values, _ = bradley_terry(np.repeat(wins, 5, 0) / 5)
    assert values[0] - values[1] == pytest.approx(np.log(30 / 10))
    values, errors = bradley_terry(np.array([[[0.0, 8.0, 8.0], [0.0, 0.0, 4.0], [0.0, 4.0, 0.0]]]))
    assert np.isfinite(values).all() and np.isfinite(errors).all() and values[0] > values[1]
    assert values[1] == pytest.approx(values[2])


def test_a_rater_biased_to_one_side_is_flagged_and_does_not_move_the_result():
    scenes = scenes_of(40)
    raters = {f"rater {n}": honest for n in range(4)}

    def quality(scene: int, arm: str) -> float:
        return 0.8 * (arm == "aligned") + 0.4 * np.sin(scene)

    flagged, widest = 0, 0.0
    for seed in range(25):
        alone = judged(scenes, raters, quality, seed)
        joined = alone + judged(scenes, {"biased": leftist}, quality, seed)
        trust = [reliability(joined, rater, "overall") for rater in (*raters, "biased")]
        assert trust[-1].flags and trust[-1].left_share == 1.0
        flagged += sum(bool(one.flags) for one in trust[:-1])
        with_biased, without = (compare(trusted(votes, trust), "aligned", 0.1) for votes in (joined, alone))
        assert with_biased == without
        # Kept, the biased rater would still only dilute: sides are drawn, so no arm gains from them.
        everyone = compare([one for one in joined if one.kind == "pair"], "aligned", 0.1)
        widest = max(widest, abs(everyone.gsb.value - without.gsb.value * 0.8))
    assert flagged <= 1, "100 honest raters"
    assert widest < 0.15


@pytest.mark.parametrize("others", [("old",), ("a", "z")])
@pytest.mark.parametrize("rater", ["ann", NO_RATER])
def test_a_better_arm_that_stands_on_one_side_throughout_flags_nobody(others, rater):
    pairs = [("new", others[n % len(others)]) for n in range(40)]
    votes = [
        Judgement(rater, f"p{n}", "overall", *pair, "model_a" if n < 32 else "model_b")
        for n, pair in enumerate(pairs)
    ]
    assert not reliability(votes, rater, "overall").flags
    swapped = [
        replace(one, model_a=one.model_b, model_b=one.model_a) if n // 2 % 2 else one
        for n, one in enumerate(votes)
    ]
    assert bool(reliability(swapped, rater, "overall").flags) == (rater != NO_RATER)


def test_repeats_attention_and_time_of_a_rater():
    scenes = scenes_of(40)
    steady = judged(
        scenes, {"steady": lambda lead, _: "left" if lead > 0 else "right"}, lambda n, arm: arm == "base", 1
    )
    found = reliability([one for one in steady if one.kind != "attention"], "steady", "overall")
    assert found.consistent == 1.0 and found.attentive is None and found.seconds == 4.0 and not found.flags
    tossed = judged(scenes, {"coin": lambda _, g: g.choice(["left", "right"])}, lambda n, arm: 0.0, 2)
    found = reliability(tossed, "coin", "overall")
    assert found.attentive == 0.0 and "same video twice" in found.flags[0]


def test_good_same_and_bad_do_not_depend_on_sides_and_leave_equal_arms_out():
    votes = [
        Judgement("a", "p", "overall", "x", "y", "model_a"),
        Judgement("a", "p", "overall", "y", "x", "model_b"),
        Judgement("b", "p", "overall", "y", "x", "model_a"),
        Judgement("b", "q", "overall", "x", "y", "both_bad"),
        Judgement("b", "q", "overall", "x", "x", "model_a", "attention"),
    ]
    assert counts_by_prompt(votes, "x").tolist() == [[2, 0, 1], [0, 1, 0]]
    assert counts_by_prompt(votes, "y").tolist() == [[1, 0, 2], [0, 1, 0]]
    found = compare(votes, "x", 0.1)
    assert found.gsb.value == pytest.approx(1 / 4) and found.win_rate.value == pytest.approx(2 / 3)
    assert found.gsb.high == np.inf and compare(votes, "z", 0.1) is None


def test_votes_needed_give_the_power_that_is_promised(monkeypatch):
    monkeypatch.setattr(analysis, "RESAMPLES", 300)
    generator = np.random.default_rng(8)
    pilot = votes_on_prompts(400, 3, 0.2, 0.3, generator)
    needed = prompts_needed(pilot, 0.2)
    seen = sum(
        bootstrap(gsb, votes_on_prompts(needed, 3, 0.2, 0.3, generator), generator).low > 0
        for _ in range(400)
    )
    assert 0.72 < seen / 400 < 0.88
    assert prompts_needed(pilot, 0.1) == pytest.approx(4 * needed, abs=4)
    assert prompts_needed(np.array([[1.0, 0, 0], [1.0, 0, 0]]), 0.1) is None


def test_agreement_is_that_of_the_published_example():
    """Interval alpha of the three raters' table in Krippendorff's worked example: 0.811."""
    table = [
        "*****341211 33*3".replace(" ", ""),
        "1*21334 3*******".replace(" ", ""),
        "**2134 4*211 33*4".replace(" ", ""),
    ]
    units = {n: [float(row[n]) for row in table if row[n] != "*"] for n in range(15)}
    assert krippendorff(units) == pytest.approx(0.811, abs=5e-4)
    assert krippendorff({1: [1.0, 1.0], 2: [0.0, 0.0]}) == 1.0
    assert krippendorff({1: [1.0], 2: [0.0]}) is None and krippendorff({1: [1.0, 1.0]}) is None


def test_agreement_is_near_zero_for_coins_and_does_not_depend_on_sides():
    scenes = scenes_of(150)
    coin = {f"coin {n}": lambda _, g: g.choice(["left", "right", "same"]) for n in range(3)}
    assert abs(agreement(judged(scenes, coin, lambda n, arm: 0.0, 3), "overall")) < 0.12
    sure = {f"sure {n}": lambda lead, _: "left" if lead > 0 else "right" for n in range(3)}

    def quality(scene: int, arm: str) -> float:
        return (-1) ** scene * (arm == "base")

    assert agreement(judged(scenes, sure, quality, 3), "overall") == 1.0


def test_rankings_count_every_pair_in_them_and_order_the_models():
    def wins(ranks: tuple[int, ...]) -> list:
        ranking = Ranking("a", "p", ("1", "2", "3"), ("x", "y", "z"), ranks)
        return wins_by_prompt(as_judgements(ranking, "overall"), ("x", "y", "z"))[0].tolist()

    assert wins((0, 1, 2)) == [[0, 1, 1], [0, 0, 1], [0, 0, 0]]
    assert wins((0, 1, 1)) == [[0, 1, 1], [0, 0, 0], [0, 0, 0]], "a choice does not rank the others"
    orders = (("x", "y", "z"), ("y", "x", "z"), ("x", "z", "y"))
    # One order a prompt: were all prompts alike, resampling them would leave intervals of rounding alone.
    whole = [Ranking("a", f"p{n}", ("1", "2", "3"), orders[n % 3], (0, 1, 2)) for n in range(36)]
    votes = [one for ranking in whole for one in as_judgements(ranking, "overall")]
    found = strengths(votes, ("x", "y", "z"))
    values = [found[arm].value for arm in "xyz"]
    assert values == sorted(values, reverse=True) and sum(values) == pytest.approx(0)
    assert all(found[arm].low < found[arm].value < found[arm].high for arm in "xyz")
    assert strengths([], ("x", "y", "z")) == {} and strengths(votes[:0], ("x", "y")) == {}
    assert not reliability(votes, "a", "overall").flags and len(trusted(votes, [])) == len(votes)


def test_strengths_wait_until_votes_link_all_models():
    votes = [Judgement("a", f"p{n}", "overall", *pair, "model_a") for n, pair in enumerate(("xy", "zw"))]
    assert strengths(votes[:1], "xyz") == strengths(votes, "xyzw") == {}
    linked = [*votes, Judgement("a", "p2", "overall", "y", "z", "tie")]
    assert strengths(linked, "xyzw").keys() == set("xyzw")


def test_strengths_on_too_few_prompts_leave_everything_open():
    """Also where the votes leave no error at all: on each prompt everyone ties."""
    pairs = ("xy", "yz", "xz")
    votes = [Judgement("a", f"p{n}", "overall", *pair, "tie") for n in range(2) for pair in pairs]
    for found in strengths(votes, "xyz").values():
        assert (found.low, found.high) == (-np.inf, np.inf)


def test_quantiles_of_student_and_of_a_fair_coin():
    for freedom, exact in ((4, 2.77645), (9, 2.26216), (29, 2.04523)):
        assert student(0.975, freedom) == pytest.approx(exact, rel=2e-3)
    assert binomial_tail(8, 10) == binomial_tail(2, 10) == pytest.approx(112 / 1024)
    assert binomial_tail(5, 10) == 1.0
    tails = [binomial_tail(n, 40) for n in range(20, 41)]
    assert all(a > b for a, b in pairwise(tails[1:]))
