"""A campaign of kills: ranks of a run die at random moments, and it ends as if nothing had happened.

Every attempt starts torchrun with ``--max-restarts`` and sends SIGKILL to a random rank at a random moment,
again and again until the run is done. The end is compared with that of an uninterrupted run of one process:
trained weights, moving average and optimiser bit for bit, metrics but for times. The campaign can be
interrupted and goes on where it was; every kill is a line of kills.jsonl.

    python benchmarks/kills.py --out runs/kills --kills 100 [--ranks 2] [--seed 0]
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from kvpo.files import TEMPORARY_PREFIX
from kvpo.training.checkpoint import latest_checkpoint
from kvpo.training.metrics_log import read_metrics

SETTINGS = [
    "--preset", "demo", "--optim.updates", "6", "--optim.prompts_per_update", "2",
    "--exploration.branches", "4", "--exploration.rows", "5", "--checkpoint.every", "1",
    "--evaluation.every", "2", "--evaluation.validation_prompts", "2", "--evaluation.test_prompts", "2",
]  # fmt: skip
RESTARTS = 3
TIMES = ("time", "seconds")
"""Metrics that no two runs share."""
STARTING = 4.0
"""Seconds in which ranks only import torch."""


def command(out: Path, ranks: int) -> list[str]:
    """The run under torchrun, or alone."""
    align = ["-m", "kvpo", "align", *SETTINGS, "--out", str(out), "--resume"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher += ["--max-restarts", str(RESTARTS)]
    return [sys.executable, *(launcher if ranks > 1 else []), *align]


def ended(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors of the last checkpoint, and metrics without times."""
    latest = latest_checkpoint(out / "checkpoints")
    assert latest is not None
    records = [
        {name: value for name, value in record.items() if name not in TIMES}
        for record in read_metrics(out / "metrics.jsonl")
    ]
    return load_file(latest / "state.safetensors"), records


def same(out: Path, reference: Path) -> bool:
    """True if two runs have ended alike."""
    (tensors, metrics), (expected, expected_metrics) = ended(out), ended(reference)
    equal = tensors.keys() == expected.keys()
    return (
        equal and metrics == expected_metrics and all(torch.equal(tensors[n], expected[n]) for n in tensors)
    )


def children(parent: int) -> list[int]:
    """Processes that a process has started: the ranks of a torchrun."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in listed]


def moment(out: Path) -> str:
    """The point that a run had reached: the last update with metrics, or the directory that it was saving."""
    saving = (
        [path.name for path in (out / "checkpoints").glob(f"{TEMPORARY_PREFIX}*")] if out.exists() else []
    )
    lines = read_metrics(out / "metrics.jsonl") if (out / "metrics.jsonl").exists() else []
    return (
        f"while saving {saving[0]}" if saving else f"after update {lines[-1]['update']}" if lines else "start"
    )


def attempt(out: Path, ranks: int, draws: random.Random, log: Path, left: int) -> list[dict[str, Any]]:
    """One torchrun, at most RESTARTS + 1 of whose ranks are killed: the kills, and when the others ended."""
    kills: list[dict[str, Any]] = []
    with log.open("a") as file:
        launcher = subprocess.Popen(command(out, ranks), stdout=file, stderr=file)
        while launcher.poll() is None and len(kills) < min(left, RESTARTS + 1):
            time.sleep(STARTING + draws.expovariate(1 / 6.0))
            ours = children(launcher.pid) if launcher.poll() is None else []
            if len(ours) < ranks:
                continue
            victim, reached, started = draws.randrange(ranks), moment(out), time.monotonic()
            os.kill(ours[victim], signal.SIGKILL)
            while launcher.poll() is None and set(ours) & set(children(launcher.pid)):
                time.sleep(0.05)
            kills.append({"rank": victim, "moment": reached, "ended_s": time.monotonic() - started})
        launcher.wait()
    return kills


def campaign(out: Path, kills: int, ranks: int, seed: int) -> list[dict[str, Any]]:
    """Kill until there are enough kills; every run that ends is compared and removed."""
    record, reference, run = out / "kills.jsonl", out / "reference", out / "run"
    out.mkdir(parents=True, exist_ok=True)
    if not (reference / "report.html").exists():
        subprocess.run(command(reference, 1), check=True)
    done = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    draws = random.Random(f"{seed}-{len(done)}")
    while (left := kills - sum("rank" in one for one in done)) > 0 or run.exists():
        own = attempt(run, ranks, draws, out / "log", left)
        finished = (run / "report.html").exists()
        verdict = same(run, reference) if finished else None
        for kill in own:
            done.append(kill)
        if finished:
            done.append({"run": "ended", "same": verdict})
            shutil.rmtree(run)
        record.write_text("".join(json.dumps(line) + "\n" for line in done))
    return done


def table(done: list[dict[str, Any]], ranks: int) -> str:
    """The campaign as Markdown."""
    kills, runs = [one for one in done if "rank" in one], [one for one in done if "run" in one]
    saving = sum(one["moment"].startswith("while saving") for one in kills)
    slowest = max((one["ended_s"] for one in kills), default=0.0)
    return "\n".join(
        [
            "| ranks | kills | while saving | others ended within | runs ended | equal bit for bit |",
            "|---|---|---|---|---|---|",
            f"| {ranks} | {len(kills)} | {saving} | {slowest:.1f} s | {len(runs)} | "
            f"{sum(bool(one['same']) for one in runs)} |",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(table(campaign(given.out, given.kills, given.ranks, given.seed), given.ranks))
