"""Analyses the votes of a study: which arm wins, how certain that is, and which raters to trust.

All functions are pure. Axes: P prompts, R resamples, M models. A vote is good for an arm (G), bad for it (B),
or neither (S, both "same" and "both bad"), as in the field's user studies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import comb, inf, sqrt
from statistics import NormalDist, median

import numpy as np

from kvpo.arena.judgements import NO_RATER, Judgement

RESAMPLES = 2000
INTERVAL_PROMPTS = 6
"""Fewest prompts for which an interval is given."""
LEVEL = 0.95
POWER = 0.8
SUSPICIOUS = 1e-3
"""A rater is flagged if a fair coin would be at least as lopsided with a probability below this."""
ATTENTIVE = 0.5
"""Least share of attention pairs that a rater must call the same."""


@dataclass(frozen=True)
class Interval:
    """An estimate with its interval at ``LEVEL``."""

    value: float
    low: float
    high: float


def student(probability: float, freedom: int) -> float:
    """Quantile of Student's t (Abramowitz and Stegun 26.7.5), within 2 % from three degrees of freedom up."""
    z = NormalDist().inv_cdf(probability)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / freedom ** (power + 1) for power, term in enumerate(terms))


def expanded_tail(prompts: int) -> float:
    """Share of resamples beyond each end of an interval at ``LEVEL``, from two prompts up.

    Phi(-sqrt(n / (n - 1)) t): as small as Student's t requires for few prompts (Hesterberg 2015, the expanded
    percentile interval); plain percentiles of six prompts cover the truth in 85 % of all cases.
    """
    return NormalDist().cdf(-sqrt(prompts / (prompts - 1)) * student((1 + LEVEL) / 2, prompts - 1))


def counts_by_prompt(judgements: Sequence[Judgement], arm: str) -> np.ndarray:
    """Good, same and bad votes of ``arm`` against the others, by prompt: [P, 3]."""
    found: dict[str, list[int]] = {}
    for one in judgements:
        if one.model_a == one.model_b or arm not in (one.model_a, one.model_b):
            continue
        row = found.setdefault(one.prompt, [0, 0, 0])
        own = "model_a" if one.model_a == arm else "model_b"
        row[0 if one.winner == own else 2 if one.winner in ("model_a", "model_b") else 1] += 1
    return np.array(list(found.values()), float).reshape(-1, 3)


def gsb(totals: np.ndarray) -> np.ndarray:
    """(G - B) / (G + S + B) of sums [..., 3]."""
    return (totals[..., 0] - totals[..., 2]) / totals.sum(-1)


def win_rate(totals: np.ndarray) -> np.ndarray:
    """G / (G + B), the good share of decided votes, of sums [..., 3]; a half if none is decided."""
    decided = totals[..., 0] + totals[..., 2]
    return np.where(decided > 0, totals[..., 0] / np.maximum(decided, 1), 0.5)


def bootstrap(
    statistic: Callable[[np.ndarray], np.ndarray], counts_P3: np.ndarray, generator: np.random.Generator
) -> Interval:
    """A statistic of the votes summed over prompts, with a bootstrap interval that resamples whole prompts.

    The percentiles are widened for few prompts (`expanded_tail`). If all resamples are equal, as with
    unanimous votes, each end assumes the largest share of all-good or all-bad prompts that this many prompts
    would miss with the probability of one tail. With fewer than ``INTERVAL_PROMPTS`` prompts the interval is
    infinite.
    """
    prompts, total_3 = len(counts_P3), counts_P3.sum(0)
    value = float(statistic(total_3))
    if prompts < INTERVAL_PROMPTS:
        return Interval(value, -inf, inf)
    drawn_RP = generator.multinomial(prompts, np.full(prompts, 1 / prompts), size=RESAMPLES)
    values_R, tail = statistic(drawn_RP @ counts_P3), expanded_tail(prompts)
    low, high = np.quantile(values_R, [tail, 1 - tail])
    if low == high:
        seen = ((1 - LEVEL) / 2) ** (1 / prompts)
        low, high = statistic(seen * total_3 + (1 - seen) * total_3.sum() * np.eye(3)[[2, 0]])
    return Interval(value, float(low), float(high))


@dataclass(frozen=True)
class Comparison:
    """The votes for and against one arm on one question, with their statistics."""

    good: int
    same: int
    bad: int
    prompts: int
    win_rate: Interval
    gsb: Interval
    prompts_needed: int | None
    """Prompts needed to detect a difference of ``effect``; None if it cannot be estimated yet."""
    votes_needed: int | None
    """Votes on that many prompts, with as many per prompt as now."""


def compare(judgements: Sequence[Judgement], arm: str, effect: float, seed: int = 0) -> Comparison | None:
    """Compare ``arm`` with every arm that it met in ``judgements``; None without a vote.

    Args:
        effect: the smallest (G - B) / (G + S + B) that matters.
    """
    counts = counts_by_prompt(judgements, arm)
    if not len(counts):
        return None
    generator = np.random.default_rng(seed)
    good, same, bad = counts.sum(0).astype(int).tolist()
    needed = prompts_needed(counts, effect)
    return Comparison(
        good,
        same,
        bad,
        len(counts),
        bootstrap(win_rate, counts, generator),
        bootstrap(gsb, counts, generator),
        needed,
        None if needed is None else round(needed * counts.sum() / len(counts)),
    )


