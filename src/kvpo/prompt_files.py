"""Prompt files: one prompt per line of text, or JSON lines with the segments of interactive videos."""

import json
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from kvpo.files import parse_json, read_text
from kvpo.prompts import VideoPrompt, check_shown

_FORMATS = (
    'a JSON line is {"prompts": [...]} with the switch frames of the configuration, or '
    '{"segments": [...], "switches": [...]} with its own (and, if it differs, "num_frames")'
)


def read_prompts(
    path: str | Path, *, num_frames: int, switches: Sequence[int] = (), first_id: int = 0, block: int = 1
) -> list[VideoPrompt]:
    """The prompts of a file, in order, numbered from ``first_id``.

    A ``.txt`` file holds one prompt per line: single-segment videos. A ``.jsonl`` file holds on each line
    either ``{"prompts": [...]}``, the interactive format of LongLive and MemFlow, whose switch frames are
    ``switches`` for every line; or ``{"segments": [...], "switches": [...]}``, which may also set
    ``"num_frames"``.

    Args:
        num_frames: latent frames of each video.
        switches: latent frames at which the segments of ``{"prompts": [...]}`` lines follow one another.
        block: latent frames generated together, of which every segment needs some.

    Raises:
        ValueError: naming file and line: missing or empty file, undecodable text, blank lines or segments,
            not JSON, unknown fields, another number of segments than before or than the switches need, switch
            frames that do not increase inside the video or leave a segment without a block.
    """
    path = Path(path)
    parse = {".txt": _text_line, ".jsonl": _json_line}.get(path.suffix.lower())
    if parse is None:
        raise ValueError(f"{path}: prompt files are .txt (one prompt per line) or .jsonl ({_FORMATS})")
    prompts: list[VideoPrompt] = []
    shared_count: int | None = None
    for number, line in _lines(path):
        try:
            segments, own_switches, own_frames = parse(line)
            if own_switches is None:
                own_switches = tuple(switches)
                shared_count = shared_count or len(segments)
                _check_shared(len(segments), shared_count, own_switches)
            prompt = VideoPrompt(first_id + len(prompts), segments, own_switches, own_frames or num_frames)
            check_shown(prompt, block)
            prompts.append(prompt)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    return prompts


def repeats(prompts: Sequence[VideoPrompt]) -> list[list[VideoPrompt]]:
    """Distinct prompts in order, each with its repeats: those that read alike.

    They differ in case, in spaces, in characters that cannot be seen, or in how Unicode spells a letter.
    """
    found: dict[tuple[str, ...], list[VideoPrompt]] = {}
    for prompt in prompts:
        found.setdefault(tuple(map(_as_read, prompt.segments)), []).append(prompt)
    return list(found.values())


def blank(text: str) -> bool:
    """True if a reader sees nothing."""
    return not _as_read(text)


def _as_read(text: str) -> str:
    seen = "".join(c for c in unicodedata.normalize("NFKC", text) if unicodedata.category(c) != "Cf")
    return " ".join(unicodedata.normalize("NFKC", seen.casefold()).split())


Line = tuple[tuple[str, ...], tuple[int, ...] | None, int | None]
"""Segments, switch frames (None: the configuration's) and number of frames (None: the configuration's)."""


def _lines(path: Path) -> list[tuple[int, str]]:
    """Numbered lines of a file without line ends; blank ones at the end are left out."""
    if not path.exists():
        raise ValueError(f"{path}: no such prompt file")
    text = read_text(path).replace("\r\n", "\n").replace("\r", "\n")
    numbered = [(number, line.strip()) for number, line in enumerate(text.rstrip().split("\n"), 1)]
    if binary := [number for number, line in numbered if "\0" in line]:
        raise ValueError(f"{path}, line {binary[0]}: holds a zero byte; save the file as UTF-8 text")
    if numbered == [(1, "")]:
        raise ValueError(f"{path}: the file holds no prompts")
    if empty := [number for number, line in numbered if blank(line)]:
        raise ValueError(f"{path}, line {empty[0]}: blank; write a prompt there or remove the line")
    return numbered


def _text_line(line: str) -> Line:
    return (line,), (), None


def _json_line(line: str) -> Line:
    try:
        record = parse_json(line)
    except ValueError as error:
        raise ValueError(f"{error}; {_FORMATS}") from error
    if not isinstance(record, dict) or ("prompts" in record) == ("segments" in record):
        raise ValueError(f"not a prompt; {_FORMATS}")
    field = "prompts" if "prompts" in record else "segments"
    allowed = {"prompts"} if field == "prompts" else {"segments", "switches", "num_frames"}
    if unknown := sorted(record.keys() - allowed):
        raise ValueError(f"unknown field {', '.join(unknown)} beside {field}; {_FORMATS}")
    segments = _segments(record[field], field)
    if field == "prompts":
        return segments, None, None
    switches = record.get("switches", [])
    if not isinstance(switches, list) or not all(_is_frame(frame) for frame in switches):
        raise ValueError(f"switches must be a list of latent frames, got {json.dumps(switches)}")
    frames = record.get("num_frames")
    if frames is not None and not (_is_frame(frames) and frames > 0):
        raise ValueError(f"num_frames must be a positive number of latent frames, got {json.dumps(frames)}")
    return segments, tuple(switches), frames


def _segments(value: object, field: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) for text in value):
        raise ValueError(f"{field} must be a list of at least one text, got {json.dumps(value)[:60]}")
    if empty := [i for i, text in enumerate(value, 1) if blank(text)]:
        raise ValueError(f"segment {empty[0]} of {len(value)} is blank")
    return tuple(text.strip() for text in value)


def _is_frame(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


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
