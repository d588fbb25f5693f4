"""The ``kvpo`` command: finds the subcommand, reads its arguments, and reports errors in one line.

Built on argparse. Flags are collected as texts by dotted path and converted by the code that reads
configuration files, so that both give the same one-line messages.
"""

import argparse
import io
import logging
import os
import sys
import typing
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any, NoReturn

from kvpo import __version__
from kvpo.app.arguments import SETTING_PREFIX
from kvpo.app.commands import COMMANDS, is_main
from kvpo.app.configuration import (
    PLACES_OF_A_RUN,
    flag_text,
    flat,
    nearest,
    path_argument,
    sections,
    settings,
)
from kvpo.app.presets import PRESETS
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.files import printable
from kvpo.training.interrupt import sigterm_as_interrupt

NO_MEMORY = ("out of memory", "can't allocate memory")
"""In torch's messages for a GPU, or a host, whose memory is full."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run ``kvpo`` with ``argv`` (default: the process's arguments) and return its exit status.

    The status is 0 for success, 1 for failure, 2 for wrong usage or configuration, 130 if interrupted. With
    KVPO_TRACEBACK=1 errors keep their traceback.
    """
    if argv is None:  # run as a program: torch is not loaded yet
        # Waiting threads that spin would take CPU time from the threads that they wait for.
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if isinstance(sys.stdout, io.TextIOWrapper):  # an unprintable name should not end the command
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        with sigterm_as_interrupt():
            status = _run(list(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError):  # the reader closed the pipe, as in `kvpo ... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 1
        full = isinstance(error, MemoryError) or any(words in str(error) for words in NO_MEMORY)
        if os.environ.get("KVPO_TRACEBACK") == "1" or isinstance(error, RuntimeError) and not full:
            raise
        text = printable(" ".join(str(error).split()))
        if full:
            text = (
                f"{text or 'out of memory'}; `kvpo plan` (docs/memory.md) says what a run needs and which "
                "flags lower it, nvidia-smi whether another process holds memory"
            )
        print(f"kvpo: {_rank()}error: {text}", file=sys.stderr)
        return 2 if isinstance(error, ConfigurationError) else 1
    except KeyboardInterrupt as interrupt:
        print(": ".join(["kvpo: interrupted", *map(str, interrupt.args)]), file=sys.stderr)
        return 130
    return status


def _rank() -> str:
    """Prefix that names this process, if torchrun has started several."""
    rank, count = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    return f"rank {rank}: " if rank and count not in (None, "", "1") else ""


def _run(argv: list[str]) -> int:
    names = [command.name for command in COMMANDS]
    if argv and not argv[0].startswith("-") and argv[0] not in names:
        raise ConfigurationError(
            f"unknown command {argv[0]!r}{nearest(argv[0], names)}; commands: {', '.join(names)}"
        )
    parser, subparsers = _parsers(_preset_for_help(argv))
    arguments, unknown = parser.parse_known_args([_underscored(word) for word in argv])
    command = next(command for command in COMMANDS if command.name == arguments.command)
    if unknown:
        name, _, value = unknown[0].partition("=")
        value = value or next(iter(unknown[1:2]), "")
        given = f" (value {value!r})" if value else ""
        if name.removeprefix("--") in settings():
            whose = "the run's own" if command.places else "no"
            raise ConfigurationError(f"{name}: kvpo {command.name} takes {whose} settings; leave it out")
        options = [option for option in subparsers[command.name]._option_string_actions if len(option) > 2]
        raise ConfigurationError(f"unknown argument {name}{given}{nearest(name, options)}")
    _show_log()
    # Rank 0 reports on the run; the others log only errors and problems with their rewards.
    logging.getLogger("kvpo").setLevel(logging.INFO if is_main() else logging.ERROR)
    logging.getLogger("kvpo.rewards").setLevel(logging.INFO)
    return command.run(arguments) or 0


def _show_log() -> None:
    """Print kvpo's own messages, unless the program that called `main` has its way of logging."""
    log = logging.getLogger("kvpo")
    if not log.hasHandlers():
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("kvpo: %(message)s"))
        log.addHandler(handler)
        log.propagate = False  # a package may give the root a handler later


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ConfigurationError(f"{message} (see {self.prog} --help)")


