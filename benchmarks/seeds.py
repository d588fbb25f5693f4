"""Does alignment learn, and from the reward? Runs several seeds of every arm through the real command line.

Arms: the paper's method (own history), the null control (advantages permuted within each group), donor
histories, and controls for what may be learned instead: advantages of the wrong sign, imitation of only the
best branches (rvm), and the same with noise branches in place of routed history. Every run evaluates the same
test prompts on the same noise, so runs are paired video by video.

    python benchmarks/seeds.py --out runs/seeds --seeds 0 1 2 [--arms paper random] [--json FILE]
        [--null FILE] [any setting]
    python benchmarks/seeds.py --tables benchmarks/results/seeds.json

After a kill at any moment, the same command continues. --json saves everything that the tables are printed
from; --null saves the gains of the null control, with which `kvpo align` and `kvpo report` compare a run.
Both are written after every run.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean
from typing import Any

import yaml
from measuring import machine, section, spread, table, write_json

from kvpo.app.comparison.command import source_commit

ARMS = {
    "paper": [],
    "random": ["--advantages", "random"],
    "donor": ["--exploration.donor", "1"],
    "flipped": ["--advantages", "flipped"],
    "positive": ["--method", "rvm", "--exploration.explorer", "routes", "--objective.keep", "4,0"],
    "noise": ["--method", "rvm", "--exploration.explorer", "fresh", "--objective.keep", "4,0"],
}
SETS = ("short", "long")
DIVERSITY = ("attribute_diversity", "pixel_distance", "broken_share", "reward_std")
Runs = dict[str, list[dict[str, Any]]]
"""Arm -> its runs by seed, each the part of its summary that the tables need."""


def run(arm: str, seed: int, out: Path, extra: Sequence[str]) -> None:
    """Run one arm with one seed, on one thread. A finished run is left alone; a killed one is resumed.

    Raises CalledProcessError if the run fails or has other settings; its log says why.
    """
    directory = out / f"{arm}-{seed}"
    if not (directory / "report.html").exists():
        with commits_file(directory).open("a") as file:
            file.write(f"{source_commit()}\n")
    command = [
        sys.executable, "-m", "kvpo", "align", "--preset", "demo", "--seed", str(seed), "--threads", "1",
        "--out", str(directory), "--resume", *ARMS[arm], *extra,
    ]  # fmt: skip
    with (out / f"{arm}-{seed}.log").open("a") as file:
        subprocess.run(command, check=True, stdout=file, stderr=file)


def commits_file(directory: Path) -> Path:
    """The file beside a run that lists the commits it was made at, one per line."""
    return directory.with_name(f"{directory.name}.commits")


def read(arm: str, seed: int, out: Path) -> dict[str, Any]:
    """The part of a finished run's summary to keep, and its commits."""
    directory = out / f"{arm}-{seed}"
    summary, made = json.loads((directory / "summary.json").read_text()), commits_file(directory)
    commits = sorted(set(made.read_text().split())) if made.exists() else ["unknown"]
    kept = ("seed", "updates", "wall_s", "cpu_s", "peak_rss_mb", "improved", "held_out", "diversity")
    return {"commits": commits, **{name: summary[name] for name in kept}}


def collected(finished: Sequence[tuple[str, int]], out: Path) -> Runs:
    """The finished runs by arm."""
    runs: Runs = {}
    for arm, seed in finished:
        runs.setdefault(arm, []).append(read(arm, seed, out))
    return runs


def made_at(runs: Runs) -> str:
    """The commits at which runs were made."""
    return ", ".join(sorted({commit for own in runs.values() for one in own for commit in one["commits"]}))


def null_runs(runs: Runs, settings: dict[str, Any]) -> dict[str, Any]:
    """The null control's gains as `kvpo report --null` reads them."""
    gains = [
        {"seed": one["seed"], **{name: one["held_out"][name]["paired_gain"] for name in SETS}}
        for one in runs["random"]
    ]
    return {"commit": made_at({"random": runs["random"]}), "settings": settings, "runs": gains}


def of(runs: Sequence[dict[str, Any]], name: str, key: str) -> list[float]:
    """One number of every run's comparison on a prompt set."""
    return [float(one["held_out"][name][key]) for one in runs]


