"""Kill ranks of a run at random moments, and check that it ends as if nothing had happened.

Every attempt starts torchrun with ``--max-restarts`` and sends SIGKILL to a random rank at a random moment,
again and again until the run is done. Half of the moments count from the start of the ranks and half from
their next metrics record; one in four then waits until a checkpoint is being written. The phase that a kill
interrupted is the one in which the surviving ranks say that they lost touch. The result is compared with an
uninterrupted run of one process: trained weights, moving average and optimiser bit for bit, and all metrics
except times. An interrupted campaign continues where it stopped; every kill is a line of kills.jsonl.

    python benchmarks/kills.py --out runs/kills --kills 100 [--ranks 2] [--seed 0] [--json PATH]
"""

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from measuring import table, write_json
from safetensors.torch import load_file
from torch import nn

from kvpo.files import TEMPORARY_PREFIX, json_lines
from kvpo.models.geometry import fields_of
from kvpo.models.settings import WanShape
from kvpo.training.checkpoint import latest_checkpoint
from kvpo.world.pretrain import PretrainSettings, new_generator, save_generator
from kvpo.world.snippets import SnippetSettings

SHAPE = WanShape(dim=32, num_heads=2, num_layers=1, ffn_dim=48, freq_dim=16, patch_size=(1, 4, 4))
"""A generator so small that starting takes longer than an update."""
SETTINGS = [
    "--preset", "demo", "--optim.updates", "24", "--optim.prompts_per_update", "2", "--optim.lora_rank", "4",
    "--exploration.branches", "4", "--exploration.rows", "5", "--checkpoint.every", "1",
    "--evaluation.every", "2", "--evaluation.validation_prompts", "2", "--evaluation.test_prompts", "2",
    "--rewards.noise_floors", "total=0",
]  # fmt: skip
RESTARTS = 3
TIMES = ("time", "seconds", "phases", "cpu_s")
"""Metrics that differ between any two runs."""
STARTING = 4.0
"""Seconds during which ranks only import torch."""
AFTER = 3.0
"""Mean of the exponential delay after that, or after the next metrics record."""
PATIENCE = 120.0
"""Seconds after which ranks are killed even without a new record."""
LOST = re.compile(r"lost touch with another rank while (.+?);")


def write_generator(directory: Path) -> None:
    """Write the geometry and random weights of the generator to train."""
    transformer, text = new_generator(SHAPE, seed=0)
    head, draws = transformer.head.head.weight, torch.Generator().manual_seed(0)
    with torch.no_grad():  # a new head is zero, and nothing could be learned
        head.copy_(0.3 * torch.randn(head.shape, generator=draws))
    state = nn.ModuleDict({"transformer": transformer, "text": text}).state_dict()
    settings = PretrainSettings(SnippetSettings(), steps=0)
    save_generator(state, SHAPE, settings, directory / "base.safetensors")
    (directory / "geometry.json").write_text(json.dumps(fields_of(SHAPE)))


def command(out: Path, ranks: int) -> list[str]:
    """Command of the run, under torchrun if there are several ranks."""
    files = [str(out.parent / name) for name in ("base.safetensors", "geometry.json")]
    generator = ["--backbone.checkpoint", files[0], "--backbone.geometry", files[1]]
    align = ["-m", "kvpo", "align", *SETTINGS, *generator, "--out", str(out), "--resume"]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    launcher += ["--max-restarts", str(RESTARTS)]
    return [sys.executable, *(launcher if ranks > 1 else []), *align]


def ended(out: Path) -> tuple[dict[str, torch.Tensor], list[dict[str, Any]]]:
    """Tensors of the last checkpoint, and the metrics without times."""
    latest = latest_checkpoint(out / "checkpoints")
    assert latest is not None
    records = [
        {name: value for name, value in record.items() if name not in TIMES}
        for _, record in json_lines(out / "metrics.jsonl")
        if record
    ]
    return load_file(latest / "state.safetensors"), records


def same(out: Path, reference: Path) -> bool:
    """True if two runs ended with the same tensors and metrics."""
    (tensors, metrics), (expected, expected_metrics) = ended(out), ended(reference)
    equal = tensors.keys() == expected.keys()
    return (
        equal and metrics == expected_metrics and all(torch.equal(tensors[n], expected[n]) for n in tensors)
    )


