"""`kvpo evaluate`: base and aligned model of a run on its test prompts, as at the end of the run."""

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kvpo.app.build import build_setup
from kvpo.app.configuration import resolve_run
from kvpo.app.provenance import demand_same_files, demand_same_prompts
from kvpo.config import Config
from kvpo.files import local_path, output_file, write_atomic
from kvpo.progress import progress_bars
from kvpo.report.headline import final_headline
from kvpo.training.checkpoint import find_checkpoint, no_improvement
from kvpo.training.device import computing
from kvpo.training.evaluation import comparison
from kvpo.training.ranks import Ranks, added_up, joined_ranks
from kvpo.training.run import evaluate_prompts, open_checkpoint

logger = logging.getLogger(__name__)


def evaluate(
    run: Path | str,
    *,
    checkpoint: str | None = None,
    weights: str = "average",
    out: Path | str | None = None,
    places: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare a run's checkpoint with its base and write the numbers as JSON; ranks share the videos.

    The result holds ``checkpoint``, ``weights``, ``verdict`` in words, ``held_out`` (for the best checkpoint
    the very numbers of ``summary.json``) and ``scored``, how many clips were scored or known already.

    Raises ValueError where the run or its checkpoint cannot be used.

    Args:
        checkpoint: best, latest, an update, a directory; None: the best.
        weights: the moving ``average`` of the trained weights, or the ``raw`` ones of the last update.
        out: file to write; None: ``evaluation.json`` in the run directory.
        places: where the run's files lie now, by setting (``{"backbone.checkpoint": "/new/base.pt"}``).
    """
    run = local_path(run, "run")
    config = resolve_run(run, places)
    target = output_file(run / "evaluation.json" if out is None else out, "out")
    with joined_ranks(config.device) as ranks, computing(config):
        return _evaluate(ranks, run, config, checkpoint, weights, target)


def _evaluate(
    ranks: Ranks, run: Path, config: Config, checkpoint: str | None, weights: str, out: Path
) -> dict[str, Any]:
    demand_same_prompts(run, config)
    demand_same_files(run, config)
    path = find_checkpoint(run / "checkpoints", checkpoint)
    if (warning := no_improvement(path, checkpoint)) is not None:
        logger.warning(warning)
    with ranks.together("loading the generator and the rewards"):
        setup = build_setup(config, ranks)
        sides = open_checkpoint(setup.backbone.weights, path, weights)
    held_out = {}
    with progress_bars(shown=ranks.main) as show:
        for done, (name, prompts) in enumerate(setup.test.items()):
            show("base and aligned on test prompts", done, len(setup.test))
            with sides.base():
                base = evaluate_prompts(setup, prompts, ranks)
            with sides.aligned():
                aligned = evaluate_prompts(setup, prompts, ranks)
            held_out[name] = comparison(base, aligned, setup.judges)
        show("base and aligned on test prompts", len(setup.test), len(setup.test))
    numbers = {"checkpoint": path.name, "weights": weights, "held_out": held_out}
    numbers |= {"scored": added_up(ranks.gather(asdict(setup.scored), "counting clips"))} | (
        {} if warning is None else {"improved": False}
    )
    verdict = final_headline(numbers, asdict(config))
    numbers["verdict"] = verdict.text
    logger.warning("%s", verdict.text)
    text = json.dumps(numbers, indent=2, allow_nan=False) + "\n"
    ranks.once("writing the numbers", lambda: write_atomic(out, text))
    return numbers
