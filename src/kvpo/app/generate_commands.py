"""``kvpo generate``: its arguments, and the functions that it calls."""

from argparse import ArgumentParser, Namespace

from kvpo.app.arguments import aligned_arguments, frames_argument, generating, is_main, names
from kvpo.app.configuration import path_argument
from kvpo.app.prompt_commands import extended_argument
from kvpo.config_checks import ConfigurationError

NOT_WITH_A_SUITE = {
    "best_of": "whose videos are those of the model alone",
    "frames": "whose videos begin with noise",
    "prompts": "which brings its own",
}


def generate_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo generate``."""
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="directory for the videos"
    )
    aligned_arguments(parser, "generates, in addition to its base")
    parser.add_argument(
        "--prompts",
        type=path_argument,
        metavar="FILE",
        help="prompts of any form (docs/evaluation.md); default: some test prompts",
    )
    extended_argument(parser)
    frames_argument(parser)
    parser.add_argument(
        "--suite",
        metavar="NAME[=PATH]",
        help="the videos of vbench, vbench-long or vbench2, by the list of its package or of a checkout",
    )
    parser.add_argument(
        "--best-of",
        type=int,
        metavar="INT",
        help="continue every video in this many ways and keep the best by --by",
    )
    parser.add_argument(
        "--by", metavar="NAME[,NAME]", help="rewards that choose (default: --rewards.scorers)"
    )
    parser.add_argument(
        "--branches",
        metavar="NAME",
        help="tells candidates apart: routes, or noise: fresh, neighbour, sde, renoise (default: routes)",
    )
    parser.add_argument("--per", choices=("block", "video"), help="how often to choose (default: block)")
    parser.add_argument(
        "--dimensions", default="", metavar="NAME[,NAME]", help="dimensions of the suite (default: all)"
    )


def run_generate(arguments: Namespace) -> None:
    """Run ``kvpo generate``."""
    config = generating(arguments)
    model = {name: vars(arguments)[name] for name in ("run", "checkpoint", "weights")}
    _demand_use(arguments)
    if arguments.suite is not None:
        from kvpo.app.suites import generate_suite

        folders = generate_suite(
            config,
            arguments.out,
            arguments.suite,
            dimensions=names(arguments.dimensions),
            extended_texts=arguments.extended,
            **model,
        )
        if is_main():
            print("\n".join(f"kvpo suite check {folder}" for folder in folders))
        return
    from kvpo.app.generate import Best, generate

    best = None
    if arguments.best_of is not None:
        by = tuple(names(arguments.by or ""))
        explorer = Best.explorer if arguments.branches is None else arguments.branches
        best = Best(arguments.best_of, by, int(arguments.per != "video"), explorer)
    videos = generate(
        config,
        arguments.out,
        prompts=arguments.prompts,
        extended_texts=arguments.extended,
        best=best,
        frames=arguments.frames,
        **model,
    )
    if is_main():
        print("\n".join(map(str, videos)))


def _demand_use(arguments: Namespace) -> None:
    """Raise ConfigurationError for an argument that would have no effect beside the others."""
    given = vars(arguments)
    for name in ("by", "branches", "per"):
        if arguments.best_of is None and given[name] is not None:
            raise ConfigurationError(f"--{name}: needs --best-of, the number of candidates")
    if arguments.suite is not None:
        for name, why in NOT_WITH_A_SUITE.items():
            if given[name] is not None:
                raise ConfigurationError(f"--{name.replace('_', '-')}: not with --suite, {why}")
    elif arguments.dimensions:
        raise ConfigurationError("--dimensions: needs --suite")
    elif arguments.extended is not None and arguments.prompts is None:
        raise ConfigurationError("--extended: needs --prompts or --suite, whose texts it extends")
