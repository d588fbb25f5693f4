"""Results in files, each valid for as long as the Python that it rests on stays as it is."""

import ast
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
PLACES = {"kvpo": ROOT / "src", "tests": ROOT, "benchmarks": ROOT}
"""Packages that change, and the directory that each is in."""
ALWAYS = (ROOT / "tests" / "conftest.py", ROOT / "pyproject.toml")
"""Every test rests on them."""


def module_file(name: str) -> Path | None:
    """The file of a module by its full name; None where there is none among ``PLACES``."""
    package, *_ = parts = name.split(".")
    if package not in PLACES:
        return None
    path = PLACES[package].joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def text_of(file: Path) -> str:
    """The text of a file when it was first asked for: later changes are of another run."""
    return file.read_text(encoding="utf-8")


@cache
def imported_files(file: Path) -> frozenset[Path]:
    """Files that a file imports, at its top or in a function, or names in full."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(text_of(file)) if file.suffix == ".py" else ast.Module([], [])):
        if isinstance(node, ast.Import):
            names |= {one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{one.name}" for one in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "\n" not in node.value:
            names |= {node.value} if len(node.value) < 100 else set()
    return frozenset(path for name in names if (path := module_file(name)))


@cache
def rests_on(file: Path) -> frozenset[Path]:
    """The file and all that it imports, directly or not."""
    found, new = set[Path](), {file, *ALWAYS}
    while new:
        found |= new
        new = {other for one in new for other in imported_files(one)} - found
    return frozenset(found)


def digest(files: Iterable[str]) -> str:
    """Digest of the text of some files, named from the repository's root, and of all that they import."""
    every = sorted({path for file in files for path in rests_on(ROOT / file)})
    texts = [f"{path.relative_to(ROOT)}\0{text_of(path)}" for path in every]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """Results by name, in files of a directory that are whole or not there."""

    directory: Path

    def _file(self, *name: str) -> Path:
        return self.directory / f"{hashlib.sha256(chr(0).join(name).encode()).hexdigest()}.json"

    def read(self, *name: str) -> Any:
        """The result of this name; None where there is none, or what it rests on has changed."""
        if not (file := self._file(*name)).exists():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["result"] if digest(found["files"]) == found["digest"] else None

    def write(self, result: Any, files: Iterable[str], *name: str) -> None:
        """Keep a result that rests on ``files`` and on what they import."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"name": name, "files": [*files], "digest": digest(files), "result": result}
        unfinished = (file := self._file(*name)).with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(file)
