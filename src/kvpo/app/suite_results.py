"""Suites after generation: checks of a folder, and the results of two folders side by side."""

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpo.app.suites import SUITES
from kvpo.arena.analysis import INTERVAL_PROMPTS, expanded_tail
from kvpo.engine.noise import keyed_generator
from kvpo.files import read_json
from kvpo.rewards.video_files import probe, read_frames

RESULTS = "*_eval_results.json"
DRAWS = 2000
"""Bootstrap draws of the prompts."""
SAME_RATE = 0.01
MANIFEST_FIELDS = {"suite", "dimensions", "videos", "frames", "rate", "size"}


def check_folder(folder: Path) -> tuple[list[str], str]:
    """Problems that keep a suite from scoring a folder correctly, and the command that scores it.

    Raises ValueError if there is no manifest of `kvpo generate --suite` next to the folder.
    """
    manifest = folder.with_name(f"{folder.name}.json")
    if not folder.is_dir() or not manifest.is_file():
        raise ValueError(
            f"{folder}: not a folder that kvpo generate --suite made ({manifest.name} is not beside it)"
        )
    record = read_json(manifest)
    if not isinstance(record, dict) or not MANIFEST_FIELDS <= record.keys():
        raise ValueError(f"{manifest}: not a manifest of kvpo generate --suite")
    there = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    problems = [f"missing: {name}" for name in record["videos"] if name not in there]
    problems += [f"extra: {name}" for name in sorted(there - record["videos"].keys())]
    for name in sorted(there & record["videos"].keys()):
        try:
            video = probe(folder / name)
            height, width = read_frames(video, [0], 2**40).shape[1:3]
        except ValueError as error:
            problems.append(f"unreadable: {name}: {error}")
            continue
        if video.num_frames != record["frames"]:
            problems.append(f"length: {name} has {video.num_frames} frames, not {record['frames']}")
        if abs(video.frame_rate - record["rate"]) > SAME_RATE:
            problems.append(
                f"rate: {name} has {video.frame_rate:g} frames per second, not {record['rate']:g}"
            )
        if [height, width] != record["size"]:
            problems.append(f"size: {name} is {height} x {width}, not {' x '.join(map(str, record['size']))}")
    suite = SUITES[record["suite"]]
    dimensions = " ".join(record["dimensions"])
    command = re.sub(r"\bD\b", "$D", suite.command).replace("DIR", shlex.quote(str(folder)))
    return problems, f"for D in {dimensions}; do {command}; done"


GROUPS: dict[str, dict[str, tuple[float, tuple[str, ...]]]] = {
    "vbench": {
        "quality": (
            4.0,
            (
                "subject_consistency", "background_consistency", "temporal_flickering", "motion_smoothness",
                "aesthetic_quality", "imaging_quality", "dynamic_degree",
            ),
        ),
        "semantic": (
            1.0,
            (
                "object_class", "multiple_objects", "human_action", "color", "spatial_relationship", "scene",
                "appearance_style", "temporal_style", "overall_consistency",
            ),
        ),
    },
    "vbench2": {
        "creativity": (1.0, ("Diversity", "Composition")),
        "commonsense": (1.0, ("Motion_Rationality", "Instance_Preservation")),
        "controllability": (
            1.0,
            (
                "Dynamic_Spatial_Relationship", "Dynamic_Attribute", "Motion_Order_Understanding",
                "Human_Interaction", "Complex_Landscape", "Complex_Plot", "Camera_Motion",
            ),
        ),
        "human fidelity": (1.0, ("Human_Anatomy", "Human_Clothes", "Human_Identity")),
        "physics": (1.0, ("Mechanics", "Thermotics", "Material", "Multi-View_Consistency")),
    },
}  # fmt: skip
"""A suite's groups of dimensions and the weight of each in the total."""
WEIGHTS = {"dynamic_degree": 0.5}
"""Weights within a group, where they are not 1."""
RANGES = {
    "subject_consistency": (0.1462, 1.0),
    "background_consistency": (0.2615, 1.0),
    "temporal_flickering": (0.6293, 1.0),
    "motion_smoothness": (0.706, 0.9975),
    "scene": (0.0, 0.8222),
    "appearance_style": (0.0009, 0.2855),
    "temporal_style": (0.0, 0.364),
    "overall_consistency": (0.0, 0.364),
}
"""Ranges that VBench's total maps to 0 to 1 (its scripts/constant); other dimensions count as they are."""


@dataclass(frozen=True)
class Compared:
    """The results of two folders in one dimension."""

    base: float
    """The suite's own number."""
    aligned: float
    prompts: int
    """Number of prompts with results in both."""
    low: float
    """Bounds of the interval of the gain (`gain_interval`); NaN for too few prompts."""
    high: float


