"""Measure how much of a run's scoring is known already where several runs share a score cache.

Real runs of the demo through the command line, one after another, on one cache (``rewards.cache``) that
starts empty: a run, another seed, the first run evaluated again, a run made longer by resuming, and the
first run once more from the start. Test and validation prompts and their noise are the same in all of them,
so what the base model makes of them is scored once.

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
    """Run the command line; its output goes to ours."""
    subprocess.run([sys.executable, "-m", "kvpo", *arguments], check=True)


def scored(file: Path) -> dict[str, int]:
    """Clips that the process which wrote a summary or an evaluation found in the cache."""
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
