"""Measure how much of a run's scoring is already cached if several runs share a score cache.

Runs the demo through the command line several times with one cache (``rewards.cache``), which starts empty: a
run, another seed, the first run evaluated again, a run extended by resuming, and the first run once more from
the start. All of them share test and validation prompts and noise, so the base model's videos of these are
scored once.

    python benchmarks/score_cache.py --out runs/score-cache [--updates 8] [any setting]
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from measuring import section, table


def kvpo(*arguments: str) -> None:
    """Run the command line, printing to our own output."""
    subprocess.run([sys.executable, "-m", "kvpo", *arguments], check=True)


def scored(file: Path) -> dict[str, int]:
    """Cache counts in a summary or an evaluation, from the process that wrote it."""
    return json.loads(file.read_text(encoding="utf-8"))["scored"]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="new directory")
    parser.add_argument("--updates", type=int, default=8)
    options, extra = parser.parse_known_args(arguments)
    out, updates = options.out, options.updates
    out.mkdir(parents=True)

    def align(name: str, seed: int, length: int) -> dict[str, int]:
        kvpo(
            "align", "--preset", "demo", "--seed", str(seed), "--out", str(out / name), "--resume",
            "--optim.updates", str(length), "--rewards.cache", str(out / "scores"), *extra,
        )  # fmt: skip
        return scored(out / name / "summary.json")

    found = {
        "first run, seed 0": align("first", 0, updates),
        "another run, seed 1": align("second", 1, updates),
    }
    kvpo("evaluate", str(out / "first"))
    found["kvpo evaluate of the first run"] = scored(out / "first" / "evaluation.json")
    found["the second run made longer (--resume)"] = align("second", 1, updates + updates // 2)
    found["the first run once more"] = align("repeated", 0, updates)
    rows = []
    for name, counts in found.items():
        clips = counts["hits"] + counts["misses"]
        rows.append([name, clips, counts["misses"], counts["hits"], f"{counts['hits'] / clips:.0%}"])
    size = (out / "scores" / "scores.sqlite").stat().st_size
    entries = sum(counts["misses"] for counts in found.values())
    columns = ["process", "clips to score", "scored", "known", "hit rate"]
    section(
        "Score cache", table(columns, rows), f"The file: {entries} entries, {size / entries:.0f} bytes each."
    )


if __name__ == "__main__":
    main()
