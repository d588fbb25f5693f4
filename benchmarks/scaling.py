"""Speed-up from more ranks: measured with gloo on one machine, and computed for many GPUs.

* Measured: strong scaling keeps the demo's eight groups, weak scaling has two groups per rank, and `branches`
  divides one group's branches. Every rank has one thread; the first update is a warm-up and not counted. The
  bytes that a rank sends are compared with the formula of `kvpo.plan.splits`.
* Model: `kvpo plan` with the rates that `benchmarks/gpu.py` measured on an H100, the memory of an H200 and
  stated bandwidths names the best way to split a run over 1 to 512 such GPUs.
* Layout: one process builds the real layout of 512 ranks, with torch's fake process group on the meta device,
  and compares parameters per rank with the plan.

    python benchmarks/scaling.py [--ranks 1 2] [--updates 2] [--only measured model layout] [--json PATH]
"""

import argparse
import json
import math
import socket
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as processes
from measuring import table, write_json
from torch.testing._internal.distributed.fake_pg import FakeStore

from kvpo.app.build import build_setup
from kvpo.app.configuration import preset
from kvpo.app.plan import Planner, split_numbers
from kvpo.config import Config
from kvpo.models.adapters import add_adapter, trained_parameters
from kvpo.models.causal_wan import CausalWan
from kvpo.plan.phases import Rates
from kvpo.plan.replays import replays_of
from kvpo.plan.splits import Sharing
from kvpo.training.device import GB, computing
from kvpo.training.ranks import Ranks, joined_ranks
from kvpo.training.sharding import local, shard
from kvpo.training.trainer import Trainer

GROUPS, PER_RANK = 8, 2
SMALL = {"exploration.rows": 9, "optim.replay_rows": 4}
"""One group at a time and one trajectory per replay pass, so that ranks can divide both."""
RATES = Rates(flops=250e12, bandwidth=3.0e12, link=400e9, network=45e9)
"""Compute and memory bandwidth of an H100: a third of the measured 752 TFLOP/s, since every phase took three
times as long as its arithmetic, and the measured bandwidth. Links: nine tenths of the one-way rates of NVLink
(450 GB/s) and a 400 Gbit/s adapter."""
MEMORY = 141 * GB
"""Memory of an H200."""
NODES = (1, 2, 8, 64)
PER_NODE = 8


def formula(config: Config, split: Sharing) -> float:
    """Bytes of gradients that a rank sends per update."""
    plan = Planner(config, RATES).plan(config, split)
    return split.exchanged(split.share(config), plan.parameters, split.replayed(replays_of(config)))


def updates(ranks: Ranks, changes: dict[str, Any], count: int) -> dict[str, Any]:
    """Seconds per update and per rollout plus replay, and the bytes that this rank sent in the last one."""
    config = preset("demo", {**SMALL, **changes, "optim.updates": count + 1})
    with computing(config):
        trainer, clock = Trainer(build_setup(config, ranks)), ranks.clock
        seconds, phases = [], []
        for _ in range(count + 1):
            ranks.gather(None, "starting together")
            started, before = time.perf_counter(), clock.read()
            trainer.step()
            seconds.append(time.perf_counter() - started)
            spent = clock.since(before)
            phases.append(spent["seconds"]["rollout"] + spent["seconds"]["replay"])
    split = Sharing(ranks.count, trainer.teams.team.count, trainer.sharded, ranks.count)
    return {
        "seconds": statistics.median(seconds[1:]),
        "rollout_and_replay": statistics.median(phases[1:]),
        "sent": spent["bytes"].get("reduce", 0.0),
        "formula": formula(config, split),
    }


def rank(index: int, count: int, port: int, changes: dict[str, Any], steps: int, found: Any) -> None:
    """One process of a measurement."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, count, is_master=index == 0)  # type: ignore[attr-defined]
    with joined_ranks("cpu", rendezvous=(store, index, count)) as ranks:
        every = ranks.gather(updates(ranks, changes, steps), "collecting")
    if index == 0:
        found.put(every)


def measured(kind: str, count: int, changes: dict[str, Any], steps: int) -> dict[str, Any]:
    """Run updates on ``count`` ranks; the numbers are those of the slowest rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = processes.get_context("spawn")
    found = context.SimpleQueue()
    started = [
        context.Process(target=rank, args=(n, count, port, changes, steps, found)) for n in range(count)
    ]
    for process in started:
        process.start()
    every = found.get()
    for process in started:
        process.join()
    slowest = {
        name: max(one[name] for one in every) for name in ("seconds", "rollout_and_replay", "sent", "formula")
    }
    return {"kind": kind, "ranks": count, "groups": changes["optim.prompts_per_update"], **slowest}


def measurements(counts: list[int], steps: int) -> list[dict[str, Any]]:
    """Measure strong and weak scaling, and one group whose branches are divided."""
    rows: list[dict[str, Any]] = []
    kinds: dict[str, Callable[[int], dict[str, Any]]] = {
        "strong": lambda count: {"optim.prompts_per_update": GROUPS},
        "weak": lambda count: {"optim.prompts_per_update": PER_RANK * count},
        "branches": lambda count: {"optim.prompts_per_update": 1, "distributed.branch_ranks": count},
    }
    for kind, changes_of in kinds.items():
        rows += [measured(kind, count, changes_of(count), steps) for count in counts]
    return rows


