"""`kvpo evaluate`: compares base and aligned model of a run on test prompts and minutes-long streams."""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from kvpo.app.build import build_setup, checkpoint_of, source_of
from kvpo.app.configuration import PLACES_OF_A_RUN, resolve_run
from kvpo.app.given_frames import with_given_frames
from kvpo.app.origin import identity_of
from kvpo.app.provenance import demand_same_files, demand_same_prompts
from kvpo.app.sources.common import as_final
from kvpo.app.taken import claimed
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.files import local_path, make_directory, new_file, output_file, remove_leftovers, write_json
from kvpo.progress import counter, progress_bars
from kvpo.report.drift import draw_drift
from kvpo.report.headline import final_headline
from kvpo.report.null_runs import kept_null
from kvpo.training.checkpoint import no_improvement
from kvpo.training.device import computing
from kvpo.training.drift import chained, drift_curves
from kvpo.training.evaluation import comparison
from kvpo.training.held_out import evaluate_prompts
from kvpo.training.kept_results import KeptResults
from kvpo.training.policy import Sides
from kvpo.training.ranks import ALONE, Ranks, added_up, joined_ranks
from kvpo.training.run import open_checkpoint
from kvpo.training.run_directory import NULL_RUNS
from kvpo.training.setup import Setup

logger = logging.getLogger(__name__)

SPLITS = {"test": "evaluation.json", "final": "final.json"}
"""The file of a run that holds its evaluation on each split."""
SPAN_SECONDS, STREAMS = 10.0, 4
"""Length of the spans that drift is measured over, rounded to whole blocks, and the number of streams."""


