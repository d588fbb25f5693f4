"""Prompt files of every form: one reader, which reports every problem with its file and line."""

import csv
import io
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from kvpo.files import named_list, read_json, read_text
from kvpo.prompt_forms import DELIMITERS, FORMATS, FORMS, as_read, asked, is_timeline, texts_of, timeline
from kvpo.prompts import VideoPrompt, check_shown

logger = logging.getLogger(__name__)

LATENT_RATE = 4.0
"""Latent frames per second of the public generators, for timelines, which count in seconds."""


@dataclass(frozen=True)
class PromptFile:
    """The prompts of a file, and the problems of records that could not be read."""

    path: Path
    prompts: tuple[VideoPrompt, ...]
    lines: tuple[int, ...]
    """Line number of every prompt."""
    problems: tuple[str, ...] = ()
    """One message per problem, with file and line."""

    def at(self, index: int) -> str:
        """Location of a prompt, for messages."""
        return f"{self.path}, line {self.lines[index]}"

    def sound(self) -> "PromptFile":
        """Return the file itself. Raises ValueError with the first problem, if there is one."""
        if self.problems:
            raise ValueError(self.problems[0])
        return self


def read_prompts(path: str | Path, **reading: Any) -> list[VideoPrompt]:
    """The prompts of a file, in order. Takes the arguments of `examine`.

    Raises:
        ValueError: the first problem, with file and line; see `examine`.
    """
    return list(examine(path, **reading).sound().prompts)


def examine(
    path: str | Path,
    *,
    num_frames: int,
    switches: Sequence[int] = (),
    first_id: int = 0,
    block: int = 1,
    latent_rate: float = LATENT_RATE,
) -> PromptFile:
    """Read the prompts of a file, numbered from ``first_id``, and collect every problem in it.

    The suffix decides the form (``kvpo.prompt_forms``).

    Args:
        num_frames: latent frames of each video.
        switches: latent frames at which the segments of ``{"prompts": [...]}`` switch.
        block: latent frames generated together; every segment needs at least one block.
        latent_rate: latent frames per second, for timelines.

    Problems are blank lines or segments, invalid JSON, unknown fields, a number of segments that differs from
    the lines before or does not match the switches, switch frames that do not increase inside the video or
    leave a segment without a block, and ``frames`` that name no file. Raises ValueError if the prompt file is
    missing, empty, of no known form, or not UTF-8.
    """
    path = Path(path)
    records = FORMS.get(path.suffix.lower())
    if records is None:
        raise ValueError(
            f"{path}: prompt files are .txt (one prompt per line), .csv and .tsv (a column prompt), .json "
            f"and .jsonl ({FORMATS})"
        )
    prompts: list[VideoPrompt] = []
    lines: list[int] = []
    problems: list[str] = []
    unread: set[str] = set()
    shared_count: int | None = None
    for number, parse in records(path, _text(path)):
        try:
            record = parse()
            own = timeline(record, block, latent_rate) if is_timeline(record) else asked(record, unread)
            cuts = own.switches
            if cuts is None:
                cuts, shared_count = tuple(switches), shared_count or len(own.segments)
                _check_shared(len(own.segments), shared_count, cuts)
            place, frames = first_id + len(prompts), own.num_frames or num_frames
            begins = _begins_with(path, own.frames)
            prompt = VideoPrompt(place, own.segments, cuts, frames, own.transitions, begins)
            check_shown(prompt, block)
            prompts.append(prompt)
            lines.append(number)
        except ValueError as error:
            problems.append(f"{path}, line {number}: {error}")
    if not prompts and not problems:
        raise ValueError(f"{path}: the file holds no prompts")
    if unread:
        logger.info("%s: fields that are not read: %s", path, named_list(sorted(unread)))
    return PromptFile(path, tuple(prompts), tuple(lines), tuple(problems))


def extended(short: PromptFile, path: str | Path, **reading: Any) -> PromptFile:
    """The same videos with the extended texts of another file, which pairs with ``short`` line by line.

    ``path`` may also be a JSON object that maps short texts to extended ones. Takes the arguments of
    `examine`.

    Raises:
        ValueError: the files do not pair, naming the line; or most texts are shorter than those of ``short``.
    """
    long = Path(path)
    if long.suffix.lower() == ".json" and isinstance(texts := read_json(long), dict):
        absent = [n for n, p in enumerate(short.prompts) if not all(text in texts for text in p.segments)]
        if absent:
            raise ValueError(f"{long}: no extended text for {short.at(absent[0])}")
        others = [texts_of([texts[text] for text in p.segments], str(long)) for p in short.prompts]
    else:
        found = examine(long, **reading).sound()
        others = [prompt.segments for prompt in found.prompts]
        for n, (one, other) in enumerate(zip(short.prompts, others, strict=False)):
            if len(one.segments) != len(other):
                raise ValueError(
                    f"{found.at(n)}: {len(other)} segments, {short.at(n)} has {len(one.segments)}: extended "
                    "texts pair with short ones line by line"
                )
        if len(others) != len(short.prompts):
            longer = short if len(short.prompts) > len(others) else found
            alone = longer.at(min(len(others), len(short.prompts)))
            raise ValueError(
                f"{long}: {len(others)} prompts, {short.path} has {len(short.prompts)}: {alone} has no "
                "counterpart"
            )
    pairs = list(zip(short.prompts, others, strict=True))
    if 2 * sum(len(" ".join(other)) < len(" ".join(one.segments)) for one, other in pairs) > len(pairs):
        raise ValueError(f"{long}: most texts are shorter than those of {short.path}; are the files swapped?")
    return replace(short, prompts=tuple(replace(one, segments=other) for one, other in pairs))