def read_results(place: Path) -> dict[str, tuple[float, dict[str, float]]]:
    """Read result files below ``place``: dimension -> the suite's number and the mean result of each prompt.

    Raises ValueError if there are no results, a file has another form, or a dimension is in two files.
    """
    files = [place] if place.is_file() else sorted(place.rglob(RESULTS))
    found: dict[str, tuple[float, dict[str, float]]] = {}
    whose: dict[str, Path] = {}
    for file in files:
        content = read_json(file)
        if not isinstance(content, dict):
            raise ValueError(f"{file}: not results of VBench")
        for dimension, value in content.items():
            if not (isinstance(value, list) and value and isinstance(value[0], int | float)):
                raise ValueError(f"{file}: {dimension} is not a number with the results of its videos")
            if dimension in whose:
                raise ValueError(f"{dimension} is in {whose[dimension]} and in {file}; keep one of them")
            whose[dimension] = file
            found[dimension] = (float(value[0]), _by_prompt(dimension, value[1] if len(value) > 1 else []))
    if not found:
        raise ValueError(f"{place}: no {RESULTS} there")
    return found


def _by_prompt(dimension: str, rows: Any) -> dict[str, float]:
    """Mean result of every prompt; the names of its videos begin with it."""
    by_prompt: dict[str, list[float]] = {}
    for row in rows if isinstance(rows, list) else []:
        value = row.get("video_results") if isinstance(row, dict) else None
        if isinstance(value, bool | int | float) and isinstance(row.get("video_path"), str):
            prompt = re.sub(r"-\d+(_\d+)?(\.\w+)?$", "", Path(row["video_path"]).name)
            by_prompt.setdefault(prompt, []).append(float(value))
    # VBench divides the number of this dimension by 100, but not the results of its videos.
    percent = dimension == "imaging_quality" and any(v > 1 for own in by_prompt.values() for v in own)
    scale = 100 if percent else 1
    return {prompt: sum(own) / len(own) / scale for prompt, own in by_prompt.items()}


def compared_results(base: Path, aligned: Path) -> dict[str, Compared]:
    """Compare every dimension that both places have results for.

    Raises ValueError as `read_results` does, and if there is no common dimension.
    """
    one, other = read_results(base), read_results(aligned)
    common = [dimension for dimension in one if dimension in other]
    if not common:
        raise ValueError(f"{base} and {aligned} have no dimension in common")
    table = {}
    for dimension in common:
        (mean, own), (aligned_mean, aligned_own) = one[dimension], other[dimension]
        gains = torch.tensor([aligned_own[p] - own[p] for p in own if p in aligned_own], dtype=torch.float64)
        table[dimension] = Compared(mean, aligned_mean, len(gains), *gain_interval(gains, dimension))
    return table


def gain_interval(gains_P: Tensor, name: str) -> tuple[float, float]:
    """Bounds of the 95 % interval of a mean gain, by bootstrap over prompts; ``name`` seeds its draws.

    NaN for fewer than ``INTERVAL_PROMPTS``; the percentiles are widened for few prompts (`expanded_tail`).
    """
    if (prompts := len(gains_P)) < INTERVAL_PROMPTS:
        return nan, nan
    draws = torch.randint(prompts, (DRAWS, prompts), generator=keyed_generator("suite bootstrap", name))
    tail = expanded_tail(prompts)
    ends = torch.quantile(gains_P[draws].mean(1), gains_P.new_tensor([tail, 1 - tail]))
    return float(ends[0]), float(ends[1])


def total(numbers: Mapping[str, float]) -> tuple[float | None, list[str]]:
    """A suite's weighted total and its missing dimensions; the total is None if any are missing."""
    name = "vbench2" if any(d in own for _, own in GROUPS["vbench2"].values() for d in numbers) else "vbench"
    missing = [d for _, own in GROUPS[name].values() for d in own if d not in numbers]
    if missing:
        return None, missing
    summed = 0.0
    for share, own in GROUPS[name].values():
        weights = [WEIGHTS.get(dimension, 1.0) for dimension in own]
        parts = [w * _in_range(d, numbers[d]) for d, w in zip(own, weights, strict=True)]
        summed += share * sum(parts) / sum(weights)
    return summed / sum(share for share, _ in GROUPS[name].values()), []


def _in_range(dimension: str, value: float) -> float:
    low, high = RANGES.get(dimension, (0.0, 1.0))
    return (value - low) / (high - low)


def result_lines(table: Mapping[str, Compared]) -> list[str]:
    """The comparison as lines of text; the last gives the total, or the missing dimensions."""
    rows: list[Sequence[str]] = [("dimension", "base", "aligned", "gain", "95 % interval", "prompts")]
    for name, one in table.items():
        interval = f"{one.low:+.4f} to {one.high:+.4f}" if one.prompts >= INTERVAL_PROMPTS else "-"
        gain = f"{one.aligned - one.base:+.4f}"
        rows.append((name, f"{one.base:.4f}", f"{one.aligned:.4f}", gain, interval, str(one.prompts)))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    base, missing = total({name: one.base for name, one in table.items()})
    aligned, _ = total({name: one.aligned for name, one in table.items()})
    if base is None or aligned is None:
        return [*lines, f"no total: {len(missing)} dimensions are missing: {', '.join(missing)}"]
    return [*lines, f"total  {base:.4f}  {aligned:.4f}  {aligned - base:+.4f}"]
