"""Measure the cost of a busy neighbour: torch threads, how they wait, and processes on the same cores.

Runs a fixed piece of the demo (some updates after a warm-up) in its own process, on a quiet machine and
beside processes that never sleep, for every number of threads and every OMP_WAIT_POLICY.

    python benchmarks/threads.py [--updates 2] [--repeats 3] [--threads 1 2] [--busy 0 2]
        [--waiting unset PASSIVE ACTIVE] [--json PATH] [any setting]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from measuring import given_settings, machine, section, table, write_json

from kvpo.app.build import build_setup
from kvpo.app.configuration import preset
from kvpo.training.collection import explore
from kvpo.training.device import computing
from kvpo.training.trainer import Trainer

UNSET = "unset"


def piece(threads: int, updates: int, latents: Path, settings: Sequence[str]) -> None:
    """Print seconds and CPU-seconds of some updates as JSON, and save the latents of the first rollout."""
    config = replace(preset("demo", given_settings(settings)), threads=threads)
    with computing(config):
        setup = build_setup(config)
        trainer = Trainer(setup)
        ((rollout, _),) = explore(setup, [0])
        torch.save(torch.cat([group.clean_MTCHW for group in rollout.groups], 1), latents)
        rollout.release()
        trainer.step()
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(updates):
            trainer.step()
        taken = {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}
    sys.stdout.write(json.dumps(taken) + "\n")


@contextmanager
def neighbours(count: int) -> Iterator[None]:
    """Run ``count`` processes that never sleep."""
    spinning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in spinning:
            process.kill()
            process.wait()


def measured(
    busy: int, threads: int, waiting: str, updates: int, latents: Path, extra: Sequence[str]
) -> dict[str, float]:
    """Run the piece in a new process, because torch reads the wait policy when it loads."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("OMP_", "GOMP_"))}
    if waiting != UNSET:
        environment["OMP_WAIT_POLICY"] = waiting
    command = [sys.executable, __file__, "--piece", str(latents), "--threads", str(threads)]
    with neighbours(busy):
        done = subprocess.run(
            [*command, "--updates", str(updates), *extra],
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def difference(one: Path, other: Path) -> float:
    """Largest difference between two rollouts' latents."""
    return float((torch.load(one, weights_only=True) - torch.load(other, weights_only=True)).abs().max())


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every arm in turn, repeat, and write the medians."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--updates", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--busy", type=int, nargs="+", default=[0, 2], help="neighbours, in turn")
    parser.add_argument("--waiting", nargs="+", default=[UNSET, "PASSIVE", "ACTIVE"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--piece", type=Path, help=argparse.SUPPRESS)
    options, extra = parser.parse_known_args(argv)
    if options.piece is not None:
        piece(options.threads[0], options.updates, options.piece, extra)
        return
    arms = list(product(options.busy, options.threads, options.waiting))
    taken: dict[Any, list[dict[str, float]]] = {arm: [] for arm in arms}
    with tempfile.TemporaryDirectory() as scratch:
        latents = {threads: Path(scratch) / f"{threads}.pt" for threads in options.threads}
        for _ in range(options.repeats):
            for arm in arms:
                taken[arm].append(measured(*arm, options.updates, latents[arm[1]], extra))
        first = options.threads[0]
        apart = {threads: difference(latents[first], latents[threads]) for threads in options.threads}
    results = [
        {"busy": busy, "threads": threads, "waiting": waiting}
        | {name: statistics.median(one[name] for one in runs) for name in ("wall_s", "cpu_s")}
        for (busy, threads, waiting), runs in taken.items()
    ]
    section(
        "Threads and a busy machine",
        f"{options.updates} updates of the demo; medians of {options.repeats} rounds.",
        table(
            ["busy neighbours", "threads", "OMP_WAIT_POLICY", "wall (s)", "CPU (s)"],
            [list(result.values()) for result in results],
        ),
        "Largest difference of a first rollout's latents from those with "
        + f"{first} thread(s): "
        + ", ".join(f"{value:.1g} with {threads}" for threads, value in apart.items() if threads != first),
    )
    write_json(options.json, {"machine": machine(), "results": results, "latents_apart": apart})


if __name__ == "__main__":
    main()
