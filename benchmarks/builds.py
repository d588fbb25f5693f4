"""An update's rollout and its replay with backward in two builds that take turns, in CPU-seconds.

    python benchmarks/builds.py OTHER [--rounds 5] [--json PATH]

OTHER is a checkout of another commit. Each build runs in its own process, on one thread, at the demo's
settings with random weights; what is measured is this script's in both, so a commit before it can be given.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path

import torch
from engine import FORK, Bench, bench, planned_rollout, replay
from measuring import machine, section, table, write_json

from kvpo.app.presets import demo
from kvpo.engine.noise import keyed_generator
from kvpo.engine.rollout import Group, Rollout, roll_out

HERE = Path(__file__).resolve().parents[1]
ROUNDS = 5


def explored(subject: Bench) -> Rollout:
    """Roots, branches and anchors, as the trainer has them."""
    return roll_out(subject.generator, planned_rollout(subject), subject.texts, subject.tape, ("benchmark",))


def taught(subject: Bench, groups: Sequence[Group]) -> None:
    """Replay and backward of the branches of every group that are learned from, a group at a time."""
    subject.model.zero_grad(set_to_none=True)
    kept = sum(subject.config.objective.keep)
    for group in groups:
        coefficients = torch.randn(kept, generator=keyed_generator("benchmark coefficients"))
        replay(subject, [(group, branch) for branch in range(kept)], coefficients, rows=kept)


def serve() -> None:
    """Run what is asked for on standard input, and answer with its CPU-seconds."""
    torch.set_num_threads(1)
    config = demo()
    subject = bench(config, config.optim.prompts_per_update)
    rollout = explored(subject)
    runs: dict[str, Callable[[], object]] = {
        "rollout": lambda: explored(subject).release(),
        "replay and backward": lambda: taught(subject, rollout.groups),
    }
    for name in chain(runs, map(str.strip, sys.stdin)):
        before = resource.getrusage(resource.RUSAGE_SELF)
        runs[name]()
        after = resource.getrusage(resource.RUSAGE_SELF)
        taken = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
        sys.stdout.write(f"{name}\t{taken}\n")
        sys.stdout.flush()


def started(checkout: Path) -> subprocess.Popen[str]:
    """This script's other half, importing the build of a checkout."""
    return subprocess.Popen(
        [sys.executable, __file__, "--serve"],
        env={**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def asked(build: subprocess.Popen[str], run: str = "") -> tuple[str, float]:
    """The next answer of a build, to a question if there is one."""
    assert build.stdin and build.stdout
    if run:
        build.stdin.write(f"{run}\n")
        build.stdin.flush()
    name, seconds = build.stdout.readline().split("\t")
    return name, float(seconds)


def alternated(checkouts: dict[str, Path], rounds: int) -> dict[str, dict[str, list[float]]]:
    """CPU-seconds of every round by phase and build; the builds take turns, the first one changing."""
    builds = {name: started(checkout) for name, checkout in checkouts.items()}
    try:
        phases = [{asked(build)[0]: None for _ in range(2)} for build in builds.values()][0]
        taken: dict[str, dict[str, list[float]]] = {phase: {name: [] for name in builds} for phase in phases}
        for round_ in range(rounds):
            for phase in phases:
                for name in reversed(builds) if round_ % 2 else builds:
                    taken[phase][name].append(asked(builds[name], phase)[1])
        return taken
    finally:
        for build in builds.values():
            build.communicate()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help="a checkout of the other commit")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds ({ROUNDS})")
    parser.add_argument("--json", type=Path, help="write every number to this file too")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve()
        return
    if options.other is None or not (options.other / "src" / "kvpo").is_dir():
        parser.error(f"a checkout with src/kvpo is needed, got {options.other}")
    taken = alternated({"other": options.other.resolve(), "this": HERE}, options.rounds)
    rows = []
    for phase, seconds in taken.items():
        other, this = (statistics.median(seconds[name]) for name in ("other", "this"))
        rows.append([phase, other, this, f"{other / this:.2f}x"])
    about = machine()
    section(
        "Two builds",
        f"{about['cpu']}, torch {about['torch']}, load average {about['load_average']:.1f} at the start; one "
        f"thread, CPU-seconds, medians of {options.rounds} alternating rounds; the demo's update, forked at "
        f"frame {FORK}.",
        table(["phase", "other", "this", "faster"], rows),
    )
    write_json(options.json, {"machine": about, "cpu_seconds": taken})


if __name__ == "__main__":
    main()
