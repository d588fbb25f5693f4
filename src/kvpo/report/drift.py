"""The figure of a run's drift on long streams."""

import math
from collections.abc import Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

SHOWN = ("reward", "unseen", "confidence", "brightness", "saturation", "motion", "sharpness", "peak_rss_mb")
"""Measures that are drawn, if they were taken."""
SIDE_COLOURS = {"base": "#8a8a8a", "aligned": "#3b6fb6"}


def draw_drift(path: Path, numbers: Mapping[str, Any]) -> None:
    """Draw every measure over time, base and aligned with their standard errors over streams, as a PNG."""
    from matplotlib.figure import Figure

    names = [name for name in SHOWN if name in numbers["base"]]
    rows = math.ceil(len(names) / 2)
    figure = Figure(figsize=(10, 2.1 * rows), layout="constrained")
    panels = figure.subplots(rows, 2, squeeze=False, sharex=True).flatten()
    for axes, name in zip(panels, names, strict=False):
        for side, colour in SIDE_COLOURS.items():
            spans = numbers[side][name]
            middle = [mean(values) for values in spans]
            error = [stdev(values) / len(values) ** 0.5 for values in spans]
            axes.plot(numbers["seconds"], middle, color=colour, label=side)
            ends = zip(middle, error, strict=True)
            low, high = zip(*((value - width, value + width) for value, width in ends), strict=True)
            axes.fill_between(numbers["seconds"], low, high, color=colour, alpha=0.2, lw=0)
        axes.set_title(name.replace("_", " "), fontsize=9)
        if name == "peak_rss_mb":
            axes.set_ylim(0, 1.25 * axes.get_ylim()[1])  # otherwise one megabyte would look like growth
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, fontsize=8)
    for axes in panels[len(names) :]:
        axes.set_axis_off()
    figure.supxlabel("seconds of the stream", fontsize=9)
    figure.savefig(path, format="png", dpi=130)
