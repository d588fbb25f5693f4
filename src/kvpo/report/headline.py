"""The change on held-out prompts, in numbers and in one sentence."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean
from typing import Any

from kvpo.files import counted
from kvpo.report.charts import interval
from kvpo.report.elements import verdict_box
from kvpo.report.formatting import duration, escape, fixed, mapping, number, numbers, percent, signed
from kvpo.report.null_runs import is_null_control, over_seeds, said_of
from kvpo.report.record import Entry, RunRecord, method_of

LENGTHS = {"short": "one prompt", "long": "several prompts with switches"}
SIGNIFICANT = 3.0
"""Fewest standard errors from zero at which a change is reported as one."""
FEWEST_PROMPTS = 16
"""Fewest distinct prompts to report a change; with fewer, the standard error itself is uncertain."""


NO_IMPROVEMENT = (
    "No improvement: no validation beat the base, so the best checkpoint is the base itself, which "
    "the test results compare with itself."
)


NO_NULL = (
    "The \u00b1 is over prompts alone: it leaves out how much runs that learn nothing differ between seeds. "
    "There are no null runs of these settings to compare with; kvpo report --null FILE names some."
)


@dataclass(frozen=True)
class Outcome:
    """One held-out comparison of base and aligned; missing numbers are None."""

    name: str
    prompts: float | None
    base_mean: float | None
    aligned_mean: float | None
    gain: float | None
    standard_error: float | None
    improved: float | None
    unseen_gain: float | None
    unseen_error: float | None
    wrong_gain: float | None
    """The gain when every video is scored against another prompt's captions; None: not measured."""
    wrong_error: float | None
    components: dict[str, dict[str, float]]
    null: tuple[float, ...] = ()
    """Gains of null runs of the same settings; empty: none are known."""

    @property
    def standard_errors(self) -> float | None:
        """The gain in standard errors; None if either is missing or the error is zero."""
        if self.gain is None or not self.standard_error:
            return None
        return self.gain / self.standard_error

    @property
    def doubt(self) -> str:
        """The reason why nothing can be concluded about the gain; empty if something can."""
        if self.prompts is None or self.prompts < FEWEST_PROMPTS:
            count = "an unknown number of" if self.prompts is None else f"{self.prompts:.0f}"
            return f"{count} distinct prompts, fewer than {FEWEST_PROMPTS}"
        if self.standard_errors is None:
            return "no standard error"
        if abs(self.standard_errors) < SIGNIFICANT:
            return f"{fixed(self.standard_errors, 1)} standard errors from zero, fewer than {SIGNIFICANT:.0f}"
        if self.null and self.gain is not None:
            least, most = min(self.null), max(self.null)
            if least <= self.gain <= most:
                return "inside the range of the null runs"
            if self.gain > 0 and self.gain < least:
                return "below every null run"
            if self.gain < 0 and self.gain > most:
                return "above every null run"
        return ""

    @property
    def direction(self) -> int:
        """+1 for better, -1 for worse, 0 if it cannot be told."""
        return 0 if self.doubt or not self.gain else 1 if self.gain > 0 else -1


@dataclass(frozen=True)
class Headline:
    """The sentence at the top of the page, its tone (good, neutral, bad, pending) and reservations."""

    tone: str
    sentence: str
    notes: tuple[str, ...]

    @property
    def text(self) -> str:
        """Sentence and reservations."""
        return " ".join((self.sentence, *self.notes))


def read_outcome(name: str, entry: Any, null: Sequence[float] = ()) -> Outcome | None:
    """An Outcome from a summary or validation entry; None if ``entry`` holds no gain."""
    found = numbers(entry)
    if "paired_gain" not in found:
        return None
    return Outcome(
        name=name,
        prompts=found.get("prompts"),
        base_mean=found.get("base_mean"),
        aligned_mean=found.get("aligned_mean"),
        gain=found["paired_gain"],
        standard_error=found.get("paired_se"),
        improved=found.get("improved_fraction"),
        unseen_gain=found.get("unseen_scorer_gain"),
        unseen_error=found.get("unseen_scorer_se"),
        wrong_gain=found.get("wrong_caption_gain"),
        wrong_error=found.get("wrong_caption_se"),
        components={
            str(key): pair
            for key, value in mapping(entry, "components").items()
            if {"base", "aligned"} <= (pair := numbers(value)).keys()
        },
        null=tuple(null),
    )


def read_outcomes(run: RunRecord) -> tuple[list[Outcome], str]:
    """The run's outcomes and where they come from: 'test', 'validation' (unfinished run) or 'none'."""
    if outcomes := tested(run.summary or {}):
        return outcomes, "test"
    latest = run.validations[-1] if run.validations else {}
    return (outcomes, "validation") if (outcomes := _outcomes(latest, {})) else ([], "none")


def tested(summary: Entry) -> list[Outcome]:
    """The outcomes of a summary, each with the gains of its null runs."""
    return _outcomes(mapping(summary, "held_out"), mapping(summary, "null"))