def gains(runs: Runs) -> str:
    """One row per arm and prompt set."""
    columns = (
        "arm", "set", "runs", "base", "paired gain, mean ± std over seeds", "SE within a run",
        "of what was missing", "with a wrong caption", "unseen scorer", "above every null run",
    )  # fmt: skip
    rows = []
    for arm, own in runs.items():
        for name in SETS:
            error = fmean(of(own, name, "paired_se"))
            found, base = of(own, name, "paired_gain"), fmean(of(own, name, "base_mean"))
            null = of(runs["random"], name, "paired_gain") if "random" in runs and arm != "random" else []
            wrong = fmean(of(own, name, "wrong_caption_gain"))
            # A share of a gain by pure chance is meaningless.
            share = f" ({wrong / fmean(found):.2f})" if arm != "random" else ""
            rows.append(
                (
                    arm, name, len(own), f"{base:.3f}", spread(found), f"{error:.4f}",
                    f"{fmean(found) / (1 - base):.1%}", f"{wrong:+.4f}{share}",
                    spread(of(own, name, "unseen_scorer_gain")),
                    f"{sum(gain > max(null) for gain in found)} of {len(found)}" if null else "",
                )
            )  # fmt: skip
    return table(columns, rows)


def by_seed(runs: Runs) -> str:
    """Gain (standard error) and unseen scorer's gain (standard error) of every run."""

    def cell(one: dict[str, Any], name: str, key: str, error: str) -> str:
        found = one["held_out"][name]
        return f"{found[key]:+.3f} ({found[error]:.3f})"

    rows = [
        (
            f"{arm} {one['seed']}",
            *(
                cell(one, name, *keys)
                for name in SETS
                for keys in (("paired_gain", "paired_se"), ("unseen_scorer_gain", "unseen_scorer_se"))
            ),
            f"{one['cpu_s']:.0f}",
        )
        for arm, own in runs.items()
        for one in own
    ]
    return table(("run", "short", "unseen", "long", "unseen", "CPU-s"), rows)


def inside(runs: Runs, key: str, value: str) -> str:
    """One column per component or accuracy, mean over seeds."""

    def mean_of(own: Sequence[dict[str, Any]], name: str, part: str) -> str:
        found = [one["held_out"][name][key].get(part) for one in own]
        if any(entry is None for entry in found):
            return ""
        if value == "change":
            return f"{fmean(entry['base'] for entry in found):.2f} → {fmean(e['aligned'] for e in found):.2f}"
        return f"{fmean(entry[value] for entry in found):+.3f}"

    parts = list(next(iter(runs.values()))[0]["held_out"]["long"][key])
    rows = [
        (arm, name, *(mean_of(own, name, p) for p in parts)) for arm, own in runs.items() for name in SETS
    ]
    return table(("arm", "set", *parts), rows)


def diversity(runs: Runs) -> str:
    """Branch diversity of the base, averaged over the paper's runs."""
    own = [one["diversity"] for one in runs.get("paper", []) if one["diversity"]]
    kinds = list(own[0]) if own else []
    return table(
        ("branches", *DIVERSITY),
        [(kind, *(fmean(one[kind][name] for one in own) for name in DIVERSITY)) for kind in kinds],
    )


def say(numbers: dict[str, Any]) -> None:
    """Print the tables of benchmarks/RESULTS.md."""
    runs: Runs = numbers["arms"]
    section("Does alignment learn, and from the reward?", f"Commit {numbers['commit']}.", gains(runs))
    section("Seed by seed", by_seed(runs))
    section("Gain per component", inside(runs, "components", "gain"))
    section("Demands met, base → aligned", inside(runs, "accuracy", "change"))
    section("What branches explore", diversity(runs))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument(
        "--jobs",
        type=int,
        default=len(os.sched_getaffinity(0)),
        help="runs side by side (default: one a core)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="where everything measured goes")
    parser.add_argument("--null", type=Path, metavar="FILE", help="where the null control's gains go")
    parser.add_argument("--tables", type=Path, metavar="FILE", help="only print the tables of such a file")
    arguments, extra = parser.parse_known_args()
    if arguments.tables:
        say(json.loads(arguments.tables.read_text()))
        return
    if arguments.out is None:
        parser.error("--out: needed, as in --out runs/seeds")
    arguments.out.mkdir(parents=True, exist_ok=True)
    jobs = [(arm, seed) for seed in arguments.seeds for arm in arguments.arms]
    numbers: dict[str, Any] = {}
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for n, _ in enumerate(pool.map(lambda job: run(job[0], job[1], arguments.out, extra), jobs), 1):
            runs = collected(jobs[:n], arguments.out)
            numbers = {"commit": made_at(runs), "machine": machine(), "settings": extra, "arms": runs}
            write_json(arguments.json, numbers)
            if "random" in runs:
                saved = arguments.out / f"random-{runs['random'][0]['seed']}" / "config.yaml"
                write_json(arguments.null, null_runs(runs, yaml.safe_load(saved.read_text())))
    say(numbers)


if __name__ == "__main__":
    main()
