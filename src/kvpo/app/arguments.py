"""Arguments that several subcommands share, and the configuration built from them."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from kvpo.app.configuration import path_argument, resolve, resolve_resumed, resolve_saved
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError

SETTING_PREFIX = "setting:"
"""Prefix of the parsed arguments that hold settings: ``setting:optim.lr``."""


def is_main() -> bool:
    """True in the process that reports for a run: rank 0 under torchrun, or the only process."""
    return os.environ.get("RANK", "0") == "0"


def configuration(arguments: Namespace, *, saved: Path | None = None) -> Config:
    """The configuration that ``arguments`` ask for, on top of ``saved`` if a run continues."""
    flags = settings_given(arguments)
    if saved is None:
        return resolve(arguments.preset, arguments.config, flags)
    return resolve_resumed(saved, arguments.preset, arguments.config, flags)


def settings_given(arguments: Namespace) -> dict[str, str]:
    """The settings among ``arguments``: dotted path -> text."""
    return {
        name.removeprefix(SETTING_PREFIX): text
        for name, text in vars(arguments).items()
        if name.startswith(SETTING_PREFIX)
    }


def names(*lists: str) -> list[str]:
    """Split comma-separated lists of names, with or without spaces around the commas."""
    return [name.strip() for text in lists for name in text.split(",") if name.strip()]


def generating(arguments: Namespace) -> Config:
    """The configuration of the run that --run names, else that of the arguments."""
    if arguments.run is None:
        if arguments.checkpoint is not None:
            raise ConfigurationError(
                "--checkpoint: needs --run, the run that it is a checkpoint of; weights of a public model "
                "go to --backbone.checkpoint"
            )
        if arguments.weights == "raw":
            raise ConfigurationError("--weights: raw needs --run, the run that trained them")
        return configuration(arguments)
    if arguments.preset is not None or arguments.config is not None:
        raise ConfigurationError("--run brings its own settings; leave out --preset and --config")
    return resolve_saved(arguments.run / "config.yaml", settings_given(arguments))


def run_argument(parser: ArgumentParser) -> None:
    """Add the directory of a run."""
    parser.add_argument("run", type=path_argument, metavar="RUN", help="directory that `kvpo align` wrote")


def checkpoint_argument(parser: ArgumentParser) -> None:
    """Add the choice of a checkpoint."""
    parser.add_argument(
        "--checkpoint",
        metavar="NAME",
        help="best, latest, an update number or a checkpoint directory (default: best)",
    )


def weights_argument(parser: ArgumentParser) -> None:
    """Add the choice between averaged and raw weights."""
    parser.add_argument(
        "--weights",
        choices=("average", "raw"),
        default="average",
        help="moving average of the trained weights, or the raw ones of the last update (default: average)",
    )


def frames_argument(parser: ArgumentParser) -> None:
    """Add the frames that videos begin with."""
    parser.add_argument(
        "--frames",
        type=path_argument,
        metavar="FILE",
        help="begin every video with this image or video; a JSON object maps prompts to such files",
    )


def aligned_arguments(parser: ArgumentParser, use: str) -> None:
    """Add --run, its checkpoint and its weights; ``use`` says what the aligned model does."""
    parser.add_argument("--run", type=path_argument, metavar="DIR", help=f"a run whose aligned model {use}")
    checkpoint_argument(parser)
    weights_argument(parser)


def address_arguments(parser: ArgumentParser, port: int, token: str = "") -> None:
    """Add a server's address; ``token`` names the environment variable of its token, if clients need one."""
    needs = "; one that other machines can reach needs a token" if token else ""
    parser.add_argument(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help=f"address to listen at{needs} (default: 127.0.0.1)",
    )
    parser.add_argument(
        "--port",
        type=int,
        default=port,
        metavar="INT",
        help=f"port to listen at (default: {port}; 0: any free one)",
    )
    if token:
        parser.add_argument(
            "--token-file",
            type=path_argument,
            metavar="FILE",
            help=f"holds the token that clients must show (default: the environment's {token})",
        )