def _outcomes(entries: Entry, null: Entry) -> list[Outcome]:
    """The outcome of every prompt set in ``entries``, with the gains of its null runs."""
    every = (read_outcome(name, entries.get(name), null.get(name, ())) for name in LENGTHS)
    return [outcome for outcome in every if outcome is not None]


def _change(outcome: Outcome) -> str:
    said = f"{signed(outcome.gain)} \u00b1 {fixed(outcome.standard_error)} on {outcome.name} videos"
    return f"{said} ({said_of(outcome.null)})" if outcome.null else said


def headline_on(outcomes: list[Outcome], *, null_control: bool = False, validation: bool = False) -> Headline:
    """The verdict in plain words; a change that may be due to chance is never reported as one."""
    if not outcomes:
        return Headline(
            "pending", "There is no held-out result yet, so nothing can be said about the gain.", ()
        )
    better, worse = ([_change(o) for o in outcomes if o.direction == sign] for sign in (1, -1))
    doubtful = [f"{_change(o)} ({o.doubt})" for o in outcomes if not o.direction]
    parts = []
    if better:
        parts.append(f"Alignment raised the held-out reward: {' and '.join(better)}.")
    if worse:
        parts.append(f"Alignment lowered the held-out reward: {' and '.join(worse)}.")
    if doubtful:
        said = "These results cannot tell whether alignment changed the held-out reward"
        parts.append(f"{said}: {' and '.join(doubtful)}.")
    tone = "bad" if worse else "good" if better and not doubtful else "neutral"
    notes = []
    if null_control:
        tone = "neutral" if tone == "good" else tone
        notes.append(
            "This is the null control: advantages were shuffled within each group, so a gain here is not "
            "learning."
        )
    elif not validation and not all(o.null for o in outcomes):
        notes.append(NO_NULL)
    if validation:
        tone = "pending" if tone == "good" else tone
        notes.append(
            "The run has not finished. These are validation prompts, which also choose the checkpoint; the "
            "test prompts are used once, at the end."
        )
    notes += [
        f"The unseen scorer fell by {fixed(-o.unseen_gain)} \u00b1 {fixed(o.unseen_error)} on {o.name} "
        "videos: the reward may have been gamed rather than the videos improved."
        for o in outcomes
        if o.unseen_gain is not None
        and o.unseen_error is not None
        and (o.prompts or 0) >= FEWEST_PROMPTS
        and o.unseen_gain < -SIGNIFICANT * o.unseen_error
    ]
    return Headline(tone, " ".join(parts), tuple(notes))


def _axis(changes: list[tuple[float | None, float | None]]) -> tuple[float, float]:
    """One axis range for several (change, standard error) pairs, including zero."""
    ends = [0.0]
    for value, error in changes:
        if value is not None:
            ends += [value - 2.4 * (error or 0), value + 2.4 * (error or 0)]
    margin = 0.05 * (max(ends) - min(ends)) or 1.0
    return min(ends) - margin, max(ends) + margin


def _facts(outcome: Outcome, to_one: bool) -> str:
    facts = []
    if outcome.standard_errors is not None:
        facts.append(f"{fixed(outcome.standard_errors, 1)} standard errors from zero")
    if to_one and outcome.direction > 0 and outcome.base_mean is not None and outcome.base_mean < 1:
        assert outcome.gain is not None
        facts.append(f"{percent(outcome.gain / (1 - outcome.base_mean))} of what was missing to 1")
    if outcome.prompts is not None:
        facts.append(f"{outcome.prompts:.0f} distinct prompts")
    return " \u00b7 ".join(facts)


def _measure(name: str, value: str, chart: str) -> str:
    return f'<div class="measure"><span>{name}</span><span>{value}</span>{chart}</div>'


def _change_measure(
    name: str,
    value: float,
    error: float | None,
    axis: tuple[float, float],
    *,
    tone: str = "flat",
    colour: str = "aligned",
) -> str:
    """A change and its standard error, in numbers and drawn."""
    bars = [(value - n * error, value + n * error) for n in (2, 1)] if error is not None else []
    label = f"{signed(value)}, standard error {fixed(error)}"
    about = f'<b class="{tone}">{signed(value)}</b> <span class="soft">\u00b1 {fixed(error)}</span>'
    return _measure(name, about, interval(value, bars, axis, label=label, colour=colour))


