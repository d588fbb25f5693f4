"""The prompts of a file: held-out sets, and the training prompts of each update."""

import logging
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.engine.forks import plan_forks
from kvpo.engine.noise import keyed_generator
from kvpo.files import counted, local_path, named_list
from kvpo.prompt_files import examine, repeats
from kvpo.prompts import VideoPrompt

logger = logging.getLogger(__name__)

PROMPT_KINDS = {"short": "one prompt", "long": "several prompts"}
Sets = dict[str, list[VideoPrompt]]
"""Prompt sets by kind."""


@dataclass(frozen=True)
class TextLimits:
    """Limits on what a source's text encoder reads of a prompt."""

    length: Callable[[str], int] | None
    """Number of units in a text; None: they cannot be counted without the tokenizer."""
    limit: int
    """Maximum number of units that are read."""
    unit: str = "tokens"
    unknown: Callable[[str], list[str]] = lambda text: []
    """Words of a text that have no effect."""
    usual: int = 0
    """Words per prompt that the generator was made for; it follows far shorter prompts badly. 0: any."""

    def notices(self, text: str) -> list[str]:
        """Notes on the parts of a text that have no effect: units that are cut, unknown words."""
        said = []
        if self.length is not None and (length := self.length(text)) > self.limit:
            said.append(f"{length} {self.unit}, {self.limit} are read: {length - self.limit} are cut")
        if unknown := self.unknown(text):
            said.append(f"unknown words have no effect: {named_list(unknown)}")
        return said


