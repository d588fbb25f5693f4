"""`kvpo compare`: its arguments."""

from argparse import ArgumentParser, Namespace

from kvpo.app.arguments import configuration, names
from kvpo.app.configuration import path_argument

METHODS_COMPARED = "kvpo,latent-distance,flow-grpo,cm-grpo,nft,rvm,self-distill,best-of-n,pretraining,null"


def compare_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of a comparison."""
    parser.add_argument(
        "--out", type=path_argument, required=True, metavar="DIR", help="directory of the comparison"
    )
    parser.add_argument(
        "--methods",
        default=METHODS_COMPARED,
        metavar="NAMES",
        help="methods, and three further arms: null (random advantages), best-of-n (training on the best "
        f"branch alone) and pretraining (more of the base's own) (default: {METHODS_COMPARED})",
    )
    parser.add_argument(
        "--arms",
        nargs="+",
        default=[],
        metavar="ARM",
        help="further arms: NAME:setting=value,setting=value, or a YAML file of them; method=NAME is the "
        "method that an arm starts from, as tuned (default: kvpo)",
    )
    parser.add_argument(
        "--seeds",
        type=int,
        default=5,
        metavar="INT",
        help="runs of every arm, the first under --seed (default: 5)",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=180.0,
        metavar="SECONDS",
        help="CPU-seconds that every run trains for (default: 180)",
    )
    parser.add_argument(
        "--trials",
        type=int,
        default=6,
        metavar="INT",
        help="trials that tune each method before, at half the budget; 0: none (default: 6)",
    )
    parser.add_argument(
        "--split",
        choices=("final", "validation"),
        default="final",
        help="prompts that runs are measured on: final, which nothing else uses, or validation, to choose "
        "among arms without spending those (default: final)",
    )


def compare_command(arguments: Namespace) -> None:
    """Compare methods and print where the numbers are."""
    config = configuration(arguments)
    from kvpo.app.comparison.arms import chosen_arms
    from kvpo.app.comparison.command import compare_methods

    compare_methods(
        config,
        arguments.out,
        chosen_arms(names(arguments.methods), arguments.arms),
        seeds=arguments.seeds,
        budget_cpu_s=arguments.budget,
        trials=arguments.trials,
        split=arguments.split,
    )
    print(arguments.out / "summary.json")
