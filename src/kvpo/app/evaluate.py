"""`kvpo evaluate`: base and aligned model of a run on its test prompts, as at the end of the run."""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpo.app.build import build_setup
from kvpo.app.configuration import resolve
from kvpo.app.progress import Bars, progress_bars
from kvpo.files import write_atomic
from kvpo.report.headline import verdict_of
from kvpo.training.checkpoint import find_checkpoint
from kvpo.training.evaluation import comparison
from kvpo.training.policy import exchanged, policy_of
from kvpo.training.run import evaluate_prompts, load_average

logger = logging.getLogger(__name__)


def evaluate(
    run: Path | str, *, checkpoint: str | None = None, out: Path | str | None = None
) -> dict[str, Any]:
    """Compare a run's checkpoint (its moving average) with its base and write the numbers as JSON.

    The result holds ``checkpoint``, ``verdict`` in words, ``held_out`` (for the best checkpoint the very
    numbers of ``summary.json``) and ``scored``, how many clips were scored or known already.

    Raises ValueError where the run or its checkpoint cannot be used.

    Args:
        checkpoint: best, latest, an update, a directory; None: the best.
        out: file to write; None: ``evaluation.json`` in the run directory.
    """
    run = Path(run)
    config = resolve(None, run / "config.yaml", {})
    path = find_checkpoint(run / "checkpoints", checkpoint)
    setup = build_setup(config)
    policy = policy_of(setup.model, adapted=config.optim.train == "lora")
    average = load_average(setup, policy, path)
    held_out = {}
    with progress_bars() as display:
        show = Bars(display)
        for done, (name, prompts) in enumerate(setup.test.items()):
            show("base and aligned on test prompts", done, len(setup.test), {})
            with policy.reference():
                base = evaluate_prompts(setup, prompts)
            with exchanged(policy.parameters, average):
                aligned = evaluate_prompts(setup, prompts)
            held_out[name] = comparison(base, aligned, setup.judges)
        show("base and aligned on test prompts", len(setup.test), len(setup.test), {})
    numbers = {"checkpoint": path.name, "held_out": held_out, "scored": asdict(setup.scored)}
    verdict = verdict_of(numbers, asdict(config))
    numbers["verdict"] = verdict.text
    logger.warning("%s", verdict.text)
    target = run / "evaluation.json" if out is None else Path(out)
    write_atomic(target, json.dumps(numbers, indent=2, allow_nan=False) + "\n")
    return numbers
