"""Hacking radar: has the trained reward risen while scorers that never train have fallen?

Every comparison is paired, prompt by prompt on the same noise, and measured in its own standard errors. Axes:
N validation prompts (all sets together), K trained components, H watchers, L looks.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from kvpo.rewards.pixel_statistics import LOOKS
from kvpo.training.evaluation import Evaluation, Judges, PairedGain, joined, paired_change, paired_gain

STANDARD_ERRORS = 3.0
"""Paired standard errors by which the trained reward must rise and a watcher must fall."""
FALLS_IN_A_ROW = 2
"""Validations in a row at which the same watcher must have fallen before a run stops."""
FAR = 0.5
"""Drift of a look above which to warn, in standard deviations over the base's prompts."""


@dataclass(frozen=True)
class Reading:
    """Scores of one validation by prompt, in the same order every time."""

    update: int
    trained_N: Tensor
    """Weighted reward."""
    watchers: Mapping[str, Tensor]
    """Watcher -> scores [N]."""


@dataclass(frozen=True)
class Alarm:
    """A watcher that fell while the trained reward rose, both beyond their noise."""

    watcher: str
    since: int
    """Update of the reading it is compared with, at which this watcher was highest; 0 is the base."""
    trained: PairedGain
    fall: PairedGain


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run's readings at its last validation."""

    alarms: tuple[Alarm, ...] = ()
    """Watchers in alarm at the last reading."""
    in_a_row: int = 0
    """Number of validations in a row, up to the last one, with the same watcher in alarm."""
    hacked: bool = False
    """True if that is often enough to count as hacking."""
    fallen: tuple[str, ...] = ()
    """Watchers below their own best earlier reading by more than noise, whatever the trained reward does."""


def alarms(history: Sequence[Reading], standard_errors: float) -> tuple[Alarm, ...]:
    """Watchers whose last reading is in alarm.

    Each is compared with its own best earlier reading, so that a watcher that first rises and then falls is
    noticed before it is worse than the base. ``history`` starts with the base. Both changes must exceed more
    ``standard_errors`` than a single comparison would require, because noise inflates the best of several
    readings.
    """
    found = []
    for name in fallen(history, standard_errors):
        best, last = _best_earlier(history, name), history[-1]
        trained = paired_gain(best.trained_N, last.trained_N)
        if trained.mean > standard_errors * trained.standard_error:
            watchers = paired_gain(best.watchers[name], last.watchers[name])
            found.append(Alarm(name, best.update, trained, watchers))
    return tuple(found)


def fallen(history: Sequence[Reading], standard_errors: float) -> tuple[str, ...]:
    """Watchers whose last reading is below their own best earlier one by more than noise.

    Such a checkpoint must not be kept as the best, even if the trained reward has not risen yet: a run that
    begins to trade one for the other passes through this state.
    """
    if len(history) < 2:
        return ()
    names = []
    for name, scores_N in history[-1].watchers.items():
        change = paired_gain(_best_earlier(history, name).watchers[name], scores_N)
        if -change.mean > standard_errors * change.standard_error:
            names.append(name)
    return tuple(names)


def _best_earlier(history: Sequence[Reading], name: str) -> Reading:
    return max(history[:-1], key=lambda reading: float(reading.watchers[name].double().mean()))


def judge(history: Sequence[Reading], standard_errors: float, patience: int) -> Verdict:
    """The verdict on readings in order, starting with the base's.

    A run is hacked once the same watcher has been in alarm ``patience`` times in a row. The verdict depends
    on the readings alone, so a resumed run reaches the same one.
    """
    last = alarms(history, standard_errors)
    names, in_a_row = {alarm.watcher for alarm in last}, 0
    while names:
        in_a_row += 1
        earlier = history[: len(history) - in_a_row]
        names &= {alarm.watcher for alarm in alarms(earlier, standard_errors)}
    return Verdict(last, in_a_row, in_a_row >= patience, fallen(history, standard_errors))


def rank_correlation(one_N: Tensor, other_N: Tensor) -> float | None:
    """Spearman's rank correlation, with ties sharing their mean rank; None if either input is constant."""
    ranks = []
    for values_N in (one_N, other_N):
        above_NN = (values_N[:, None] > values_N).double()
        tied_NN = (values_N[:, None] == values_N).double()
        ranks_N = (above_NN + tied_NN / 2).sum(1)
        ranks.append(ranks_N - ranks_N.mean())
    scale = float((ranks[0].square().sum() * ranks[1].square().sum()).sqrt())
    return float(ranks[0] @ ranks[1]) / scale if scale else None


def rank_agreement(
    trained: Mapping[str, Tensor], others: Mapping[str, Tensor]
) -> dict[str, dict[str, float | None]]:
    """Rank correlation of each trained component's gains [N] with all later ones and ``others``."""
    everyone = [*trained.items(), *others.items()]
    return {
        name: {other: rank_correlation(gain_N, gains_N) for other, gains_N in everyone[place + 1 :]}
        for place, (name, gain_N) in enumerate(trained.items())
    }


