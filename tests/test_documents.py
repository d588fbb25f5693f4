"""What the documents point at exists: functions, tests, files and settings."""

import ast
import importlib
import re
from pathlib import Path

import pytest

from kvpo.config import Config

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
TABLE = METHOD.split("## Symbol, function, test")[1].split("## 1.")[0]
ROWS = [line.split(" | ") for line in TABLE.splitlines()]


def defined(path: Path) -> set[str]:
    """Names that a file defines at its top level."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def resolves(dotted: str) -> bool:
    """Whether ``module.name`` or ``module.Class.name`` below the package can be imported."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(["kvpo", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            if not hasattr(found, name):
                return False
            found = getattr(found, name)
        return True
    return False


@pytest.mark.parametrize("row", [row for row in ROWS if len(row) == 3 and "`" in row[1]], ids=lambda r: r[0])
def test_every_symbol_has_its_functions_and_tests(row):
    *_, functions, tests = row
    module = ""
    for name in re.findall(r"`([^`]+)`", functions):
        module, dotted = (name.rsplit(".", 1)[0], name) if "." in name else (module, f"{module}.{name}")
        assert resolves(dotted), f"kvpo.{dotted}"
    for path, name in named_tests(tests):
        assert name in defined(ROOT / "tests" / path), f"tests/{path}::{name}"


def named_tests(text: str) -> list[tuple[str, str]]:
    """(file below tests, name) of every `file.py::name` and of `::name`, which is of the file before it."""
    found, path = [], ""
    for file, name in re.findall(r"`([\w/.]*)::(\w+)`", text):
        path = file or path
        found.append((path.removeprefix("tests/"), name))
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_named_tests_lead_somewhere(document):
    text = document.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        if not target.startswith(("http:", "https:", "mailto:")):
            assert (document.parent / target).exists(), target
    for path, name in named_tests(text):
        assert name in defined(ROOT / "tests" / path), f"tests/{path}::{name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_settings_that_are_named_exist(document):
    sections = {name: vars(value) for name, value in vars(Config()).items() if hasattr(value, "__dict__")}
    for section, field in re.findall(r"[`-](\w+)\.(\w+)[` ]", document.read_text(encoding="utf-8")):
        if section in sections and field != "py":
            assert field in sections[section], f"{section}.{field}"