def _parsers(shown: Config) -> tuple[_Parser, dict[str, _Parser]]:
    """The parser of ``kvpo`` and those of its subcommands; help shows the values of ``shown``."""
    parser = _Parser(
        prog="kvpo",
        description="Align streaming autoregressive video generators with preferences by KV-cache policy "
        "optimisation.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"kvpo {__version__}")
    chosen = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    subparsers = {}
    for command in COMMANDS:
        subparsers[command.name] = subparser = chosen.add_parser(
            command.name,
            help=command.summary,
            description=f"{command.summary[0].upper()}{command.summary[1:]}.",
            allow_abbrev=False,
        )
        command.add_arguments(subparser)
        if command.configured:
            subparser.usage = subparser.usage or _usage(command.name, subparser)
            _add_bases(subparser)
            _add_settings(subparser, settings(), shown)
        elif command.places:
            _add_settings(subparser, PLACES_OF_A_RUN)
    return parser, subparsers


def _usage(name: str, parser: argparse.ArgumentParser) -> str:
    """The usage of a configured command, which has too many settings to list."""
    out = parser._option_string_actions.get("--out")
    words = [f"--out {out.metavar}" if out.required else f"[--out {out.metavar}]"] if out else []
    return " ".join(["kvpo", name, *words, "[--preset NAME] [options]"])


def _add_bases(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--preset", metavar="NAME", help=f"where the values start: {', '.join(PRESETS)}")
    parser.add_argument(
        "--config", type=path_argument, metavar="FILE", help="YAML file of values, over the preset's"
    )


def _add_settings(parser: argparse.ArgumentParser, paths: Iterable[str], shown: Config | None = None) -> None:
    """Add flags for settings; their help shows the values of ``shown``, or says that the run's apply."""
    values = {} if shown is None else flat(asdict(shown))
    groups: dict[str, Any] = {"": parser}
    for path in paths:
        if path == "preset":
            continue
        setting, section = settings()[path], path.rpartition(".")[0]
        if section not in groups:
            groups[section] = parser.add_argument_group(f"--{section}.*", sections()[section].__doc__)
        value = flag_text(values[path]) if path in values else "as in the run"
        text = f"{setting.doc} [{value}]".replace("%", "%%")
        groups[section].add_argument(
            f"--{path}",
            dest=SETTING_PREFIX + path,
            default=argparse.SUPPRESS,
            metavar=_metavar(setting.type),
            help=text,
            # a switch may be given bare: --optim.checkpointing
            **({"nargs": "?", "const": "true"} if setting.type is bool else {}),
        )


def _metavar(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "{" + ",".join(typing.get_args(kind)) + "}"
    words = {bool: "BOOL", int: "INT", float: "FLOAT", str: "TEXT", float | None: "FLOAT"}
    if kind in words:
        return words[kind]
    if typing.get_origin(kind) is dict:
        return f"NAME={words[typing.get_args(kind)[1]]},..."
    return "LIST"


def _preset_for_help(argv: list[str]) -> Config:
    """The preset whose values ``--help`` shows; an unknown name is refused later, with a message."""
    scout = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    scout.add_argument("--preset", nargs="?")
    return PRESETS.get(scout.parse_known_args(argv)[0].preset, PRESETS["demo"])()


def _underscored(word: str) -> str:
    """Turn --optim.lora-rank=8 into --optim.lora_rank=8, since both spellings are common."""
    name, equals, value = word.partition("=")
    setting = name.startswith("--") and "." in name
    return "--" + name[2:].replace("-", "_") + equals + value if setting else word


if __name__ == "__main__":
    sys.exit(main())
