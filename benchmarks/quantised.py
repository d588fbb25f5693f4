"""Compare 8-bit and float32 rollouts: CPU-seconds, the policy gap, and what runs that use them learn.

    python benchmarks/quantised.py [--repeats 4] [--runs DIR ...] [--json PATH] [any setting]

Measures one rollout of the demo with a random adapter at 4 % of the weights; arms alternate.
"""

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any, cast
from unittest.mock import patch

import torch
import yaml
from measuring import alternated, given_settings, machine, section, table, write_json
from torch import Tensor, nn

from kvpo.app.build import build_setup
from kvpo.app.configuration import preset
from kvpo.models import quantised
from kvpo.models.adapted_linear import AdaptedLinear
from kvpo.models.quantised import QuantisedLinear
from kvpo.training.collection import explore, policy_gap
from kvpo.training.device import computing

BESIDE = "int8, adapter beside"
PRECISIONS = {"same": "same", "int8": "int8", BESIDE: "int8", "fp8": "fp8"}


class Beside(nn.Module):
    """The alternative way to quantise an adapted layer: only its weight, with the adapter in float32."""

    def __init__(self, layer: AdaptedLinear, precision: str) -> None:
        super().__init__()
        self.weight = QuantisedLinear(cast(nn.Linear, layer.base_layer), precision)
        self.in_features = layer.in_features
        (name,) = layer.active_adapters
        self.a, self.b = (cast(Tensor, part[name].weight) for part in (layer.lora_A, layer.lora_B))
        self.scale = layer.scaling[name]

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both products."""
        return self.weight(x) + self.scale * ((x @ self.a.t()) @ self.b.t())


def rollouts(repeats: int, settings: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """CPU-seconds and gap of each arm's rollout, including scoring, all from the same weights."""
    setups = {
        arm: build_setup(preset("demo", {**settings, "optim.rollout_precision": precision}))
        for arm, precision in PRECISIONS.items()
    }
    for setup in setups.values():
        draws = torch.Generator().manual_seed(0)
        for name, value in setup.model.named_parameters():
            if "lora_B" in name:
                value.data.normal_(0, 0.02, generator=draws)
    gaps: dict[str, float] = {}

    def rolled_out(arm: str) -> None:
        setup, made = setups[arm], Beside if arm == BESIDE else QuantisedLinear
        with patch.object(quantised, "QuantisedLinear", made):
            ((rollout, _),) = explore(setup, [0])
        if arm not in gaps:
            gaps[arm] = fmean(policy_gap(setup.generator, group) for group in rollout.groups)
        rollout.release()

    arms = {arm: partial(rolled_out, arm) for arm in PRECISIONS}
    with computing(setups["same"].config):
        for warm in arms.values():
            warm()
        seconds = alternated(arms, repeats, clock=time.process_time)
    return {arm: {"cpu_s": seconds[arm], "gap": gaps[arm]} for arm in arms}


def learned(directory: Path) -> dict[str, Any]:
    """Precision, gap and held-out gains of a finished run."""
    config = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
    lines = map(json.loads, (directory / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    updates = [line for line in lines if line["kind"] == "update"]
    summary = json.loads((directory / "summary.json").read_text(encoding="utf-8"))
    return {
        "precision": config["optim"]["rollout_precision"],
        "seed": config["seed"],
        "updates": len(updates),
        "cpu_s": sum(one["cpu_s"] for one in updates),
        "gaps": [one["rollout_gap"] for one in updates if "rollout_gap" in one],
        "gains": {
            name: [held["paired_gain"], held["paired_se"]] for name, held in summary["held_out"].items()
        },
    }


def rolled(numbers: Mapping[str, Any]) -> str:
    """The table of rollouts."""
    found = numbers["rollouts"]
    rows = [
        (arm, f"{one['cpu_s']:.2f}", f"{one['cpu_s'] / found['same']['cpu_s']:.2f}", f"{one['gap']:.2g}")
        for arm, one in found.items()
    ]
    return table(("rollout", "CPU (s)", "to float32", "policy gap"), rows)


def runs(numbers: Mapping[str, Any]) -> str:
    """The table of runs."""
    rows = [
        (one["precision"], one["seed"], f"{one['cpu_s']:.1f}",
         f"{min(one['gaps']):.2g} to {max(one['gaps']):.2g}" if one["gaps"] else "",
         *(f"{gain:+.3f} ± {error:.3f}" for gain, error in one["gains"].values()))
        for one in numbers["runs"]
    ]  # fmt: skip
    return table(("rollouts", "seed", "CPU of updates (s)", "policy gap", "gain, short", "gain, long"), rows)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=4)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="finished runs of `kvpo align`")
    parser.add_argument("--json", type=Path)
    options, extra = parser.parse_known_args(arguments)
    numbers = {
        "machine": machine(),
        "rollouts": rollouts(options.repeats, given_settings(extra)),
        "runs": [learned(directory) for directory in options.runs],
    }
    write_json(options.json, numbers)
    section("Rollouts of 8 bits", rolled(numbers), runs(numbers))


if __name__ == "__main__":
    main()
