"""Reads the files of a run. Anything missing or unreadable becomes a line in ``problems``.

- ``config.yaml``, ``metrics.jsonl`` (lines of kind "update" and "validation"), ``summary.json``.
- ``meanings.json``: {heading: {metric of an update: the sentence that explains it}}.
- ``gallery/gallery.json``: a list of {title, prompt_segments, switches, num_frames, base, aligned,
  base_reward, aligned_reward, components: {name: {base, aligned}}}; ``base`` and ``aligned`` name uint8
  [T, H, W, 3] tensors in ``gallery/videos.safetensors``.
- ``branches/branches.json``: {groups: [...], causality: [...]}, each {title, prompt_segments, switches,
  fork_frame, window_frames, num_frames, members: [{name, video, routed_frames, reward, local, global,
  advantage, probability, and the residuals as the method calls them: energy, distance or residual}]}; the
  member named "anchor" is not routed, a routed frame of another prompt is {frame, prompt}, and ``video``
  names a tensor in ``branches/branches.safetensors``. Advantages are the values before the best and worst
  branches are chosen and centred; branches that are not chosen have no probability. A group of ``causality``
  also has ``resident_frames`` (0). If they can be read, it has ``acts``, the look of the actor in every act
  before the fork, and its members have ``shows``, the look of the actor after the window.

Frame indices count latent frames from the start of the video, which has ``num_frames`` of them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from safetensors import SafetensorError, safe_open

from kvpo.files import counted, json_lines, read_json, read_text, refuse_pointers
from kvpo.report.formatting import number
from kvpo.report.video import as_frames

Entry = dict[str, Any]


@dataclass(frozen=True)
class RunRecord:
    """The contents of one run directory, as plain data."""

    directory: Path
    config: Entry
    """Resolved configuration; empty if unreadable."""
    summary: Entry | None
    """Final numbers, None until the run has finished."""
    updates: list[Entry]
    """Metrics per optimiser update, in order."""
    meanings: dict[str, dict[str, str]]
    """Heading -> metric of an update -> the sentence that explains it, as the run wrote it."""
    validations: list[Entry]
    """Held-out evaluations during training, in order."""
    gallery: list[Entry]
    """Before/after pairs."""
    groups: list[Entry]
    """Groups of branches for the explorer."""
    causality: list[Entry]
    """Groups whose branches were routed to acts 1 and 2."""
    problems: list[str] = field(default_factory=list)
    """A line for each thing that is missing or unreadable; grows while videos are read."""


def read_run(directory: Path) -> RunRecord:
    """Read ``directory``; raises ValueError if it lacks ``config.yaml`` or ``metrics.jsonl``."""
    for name in ("config.yaml", "metrics.jsonl"):
        if not (directory / name).is_file():
            raise ValueError(
                f"run directory {directory}: {name} is missing; pass the directory that was given to --out"
            )
    problems: list[str] = []
    updates, validations = _read_metrics(directory / "metrics.jsonl", problems)
    summary = _read_json(directory, "summary.json", "final numbers are not there yet", problems)
    if summary is not None and not isinstance(summary, dict):
        problems.append("summary.json does not hold a mapping")
        summary = None
    gallery = _read_json(directory, "gallery/gallery.json", "no before/after videos", problems)
    branches = _read_json(directory, "branches/branches.json", "no branch groups", problems)
    branches = branches if isinstance(branches, dict) else {}
    return RunRecord(
        directory=directory,
        config=_read_config(directory / "config.yaml", problems),
        summary=summary,
        updates=updates,
        meanings=_read_meanings(directory, problems),
        validations=validations,
        gallery=_entries(gallery),
        groups=_entries(branches.get("groups")),
        causality=_entries(branches.get("causality")),
        problems=problems,
    )


def method_of(run: RunRecord) -> str:
    """The name of the method that trained the run; empty if the run does not say."""
    method = (run.summary or {}).get("method", run.config.get("method"))
    return method if isinstance(method, str) else ""


def _entries(value: Any) -> list[Entry]:
    return [entry for entry in value if isinstance(entry, dict)] if isinstance(value, list) else []


def _read_config(path: Path, problems: list[str]) -> Entry:
    try:
        config = yaml.safe_load(read_text(path))
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        problems.append(f"config.yaml cannot be read: {error}")
        return {}
    if not isinstance(config, dict):
        problems.append("config.yaml does not hold a mapping")
        return {}
    return config


def _read_json(directory: Path, name: str, meaning: str, problems: list[str]) -> Any:
    try:
        return read_json(directory / name)
    except ValueError as error:
        there = (directory / name).exists()
        problems.append(f"{name} cannot be read: {error}" if there else f"{name} is missing: {meaning}")
    return None


def _read_metrics(path: Path, problems: list[str]) -> tuple[list[Entry], list[Entry]]:
    """Updates and validations in order of update numbers; after a resume, the line written last counts."""
    kinds: dict[str, dict[float, Entry]] = {"update": {}, "validation": {}}
    unreadable = 0
    for _, entry in json_lines(path):
        update = None if entry is None else number(entry.get("update"))
        if entry is None or update is None:
            unreadable += 1
        elif (kind := str(entry.get("kind"))) in kinds:
            kinds[kind][update] = entry
    if unreadable:
        problems.append(f"metrics.jsonl: {counted(unreadable, 'unreadable line')} skipped")
    updates, validations = ([kind[update] for update in sorted(kind)] for kind in kinds.values())
    return updates, validations


def _read_meanings(directory: Path, problems: list[str]) -> dict[str, dict[str, str]]:
    found = _read_json(directory, "meanings.json", "metrics are shown without their meaning", problems)
    return {
        str(heading): {str(name): str(meaning) for name, meaning in metrics.items()}
        for heading, metrics in (found.items() if isinstance(found, dict) else ())
        if isinstance(metrics, dict)
    }


def read_videos(path: Path, keys: list[str], problems: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (key, uint8 [T, H, W, 3]) for each distinct key found in a safetensors file, one at a time."""
    name = f"{path.parent.name}/{path.name}"
    if not keys:
        return
    try:
        refuse_pointers(path)
        with safe_open(path, framework="numpy") as file:
            present = set(file.keys())
            for key in dict.fromkeys(keys):
                if key not in present:
                    problems.append(f"{name}: no video {key!r}")
                    continue
                try:
                    yield key, as_frames(file.get_tensor(key), key)
                except ValueError as error:
                    problems.append(f"{name}: {error}")
    except FileNotFoundError:
        problems.append(f"{name} is missing: the videos of {path.parent.name}.json cannot be shown")
    except (OSError, ValueError, SafetensorError) as error:
        problems.append(f"{name} cannot be read: {error}")