def prompts_needed(counts_P3: np.ndarray, effect: float) -> int | None:
    """Prompts needed to detect a true (G - B) / (G + S + B) of ``effect`` with probability ``POWER``.

    (z_level + z_power)² s² / effect², where s is the standard deviation over prompts of a prompt's linearised
    contribution to the statistic. None with fewer than two prompts, or if all prompts agree.
    """
    if len(counts_P3) < 2:
        return None
    votes_P = counts_P3.sum(1)
    added_P = (counts_P3[:, 0] - counts_P3[:, 2] - gsb(counts_P3.sum(0)) * votes_P) / votes_P.mean()
    spread = added_P.std(ddof=1)
    reach = NormalDist().inv_cdf((1 + LEVEL) / 2) + NormalDist().inv_cdf(POWER)
    return int(np.ceil((reach * spread / effect) ** 2)) if spread > 0 else None


def wins_by_prompt(judgements: Sequence[Judgement], models: Sequence[str]) -> np.ndarray:
    """Wins of row over column, by prompt: [P, M, M]; a tie is half a win for each."""
    place = {model: n for n, model in enumerate(models)}
    found: dict[str, np.ndarray] = {}
    for one in judgements:
        if one.model_a != one.model_b:
            table = found.setdefault(one.prompt, np.zeros((len(models), len(models))))
            share = {"model_a": 1.0, "model_b": 0.0}.get(one.winner, 0.5)
            table[place[one.model_a], place[one.model_b]] += share
            table[place[one.model_b], place[one.model_a]] += 1 - share
    return np.stack(list(found.values())) if found else np.zeros((0, len(models), len(models)))


