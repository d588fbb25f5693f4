"""Results cached in files, each valid until the Python code that it depends on changes."""

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
"""Packages that may change, and the directory of each."""
ALWAYS = (ROOT / "tests" / "conftest.py", ROOT / "pyproject.toml")
"""Dependencies of every test."""


def module_file(name: str) -> Path | None:
    """The file of a module by its full name, or None outside ``PLACES``."""
    package, *_ = parts = name.split(".")
    if package not in PLACES:
        return None
    path = PLACES[package].joinpath(*parts)
    return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)


@cache
def text_of(file: Path) -> str:
    """The text of a file as first read: later changes belong to another run."""
    return file.read_text(encoding="utf-8")


@cache
def imported_files(file: Path) -> frozenset[Path]:
    """Files of the modules that a file imports, at any level, or names in a string."""
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
    """The file and everything that it imports, directly or indirectly."""
    found, new = set[Path](), {file, *ALWAYS}
    while new:
        found |= new
        new = {other for one in new for other in imported_files(one)} - found
    return frozenset(found)


def digest(files: Iterable[str]) -> str:
    """Digest of some files (paths from the repository's root) and of everything that they import."""
    every = sorted({path for file in files for path in rests_on(ROOT / file)})
    texts = [f"{path.relative_to(ROOT)}\0{text_of(path)}" for path in every]
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()


@dataclass(frozen=True)
class Kept:
    """Results by name, in a directory whose files are written atomically."""

    directory: Path

    def _file(self, *name: str) -> Path:
        return self.directory / f"{hashlib.sha256(chr(0).join(name).encode()).hexdigest()}.json"

    def read(self, *name: str) -> Any:
        """The result of this name, or None if there is none or a file that it depends on has changed."""
        if not (file := self._file(*name)).exists():
            return None
        found = json.loads(file.read_text(encoding="utf-8"))
        return found["result"] if digest(found["files"]) == found["digest"] else None

    def write(self, result: Any, files: Iterable[str], *name: str) -> None:
        """Keep a result that depends on ``files`` and on what they import."""
        self.directory.mkdir(parents=True, exist_ok=True)
        content = {"name": name, "files": [*files], "digest": digest(files), "result": result}
        unfinished = (file := self._file(*name)).with_suffix(".unfinished")
        unfinished.write_text(json.dumps(content), encoding="utf-8")
        unfinished.replace(file)
