"""The forms of prompt files: lines, JSON, tables, timelines; parsed record by record.

``.txt`` holds one prompt per line; ``# ...`` is a comment. ``.jsonl`` holds a record per line. ``.json``
holds a list of records or texts, one record, or a timeline of Scope, which is one video. ``.csv`` and
``.tsv`` have a column ``prompt``.

Records are ``{"prompt": text}`` (``prompt_en`` in VBench's lists), ``{"prompts": [...]}``, the interactive
form of LongLive and MemFlow with the configuration's switch frames, and
``{"segments": [...], "switches": [...]}``. The last may also set ``"num_frames"`` and ``"transitions"``, the
number of blocks over which each switch blends. Records and tables may name the image or video that a video
begins with in ``frames``, relative to their file.
"""

import csv
import io
import json
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from kvpo.files import named_list, parse_json

FORMATS = (
    'a record is {"prompt": "..."}, {"prompts": [...]} with the switch frames of the configuration, or '
    '{"segments": [...], "switches": [...]} with its own ("transitions" and "num_frames" too, if they '
    'differ); each may have "frames", an image or a video to begin with'
)


@dataclass(frozen=True)
class Asked:
    """A prompt as it is written in a file."""

    segments: tuple[str, ...]
    switches: tuple[int, ...] | None = ()
    """None: the configuration's."""
    num_frames: int | None = None
    """None: the configuration's."""
    transitions: tuple[int | None, ...] = ()
    frames: str | None = None
    """The file that the video begins with, as written."""


AtLine = tuple[int, Callable[[], Any]]
"""A line number, and the call that parses the record there; its errors belong to the line."""


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Numbered lines without surrounding spaces."""
    return enumerate(map(str.strip, text.split("\n")), 1) if text else iter(())


def _of_text(path: Path, text: str) -> Iterator[AtLine]:
    return (
        (number, partial(_not_blank, line)) for number, line in _lines(text) if line[:2] not in ("#", "# ")
    )


def _of_json_lines(path: Path, text: str) -> Iterator[AtLine]:
    return ((number, partial(_json, line)) for number, line in _lines(text))


def _of_json(path: Path, text: str) -> Iterator[AtLine]:
    """The elements of a list, or the one value, each with its line."""
    at, more = _beyond_spaces(text, 0), True
    if text[at : at + 1] != "[":
        yield text.count("\n", 0, at) + 1, partial(_json, text)
        return
    at = _beyond_spaces(text, at + 1)
    try:
        if text[at : at + 1] == "]":
            more, at = False, _beyond_spaces(text, at + 1)
        while more:
            _, stop = json.JSONDecoder().raw_decode(text, at)
            yield text.count("\n", 0, at) + 1, partial(_json, text[at:stop])
            at = _beyond_spaces(text, stop)
            more = text[at : at + 1] == ","
            if not more and text[at : at + 1] != "]":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = _beyond_spaces(text, at + 1)
        if at < len(text):
            raise json.JSONDecodeError("Extra data", text, at)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {error.lineno}: not JSON ({error.msg})") from error
    except (RecursionError, ValueError) as error:
        line, deep = text.count("\n", 0, at) + 1, isinstance(error, RecursionError)
        reason = "nested too deeply" if deep else "a number of too many digits"
        raise ValueError(f"{path}, line {line}: not JSON that can be read ({reason})") from error


def _beyond_spaces(text: str, at: int) -> int:
    found = _SPACES.match(text, at)
    return found.end() if found else at


_SPACES = re.compile(r"\s*")


DELIMITERS = {".csv": ",", ".tsv": "\t"}


def _of_table(path: Path, text: str) -> Iterator[AtLine]:
    """The columns ``prompt``, or VBench's ``prompt_en``, and ``frames`` of a table."""
    rows = csv.reader(io.StringIO(text), delimiter=DELIMITERS[path.suffix.lower()], strict=True)
    try:
        head = [name.strip().lower() for name in next(rows, [])]
        column = next((name for name in ("prompt", "prompt_en") if name in head), None)
        if column is None:
            raise ValueError(f"{path}, line 1: no column is called prompt; there are {named_list(head)}")
        line = rows.line_num + 1
        for row in rows:
            cells = dict(zip(head, row, strict=False))
            yield line, partial(_of_row, cells.get(column, ""), cells.get("frames", ""))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not a table ({error})") from error


def _of_row(text: str, frames: str) -> dict[str, str]:
    return {"prompt": _not_blank(text)} | ({"frames": frames} if frames.strip() else {})


FORMS: dict[str, Callable[[Path, str], Iterator[AtLine]]] = {
    ".txt": _of_text,
    ".jsonl": _of_json_lines,
    ".json": _of_json,
    ".csv": _of_table,
    ".tsv": _of_table,
}


def _not_blank(line: str) -> str:
    if blank(line):
        raise ValueError("blank; write a prompt there or remove the line")
    return line


