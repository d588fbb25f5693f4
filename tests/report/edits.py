"""Changes to copies of a run that `kvpo align` wrote."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

HOSTILE = "A <script>document.title='owned'</script> \"quoted\" & 'single' prompt </script>"


def copy_of(run: Path, target: Path) -> Path:
    """The files of a run that the report reads."""
    wanted = ("checkpoints", "tensorboard", "report.html")
    return Path(shutil.copytree(run, target, ignore=shutil.ignore_patterns(*wanted)))


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Replace what a file holds by what ``change`` returns, or by the changed value where that is None."""
    value = json.loads(path.read_text())
    changed = change(value)
    path.write_text(json.dumps(value if changed is None else changed))


def lines_of(run: Path, kind: str) -> list[dict[str, Any]]:
    """Lines of one kind in a run's metrics."""
    every = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in every if line["kind"] == kind]


def edit_metrics(run: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change every line of a run's metrics in place."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        change(line)
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def held_out(run: Path, **numbers: float) -> None:
    """Give every outcome of the summary some numbers, as if it had been measured on enough prompts."""
    for name in ("short", "long"):
        edit_json(
            run / "summary.json", lambda s, name=name: s["held_out"][name].update({"prompts": 128} | numbers)
        )


def enlarge(run: Path, factor: int, frames: int) -> None:
    """Gallery videos of so many frames, each pixel ``factor`` pixels wide and high."""
    path = run / "gallery" / "videos.safetensors"
    videos = {key: video[:frames] for key, video in load_file(path).items()}
    save_file(
        {key: np.ascontiguousarray(v.repeat(factor, 1).repeat(factor, 2)) for key, v in videos.items()}, path
    )
