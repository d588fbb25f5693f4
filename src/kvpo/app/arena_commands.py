"""``kvpo arena``: its arguments, and the functions that its verbs call."""

from argparse import ArgumentParser, Namespace
from functools import partial
from pathlib import Path

from kvpo.app.arguments import address_arguments, names
from kvpo.app.configuration import path_argument
from kvpo.config_checks import ConfigurationError
from kvpo.files import local_path, output_file


def arena_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo arena``."""
    parser.usage = (
        "kvpo arena SOURCE [SOURCE ...] [--out DIR] [options]\n"
        "       kvpo arena STUDY [options]\n"
        "       kvpo arena report STUDY|VOTES [--close] [--effect FLOAT]\n"
        "       kvpo arena invite STUDY NAME [NAME ...]\n"
        "       kvpo arena export STUDY FILE\n"
        "       kvpo arena import STUDY FILE"
    )
    parser.add_argument(
        "words",
        nargs="+",
        metavar="SOURCE",
        help="a run, one of its checkpoints, or a folder of videos with prompts, as [NAME=]PATH; :base, "
        ":aligned or :branches at its end selects a part; or report, invite, export, import and a study",
    )
    parser.add_argument(
        "--out", type=path_argument, metavar="DIR", help="the study (default: arena/ and the sources' names)"
    )
    parser.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="what runs generate and folders show (default: test prompts of the first run; videos.json)",
    )
    parser.add_argument("--pairs", type=int, metavar="INT", help="most pairs per rater (default: 20)")
    parser.add_argument(
        "--questions", type=path_argument, metavar="FILE", help="YAML: title, instructions, questions"
    )
    parser.add_argument(
        "--rank", action="store_true", help="rank all videos of a prompt at once, by drag and drop"
    )
    parser.add_argument(
        "--raters", default="you", metavar="NAME[,NAME]", help="who gets a link (default: you)"
    )
    address_arguments(parser, 8789)
    parser.add_argument("--close", action="store_true", help="report: take no more votes, and name the arms")
    parser.add_argument(
        "--effect",
        type=float,
        default=0.1,
        metavar="FLOAT",
        help="report: the smallest (G - B) / (G + S + B) that matters (default: 0.1)",
    )


def arena(arguments: Namespace) -> None:
    """Run ``kvpo arena``."""
    verb, *rest = arguments.words
    if verb in _VERBS:
        _VERBS[verb](rest, arguments)
        return
    raters = names(arguments.raters)
    if not raters:
        raise ConfigurationError("--raters: name one at least, as in --raters ann,bob")
    from kvpo.app.arena import open_study, serve_study

    opened = partial(
        open_study,
        arguments.words,
        arguments.out,
        prompts=arguments.prompts,
        questions=arguments.questions,
        pairs=arguments.pairs,
        ranked=arguments.rank,
    )
    serve_study(opened, raters, host=arguments.host, port=arguments.port)


def _places(verb: str, rest: list[str], *expected: str) -> list[Path]:
    if len(rest) != len(expected):
        raise ConfigurationError(
            f"kvpo arena {verb} takes {' '.join(expected)}, got {' '.join(rest) or 'nothing'}"
        )
    return [local_path(word, name) for word, name in zip(rest, expected, strict=True)]


def _report(rest: list[str], arguments: Namespace) -> None:
    (place,) = _places("report", rest, "STUDY|VOTES")
    from kvpo.app.arena import report
    from kvpo.arena.report import text_table

    page, result = report(place, effect=arguments.effect, close=arguments.close)
    print(text_table(result))
    print(page)


def _invite(rest: list[str], arguments: Namespace) -> None:
    place, *_ = _places("invite", rest[:2], "STUDY", "NAME")
    from kvpo.app.arena import links
    from kvpo.arena.store import Study
    from kvpo.serving import url_of

    print("\n".join(links(Study(place), rest[1:], url_of(arguments.host, arguments.port))))


def _export(rest: list[str], arguments: Namespace) -> None:
    place, file = _places("export", rest, "STUDY", "FILE")
    from kvpo.app.arena import export_votes
    from kvpo.arena.store import Study

    out = output_file(file, "FILE")
    print(f"{export_votes(Study(place), out)} answers: {out}")


def _import(rest: list[str], arguments: Namespace) -> None:
    place, file = _places("import", rest, "STUDY", "FILE")
    from kvpo.arena.exchange import read_votes
    from kvpo.arena.intake import add_judgements
    from kvpo.arena.store import Study

    print(f"{add_judgements(Study(place), read_votes(file))} answers are new")


_VERBS = {"report": _report, "invite": _invite, "export": _export, "import": _import}