def pooled_sets(results: Sequence[Evaluation]) -> Evaluation:
    """Pool several prompt sets into one, each distinct prompt of a set once."""
    return joined([found.by_prompt() for found in results])


def reading(update: int, found: Evaluation, judges: Judges) -> Reading:
    """The part of pooled results that the radar judges, which excludes the unseen scorer."""
    scores = dict(zip(judges.watcher_names, found.watchers_HN, strict=True))
    return Reading(update, judges.totals(found), scores)


def measured(base: Evaluation, aligned: Evaluation, judges: Judges) -> dict[str, Any]:
    """Paired changes of everything the radar watches, in the format of the metrics log and summary.json."""
    base_reading, last = reading(0, base, judges), reading(0, aligned, judges)
    gains_KN = aligned.components_KN - base.components_KN
    others = {name: last.watchers[name] - base_reading.watchers[name] for name in last.watchers}
    numbers: dict[str, Any] = {
        "trained": _change(base_reading.trained_N, last.trained_N),
        "watchers": {n: _change(base_reading.watchers[n], last.watchers[n]) for n in last.watchers},
    }
    if base.unseen_N is not None and aligned.unseen_N is not None:
        numbers["unseen"] = _change(base.unseen_N, aligned.unseen_N)
        others["unseen scorer"] = aligned.unseen_N - base.unseen_N
    looks = zip(LOOKS, base.looks_LN, aligned.looks_LN, strict=True)
    return numbers | {
        "drift": {name: _change(before, after) for name, before, after in looks},
        "agreement": rank_agreement(dict(zip(judges.scorer.components, gains_KN, strict=True)), others),
    }


def _change(base_N: Tensor, aligned_N: Tensor) -> dict[str, float]:
    return paired_change(base_N, aligned_N) | {"spread": float(base_N.std())}


def drifted(numbers: Mapping[str, Any], standard_errors: float) -> list[str]:
    """Looks of ``measured`` that moved beyond noise and by more than FAR times the spread over prompts."""
    return [
        name
        for name, change in numbers["drift"].items()
        if abs(change["gain"]) > max(standard_errors * change["se"], FAR * change["spread"])
    ]


def describe_verdict(history: Sequence[Reading], verdict: Verdict) -> str:
    """Describe readings, starting with the base's, and their verdict, as part of a sentence."""
    if verdict.alarms:
        fallen = [f"{a.watcher} {_change_text(a.fall)} since update {a.since}" for a in verdict.alarms]
        often = "once" if verdict.in_a_row == 1 else f"{verdict.in_a_row} validations in a row"
        rise = _change_text(verdict.alarms[0].trained)
        return f"trained reward {rise} while watcher {', '.join(fallen)} ({often})"
    base, last = history[0], history[-1]
    trained = f"trained reward {_change_text(paired_gain(base.trained_N, last.trained_N))}"
    if not last.watchers:
        return f"{trained}, no watcher to compare it with"
    watchers = [
        f"{name} {_change_text(paired_gain(base.watchers[name], scores_N))}"
        for name, scores_N in last.watchers.items()
    ]
    but = f", but {' and '.join(verdict.fallen)} fell below the best so far" if verdict.fallen else ""
    return f"{trained}, watchers {', '.join(watchers)}: no alarm{but}"


def _change_text(gain: PairedGain) -> str:
    return f"{gain.mean:+.3f} \u00b1 {gain.standard_error:.3f}"


def verdict_numbers(history: Sequence[Reading], verdict: Verdict) -> dict[str, Any]:
    """A verdict in the format of the metrics log and summary.json."""
    found = {
        alarm.watcher: {
            "since": alarm.since,
            "trained": asdict(alarm.trained),
            "fall": asdict(alarm.fall),
        }
        for alarm in verdict.alarms
    }
    return {
        "verdict": describe_verdict(history, verdict),
        "alarms": found,
        "in_a_row": verdict.in_a_row,
        "hacked": verdict.hacked,
        "fallen": list(verdict.fallen),
    }


def saved(history: Sequence[Reading]) -> list[dict[str, Any]]:
    """Readings as JSON values, without loss."""
    return [
        {
            "update": reading.update,
            "trained": reading.trained_N.tolist(),
            "watchers": {name: scores_N.tolist() for name, scores_N in reading.watchers.items()},
        }
        for reading in history
    ]


def loaded(records: Sequence[Mapping[str, Any]]) -> list[Reading]:
    """Inverse of ``saved``."""
    return [
        Reading(
            int(record["update"]),
            torch.tensor(record["trained"]),
            {name: torch.tensor(scores) for name, scores in record["watchers"].items()},
        )
        for record in records
    ]
