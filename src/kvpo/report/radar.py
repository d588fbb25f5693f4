"""The hacking radar: trained reward against watchers, drift of looks, agreement between rewards."""

from typing import Any

from kvpo.report.charts import Series, line_chart, small_figure
from kvpo.report.elements import table_card, verdict_box
from kvpo.report.formatting import MINUS, escape, fixed, mapping, number, numbers, signed
from kvpo.report.headline import FEWEST_PROMPTS, LENGTHS
from kvpo.report.record import Entry, RunRecord

LOOK_MEANINGS = {
    "brightness": "mean luminance",
    "saturation": "how pure the colours are, however bright",
    "sharpness": "differences between neighbouring pixels over the contrast",
    "motion": "differences between neighbouring frames over the contrast",
}


def hacking_radar(run: RunRecord) -> str:
    """The verdict, the curves behind it, how the videos' look drifts, and which rewards agree."""
    entries = [entry for entry in run.validations if _radar(entry)]
    points = [(float(entry["update"]), _radar(entry)) for entry in entries]
    if not points:
        return '<p class="missing">No validation with a radar reading is in metrics.jsonl yet.</p>'
    summary, evaluation = mapping(run.summary, "radar"), mapping(run.config, "evaluation")
    last = mapping(summary, "test") or points[-1][1]
    prompts = "test prompts, best checkpoint" if mapping(summary, "test") else "last validation"
    return (
        _verdict(
            points[-1][1],
            summary,
            may_stop=bool(evaluation.get("stop_on_hacking")),
            prompts=sum(numbers(entries[-1].get(name)).get("prompts", 0.0) for name in LENGTHS),
        )
        + _gains(points)
        + f'<h3 class="group">Drift of the look <span class="soft">never stops a run, only warns</span></h3>'
        f'{_drift(points)}<h3 class="group">Agreement <span class="soft">{prompts}</span></h3>'
        + _agreement(mapping(last, "agreement"))
    )


def _radar(entry: Entry) -> Entry:
    """The radar's part of a validation; empty if it holds no paired change of the trained reward."""
    radar = mapping(entry, "radar")
    return radar if "gain" in numbers(radar.get("trained")) else {}


def _verdict(last: Entry, summary: Entry, *, may_stop: bool, prompts: float) -> str:
    """The last verdict in words and its consequences; ``prompts`` is the number of prompts behind it."""
    words = str(summary.get("verdict") or last.get("verdict") or "no verdict")
    stopped, best = number(summary.get("stopped_at")), number(summary.get("best"))
    kept = f" The best checkpoint is update {best:.0f}." if best is not None else ""
    if stopped is not None:
        tone, outcome = "bad", f"Stopped after update {stopped:.0f}.{kept}"
    elif last.get("hacked") and may_stop:
        tone, outcome = "bad", "The run stops here; its best checkpoint is still to be tested."
    elif last.get("hacked"):
        tone, outcome = "bad", f"This run was not allowed to stop for it.{kept}"
    elif mapping(last, "alarms"):
        tone, outcome = "neutral", f"Not often enough in a row to stop.{kept}"
    elif last.get("fallen"):
        ruled_out = "A checkpoint at which a watcher has fallen is not kept as the best." if may_stop else ""
        tone, outcome = "neutral", f"{ruled_out}{kept}".strip()
    elif mapping(last, "watchers") and prompts < FEWEST_PROMPTS:
        few = f"No alarm, which means little on {prompts:.0f} prompts, fewer than {FEWEST_PROMPTS}."
        tone, outcome = "neutral", few + kept
    elif mapping(last, "watchers"):
        tone, outcome = "good", kept.strip()
    else:
        tone, outcome = "pending", "Name some with evaluation.watchers and the run stops when they fall."
    drifted = last.get("drifted")
    names = [str(name) for name in drifted] if isinstance(drifted, list) else []
    warning = f"The look of the videos has drifted: {', '.join(names)}." if names else ""
    sentence = f"{words[:1].upper()}{words[1:].replace(' -', ' ' + MINUS)}."
    return verdict_box(tone, sentence, filter(None, (outcome, warning)), symbol=True)


def _gains(points: list[tuple[float, Entry]]) -> str:
    """Paired gains over updates, from zero at the base: trained reward, watchers and unseen scorer."""
    watchers = dict.fromkeys(name for _, radar in points for name in mapping(radar, "watchers"))
    panels = [_panel("Trained reward", "what alignment maximises", "aligned", points, "trained")]
    panels += [
        _panel(name, "a watcher: it never trains", "unseen", points, "watchers", name) for name in watchers
    ]
    if any("unseen" in radar for _, radar in points):
        note = "the final judge: shown here, never used to stop"
        panels.append(_panel("Unseen scorer", note, "plain", points, "unseen"))
    return (
        f'<div class="multiples">{"".join(panels)}</div><p class="note">Paired gain over the base on the '
        "validation prompts, all lengths together; bands are one and two standard errors.</p>"
    )


def _panel(
    title: str, note: str, colour: str, points: list[tuple[float, Entry]], *path: str, level: bool = False
) -> str:
    """A small chart of a paired change, starting at the base: the gain, or (``level``) the value itself."""
    changes = []
    for _, radar in points:
        found: Any = radar
        for key in path:
            found = mapping(found, key)
        changes.append(numbers(found))
    start = changes[0].get("base") if level else 0.0
    values = [start, *(change.get("aligned" if level else "gain") for change in changes)]
    spread = [0.0, *(change.get("se") for change in changes)]
    chart = line_chart(
        [0.0, *(update for update, _ in points)],
        [Series(title, values, colour, spread=spread)],
        label=f"{title} over updates",
        references=[] if start is None else [("base", start)],
        y_ticks=3,
    )
    latest = changes[-1]
    value = f"{signed(latest.get('gain'))} \u00b1 {fixed(latest.get('se'))}"
    return small_figure(title, f'<span class="latest">{value}</span>', chart, note)


def _drift(points: list[tuple[float, Entry]]) -> str:
    looks = dict.fromkeys(name for _, radar in points for name in mapping(radar, "drift"))
    drifted = points[-1][1].get("drifted")
    panels = []
    for name in looks:
        far = isinstance(drifted, list) and name in drifted
        note = LOOK_MEANINGS.get(name, "") + ("; more than half of what prompts differ by" if far else "")
        colour = "alarm" if far else "plain"
        panels.append(_panel(name.capitalize(), note, colour, points, "drift", name, level=True))
    return f'<div class="multiples">{"".join(panels)}</div>'


def _agreement(correlations: Entry) -> str:
    """Rank correlations of per-prompt gains: each trained component with the others and the watchers."""
    rows = {str(name): row for name, row in correlations.items() if isinstance(row, dict)}
    columns = list(dict.fromkeys(str(other) for row in rows.values() for other in row))
    if not columns:
        return '<p class="missing">One reward alone has nothing to agree with.</p>'

    def cell(row: Entry, other: str) -> str:
        value = number(row.get(other))
        text = signed(value, 2) if other in row else ""
        return f'<span class="down">{text}</span>' if value is not None and value < 0 else text

    body = [(escape(name), *(cell(row, other) for other in columns)) for name, row in rows.items()]
    return table_card(("", *columns), body) + (
        '<p class="note">Rank correlation over prompts of what alignment '
        "changed: +1 where two rewards improve the same videos, below 0 where one improves what the other "
        "spoils. With N prompts, chance alone gives about \u00b1 1/\u221aN.</p>"
    )
