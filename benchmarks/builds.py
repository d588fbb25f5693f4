"""Time an update's rollout, and its replay with backward, in two builds by turns, in CPU-seconds.

    python benchmarks/builds.py OTHER [--rounds 5] [--quick] [--json PATH]

OTHER is a checkout of another commit. Each build runs in its own process, on one thread, at the demo's
settings with random weights. Both run this copy of the script, so OTHER may be older than the script. The
largest difference between the two builds' results is printed too.
"""

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path

import torch
from engine import FORK, Bench, bench, planned_rollout, replay
from measuring import machine, section, table, write_json
from shapes import with_shape
from torch import Tensor

from kvpo.app.presets import demo
from kvpo.config import Config
from kvpo.engine.noise import keyed_generator
from kvpo.engine.rollout import Group, Rollout, roll_out

HERE = Path(__file__).resolve().parents[1]
ROUNDS = 5


def explored(subject: Bench) -> Rollout:
    """Roots, branches and anchors, as in training."""
    return roll_out(subject.generator, planned_rollout(subject), subject.texts, subject.tape, ("benchmark",))


def settings(quick: bool) -> Config:
    """The demo's settings or, if ``quick``, a transformer of a few thousand parameters and one prompt."""
    config = demo()
    if not quick:
        return config
    config = with_shape(config, dim=32, num_heads=2, num_layers=2, ffn_dim=48)
    return replace(config, optim=replace(config.optim, prompts_per_update=1))


def taught(subject: Bench, groups: Sequence[Group]) -> Tensor:
    """Energies of every group's trained branches, one group at a time, with backward."""
    subject.model.zero_grad(set_to_none=True)
    kept = sum(subject.config.objective.keep)
    coefficients = torch.randn(kept, generator=keyed_generator("benchmark coefficients"))
    branches = range(kept)
    energies = [replay(subject, [(one, n) for n in branches], coefficients, rows=kept) for one in groups]
    return torch.cat(energies)


def serve(config: Config, computed: Path) -> None:
    """Run each phase named on standard input, and answer with its CPU-seconds.

    The results are written to ``computed`` before the first answer.
    """
    torch.set_num_threads(1)
    subject = bench(config, config.optim.prompts_per_update)
    rollout = explored(subject)
    energies = taught(subject, rollout.groups)
    gradients = [p.grad.flatten() for p in subject.trained.values() if p.grad is not None]
    latents = torch.stack([group.trajectories.clean_MPFCHW for group in rollout.groups])
    torch.save({"latents": latents, "energies": energies, "gradients": torch.cat(gradients)}, computed)
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


def started(checkout: Path, computed: Path, quick: bool) -> subprocess.Popen[str]:
    """Start this script as a server that imports the build of a checkout."""
    return subprocess.Popen(
        [sys.executable, __file__, "--serve", str(computed), *(["--quick"] if quick else [])],
        env={**os.environ, "PYTHONPATH": str(checkout / "src"), "OMP_NUM_THREADS": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def asked(build: subprocess.Popen[str], run: str = "") -> tuple[str, float]:
    """The next answer of a build, after asking it for ``run`` if one is named."""
    assert build.stdin and build.stdout
    if run:
        build.stdin.write(f"{run}\n")
        build.stdin.flush()
    name, seconds = build.stdout.readline().split("\t")
    return name, float(seconds)


def largest_differences(one: Path, other: Path) -> dict[str, float]:
    """Largest difference between two builds in each result, relative to its largest value."""
    ours, theirs = torch.load(one), torch.load(other)
    return {
        what: float((value - theirs[what]).abs().max() / value.abs().max()) for what, value in ours.items()
    }


Taken = dict[str, dict[str, list[float]]]


def alternated(checkouts: dict[str, Path], rounds: int, quick: bool) -> tuple[Taken, dict[str, float]]:
    """CPU-seconds of every round by phase and build, and how far their results differ.

    The builds take turns, and which one goes first alternates.
    """
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.pt" for name in checkouts}
        builds = {name: started(checkout, files[name], quick) for name, checkout in checkouts.items()}
        try:
            phases = [[asked(build)[0] for _ in range(2)] for build in builds.values()][0]
            differences = largest_differences(*files.values())
            taken: Taken = {phase: {name: [] for name in builds} for phase in phases}
            for round_ in range(rounds):
                for phase in phases:
                    for name in reversed(builds) if round_ % 2 else builds:
                        taken[phase][name].append(asked(builds[name], phase)[1])
            return taken, differences
        finally:
            for build in builds.values():
                build.communicate()


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("other", type=Path, nargs="?", help="a checkout of the other commit")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"rounds ({ROUNDS})")
    parser.add_argument("--json", type=Path, help="write every number to this file too")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: checks the benchmark itself")
    parser.add_argument("--serve", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.serve:
        serve(settings(options.quick), options.serve)
        return
    if options.other is None or not (options.other / "src" / "kvpo").is_dir():
        parser.error(f"a checkout with src/kvpo is needed, got {options.other}")
    checkouts = {"other": options.other.resolve(), "this": HERE}
    taken, differences = alternated(checkouts, options.rounds, options.quick)
    rows = []
    for phase, seconds in taken.items():
        other, this = (statistics.median(seconds[name]) for name in ("other", "this"))
        rows.append([phase, other, this, f"{other / this:.2f}x"])
    about = machine()
    section(
        "Two builds",
        f"{about['cpu']}, torch {about['torch']}, load average {about['load_average']:.1f} at the start; one "
        f"thread, CPU-seconds, medians of {options.rounds} alternating rounds; the demo's update, forked at "
        f"frame {FORK}. Largest difference relative to the largest value: "
        + ", ".join(f"{what} {value:.1e}" for what, value in differences.items())
        + ".",
        table(["phase", "other", "this", "faster"], rows),
    )
    write_json(options.json, {"machine": about, "cpu_seconds": taken, "differences": differences})


if __name__ == "__main__":
    main()
