"""``kvpo suite``: its arguments, and the functions that its verbs call."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from kvpo.app.configuration import path_argument
from kvpo.config_checks import ConfigurationError
from kvpo.files import counted, output_file, write_json


def suite_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo suite``."""
    parser.usage = "kvpo suite check DIR [DIR ...]\n       kvpo suite import BASE ALIGNED [--out FILE]"
    parser.add_argument("verb", choices=("check", "import"), help="check folders, or compare their results")
    parser.add_argument(
        "places",
        nargs="+",
        type=path_argument,
        metavar="DIR",
        help="folders that kvpo generate --suite made; or results of VBench: a file, or a folder with "
        "*_eval_results.json",
    )
    parser.add_argument("--out", type=path_argument, metavar="FILE", help="import: write the numbers as JSON")


def suite(arguments: Namespace) -> int:
    """Run ``kvpo suite``. Returns 1 if a folder has problems."""
    if arguments.verb == "import":
        return _import(arguments.places, arguments.out)
    if arguments.out is not None:
        raise ConfigurationError("--out: kvpo suite check writes no file; leave it out")
    return _check(arguments.places)


def _check(places: list[Path]) -> int:
    from kvpo.app.suite_results import check_folder

    status = 0
    for folder in places:
        problems, command = check_folder(folder)
        print("\n".join([f"{folder}: {counted(len(problems), 'problem')}", *problems, command]))
        status |= bool(problems)
    return status


def _import(places: list[Path], out: Path | None) -> int:
    if len(places) != 2:
        raise ConfigurationError(f"suite import: takes BASE and ALIGNED, got {len(places)}")
    target = None if out is None else output_file(out, "--out")
    from dataclasses import asdict

    from kvpo.app.suite_results import compared_results, result_lines
    from kvpo.files import finite

    table = compared_results(*places)
    print("\n".join(result_lines(table)))
    if target is not None:
        numbers = {name: finite(asdict(one)) for name, one in table.items()}
        write_json(target, numbers, allow_nan=False)
    return 0