def _card(
    outcome: Outcome, gain_axis: tuple[float, float], unseen_axis: tuple[float, float], *, to_one: bool
) -> str:
    """One prompt set's numbers; ``to_one``: no video can have a reward above 1."""
    tone = {1: "up", -1: "down"}.get(outcome.direction, "flat")
    assert outcome.gain is not None
    measures = _change_measure("Paired gain", outcome.gain, outcome.standard_error, gain_axis, tone=tone)
    if (gain := outcome.unseen_gain) is not None:
        measures += _change_measure("Unseen scorer", gain, outcome.unseen_error, unseen_axis, colour="unseen")
    if (gain := outcome.wrong_gain) is not None:
        measures += _change_measure("With a wrong caption", gain, outcome.wrong_error, gain_axis)
    if outcome.null:
        name, error = f"{counted(len(outcome.null), 'null run')}, over seeds", over_seeds(outcome.null)
        measures += _change_measure(name, mean(outcome.null), error, gain_axis, colour="base")
    if outcome.improved is not None:
        width = f"{min(100.0, max(0.0, 100 * outcome.improved)):.1f}%"
        chart = f'<div class="share"><i style="width:{width}"></i><i class="half" title="one half"></i></div>'
        measures += _measure("Videos improved", f"<b>{percent(outcome.improved)}</b>", chart)
    return (
        f'<article class="card outcome"><h3>{outcome.name.capitalize()} videos '
        f'<span class="soft">{LENGTHS[outcome.name]}</span></h3><p class="from-to">'
        f'<span class="base-number">{fixed(outcome.base_mean)}</span><span class="arrow">\u2192</span>'
        f'<span class="aligned-number">{fixed(outcome.aligned_mean)}</span>'
        '<span class="soft">mean held-out reward, base \u2192 aligned</span></p>'
        f'{measures}<p class="facts">{_facts(outcome, to_one)}</p></article>'
    )


def _run_facts(run: RunRecord) -> str:
    summary = numbers(run.summary)
    last = number(run.updates[-1].get("update")) if run.updates else None
    memory, resumed = summary.get("peak_rss_mb"), summary.get("resumed_at")
    since = f" since update {resumed:.0f}" if resumed else ""
    facts = [
        ("method", method_of(run) or "n/a"),
        ("preset", str(run.config.get("preset", "n/a"))),
        ("seed", str(run.config.get("seed", "n/a"))),
        ("updates", f"{last:.0f}" if last else "0"),
        (f"wall time{since}", duration(summary.get("wall_s"))),
        (f"CPU time{since}", duration(summary.get("cpu_s"))),
        ("peak memory", f"{memory / 1024:.2f} GB" if memory is not None else "n/a"),
    ]
    items = "".join(f"<div><dt>{name}</dt><dd>{escape(value)}</dd></div>" for name, value in facts)
    return f'<dl class="run-facts">{items}</dl>'


def final_headline(summary: Entry, config: Entry) -> Headline:
    """The verdict on the held-out results of a summary, for a run with this configuration."""
    if summary.get("improved") is False:
        return Headline("neutral", NO_IMPROVEMENT, ())
    return headline_on(tested(summary), null_control=is_null_control(config))


def ends_at_one(config: Entry) -> bool:
    """True if no reward can exceed 1: only that of the embedded world, with its default weights."""
    rewards = mapping(config, "rewards")
    return list(rewards.get("scorers", ())) == ["world"] and not rewards.get("weights")


def idle_note(run: RunRecord) -> list[str]:
    """A note on the number of updates that learned nothing, if it is one in ten or more."""
    coverage = [number(entry.get("gradient_coverage")) for entry in run.updates]
    idle = sum(value == 0 for value in coverage)
    if not idle or 10 * idle < len(coverage):
        return []
    return [f"Nothing was learned in {idle} of {len(coverage)} updates: no trained group, or no gradient."]


def headline(run: RunRecord) -> str:
    """The verdict, a card each for short and long videos, and the cost of the run."""
    outcomes, source = read_outcomes(run)
    verdict = headline_on(
        outcomes, null_control=is_null_control(run.config), validation=source == "validation"
    )
    stopped = numbers(mapping(run.summary, "radar")).get("stopped_at")
    radar = [] if stopped is None else [f"The hacking radar stopped this run after update {stopped:.0f}."]
    radar += idle_note(run)
    if run.summary and run.summary.get("improved") is False:
        verdict = final_headline(run.summary, run.config)
    gain_axis = _axis([(o.gain, o.standard_error) for o in outcomes])
    unseen_axis = _axis([(o.unseen_gain, o.unseen_error) for o in outcomes])
    to_one = ends_at_one(run.config)
    cards = "".join(_card(outcome, gain_axis, unseen_axis, to_one=to_one) for outcome in outcomes)
    legend = (
        "Bars: one and two standard errors over distinct prompts; the upright line is zero. The gain is "
        "paired: same prompt, same noise. The unseen scorer looks at pixels only and is never used for "
        "training, selection or stopping. A gain that is as large with a wrong caption, another prompt's, "
        "comes from looks, not from what was asked for."
    )
    return (
        verdict_box(verdict.tone, verdict.sentence, (*radar, *verdict.notes), symbol=True)
        + f'<div class="pair">{cards}</div>'
        + (f'<p class="note">{legend}</p>' if outcomes else "")
        + _run_facts(run)
    )