def short_notice(prompts: Sequence[VideoPrompt], usual: int) -> str | None:
    """One line if the median prompt has less than a third of the ``usual`` words, else None."""
    lengths = sorted(word_count(text) for prompt in prompts for text in prompt.segments)
    if not lengths or 3 * (median := lengths[len(lengths) // 2]) >= usual:
        return None
    return (
        f"the median prompt has {median} words, the generator was made for extended ones of about {usual} "
        "and follows short ones badly; pair them with extended texts: "
        "kvpo prompts FILE --extended FILE --out NEW"
    )


def word_count(text: str) -> int:
    """Number of words in a text; in scripts without spaces between words, two characters count as one."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" and c.isalpha() for c in text)
    return wide // 2 + sum(
        any(c.isalnum() and unicodedata.east_asian_width(c) not in "WF" for c in word)
        for word in text.split()
    )


@dataclass(frozen=True)
class FilePrompts:
    """Training prompts of each update, a function of (seed, update) alone; every pass has another order.

    A pass shows every prompt once. Prompts of one update share their switches and length, so that they have
    forks in common. If the number of such prompts is no multiple of ``count``, some updates have fewer.
    """

    prompts: tuple[VideoPrompt, ...]
    seed: int
    count: int
    """Maximum number of prompts per update."""

    @cached_property
    def alike(self) -> list[list[VideoPrompt]]:
        """Prompts grouped by switches and length, in a fixed order."""
        found: dict[tuple[int, tuple[int, ...]], list[VideoPrompt]] = {}
        for prompt in self.prompts:
            found.setdefault((prompt.num_frames, prompt.switches), []).append(prompt)
        return [found[shape] for shape in sorted(found)]

    def updates(self, turn: int) -> list[list[VideoPrompt]]:
        """The prompts of each update of a pass; updates of one group differ in size by one at most."""
        draws = keyed_generator("prompt order", self.seed, turn)
        updates = [
            [own[n] for n in part.tolist()]
            for own in self.alike
            for part in torch.randperm(len(own), generator=draws).tensor_split(-(-len(own) // self.count))
        ]
        return [updates[n] for n in torch.randperm(len(updates), generator=draws).tolist()]

    def __call__(self, update: int) -> list[VideoPrompt]:
        turn, place = divmod(update, sum(-(-len(own) // self.count) for own in self.alike))
        chosen = self.updates(turn)[place]
        return [replace(prompt, id=update * self.count + n) for n, prompt in enumerate(chosen)]


def updates_prompts(config: Config, training: Sequence[VideoPrompt]) -> FilePrompts:
    """The training prompts of every update; warns if there are too few to fill one.

    Raises ConfigurationError if an update would have a single prompt, and so no donor histories to take.
    """
    asked = config.optim.prompts_per_update
    prompts = FilePrompts(tuple(training), config.seed, asked)
    sizes = [len(update) for update in prompts.updates(0)]
    if config.exploration.donor and min(sizes) < 2:
        raise ConfigurationError(
            f"exploration.donor: an update would have a single prompt and no donor; change the number of "
            f"prompts in {config.prompts.file}, or optim.prompts_per_update = {asked}"
        )
    if max(sizes) < asked:
        logger.warning(
            "optim.prompts_per_update = %d, but %s has at most %d training prompts of one length with "
            "the same switches; updates have no more than that",
            asked,
            config.prompts.file,
            max(sizes),
        )
    return prompts


def prompt_file(location: Path | str) -> Path:
    """Local path of a prompt file, given by path or hub id. Raises ValueError if it is neither."""
    local = local_path(location, "prompts")
    if local.exists():
        return local
    from kvpo.models.hub import resolve_location

    try:
        return resolve_location(location)
    except ValueError as error:
        raise ValueError(f"{location}: no such prompt file ({error})") from error


def reading_of(config: Config, num_frames: int, rate: float) -> dict[str, Any]:
    """The arguments with which `kvpo.prompt_files` reads prompts for a configuration's generator.

    Args:
        num_frames: latent frames of videos without a given length.
        rate: latent frames per second.
    """
    return {
        "num_frames": num_frames,
        "switches": config.prompts.switches,
        "block": config.stream.block,
        "latent_rate": rate,
    }


def prompts_of_file(config: Config, reading: dict[str, Any]) -> list[VideoPrompt]:
    """The prompts of a run's prompt file, read with the arguments of its source.

    Raises ValueError for problems that `examine` finds, and for videos that begin with given frames.
    """
    found = examine(prompt_file(config.prompts.file), **reading).sound()
    for n, prompt in enumerate(found.prompts):
        if prompt.frames is not None:
            raise ValueError(
                f"{found.at(n)}: begins with {prompt.frames}, and runs train on videos that begin with "
                "noise; leave its frames out, or give the file to kvpo generate"
            )
    return list(found.prompts)


def longest_of_file(config: Config, reading: dict[str, Any]) -> VideoPrompt:
    """The most demanding video of the prompt file: the one with most switches, then most frames."""
    every = prompts_of_file(config, reading)
    return max(every, key=lambda prompt: (len(prompt.switches), prompt.num_frames))


def split_prompts(config: Config, reading: dict[str, Any]) -> tuple[list[VideoPrompt], Sets, Sets]:
    """Split the prompt file into training prompts, validation and test sets by kind; the same for every seed.

    For each kind (one prompt, several), a fixed shuffle of the distinct prompts yields test, validation and
    training prompts in this order. Prompts that differ only in case and spaces count as one: it is held out
    once, without its repeats, or trained on as often as the file has it.

    Raises:
        ConfigurationError: no file, no prompt file, too few prompts in it, or videos too short to fork.
    """
    settings, evaluation = config.prompts, config.evaluation
    if not settings.file:
        raise ConfigurationError(
            "prompts.file: empty; give --prompts FILE (.txt, .jsonl, .json, .csv or .tsv)"
        )
    try:
        every = prompts_of_file(config, reading)
    except ValueError as error:
        raise ConfigurationError(f"prompts.file: {error}") from error
    training: list[VideoPrompt] = []
    validation: Sets = {}
    test: Sets = {}
    for kind, words in PROMPT_KINDS.items():
        own = [prompt for prompt in every if (len(prompt.segments) > 1) == (kind == "long")]
        if not own:
            continue
        check_length(own, config)
        same = repeats(own)
        if again := len(own) - len(same):
            logger.info("%s: %d of %d videos of %s are repeats", settings.file, again, len(own), words)
        held = evaluation.test_prompts + evaluation.validation_prompts
        if len(same) <= held:
            raise ConfigurationError(
                f"prompts.file: {settings.file} has {counted(len(same), 'distinct video')} of {words}; the "
                f"{held} that evaluation.test_prompts + evaluation.validation_prompts hold out leave none "
                "to train on: lower them or add prompts"
            )
        order = torch.randperm(len(same), generator=keyed_generator("prompt split", kind)).tolist()
        test[kind] = [same[n][0] for n in order[: evaluation.test_prompts]]
        validation[kind] = [same[n][0] for n in order[evaluation.test_prompts : held]]
        training += [prompt for n in order[held:] for prompt in same[n]]
    for prompt in {(prompt.num_frames, prompt.switches): prompt for prompt in training}.values():
        try:
            plan_forks([prompt], config.exploration, config.stream.deployment)
        except ValueError as error:
            raise ConfigurationError(f"prompts.file: {settings.file}: {error}") from error
    return training, validation, test


def held_out(prompts: Sequence[VideoPrompt], count: int) -> tuple[list[VideoPrompt], list[VideoPrompt]]:
    """Split prompts into those to keep and ``count`` distinct ones to hold out, always the same, in order.

    Repeats of held-out prompts are dropped. Raises ValueError if nothing would be left.
    """
    same = repeats(prompts)
    if count >= len(same):
        raise ValueError(f"{count} of {len(same)} distinct prompts cannot be held out: none would be left")
    order = torch.randperm(len(same), generator=keyed_generator("prompts held out")).tolist()
    chosen = {id(prompt) for n in order[:count] for prompt in same[n]}
    first = {id(same[n][0]) for n in order[:count]}
    return [p for p in prompts if id(p) not in chosen], [p for p in prompts if id(p) in first]


def check_length(prompts: Sequence[VideoPrompt], config: Config) -> None:
    """Raise ConfigurationError unless all have one length, in whole blocks: they are generated together."""
    lengths = sorted({prompt.num_frames for prompt in prompts})
    block = config.stream.block
    if len(lengths) > 1 or lengths[0] % block:
        raise ConfigurationError(
            f"prompts.file: videos of one kind must have one length, a multiple of stream.block = {block} "
            f"latent frames; {config.prompts.file} has {', '.join(map(str, lengths))}"
        )
