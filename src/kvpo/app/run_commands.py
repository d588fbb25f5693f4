"""Commands on an existing run: `kvpo evaluate` and `kvpo report`."""

from argparse import ArgumentParser, Namespace

from kvpo.app.arguments import (
    checkpoint_argument,
    frames_argument,
    is_main,
    run_argument,
    settings_given,
    weights_argument,
)
from kvpo.app.configuration import parse_flags, path_argument
from kvpo.config_checks import ConfigurationError


def evaluate_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `kvpo evaluate`."""
    run_argument(parser)
    checkpoint_argument(parser)
    weights_argument(parser)
    frames_argument(parser)
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="where the numbers go (default: RUN/evaluation.json, or RUN/final.json)",
    )
    parser.add_argument(
        "--split",
        choices=("test", "final"),
        default="test",
        help="the run's test prompts (the default), or the last test: stories that no run holds (of a prompt "
        "file, its test prompts) on noise that no run draws",
    )
    parser.add_argument(
        "--drift",
        action="store_true",
        help="instead, stream for --seconds and write RUN/drift.json and drift.png: rewards and pixel "
        "statistics every ten seconds",
    )
    parser.add_argument(
        "--seconds", type=float, metavar="SECONDS", help="length of the streams of --drift (default: 300)"
    )


def evaluate_run(arguments: Namespace) -> None:
    """Run `kvpo evaluate`: write the numbers of a run, or its drift."""
    from kvpo.app.evaluate import evaluate, evaluate_drift, numbers_file

    places = parse_flags(settings_given(arguments))
    given = {"checkpoint": arguments.checkpoint, "weights": arguments.weights, "places": places}
    if arguments.drift:
        if arguments.out:
            raise ConfigurationError(
                "--out: --drift writes drift.json and drift.png into the run; leave it out"
            )
        if arguments.split != "test":
            raise ConfigurationError(f"--split: --drift streams the test prompts, got {arguments.split}")
        if arguments.frames:
            raise ConfigurationError("--frames: not with --drift, whose streams go from prompt to prompt")
        given |= {} if arguments.seconds is None else {"seconds": arguments.seconds}
        evaluate_drift(arguments.run, **given)
        print(arguments.run / "drift.json")
        return
    if arguments.seconds is not None:
        raise ConfigurationError("--seconds: sets the length of the streams of --drift; add --drift")
    out = arguments.out or numbers_file(arguments.run, arguments.split)
    evaluate(arguments.run, split=arguments.split, out=out, frames=arguments.frames, **given)
    if is_main():
        print(out)


def null_argument(parser: ArgumentParser) -> None:
    """Add --null, the gains of null runs."""
    parser.add_argument(
        "--null",
        type=path_argument,
        metavar="FILE",
        help="gains of null runs of the same settings, which the run's own are compared with "
        "(benchmarks/seeds.py --arms random --null FILE writes it)",
    )


def report_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of `kvpo report`."""
    run_argument(parser)
    null_argument(parser)


def report_run(arguments: Namespace) -> None:
    """Write the page of a run and print where it is."""
    from kvpo.report.page import write_report

    print(write_report(arguments.run, null=arguments.null))
