"""``kvpo score`` and ``kvpo calibrate``: their arguments, and the functions they call."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from kvpo.config_checks import ConfigurationError
from kvpo.rewards.catalogue import FAMILIES, REWARD_IDS

_PARTS = ", ".join(f"{family.ids[0]}.{part}" for family in FAMILIES for part in family.parts)


def score_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo score``."""
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="videos, also in folders below; or one file"
    )
    parser.add_argument(
        "--reward",
        action="append",
        required=True,
        metavar="NAME[,NAME]",
        help=f"{', '.join(REWARD_IDS)}, world (the embedded world's), or your own as package.module:function",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("scores.html"),
        metavar="FILE",
        help="page to write, with a .json beside it (default: scores.html)",
    )
    _shared_arguments(parser)


def score(arguments: Namespace) -> None:
    """Run ``kvpo score``."""
    names = [name.strip() for names in arguments.reward for name in names.split(",") if name.strip()]
    _check_out(arguments.out, ".html")
    from kvpo.app.score import score_folder, table

    with _progress("scoring") as progress:
        results = score_folder(
            arguments.folder,
            names,
            prompts=arguments.prompts,
            out=arguments.out,
            sources=_sources(arguments.source),
            device=arguments.device or _device(),
            progress=progress,
        )
    print(table(results))
    print(arguments.out)


def calibrate_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo calibrate``."""
    parser.add_argument("reward", metavar="REWARD", help="a reward, named as for `kvpo score`")
    parser.add_argument(
        "folder",
        type=Path,
        nargs="?",
        metavar="FOLDER",
        help="videos to measure on (default: generated ones)",
    )
    parser.add_argument(
        "--clips", type=int, default=8, metavar="INT", help="videos to measure on (default: 8)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="INT", help="keys the noise and generated videos"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="JSON to write (default: REWARD.noise.json)")
    _shared_arguments(parser)


def calibrate(arguments: Namespace) -> None:
    """Run ``kvpo calibrate``."""
    out = arguments.out or Path(f"{arguments.reward.replace(':', '.')}.noise.json")
    _check_out(out, ".json")
    from kvpo.app.calibrate import calibrate as measure
    from kvpo.app.calibrate import table

    with _progress("calibrating") as progress:
        found = measure(
            arguments.reward,
            arguments.folder,
            prompts=arguments.prompts,
            clips=arguments.clips,
            seed=arguments.seed,
            out=out,
            sources=_sources(arguments.source),
            device=arguments.device or _device(),
            progress=progress,
        )
    print(table(found))
    print(f"--objective.noise_floor {list(found.values())[-1].noise_floor:.3g}")
    print(out)


def _shared_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--prompts",
        type=Path,
        metavar="FILE",
        help="one line per video in the order of their names (.txt), or JSON that maps file names to prompts",
    )
    parser.add_argument(
        "--source",
        action="append",
        default=[],
        metavar="PART=PATH",
        help=f"path or hub id of a part of a reward: {_PARTS}",
    )
    parser.add_argument("--device", metavar="TEXT", help="torch device (default: cuda where there is one)")


def _sources(given: list[str]) -> dict[str, str]:
    sources = {}
    for text in given:
        part, equals, path = text.partition("=")
        if not (part and equals and path):
            raise ConfigurationError(f"--source: expected PART=PATH, got {text!r}; parts are {_PARTS}")
        sources[part] = path
    return sources


def _check_out(out: Path, suffix: str) -> None:
    if out.suffix != suffix or not out.parent.is_dir():
        raise ConfigurationError(f"--out: must be a {suffix} file in a folder that exists, got {out}")


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A progress bar on standard error where that is a terminal; standard output is for results."""
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(file=sys.stderr), disable=not sys.stderr.isatty(), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
