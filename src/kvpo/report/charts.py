"""Charts as inline SVG that stretches to any width, with axis labels in HTML so that text keeps its size.

Colours are class names; the style sheet gives each a light and a dark value. Hover read-outs come from the
``data-chart`` attribute.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from kvpo.report.formatting import attribute_json, compact, escape, fixed, signed, tone_of

Values = Sequence[float | None]


@dataclass(frozen=True)
class Series:
    """One line: a value (or None) per x, a colour class, and optionally the half width of its bands."""

    name: str
    values: Values
    colour: str
    spread: Values | None = None
    dashed: bool = False


def ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers inside [low, high]: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def value_range(values: Sequence[float]) -> tuple[float, float]:
    """The range of ``values`` with a margin of 8 % at both ends; a constant gets a range around it."""
    low, high = min(values), max(values)
    if high - low <= 1e-12 * max(abs(low), abs(high)):
        margin = 0.5 * abs(low)
        return (low - margin, high + margin) if margin else (-0.1, 1.0)  # half of the smallest number is 0
    return low - 0.08 * (high - low), high + 0.08 * (high - low)


def _runs(points: list[tuple[float, float] | None]) -> list[list[tuple[float, float]]]:
    """Consecutive points between the gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for point in points:
        if point is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _path(points: list[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.2f} {y:.2f}" for x, y in points)


def _band(series: Series, x_at: list[float], y_of, width: float) -> str:
    assert series.spread is not None
    edges = [
        (x, y_of(value + width * spread), y_of(value - width * spread))
        for x, value, spread in zip(x_at, series.values, series.spread, strict=True)
        if value is not None and spread is not None
    ]
    if len(edges) < 2:
        return ""
    outline = [(x, top) for x, top, _ in edges] + [(x, bottom) for x, _, bottom in reversed(edges)]
    return f'<path class="band {series.colour}" d="{_path(outline)}Z"/>'


def _line(series: Series, x_at: list[float], y_of) -> str:
    points = [
        None if value is None else (x, y_of(value)) for x, value in zip(x_at, series.values, strict=True)
    ]
    marks = []
    for run in _runs(points):
        if len(run) > 1:
            style = " dashed" if series.dashed else ""
            marks.append(f'<path class="line {series.colour}{style}" d="{_path(run)}"/>')
        if len(run) == 1 or (len(x_at) <= 12 and not series.dashed):
            # A zero-length stroke with round caps stays round however the drawing is stretched.
            marks += [f'<path class="dot {series.colour}" d="M{x:.2f} {y:.2f}h0"/>' for x, y in run]
    return "".join(marks)


def line_chart(
    x: Sequence[float],
    series: Sequence[Series],
    *,
    label: str,
    references: Sequence[tuple[str, float]] = (),
    y_ticks: int = 4,
) -> str:
    """A line chart of ``series`` over ``x`` with one- and two-spread bands and dashed reference values.

    Returns a ``<div>``, or a note if there is no finite value.
    """
    seen = [value for one in series for value in one.values if value is not None]
    for one in series:
        if one.spread is not None:
            for value, spread in zip(one.values, one.spread, strict=True):
                if value is not None and spread is not None:
                    seen += [value - 2 * spread, value + 2 * spread]
    if not seen:
        return '<p class="missing">no finite values</p>'
    low, high = value_range([*seen, *(value for _, value in references)])
    left, right = (min(x), max(x)) if max(x) > min(x) else (x[0] - 1, x[0] + 1)

    def y_of(value: float) -> float:
        return 100 * (high - value) / (high - low)

    x_at = [100 * (value - left) / (right - left) for value in x]
    levels = ticks(low, high, y_ticks)
    grid = "".join(f'<path class="grid" d="M0 {y_of(v):.2f}H100"/>' for v in levels)
    grid += "".join(f'<path class="reference" d="M0 {y_of(v):.2f}H100"/>' for _, v in references)
    bands = "".join(
        _band(one, x_at, y_of, width) for one in series if one.spread is not None for width in (2.0, 1.0)
    )
    lines = "".join(_line(one, x_at, y_of) for one in series)
    y_labels = "".join(f'<span class="y" style="top:{y_of(v):.2f}%">{compact(v)}</span>' for v in levels)
    y_labels += "".join(
        f'<span class="named" style="top:{y_of(v):.2f}%">{escape(name)}</span>'
        for name, v in references
        if name
    )
    x_labels = "".join(
        f'<span class="x" style="left:{100 * (v - left) / (right - left):.2f}%">{compact(v)}</span>'
        for v in ticks(left, right, 3)
        if v % 1 == 0  # there is no update 1.5
    )
    data = {
        "x": list(x),
        "at": [round(value, 3) for value in x_at],
        "series": [
            {"name": one.name, "colour": one.colour, "y": list(one.values)}
            | ({"spread": list(one.spread)} if one.spread is not None else {})
            for one in series
        ],
    }
    return (
        f'<div class="chart" role="img" aria-label="{escape(label)}" data-chart="{attribute_json(data)}">'
        f'<div class="plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none">{grid}{bands}{lines}</svg>'
        f'{y_labels}{x_labels}<i class="cursor"></i></div></div>'
    )


def small_figure(title: str, values: str, chart: str, meaning: str) -> str:
    """A small chart as HTML with its title, values beside it (HTML), and the sentence that explains it."""
    return (
        f'<figure class="card small"><figcaption><h4>{escape(title)}</h4>{values}</figcaption>{chart}'
        f'<p class="meaning">{escape(meaning)}</p></figure>'
    )


def interval(
    value: float,
    bars: Sequence[tuple[float, float]],
    axis: tuple[float, float],
    *,
    label: str,
    colour: str = "aligned",
) -> str:
    """A dot with one or two bars (start, end), the wider first, on a shared axis that marks zero."""
    low, high = axis

    def at(position: float) -> float:
        return min(100.0, max(0.0, 100 * (position - low) / (high - low)))

    drawn = "".join(
        f'<i class="{name} {colour}" style="left:{at(start):.2f}%;width:{at(end) - at(start):.2f}%"></i>'
        for name, (start, end) in zip(("two", "one"), bars, strict=False)
    )
    return (
        f'<div class="interval" role="img" aria-label="{escape(label)}">'
        f'<i class="zero" style="left:{at(0):.2f}%"></i>'
        f'{drawn}<i class="point {colour}" style="left:{at(value):.2f}%"></i></div>'
    )


def paired_bars(rows: Sequence[tuple[str, float, float, float | None]]) -> str:
    """Bars of (name, base, aligned, standard error of the gain), sorted by gain, largest first."""
    top = max([1.0, *(max(base, aligned) for _, base, aligned, _ in rows)])
    bottom = min([0.0, *(min(base, aligned) for _, base, aligned, _ in rows)])

    def at(value: float) -> float:
        return 100 * (value - bottom) / (top - bottom)

    def bar(value: float, colour: str) -> str:
        start, end = sorted((at(0.0), at(value)))
        return f'<i class="bar {colour}" style="left:{start:.2f}%;width:{max(0.4, end - start):.2f}%"></i>'

    items = []
    for name, base, aligned, error in sorted(rows, key=lambda row: row[1] - row[2]):
        gain = aligned - base
        spread = f' <span class="soft">\u00b1 {fixed(error)}</span>' if error is not None else ""
        items.append(
            f'<li><span class="name">{escape(name)}</span>'
            f'<span class="bars" role="img" aria-label="base {fixed(base)}, aligned {fixed(aligned)}">'
            f"{bar(base, 'base')}{bar(aligned, 'aligned')}</span>"
            f'<span class="values"><span class="soft">{fixed(base)} \u2192</span> {fixed(aligned)}</span>'
            f'<span class="gain {tone_of(gain)}">{signed(gain)}{spread}</span></li>'
        )
    errors = " with-errors" if any(error is not None for *_, error in rows) else ""
    return f'<ul class="paired{errors}">{"".join(items)}</ul>'