def evaluate(
    run: Path | str,
    *,
    checkpoint: str | int | Path | None = None,
    weights: str = "average",
    split: Literal["test", "final"] = "test",
    out: Path | str | None = None,
    frames: Path | None = None,
    places: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare a run's checkpoint with its base and write the numbers as JSON; ranks share the videos.

    The result holds ``checkpoint``, ``weights``, ``split``, ``verdict`` (text), ``held_out`` and ``scored``,
    the number of clips that this call scored or found already known. For the best checkpoint on the test
    split, ``held_out`` has the same numbers as ``summary.json``.

    Raises ValueError if the run, its checkpoint or the split cannot be used.

    Args:
        checkpoint: best, latest, an update number or a directory; None: the best.
        weights: the moving ``average`` of the trained weights, or the ``raw`` ones of the last update.
        split: the run's ``test`` prompts on the tape of all held-out results, or the ``final`` ones: prompts
            and a tape that no run draws from, for a project's final results.
        out: file to write; None: ``evaluation.json`` in the run, or ``final.json`` for the final split.
        frames: an image or video that all videos begin with, or a JSON file that maps prompts to such files;
            only what follows them is scored.
        places: where the run's files are now, by setting (``{"backbone.checkpoint": "/new/base.pt"}``).
    """
    if split not in SPLITS:
        raise ConfigurationError(f"split: must be {' or '.join(SPLITS)}, got {split!r}")
    run = local_path(run, "run")
    config = resolve_run(run, places)
    target = output_file(numbers_file(run, split) if out is None else out, "out")
    with joined_ranks(config.device) as ranks, computing(config):
        return _evaluate(ranks, run, config, checkpoint, weights, split, target, frames)


def numbers_file(run: Path, split: str) -> Path:
    """The file of a run that holds its evaluation on a split."""
    return run / SPLITS[split]


def _evaluate(
    ranks: Ranks,
    run: Path,
    config: Config,
    checkpoint: str | int | Path | None,
    weights: str,
    split: str,
    out: Path,
    frames: Path | None,
) -> dict[str, Any]:
    setup, sides, path = _opened(ranks, run, config, checkpoint, weights)
    if split == "final":
        sets, tape = source_of(config).final(config), setup.final_tape()
    else:
        sets, tape = as_final(setup.test), setup.evaluation_tape()
    with ranks.together("encoding given frames"):
        asked = [prompt for one in sets.values() for prompt in one.prompts]
        setup = replace(setup, backbone=with_given_frames(setup.backbone, frames, asked))
    held_out: dict[str, Any] = {}
    aligned = f"{identity_of(path, weights)}, {config}"
    with _unfinished(ranks, out) as parts, progress_bars(shown=ranks.main) as show:
        report = counter(show, f"{split} videos of base and aligned", 2 * len(asked))
        both = (
            (sides.base, KeptResults(parts, f"base, {config}", ranks)),
            (sides.aligned, KeptResults(parts, aligned, ranks)),
        )
        for name, one in sets.items():
            found = []
            for side, kept in both:
                given = {"mismatched": True, "first": one.first, "report": report, "kept": kept}
                with side():
                    found.append(evaluate_prompts(setup, one.prompts, ranks, tape, **given))
            held_out[name] = comparison(*found, setup.judges)
        numbers = {"checkpoint": path.name, "weights": weights, "split": split, "held_out": held_out}
        numbers |= {} if frames is None else {"frames": str(frames)}
        numbers |= {"scored": added_up(ranks.gather(asdict(setup.scored), "counting clips"))}
        numbers |= {} if no_improvement(path, checkpoint) is None else {"improved": False}
        # Null runs were measured with averaged weights of their best checkpoints on the test prompts.
        if split == "test" and frames is None and checkpoint in (None, "best") and weights == "average":
            numbers |= ranks.once(
                "reading null runs", partial(kept_null, run / NULL_RUNS, asdict(config), PLACES_OF_A_RUN)
            )
        verdict = final_headline(numbers, asdict(config))
        numbers["verdict"] = verdict.text
        logger.warning("%s", verdict.text)
        ranks.once("writing the numbers", partial(write_json, out, numbers, indent=2, allow_nan=False))
    return numbers


@contextmanager
def _unfinished(ranks: Ranks, out: Path) -> Iterator[Path]:
    """A folder next to the file ``out`` for its results so far, removed when the block ends without an error.

    What else lies in such a folder stays. Raises StorageError if another process is using it.
    """
    parts = out.with_name(f"{out.name}.parts")

    def prepare() -> None:
        make_directory(parts)
        held.callback(_remove_if_empty, parts)
        held.enter_context(claimed(parts))
        remove_leftovers(parts)

    with ExitStack() as held:
        ranks.once("preparing to keep results", prepare)
        yield parts
        ranks.once("removing kept results", KeptResults(parts).remove)


def _remove_if_empty(folder: Path) -> None:
    with suppress(OSError):
        folder.rmdir()


def _opened(
    ranks: Ranks, run: Path, config: Config, checkpoint: str | int | Path | None, weights: str
) -> tuple[Setup, Sides, Path]:
    """A run's setup, its base and aligned policy, and the checkpoint's path."""
    demand_same_prompts(run, config)
    demand_same_files(run, config)
    path = checkpoint_of(run, checkpoint, ranks)
    assert path is not None
    with ranks.together("loading the generator and the rewards"):
        setup = build_setup(config, ranks)
        sides = open_checkpoint(setup.backbone.weights, path, weights)
    return setup, sides, path


def evaluate_drift(
    run: Path | str,
    *,
    seconds: float = 300.0,
    checkpoint: str | int | Path | None = None,
    weights: str = "average",
    places: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Stream test prompts back to back for minutes, base and aligned, and measure every ten seconds.

    Writes ``drift.json`` and ``drift.png`` into the run and returns the contents of the former: every measure
    of ``base`` and ``aligned`` as ``[spans][videos]`` (see `drift_curves`), and the ``seconds`` at which the
    spans end. Other arguments are as for `evaluate`.

    Raises ValueError if the run or its checkpoint cannot be used, or the streams are too short.
    """
    run = local_path(run, "run")
    config = resolve_run(run, places)
    with computing(config), progress_bars() as show:
        setup, sides, path = _opened(ALONE, run, config, checkpoint, weights)
        codec, block = setup.backbone.codec, setup.generator.block
        rate = codec.frames_per_second / codec.frames_per_latent
        span = max(1, round(SPAN_SECONDS * rate / block)) * block
        spans = int(seconds * rate / span + 1e-6) if math.isfinite(seconds) else 0
        if spans < 1:
            raise ValueError(f"--seconds: must be at least {span / rate:g}, one span, got {seconds:g}")
        pool = list(setup.test.get("long") or next(iter(setup.test.values())))
        turns = [len(pool) * n // STREAMS for n in range(STREAMS)]
        prompts = [chained([*pool[at:], *pool[:at]], spans * span, n) for n, at in enumerate(turns)]
        tape, read_off = setup.backbone.tape("drift"), source_of(config).read_off
        numbers: dict[str, Any] = {
            "checkpoint": path.name,
            "weights": weights,
            "latent_frames": spans * span,
            "seconds": [span * (n + 1) / rate for n in range(spans)],
        }
        for side in ("base", "aligned"):
            given = {"read_off": read_off and read_off(), "show": partial(show, f"{side} streams")}
            with (sides.base if side == "base" else sides.aligned)():
                numbers[side] = drift_curves(setup.backbone, prompts, tape, setup.judges, span, **given)
    write_json(run / "drift.json", numbers, allow_nan=False)
    with new_file(run / "drift.png") as picture:
        draw_drift(picture, numbers)
    return numbers
