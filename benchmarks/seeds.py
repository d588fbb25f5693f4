"""Does alignment learn, and from the reward? Several seeds of every arm, through the real command line.

Arms: the paper's method (own history), donor histories, and the null control (advantages permuted within each
group). Every run evaluates the same test prompts on the same noise, so runs are paired video by video.

    python benchmarks/seeds.py --out runs/seeds --seeds 0 1 2 [--arms paper donor random] [--jobs 2]
"""

import argparse
import json
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ARMS = {
    "paper": [],
    "donor": ["--exploration.donor", "1"],
    "random": ["--advantages", "random"],
}


def run(arm: str, seed: int, out: Path, extra: list[str], threads: int) -> dict:
    """One run of one arm; a finished one is read instead of repeated."""
    directory = out / f"{arm}-{seed}"
    summary = directory / "summary.json"
    if not summary.exists():
        command = [
            sys.executable, "-m", "kvpo", "align", "--preset", "demo", "--seed", str(seed),
            "--out", str(directory), "--resume", "--threads", str(threads), *ARMS[arm], *extra,
        ]  # fmt: skip
        log = out / f"{arm}-{seed}.log"
        with log.open("w") as file:
            subprocess.run(command, check=True, stdout=file, stderr=file)
    return json.loads(summary.read_text())


def mean_std(values: list[float]) -> str:
    """Mean and standard deviation (ddof 1) over seeds."""
    spread = statistics.stdev(values) if len(values) > 1 else float("nan")
    return f"{statistics.mean(values):+.4f} ± {spread:.4f}"


def table(results: dict[str, list[dict]]) -> str:
    """One row per arm and prompt set."""
    lines = [
        "| arm | set | base | paired gain, mean ± std over seeds | SE within a run | "
        "share of what was missing | improved | unseen scorer gain (SE) | align + evaluate, s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for arm, runs in results.items():
        for name in ("short", "long"):
            sets = [run["held_out"][name] for run in runs]
            gains = [one["paired_gain"] for one in sets]
            base = statistics.mean(one["base_mean"] for one in sets)
            unseen = statistics.mean(one["unseen_scorer_gain"] for one in sets)
            lines.append(
                f"| {arm} | {name} | {base:.3f} | {mean_std(gains)} | "
                f"{statistics.mean(one['paired_se'] for one in sets):.4f} | "
                f"{statistics.mean(gains) / (1 - base):.1%} | "
                f"{statistics.mean(one['improved_fraction'] for one in sets):.0%} | "
                f"{unseen:+.4f} ({statistics.mean(one['unseen_scorer_se'] for one in sets):.4f}) | "
                f"{statistics.mean(run['wall_s'] for run in runs):.0f} |"
            )
    return "\n".join(lines)


def components(results: dict[str, list[dict]]) -> str:
    """Gain per component, mean over seeds."""
    names = list(next(iter(results.values()))[0]["held_out"]["short"]["components"])
    lines = ["| arm | set | " + " | ".join(names) + " |", "|---|---|" + "---|" * len(names)]
    for arm, runs in results.items():
        for name in ("short", "long"):
            gains = [
                statistics.mean(run["held_out"][name]["components"][part]["gain"] for run in runs)
                for part in names
            ]
            lines.append(f"| {arm} | {name} | " + " | ".join(f"{gain:+.3f}" for gain in gains) + " |")
    return "\n".join(lines)


def diversity(results: dict[str, list[dict]]) -> str:
    """Branch diversity of the base, mean over the runs' seeds."""
    runs = [run for run in results.get("paper", []) if run["diversity"]]
    if not runs:
        return ""
    kinds = list(runs[0]["diversity"])
    names = ("attribute_diversity", "pixel_distance", "broken_share", "reward_std")
    lines = ["| branches | " + " | ".join(names) + " |", "|---|---|---|---|---|"]
    for kind in kinds:
        means = [statistics.mean(run["diversity"][kind][name] for run in runs) for name in names]
        lines.append(f"| {kind} | " + " | ".join(f"{value:.3f}" for value in means) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--jobs", type=int, default=2, help="runs side by side")
    parser.add_argument("--threads", type=int, default=1, help="torch threads per run")
    arguments, extra = parser.parse_known_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms]
    with ThreadPoolExecutor(arguments.jobs) as pool:
        done = list(pool.map(lambda job: run(*job, arguments.out, extra, arguments.threads), jobs))
    results: dict[str, list[dict]] = {}
    for (arm, _), summary in zip(jobs, done, strict=True):
        results.setdefault(arm, []).append(summary)
    print(table(results), "", components(results), "", diversity(results), sep="\n")


if __name__ == "__main__":
    main()
