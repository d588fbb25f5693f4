"""Held-out results of a run's model, base and aligned."""

from collections.abc import Callable, Mapping
from typing import Any

from kvpo.engine.noise import Tape
from kvpo.training.evaluation import ROWS, Evaluation, evaluate_policy
from kvpo.training.ranks import Ranks
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer


def evaluate_prompts(
    setup: Setup,
    prompts: Any,
    ranks: Ranks,
    tape: Tape | None = None,
    *,
    mismatched: bool = False,
    first: int = 0,
    report: Callable[[int], None] = lambda videos: None,
) -> Evaluation:
    """Held-out results of the model's current weights; ranks divide the videos (see `evaluate_policy`).

    The default tape is the one of all held-out results.
    """
    return evaluate_policy(
        setup.backbone,
        prompts,
        tape or setup.evaluation_tape(),
        setup.judges,
        rows=setup.config.exploration.rows or ROWS,
        ranks=ranks,
        mismatched=mismatched,
        first=first,
        report=report,
    )


def evaluate_base(
    setup: Setup,
    trainer: Trainer,
    sets: Mapping[str, Any],
    *,
    mismatched: bool = False,
    report: Callable[[int], None] = lambda videos: None,
) -> dict[str, Evaluation]:
    """Held-out results of the starting policy."""
    with trainer.sides.base():
        return {
            name: evaluate_prompts(setup, own, trainer.sharing, mismatched=mismatched, report=report)
            for name, own in sets.items()
        }
