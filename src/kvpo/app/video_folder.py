"""Folders of videos, and the prompts of their files."""

import logging
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvpo.files import named_list, printable, read_json
from kvpo.prompt_files import read_prompts
from kvpo.prompt_forms import blank

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = frozenset(
    ".mp4 .m4v .mov .webm .mkv .avi .gif .apng .mpg .mpeg .ts .m2ts .wmv .flv .3gp .ogv .mjpeg .y4m".split()
)
"""File name endings of videos."""
MANIFEST = "videos.json"
"""File that `kvpo generate` writes with its videos: file name -> its prompts, in order of appearance."""
SIDE_BY_SIDE = "-side-by-side"
"""Suffix of the names of videos that show base and aligned side by side."""
ANY_LENGTH = 2**31
SEVERAL = "several prompts, one after the other, and a file is scored against one: cut it at its switches"


def find_videos(folder: Path) -> list[Path]:
    """Video files in a folder and below it, in natural order (2 before 10); a file is returned as it is.

    Side-by-side videos of `kvpo generate --run` repeat two others and are left out.

    Raises:
        ValueError: no such folder, no video in it, a manifest that cannot be read.
    """
    if folder.is_file():
        return [folder]
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    found = [
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in VIDEO_SUFFIXES
        and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if pairs := {path for path in found if path.stem.endswith(SIDE_BY_SIDE) and _listed(path)}:
        logger.info("%s: left out: %d of base and aligned side by side", folder, len(pairs))
        found = [path for path in found if path not in pairs]
    if not found:
        raise ValueError(f"{folder}: no video files in it ({' '.join(sorted(VIDEO_SUFFIXES))})")
    return sorted(found, key=lambda path: (_natural(path.relative_to(folder)), str(path)))


def _natural(name: Path, number: str = r"(\d+)") -> list[list[Any]]:
    """A sort key: words are compared without case, matches of ``number`` by value."""
    parts = [re.split(number, part.casefold()) for part in name.parts]
    return [[float(word) if i % 2 else word for i, word in enumerate(words)] for words in parts]


def shown_names(root: Path, files: Sequence[Path]) -> list[str]:
    """Names of files below ``root`` that can be printed and written, even if their bytes are not UTF-8."""
    return [printable(str(file.relative_to(root))) for file in files]


def listed_videos(folder: Path, prompts: Path | None) -> tuple[list[Path], list[str], list[str] | None]:
    """The videos of a folder, their names, and their prompts; the latter are None if unknown.

    Raises ValueError as `find_videos` and `file_prompts` do.
    """
    files = find_videos(folder)
    root = folder if folder.is_dir() else folder.parent
    return files, shown_names(root, files), file_prompts(prompts, root, files)


def file_prompts(path: Path | None, root: Path, files: Sequence[Path]) -> list[str] | None:
    """The single prompt of every file below ``root``; None if unknown, or if the manifest has several.

    Raises:
        ValueError: see `file_segments`; also if ``path`` gives several prompts for a file.
    """
    names, found = shown_names(root, files), file_segments(path, root, files)
    if found is None:
        return None
    several = [name for name, texts in zip(names, found, strict=True) if len(texts) > 1]
    if several and path is None:
        logger.warning("no prompts are read from %s: %s shows %s", MANIFEST, several[0], SEVERAL)
        return None
    if several:
        raise ValueError(f"{path}: {several[0]} shows {SEVERAL}")
    return [texts[0] for texts in found]


def file_segments(path: Path | None, root: Path, files: Sequence[Path]) -> list[Sequence[str]] | None:
    """The prompts of every file below ``root``, in order of appearance; None if unknown.

    ``path`` is a JSON file that maps file names to prompts, or a prompt file with one line per file in
    natural order. Without a JSON file, the manifest of `kvpo generate` next to the files decides if there is
    one, and a prompt file must agree with it.

    Raises:
        ValueError: files without a prompt, more or fewer prompts than files, names in ambiguous order, a
            prompt file that the manifest contradicts.
    """
    names = shown_names(root, files)
    if path is not None and path.suffix.lower() == ".json" and isinstance(read_json(path), dict):
        return list(_by_name(path, names))
    listed = [_listed(file) for file in files]
    if path is None:
        return None if None in listed else [texts for texts in listed if texts]
    prompts = [prompt.segments for prompt in read_prompts(path, num_frames=ANY_LENGTH)]
    if not any(listed):
        return _by_position(path, files, root, prompts)
    for name, texts in zip(names, listed, strict=True):
        if texts is None:
            raise ValueError(f"{name} is not in the {MANIFEST} next to it, other files are; {_MAP}")
        if tuple(texts) not in prompts:
            raise ValueError(
                f"{path}: {MANIFEST} says that {name} shows {texts[0][:60]!r}, which is not among "
                f"these prompts; leave --prompts out, or {_MAP}"
            )
    return [texts for texts in listed if texts]


_MAP = "give a .json file that maps names to prompts"


def read_manifest(path: Path) -> dict[str, list[str]]:
    """Read a JSON object that maps file names to a prompt, or to a list of prompts.

    Raises ValueError for anything else.
    """
    given = read_json(path)
    if not isinstance(given, dict):
        raise ValueError(f"{path}: expected a JSON object that maps file names to prompts")
    found = {}
    for name, value in given.items():
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"{path}: expected a prompt for {name!r}, got {str(value)[:60]}")
        if any(blank(text) for text in texts):
            raise ValueError(f"{path}: the prompt for {name!r} is blank")
        if found.setdefault(_plain(name), texts) != texts:
            raise ValueError(f"{path}: two prompts for {_plain(name)!r}, whose accents are spelt in two ways")
    return found


def _plain(name: str) -> str:
    """Normalise the spelling of a name: some systems store letters and their accents separately."""
    return unicodedata.normalize("NFC", printable(name))


def _listed(file: Path) -> list[str] | None:
    """The prompts of a file in the manifest next to it; None if it has no entry there."""
    manifest = file.parent / MANIFEST
    return read_manifest(manifest).get(_plain(file.name)) if manifest.is_file() else None


def _by_name(path: Path, names: Sequence[str]) -> list[list[str]]:
    given = read_manifest(path)
    own = [_plain(name) for name in names]
    keys = [name if name in given else Path(name).name for name in own]
    if absent := [name for name, key in zip(names, keys, strict=True) if key not in given]:
        raise ValueError(f"{path}: no prompt for {named_list(absent, 1)}")
    twice = [key for key, count in Counter(keys).items() if count > 1]
    if twice:
        raise ValueError(
            f"{path}: {twice[0]!r} is the name of {keys.count(twice[0])} files; name their folders too"
        )
    return [given[key] for key in keys]


def _by_position(
    path: Path, files: Sequence[Path], root: Path, prompts: Sequence[Sequence[str]]
) -> list[Sequence[str]]:
    if len(prompts) != len(files):
        raise ValueError(
            f"{path}: {len(prompts)} prompts for {len(files)} files: give one per file in the order of their "
            "names, or a .json file that maps names to prompts"
        )
    names = [file.relative_to(root) for file in files]
    for one, two in zip(names, names[1:], strict=False):
        decimal = r"(\d+(?:\.\d+)?)"
        if _natural(one) == _natural(two) or _natural(one, decimal) > _natural(two, decimal):
            raise ValueError(f"{path}: it is not plain whether {one} or {two} comes first; {_MAP}")
    return list(prompts)
