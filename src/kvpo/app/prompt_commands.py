"""``kvpo prompts``: its arguments, and the checking, converting and splitting of prompt files."""

import logging
from argparse import ArgumentParser, Namespace
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from kvpo.app.arguments import configuration
from kvpo.app.configuration import path_argument
from kvpo.config_checks import ConfigurationError
from kvpo.files import counted, output_file, write_atomic

if TYPE_CHECKING:
    from kvpo.app.prompt_sets import TextLimits
    from kvpo.config import Config
    from kvpo.prompt_files import PromptFile

logger = logging.getLogger(__name__)


def prompts_arguments(parser: ArgumentParser) -> None:
    """Arguments of ``kvpo prompts``."""
    parser.usage = "kvpo prompts FILE [FILE ...] [--extended FILE] [--out FILE] [--hold-out INT] [options]"
    parser.add_argument(
        "files", nargs="+", type=path_argument, metavar="FILE", help=".txt, .jsonl, .json, .csv or .tsv"
    )
    extended_argument(parser)
    parser.add_argument(
        "--out",
        type=path_argument,
        metavar="FILE",
        help="write all prompts to one file, of its suffix's form",
    )
    parser.add_argument(
        "--hold-out",
        type=int,
        default=0,
        metavar="INT",
        help="with --out: write this many of the distinct prompts, always the same ones, to a second file "
        "with -held-out in its name instead",
    )


def extended_argument(parser: ArgumentParser) -> None:
    """Add the file of extended texts."""
    parser.add_argument(
        "--extended",
        type=path_argument,
        metavar="FILE",
        help="extended texts of the prompts, line by line, or JSON that maps short texts to them",
    )


def with_extended_prompts(config: "Config", texts: Path, run: Path) -> "Config":
    """A run's configuration with extended prompts, which are written to a file next to its directory.

    Repeating the command, or restarting its ranks, finds that file.

    Raises:
        ConfigurationError: no prompt file to extend, or the directory's run has other prompts.
        ValueError: files that do not match; see `kvpo.prompt_files.extended`.
    """
    if not config.prompts.file:
        raise ConfigurationError("--extended: needs --prompts, whose texts it extends")
    from kvpo.app.build import source_of
    from kvpo.app.prompt_sets import prompt_file
    from kvpo.prompt_files import examine, extended, written
    from kvpo.training.run_directory import belongs_to_run

    file = output_file(run.with_name(f"{run.name}-prompts.jsonl"), "--out")
    if str(file) == config.prompts.file:
        raise ConfigurationError("--extended: the run has its prompts already; leave it out")
    how = source_of(config).reading(config)
    short = examine(prompt_file(config.prompts.file), **how).sound()
    pairs = extended(short, texts, **how)
    text = written(pairs.prompts, file)
    there = file.is_file() and file.read_bytes() == text.encode()
    if not there and belongs_to_run(run):
        raise ConfigurationError(
            f"--extended: the run {run} has other prompts; leave it out to go on, or choose another --out"
        )
    if not there:
        write_atomic(file, text)
    logger.info("%s: %d prompts under their extended texts", file, len(pairs.prompts))
    return replace(config, prompts=replace(config.prompts, file=str(file)))


def prompts(arguments: Namespace) -> int:
    """Run ``kvpo prompts``. Returns 1, and writes nothing, if a file has problems."""
    config = configuration(arguments)
    out = None if arguments.out is None else output_file(arguments.out, "--out")
    if arguments.hold_out < 0 or arguments.hold_out and out is None:
        raise ConfigurationError("--hold-out: needs a positive number, and --out for what is left")
    from kvpo.app.build import source_of
    from kvpo.app.prompt_sets import held_out, prompt_file
    from kvpo.prompt_files import examine, extended, written

    how = source_of(config).reading(config)
    found, problems = [], []
    for path in arguments.files:
        try:
            found.append(examine(prompt_file(path), **how))
            problems += found[-1].problems
        except ValueError as error:
            problems.append(str(error))
    if arguments.extended is not None:
        if len(arguments.files) > 1:
            raise ConfigurationError("--extended: pairs with one file of prompts")
        if not problems:
            found = [extended(found[0], arguments.extended, **how)]
    print("\n".join([*problems, *notes(found, source_of(config).text_limits(config))]))
    if problems:
        return 1
    if out is not None:
        every = [prompt for file in found for prompt in file.prompts]
        rest, held = held_out(every, arguments.hold_out)
        parts = {out: rest} | ({out.with_stem(f"{out.stem}-held-out"): held} if held else {})
        texts = {path: written(own, path, how["num_frames"]) for path, own in parts.items()}
        for path, text in texts.items():
            write_atomic(path, text)
            print(f"{path}: {counted(len(parts[path]), 'prompt')}")
    return 0


def notes(files: "list[PromptFile]", limits: "TextLimits") -> list[str]:
    """Notes on prompts that were read: lengths, repeats, parts that have no effect."""
    from kvpo.app.prompt_sets import short_notice, word_count
    from kvpo.prompt_files import repeats

    said = []
    places = {}
    for file in files:
        if not file.prompts:
            continue
        counts = sorted(word_count(text) for prompt in file.prompts for text in prompt.segments)
        low, middle, high = counts[0], counts[len(counts) // 2], counts[-1]
        spread = counted(low, "word") if low == high else f"{low} to {high} words, the median {middle}"
        said.append(
            f"{file.path}: {counted(len(file.prompts), 'prompt')}, {len(repeats(file.prompts))} distinct; "
            f"{spread}"
        )
        for n, prompt in enumerate(file.prompts):
            places[id(prompt)] = file.at(n)
            for text in dict.fromkeys(prompt.segments):
                said += [f"{file.at(n)}: {notice}" for notice in limits.notices(text)]
    every = [prompt for file in files for prompt in file.prompts]
    for first, *again in repeats(every):
        said += [f"{places[id(prompt)]}: repeats {places[id(first)]}" for prompt in again]
    if limits.length is None:
        said.append(f"{limits.unit} are not counted: give --backbone.encoders")
    if (notice := short_notice(every, limits.usual)) is not None:
        said.append(notice)
    return said
