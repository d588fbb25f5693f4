"""Held-out results of a run's model, base and aligned."""

from collections.abc import Callable, Mapping
from typing import Any

from kvpo.engine.noise import Tape
from kvpo.training.evaluation import ROWS, Evaluation, evaluate_policy
from kvpo.training.kept_results import NOTHING_KEPT, KeptResults
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
    kept: KeptResults = NOTHING_KEPT,
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
        kept=kept,
    )


def evaluate_base(
    setup: Setup,
    trainer: Trainer,
    sets: Mapping[str, Any],
    **how: Any,
) -> dict[str, Evaluation]:
    """Held-out results of the starting policy (``how``: see `evaluate_prompts`)."""
    with trainer.sides.base():
        return {name: evaluate_prompts(setup, own, trainer.sharing, **how) for name, own in sets.items()}
