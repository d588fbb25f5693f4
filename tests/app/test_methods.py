"""Every method through the command line, from a tiny base to its summary."""

import json
from pathlib import Path

import pytest
import yaml

from kvpo.app.cli import main
from kvpo.method.methods import METHODS
from kvpo.training.checks import RATIO_TOLERANCE
from tests.tiny_world import SETTINGS

FEW = {
    "optim.updates": 2,
    "evaluation.every": 0,
    "exploration.branches": 2,
    "exploration.distinct": 1,
    "exploration.resident_frames": 9,
}


EACH_KIND = ("kvpo", "cm-grpo", "nft")
"""A surrogate of velocities, a policy over noise at single steps, and a policy that lags."""


@pytest.mark.parametrize(
    "method",
    [name if name in EACH_KIND else pytest.param(name, marks=pytest.mark.slow) for name in METHODS],
)
def test_a_run_of_every_method_ends_with_its_summary(tiny_base: Path, tmp_path: Path, method: str) -> None:
    out = tmp_path / "run"
    command = [
        "align",
        "--preset",
        "demo",
        "--method",
        method,
        "--out",
        str(out),
        "--backbone.checkpoint",
        str(tiny_base),
    ]
    for name, value in (SETTINGS | FEW).items():
        text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
        command.append(f"--{name.replace('_', '-')}={text}")
    assert main(command) == 0
    summary = json.loads((out / "summary.json").read_text())
    assert summary["method"] == method
    checks = summary["checks"]
    assert checks["anchor_energy_at_old"] == checks["default_route_max_difference"] == 0.0
    assert ("first_ratio_max_deviation" in checks) == ("ratio_deviation" in METHODS[method].metrics)
    assert checks.get("first_ratio_max_deviation", 0.0) <= RATIO_TOLERANCE["none"]
    saved = yaml.safe_load((out / "config.yaml").read_text())
    assert saved["method"] == method and saved["exploration"]["donor"] == 0
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    updates = [record for record in records if record["kind"] == "update"]
    assert len(updates) == 2 and set(METHODS[method].metrics) <= set(updates[0])
    assert (out / "report.html").is_file()