def children(parent: int) -> list[int]:
    """Ids of a process's children: the ranks of a torchrun."""
    listed = Path(f"/proc/{parent}/task/{parent}/children").read_text().split()
    return [int(child) for child in listed]


def saving(out: Path) -> bool:
    """True while a checkpoint is being written."""
    return any((out / "checkpoints").glob(f"{TEMPORARY_PREFIX}*"))


def recorded(out: Path) -> int:
    """Bytes of metrics written so far."""
    metrics = out / "metrics.jsonl"
    return metrics.stat().st_size if metrics.exists() else 0


def wait(out: Path, size: int, draws: random.Random, ended: Callable[[], bool]) -> None:
    """Wait for a random moment after the start or next record, sometimes also for a checkpoint."""
    until = time.monotonic() + PATIENCE
    if draws.random() < 0.5:
        time.sleep(STARTING)
    else:  # a resumed run first drops the records after its checkpoint
        while recorded(out) <= size and not ended() and time.monotonic() < until:
            time.sleep(0.01)
    time.sleep(draws.expovariate(1 / AFTER))
    if draws.random() < 0.25:
        until = time.monotonic() + 5 * AFTER
        while not saving(out) and not ended() and time.monotonic() < until:
            time.sleep(0.0005)


def attempt(out: Path, ranks: int, draws: random.Random, log: Path, left: int) -> list[dict[str, Any]]:
    """Run one torchrun and kill at most RESTARTS + 1 ranks: the kills, and when the others ended."""
    kills: list[dict[str, Any]] = []
    with log.open("a") as file:
        launcher = subprocess.Popen(command(out, ranks), stdout=file, stderr=file)
        while launcher.poll() is None and len(kills) < min(left, RESTARTS + 1):
            size = recorded(out)
            wait(out, size, draws, lambda: launcher.poll() is not None)
            ours = children(launcher.pid) if launcher.poll() is None else []
            if len(ours) < ranks:
                continue
            victim, writing, said = draws.randrange(ranks), saving(out), log.stat().st_size
            started = time.monotonic()
            os.kill(ours[victim], signal.SIGKILL)
            while launcher.poll() is None and set(ours) & set(children(launcher.pid)):
                time.sleep(0.05)
            lost = LOST.search(log.read_bytes()[said:].decode(errors="replace"))
            unsaid = "working; torchrun ended the others" if recorded(out) > size else "starting, or resuming"
            doing = lost.group(1) if lost else unsaid
            kills.append(
                {
                    "rank": victim,
                    "doing": doing,
                    "writing": writing,
                    "ended_s": round(time.monotonic() - started, 2),
                }
            )
        launcher.wait()
    return kills


def campaign(out: Path, kills: int, ranks: int, seed: int) -> list[dict[str, Any]]:
    """Kill until there are enough kills. Finished runs are compared, and removed if they match."""
    record, reference, run = out / "kills.jsonl", out / "reference", out / "run"
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "geometry.json").exists():
        write_generator(out)
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
            if verdict:
                shutil.rmtree(run)
            else:  # kept for debugging
                run.rename(out / f"differs-{len(done)}")
        record.write_text("".join(json.dumps(line) + "\n" for line in done))
    return done


def counted(done: list[dict[str, Any]], ranks: int) -> str:
    """The campaign as Markdown: how often each phase was interrupted, and how the runs ended."""
    kills, runs = [one for one in done if "rank" in one], [one for one in done if "run" in one]
    slowest = max((one["ended_s"] for one in kills), default=0.0)
    interrupted = Counter(one["doing"] for one in kills).most_common()
    return (
        f"{table(('ranks were', 'kills'), interrupted)}\n\n"
        f"{len(kills)} kills on {ranks} ranks, {sum(one['writing'] for one in kills)} while a checkpoint "
        f"was being written; the others ended within {slowest:.1f} s; "
        f"{sum(bool(one['same']) for one in runs)} of {len(runs)} runs ended equal bit for bit."
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/kills"))
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    found = campaign(given.out, given.kills, given.ranks, given.seed)
    print(counted(found, given.ranks))
    write_json(given.json, found)