def written(prompts: Sequence[VideoPrompt], path: Path, num_frames: int | None = None) -> str:
    """The content of a prompt file at ``path``, as `examine` reads it; frames are named relative to it.

    ``num_frames`` is the default length in latent frames, for forms that hold no lengths (None: any).

    Raises:
        ValueError: the form is unknown, or cannot hold several segments, lengths, or frames.
    """
    suffix = path.suffix.lower()
    begins = [prompt.frames and os.path.relpath(prompt.frames, path.parent) for prompt in prompts]
    if suffix in (".json", ".jsonl"):
        records = [
            prompt_record(prompt) | ({"frames": file} if file else {})
            for prompt, file in zip(prompts, begins, strict=True)
        ]
        if suffix == ".json":
            return json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    if suffix not in FORMS:
        raise ValueError(f"prompt files are {', '.join(FORMS)}, not {suffix or 'without a suffix'}")
    if several := [prompt for prompt in prompts if len(prompt.segments) > 1]:
        raise ValueError(
            f"a {suffix} file holds one text per video, prompt {several[0].id} has "
            f"{len(several[0].segments)}; write .jsonl"
        )
    if others := [prompt for prompt in prompts if num_frames not in (None, prompt.num_frames)]:
        raise ValueError(
            f"a {suffix} file holds no lengths, prompt {others[0].id} has {others[0].num_frames} latent "
            f"frames and {num_frames} are the default; write .jsonl"
        )
    texts = [prompt.segments[0] for prompt in prompts]
    if suffix == ".txt" and any(begins):
        raise ValueError("a .txt file holds texts alone, and prompts have frames to begin with; write .jsonl")
    if suffix == ".txt":
        return "".join(" ".join(text.split()) + "\n" for text in texts)
    file = io.StringIO()
    rows = [("prompt", "frames"), *((text, file or "") for text, file in zip(texts, begins, strict=True))]
    csv.writer(file, delimiter=DELIMITERS[suffix], lineterminator="\n").writerows(
        row if any(begins) else row[:1] for row in rows
    )
    return file.getvalue()


def prompt_record(prompt: VideoPrompt) -> dict[str, Any]:
    """A prompt as the object on a line of a ``.jsonl`` file."""
    record = {name: getattr(prompt, name) for name in ("segments", "switches", "num_frames")}
    said = any(blocks is not None for blocks in prompt.transitions)
    return {**record, "transitions": prompt.transitions} if said else record


def repeats(prompts: Sequence[VideoPrompt]) -> list[list[VideoPrompt]]:
    """Group prompts that read alike, in order of their first appearance.

    Prompts of a group begin with the same frames, and differ only in case, whitespace, invisible characters
    or Unicode spelling.
    """
    found: dict[tuple[Path | str | None, ...], list[VideoPrompt]] = {}
    for prompt in prompts:
        found.setdefault((prompt.frames, *map(as_read, prompt.segments)), []).append(prompt)
    return list(found.values())


def _begins_with(path: Path, frames: str | None) -> Path | None:
    """The file that a record of ``path`` names. Raises ValueError if there is none."""
    if frames is None:
        return None
    file = path.parent / frames.strip()
    if not os.path.isfile(file):  # also False for what cannot be a path: an image in base64
        raise ValueError(
            f"frames: {str(file)[:300]} is not a file; give an image or a video, relative to {path.name}"
        )
    return file


def _text(path: Path) -> str:
    """The text of a file with normalised line ends."""
    if not path.exists():
        raise ValueError(f"{path}: no such prompt file")
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n").rstrip()
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise ValueError(f"{path}, line {line}: holds a zero byte; save the file as UTF-8 text")
    return text


def _check_shared(count: int, first_count: int, switches: tuple[int, ...]) -> None:
    """Demand as many segments as the shared switch frames need, and the same number on every line."""
    if count != first_count:
        raise ValueError(
            f'{count} segments, but the lines before have {first_count}: lines of {{"prompts": [...]}} share '
            "their switch frames and need the same number of segments"
        )
    if count - 1 != len(switches):
        raise ValueError(
            f"{count} segments need {count - 1} switch frames, the configuration has {len(switches)}: "
            f"{list(switches)}"
        )