def _json(line: str) -> Any:
    try:
        return parse_json(_not_blank(line))
    except ValueError as error:
        raise ValueError(f"{error}; {FORMATS}") from error


_ONE = ("prompt", "prompt_en")


def asked(record: Any, unread: set[str]) -> Asked:
    """Parse a text or a record; names of ignored fields are added to ``unread``.

    Raises ValueError for anything else.
    """
    if isinstance(record, str):
        return Asked(texts_of([record], "prompt"))
    named = [name for name in ("prompts", "segments", *_ONE) if isinstance(record, dict) and name in record]
    if len(named) != 1:
        raise ValueError(f"not a prompt; {FORMATS}")
    field = named[0]
    allowed = {"prompts": set(), "segments": {"switches", "transitions", "num_frames"}}.get(
        field, {"num_frames"}
    )
    unknown = record.keys() - allowed - {field, "frames"}
    if field in _ONE and "switches" not in unknown:
        unread |= unknown  # fields of data sets, which describe their prompts
    elif unknown:
        raise ValueError(f"unknown field {', '.join(sorted(unknown))} beside {field}; {FORMATS}")
    segments = texts_of([record[field]] if field in _ONE else record[field], field)
    begins = record.get("frames")
    if begins is not None and not (isinstance(begins, str) and begins.strip()):
        raise ValueError(f"frames must name an image or a video, got {json.dumps(begins)[:60]}")
    if field == "prompts":
        return Asked(segments, None, frames=begins)
    switches = record.get("switches", [])
    if not isinstance(switches, list) or not all(_is_frame(frame) for frame in switches):
        raise ValueError(f"switches must be a list of latent frames, got {json.dumps(switches)}")
    frames = record.get("num_frames")
    if frames is not None and not (_is_frame(frames) and frames > 0):
        raise ValueError(f"num_frames must be a positive number of latent frames, got {json.dumps(frames)}")
    transitions = record.get("transitions", [])
    if not isinstance(transitions, list) or not all(n is None or _is_frame(n) for n in transitions):
        raise ValueError(f"transitions must be a list of numbers of blocks, got {json.dumps(transitions)}")
    return Asked(segments, tuple(switches), frames, tuple(transitions), begins)


TIMELINE_SECONDS = 1e9
"""Upper limit of times in a timeline, about thirty years, so that frames can be counted."""


def is_timeline(record: Any) -> bool:
    """True for a timeline that Scope exports: prompts with the seconds at which they start."""
    entries = record.get("prompts") if isinstance(record, dict) else None
    return isinstance(entries, list) and any(isinstance(e, dict) and "startTime" in e for e in entries)


def timeline(record: dict[str, Any], block: int, latent_rate: float) -> Asked:
    """Convert a timeline to one video: seconds become latent frames, the length whole blocks.

    The texts of a blend are joined by commas, as Scope itself shows them. Entries of no length are left out,
    since Scope does not show them. Raises ValueError for malformed entries, or if nothing is shown.
    """
    cues: list[tuple[float, float, str]] = []
    for number, entry in enumerate(record["prompts"], 1):
        try:
            start, end = float(entry["startTime"]), float(entry["endTime"])
            texts = [part["text"] for part in entry["prompts"]] if "prompts" in entry else [entry["text"]]
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError(
                f"entry {number} of the timeline needs startTime and endTime, numbers of seconds, and "
                f"prompts, each with a text; got {json.dumps(entry)[:60]}"
            ) from error
        if not all(abs(time) < TIMELINE_SECONDS for time in (start, end)):  # nan fails this, too
            raise ValueError(
                f"entry {number} of the timeline lasts from {start} to {end}; give seconds, fewer than "
                f"{TIMELINE_SECONDS:g}"
            )
        if start != end:
            (text,) = texts_of([", ".join(map(str, texts))], f"entry {number} of the timeline")
            cues.append((start, end, text))
    if not cues:
        raise ValueError("the timeline shows nothing")
    cues.sort(key=lambda cue: cue[0])
    starts = [round(latent_rate * (start - cues[0][0])) for start, _, _ in cues]
    blocks = round(latent_rate * (max(end for _, end, _ in cues) - cues[0][0]) / block)
    return Asked(tuple(text for *_, text in cues), tuple(starts[1:]), max(1, blocks) * block)


def texts_of(value: object, field: str) -> tuple[str, ...]:
    """Strip a list of texts. Raises ValueError unless there is at least one text and none is blank."""
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{field} must be a list of at least one text, got {json.dumps(value)[:60]}")
    if empty := [i for i, text in enumerate(value, 1) if blank(text)]:
        raise ValueError(f"segment {empty[0]} of {len(value)} is blank")
    return tuple(text.strip() for text in value)


def _is_frame(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def blank(text: str) -> bool:
    """True if a text has no visible characters."""
    return not as_read(text)


def as_read(text: str) -> str:
    """The text as a reader sees it: without invisible characters, in one case and one Unicode spelling."""
    seen = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen.casefold()).split())
