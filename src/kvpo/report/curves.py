"""Reward curves, components and training diagnostics."""

from collections import Counter

from kvpo.report.charts import Series, line_chart, paired_bars, small_figure
from kvpo.report.formatting import compact, escape, mapping, number, numbers, title_of
from kvpo.report.headline import LENGTHS, read_outcome, read_outcomes
from kvpo.report.record import Entry, RunRecord

NOT_METRICS = {"kind", "update", "time", "phases"}
RATIOS = {"ratio_mean", "ratio_max"}
"""Metrics on the scale of the clip range."""


def reward_curves(run: RunRecord) -> str:
    """Held-out reward over updates, base and aligned, with bands of one and two paired standard errors."""
    charts = []
    for name, meaning in LENGTHS.items():
        points = [
            (number(entry["update"]), outcome)
            for entry in run.validations
            if (outcome := read_outcome(name, entry.get(name))) is not None
        ]
        if not points:
            continue
        updates = [update for update, _ in points if update is not None]
        aligned = Series(
            "aligned",
            [o.aligned_mean for _, o in points],
            "aligned",
            spread=[o.standard_error for _, o in points],
        )
        base = Series("base", [o.base_mean for _, o in points], "base", dashed=True)
        chart = line_chart(updates, [aligned, base], label=f"held-out reward on {name} videos over updates")
        charts.append(
            f'<figure class="card"><figcaption><h3>{name.capitalize()} videos '
            f'<span class="soft">{meaning}</span></h3><span class="legend"><i class="aligned"></i>aligned '
            f'<i class="base"></i>base</span></figcaption><div class="tall">{chart}</div>'
            '<p class="axis">updates</p></figure>'
        )
    if not charts:
        return '<p class="missing">No validation has been written to metrics.jsonl yet.</p>'
    return (
        f'<div class="pair">{"".join(charts)}</div><p class="note">Bands: one and two standard errors of the '
        "paired gain. Validation prompts also choose the checkpoint; the headline uses test prompts.</p>"
    )


def components(run: RunRecord) -> str:
    """Reward components before and after, sorted by gain."""
    outcomes, source = read_outcomes(run)
    cards = [
        f'<figure class="card"><figcaption><h3>{outcome.name.capitalize()} videos</h3><span class="legend">'
        '<i class="base"></i>base <i class="aligned"></i>aligned</span></figcaption>'
        + paired_bars(
            [(key, pair["base"], pair["aligned"], pair.get("se")) for key, pair in outcome.components.items()]
        )
        + "</figure>"
        for outcome in outcomes
        if outcome.components
    ]
    if not cards:
        return '<p class="missing">No components have been reported yet.</p>'
    note = "Validation prompts, last evaluation." if source == "validation" else "Held-out test prompts."
    return f'<div class="pair">{"".join(cards)}</div><p class="note">{note} Sorted by gain.</p>'


def _panel(key: str, meaning: str, updates: list[Entry], references: list[tuple[str, float]]) -> str:
    """A chart of one metric over updates, with the sentence that explains it (empty if there is none)."""
    title, values = title_of(key), [number(entry.get(key)) for entry in updates]
    present = [value for value in values if value is not None]
    broken = sum(key in entry for entry in updates) - len(present)
    alarm = f'<span class="alarm">{broken} not finite</span>' if broken else ""
    latest = f'<span class="latest">{compact(present[-1])}</span>' if present else ""
    x, line = [float(entry["update"]) for entry in updates], Series(title, values, "plain")
    chart = line_chart(x, [line], label=title, references=references, y_ticks=3)
    return small_figure(title, alarm + latest, chart, meaning)


def _counts(key: str, meaning: str, updates: list[Entry]) -> str:
    """A metric that consists of named counts, such as forks by frame, summed over the updates."""
    total: Counter[str] = Counter()
    for entry in updates:
        total.update(numbers(entry.get(key)))
    most = max(total.values(), default=0) or 1
    rows = "".join(
        f'<div><dt>{escape(name)}</dt><dd><i class="share"><i style="width:{100 * count / most:.1f}%">'
        f"</i></i></dd><dd>{compact(count)}</dd></div>"
        for name, count in sorted(total.items(), key=lambda item: (len(item[0]), item[0]))
    )
    return small_figure(title_of(key), "", f'<dl class="counts">{rows}</dl>', meaning)


def _clip_range(run: RunRecord) -> list[tuple[str, float]]:
    """Bounds at which ratios are clipped; empty if the run's settings have none."""
    match mapping(run.config, "objective").get("clip"):
        case [int() | float() as low, int() | float() as high]:
            return [("clip", 1 - low), ("clip", 1 + high)]
        case _:
            return []


def diagnostics(run: RunRecord) -> str:
    """Small multiples of every number in the update lines, with the headings and meanings that the run wrote.

    Numbers without a meaning come last, under 'Other'.
    """
    if not run.updates:
        return '<p class="missing">No update has been written to metrics.jsonl yet.</p>'
    keys = {key: None for entry in run.updates for key in entry if key not in NOT_METRICS}
    known = {key for metrics in run.meanings.values() for key in metrics}
    other = {key: "" for key in keys if key not in known and _is_number(key, run.updates)}
    blocks = []
    for heading, metrics in (*run.meanings.items(), ("Other", other)):
        panels = [
            _counts(key, meaning, run.updates)
            if any(isinstance(entry.get(key), dict) for entry in run.updates)
            else _panel(key, meaning, run.updates, _clip_range(run) if key in RATIOS else [])
            for key, meaning in metrics.items()
            if key in keys
        ]
        if panels:
            blocks.append(
                f'<h3 class="group">{escape(heading)}</h3><div class="multiples">{"".join(panels)}</div>'
            )
    return "".join(blocks)


def _is_number(key: str, updates: list[Entry]) -> bool:
    """True if any update holds a number, or numbers by name, under ``key``; text is not plotted."""
    return any(number(entry.get(key)) is not None or numbers(entry.get(key)) for entry in updates)