def bradley_terry(wins_PMM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Log-strengths of models, mean 0, and their standard errors: [..., M] each, from wins [..., P, M, M].

    P(i beats j) = 1 / (1 + exp(s_j - s_i)) (Bradley and Terry 1952), fitted by Newton's method. One tie is
    added to every pair that met, so that a model that always won stays finite. Votes have to link all models.
    The errors are sandwich estimates clustered by prompt, since votes on one prompt may be dependent.
    """
    wins = wins_PMM.sum(-3)
    met = wins + np.swapaxes(wins, -1, -2)
    wins = wins + 0.5 * (met > 0)
    met = wins + np.swapaxes(wins, -1, -2)
    models = wins.shape[-1]
    strengths = np.zeros(wins.shape[:-1])
    level = np.full((models, models), 1 / models)  # fixes the mean, which votes do not determine
    for _ in range(30):
        expected = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))
        slope = (wins - met * expected).sum(-1)
        information = _information(met, expected) + level
        strengths = strengths + np.clip(np.linalg.solve(information, slope[..., None])[..., 0], -1, 1)
    expected = 1 / (1 + np.exp(strengths[..., None, :] - strengths[..., :, None]))
    bread = np.linalg.inv(_information(met, expected) + level)
    met_PMM = wins_PMM + np.swapaxes(wins_PMM, -1, -2)
    scores_PM = (wins_PMM - met_PMM * expected[..., None, :, :]).sum(-1)
    prompts = wins_PMM.shape[-3]
    meat = np.swapaxes(scores_PM, -1, -2) @ scores_PM * (prompts / max(1, prompts - 1))
    errors = np.sqrt(np.clip(np.diagonal(bread @ meat @ bread, axis1=-2, axis2=-1), 0, None))
    return strengths - strengths.mean(-1, keepdims=True), errors


def _information(met: np.ndarray, expected: np.ndarray) -> np.ndarray:
    weights = met * expected * (1 - expected)
    return np.eye(weights.shape[-1]) * weights.sum(-1)[..., None] - weights


def strengths(judgements: Sequence[Judgement], models: Sequence[str]) -> dict[str, Interval]:
    """Bradley-Terry log-strengths of the models with intervals.

    Empty for fewer than three models, and until votes link all of them: models that never met, directly or
    through others, cannot be compared.
    """
    wins = wins_by_prompt(judgements, models)
    met = (wins.sum(0) + wins.sum(0).T > 0) | np.eye(len(models), dtype=bool)
    if len(models) < 3 or not np.linalg.matrix_power(met, len(models)).all():
        return {}
    values, errors = bradley_terry(wins)
    enough = len(wins) >= INTERVAL_PROMPTS
    ends = student((1 + LEVEL) / 2, len(wins) - 1) * errors if enough else np.full_like(errors, inf)
    return {
        model: Interval(float(value), float(value - end), float(value + end))
        for model, value, end in zip(models, values, ends, strict=True)
    }


def krippendorff(units: Mapping[object, Sequence[float]]) -> float | None:
    """Krippendorff's alpha for interval data: unit -> one value per rater who judged it.

    1 - D_o / D_e with squared differences (Krippendorff 2011); 1 is perfect agreement, 0 chance. None if
    no unit has two raters, or no two values differ.
    """
    paired = [np.asarray(values, float) for values in units.values() if len(values) > 1]
    if not paired:
        return None
    every = np.concatenate(paired)
    # the sum of squared differences over ordered pairs is 2 n² times the variance
    observed = sum(2 * len(v) ** 2 * v.var() / (len(v) - 1) for v in paired) / len(every)
    expected = 2 * len(every) ** 2 * every.var() / (len(every) * (len(every) - 1))
    return float(1 - observed / expected) if expected > 0 else None


Unit = tuple[str, str, tuple[str, str], tuple[str, str]]
"""(prompt, question, (arm, digest), (arm, digest)), the two videos ordered by digest."""


def preferences(judgements: Sequence[Judgement]) -> dict[Unit, dict[str, list[float]]]:
    """Unit -> rater -> votes: 1 for the first video, -1 for the other, 0 for neither, on either side."""
    found: dict[Unit, dict[str, list[float]]] = {}
    for one in judgements:
        if one.kind == "attention":
            continue
        first, other = (one.model_a, one.video_a), (one.model_b, one.video_b)
        value = {"model_a": 1.0, "model_b": -1.0}.get(one.winner, 0.0)
        if other[::-1] < first[::-1]:
            first, other, value = other, first, -value
        raters = found.setdefault((one.prompt, one.question, first, other), {})
        raters.setdefault(one.rater, []).append(value)
    return found


def agreement(judgements: Sequence[Judgement], question: str) -> float | None:
    """Krippendorff's alpha between raters on one question; for a repeated pair, the first answer counts."""
    return krippendorff(
        {
            unit: [values[0] for values in raters.values()]
            for unit, raters in preferences(judgements).items()
            if unit[1] == question
        }
    )


@dataclass(frozen=True)
class Reliability:
    """A rater's voting habits, whichever arm wins."""

    rater: str
    votes: int
    left_share: float | None
    """Share of decided votes that went to the left side; None without one."""
    consistent: float | None
    """Share of repeated answers that chose the same video again; None without a repeat."""
    attentive: float | None
    """Share of answers on attention pairs that were "same"; None without one."""
    seconds: float
    """Median time of a ballot, in seconds."""
    flags: tuple[str, ...]
    """Reasons why this rater's votes do not count."""


def reliability(judgements: Sequence[Judgement], rater: str, question: str) -> Reliability:
    """A rater's habits in answers to ``question``, measured without looking at which arm wins.

    Only one question is used, since answers to several about one pair are not independent. Side bias is
    flagged only if the sides of every arm look randomly drawn: an imported table may always have the better
    arm on one side. It is never flagged for votes without a rater, which may come from many people.
    """
    own = [one for one in judgements if one.rater == rater and one.question == question]
    own = [one for one in own if one.kind != "ranking"]
    decided = [one.winner == "model_a" for one in own if one.winner in ("model_a", "model_b")]
    left = sum(decided) / len(decided) if decided else None
    repeated = [
        values for raters in preferences(own).values() for values in raters.values() if len(values) > 1
    ]
    again = [value == values[0] for values in repeated for value in values[1:]]
    same = [one.winner == "tie" for one in own if one.kind == "attention"]
    attentive = sum(same) / len(same) if same else None
    flags = []
    sides = [(one.model_a, one.model_b) for one in own if one.model_a != one.model_b]
    drawn = all(
        binomial_tail(sum(arm == side for side, _ in sides), sum(arm in pair for pair in sides)) >= SUSPICIOUS
        for arm in {arm for pair in sides for arm in pair}
    )
    if rater != NO_RATER and drawn and binomial_tail(sum(decided), len(decided)) < SUSPICIOUS:
        side = "left" if left is not None and left > 0.5 else "right"
        flags.append(f"votes for the {side} side whatever is shown there")
    if attentive is not None and attentive < ATTENTIVE:
        flags.append("calls most attention pairs, the same video twice, different")
    times = [one.milliseconds / 1000 for one in own if one.milliseconds > 0]
    return Reliability(
        rater,
        len(own),
        left,
        sum(again) / len(again) if again else None,
        attentive,
        median(times) if times else 0.0,
        tuple(flags),
    )


def trusted(judgements: Sequence[Judgement], raters: Sequence[Reliability]) -> list[Judgement]:
    """The votes that count: first showings of different videos, and rankings, by raters without flags."""
    flagged = {one.rater for one in raters if one.flags}
    return [one for one in judgements if one.kind in ("pair", "ranking") and one.rater not in flagged]


def binomial_tail(successes: int, trials: int) -> float:
    """Two-sided probability that a fair coin lands at least as far from half of the trials."""
    far = max(successes, trials - successes)
    return min(1.0, 2 * sum(comb(trials, n) for n in range(far, trials + 1)) / 2**trials)
