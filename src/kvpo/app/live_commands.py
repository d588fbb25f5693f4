"""The arguments of ``kvpo live``; imports nothing heavy at the top."""

import os
from argparse import ArgumentParser, Namespace
from pathlib import Path

from kvpo.app.arguments import address_arguments, aligned_arguments, generating
from kvpo.app.configuration import path_argument
from kvpo.config_checks import ConfigurationError


def live_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo live``."""
    aligned_arguments(parser, "streams too, beside its base (default: the base alone)")
    address_arguments(parser, 8788, "KVPO_LIVE_TOKEN")
    parser.add_argument(
        "--out",
        type=path_argument,
        default=Path("runs/live"),
        metavar="DIR",
        help="directory for snapshots, exports and choices (default: runs/live)",
    )
    parser.add_argument(
        "--sessions", type=int, default=8, metavar="INT", help="most streams at a time (default: 8)"
    )
    parser.add_argument(
        "--rows",
        type=int,
        default=0,
        metavar="INT",
        help="streams per forward pass; 1: what a session shows does not depend on others, bit for bit "
        "(default: 0, all)",
    )


def live(arguments: Namespace) -> None:
    """Run ``kvpo live``."""
    for name, least in (("sessions", 1), ("rows", 0)):
        if vars(arguments)[name] < least:
            raise ConfigurationError(f"--{name}: must be {least} or more, got {vars(arguments)[name]}")
    config = generating(arguments)
    from kvpo.app.live import LIVE_TOKEN_VARIABLE, serve_live
    from kvpo.live.scheduler import SessionLimits
    from kvpo.serving import read_token

    serve_live(
        config,
        arguments.out,
        host=arguments.host,
        port=arguments.port,
        token=read_token(arguments.token_file, os.environ, LIVE_TOKEN_VARIABLE),
        run=arguments.run,
        checkpoint=arguments.checkpoint,
        weights=arguments.weights,
        limits=SessionLimits(sessions=arguments.sessions, rows=arguments.rows),
    )