def measured_table(rows: list[dict[str, Any]]) -> str:
    """The table; the gain is groups per second relative to the first row of a kind."""
    columns = (
        "scaling", "ranks", "groups", "s per update", "gain", "of rollout and replay", "MB sent",
        "formula, MB",
    )  # fmt: skip
    lines = []
    for row in rows:
        first = next(one for one in rows if one["kind"] == row["kind"])
        share = row["groups"] / first["groups"]
        gains = [share * first[name] / row[name] for name in ("seconds", "rollout_and_replay")]
        numbers = (row["seconds"], *gains, row["sent"] / 1e6, row["formula"] / 1e6)
        lines.append((row["kind"], row["ranks"], row["groups"], *(f"{value:.2f}" for value in numbers)))
    return table(columns, lines)


def model(groups: int) -> list[dict[str, Any]]:
    """The best way to split an update of the 1.3B and 14B presets over more and more GPUs."""
    rows = []
    for name in ("longlive-1.3b", "wan-14b"):
        changes = {
            "optim.prompts_per_update": groups,
            "optim.checkpointing": True,
            "rewards.scorers": ["flicker"],
        }
        config = preset(name, {**changes, "backbone.offload": True})
        planner = Planner(config, RATES)
        alone = planner.plan(config).seconds
        for gpus, nodes in ((1, 1), *((PER_NODE, nodes) for nodes in NODES)):
            best = planner.best_split(config, gpus, nodes, MEMORY)[0]
            numbers = split_numbers(best, MEMORY)
            busy = min(1.0, groups / best.split.teams)
            rows.append({"preset": name, "groups": groups, **numbers, "busy": busy, "alone": alone})
    return rows


def model_table(rows: list[dict[str, Any]]) -> str:
    """The table; efficiency is the time of one GPU over the total time of all GPUs."""
    columns = (
        "preset", "groups", "GPUs", "branch_ranks", "weights spread", "GB", "fits", "s per update",
        "exchange, s", "efficiency", "ranks with work",
    )  # fmt: skip
    lines = []
    for row in rows:
        efficiency = row["alone"] / row["seconds_per_update"] / row["ranks"]
        lines.append(
            (
                row["preset"], row["groups"], row["ranks"], row["branch_ranks"],
                "yes" if row["shard"] else "no", f"{row['peak']['bytes'] / GB:.1f}",
                "yes" if row["fits"] else "no", f"{row['seconds_per_update']:.3g}",
                f"{row['exchange_seconds']:.2g}", f"{efficiency:.0%}", f"{row['busy']:.0%}",
            )
        )  # fmt: skip
    return table(columns, lines)


def layout(ranks: int = 512, size: int = 8, lora_rank: int = 16) -> dict[str, Any]:
    """Shard the 14B transformer over the last team of 512 ranks on the meta device; compare with the plan."""
    dist.init_process_group("fake", rank=ranks - 1, world_size=ranks, store=FakeStore())
    try:
        numbers = range(ranks - size, ranks)
        group = dist.new_group(list(numbers), backend="fake")
        config = preset(
            "wan-14b", {"optim.lora_rank": lora_rank, "backbone.lora": "", "rewards.scorers": ["flicker"]}
        )
        with torch.device("meta"):
            transformer = CausalWan(config.model).to(torch.bfloat16).requires_grad_(False)
        draws = torch.Generator().manual_seed(0)
        add_adapter(transformer, lora_rank, generator=draws)
        shard(transformer, Ranks(size - 1, size, None, group), "cpu")
        trained = sum(local(value).nbytes for value in trained_parameters(transformer).values())
        every = sum(local(value).nbytes for value in transformer.parameters())
    finally:
        dist.destroy_process_group()
    plan = Planner(config, RATES).plan(config, Sharing(ranks, size, True, PER_NODE))
    return {
        "ranks": ranks,
        "team": size,
        "weights": every - trained,
        "planned_weights": plan.standing["weights"],
        "adapter": trained,
        "planned_adapter": plan.standing["adapter"],
        "teams": plan.split.teams,
        "deepest_turns": math.ceil(config.optim.prompts_per_update / plan.split.teams),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the parts that are asked for, and write their tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--updates", type=int, default=2)
    parts = ("measured", "model", "layout")
    parser.add_argument("--only", nargs="+", choices=parts, default=list(parts))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    found: dict[str, Any] = {}
    if "measured" in given.only:
        found["measured"] = measurements(given.ranks, given.updates)
        print(measured_table(found["measured"]))
    if "model" in given.only:
        found["model"] = [row for groups in (8, 64) for row in model(groups)]
        print(model_table(found["model"]))
    if "layout" in given.only:
        found["layout"] = layout()
        print(json.dumps(found["layout"], indent=1))
    write_json(given.json, found)


if __name__ == "__main__":
    main()
