"""Check the files, functions, settings, tests, sections and counts that documents and docstrings name."""

import ast
import importlib
import io
import re
import tokenize
from collections.abc import Iterator
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

from kvpo.config import Config
from kvpo.engine.explorers import EXPLORERS
from kvpo.method.methods import METHODS

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")])
TODAY = [path for path in DOCUMENTS if path.name != "CHANGELOG.md"]
"""Documents about the current code; a changelog may name what was removed."""
FOLDERS = ("src", "tests", "benchmarks", "examples")
MODULES = sorted(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py"))
METHOD = (ROOT / "docs" / "method.md").read_text(encoding="utf-8")
UPSTREAM = {
    "dataset/data_collator_qwen.py",
    "data_collator_qwen.py",
    "prompt_template.py",
    "vision_process.py",
    "open_clip/transformer.py",
    "ImageReward/ImageReward.py",
}
"""Files of other projects that rewards reimplement."""
OF_A_RUN = {"arms.yaml", "config.yaml", "plot.yaml", "rewards.py"}
"""Files that a run or its user writes."""
OTHERS_NAMES = {"from_pretrained", "load_lora_adapter", "load_lora_weights", "use_safetensors", "use_rslora"}
"""Names in the documents that belong to other libraries."""


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def defined(path: Path) -> set[str]:
    """Names that a file defines at its top level."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}


@cache
def sections() -> dict[str, set[str]]:
    """Section of the configuration -> its settings."""
    parts = {name: value for name, value in vars(Config()).items() if hasattr(value, "__dict__")}
    return {name: {field.name for field in fields(value)} for name, value in parts.items()}


@cache
def prose(path: Path) -> str:
    """A document's text, or a module's docstrings and comments."""
    text = path.read_text(encoding="utf-8")
    if path.suffix != ".py":
        return text
    found = [
        node.value.value
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join([*found, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


@cache
def words_of_the_code() -> set[str]:
    """Every word of the code outside docstrings and comments: names and words in strings."""
    words: set[str] = set()
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        quoted = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            for field in ("id", "attr", "arg", "name"):
                words.update(re.findall(r"\w+", str(getattr(node, field, ""))))
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in quoted:
                words.update(re.findall(r"\w+", node.value))
    return words


def resolves(dotted: str) -> bool:
    """True if ``module.name`` or ``module.Class.name`` below the package can be imported."""
    parts = dotted.split(".")
    for cut in range(len(parts) - 1, -1, -1):
        try:
            found = importlib.import_module(".".join(["kvpo", *parts[:cut]]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            known = getattr(found, "__annotations__", {}) | vars(found)
            if name in known or hasattr(found, name):
                found = getattr(found, name, None)
                continue
            try:
                found = importlib.import_module(f"{found.__name__}.{name}")
            except (ModuleNotFoundError, AttributeError):
                return False
        return True
    return False


def anchor(heading: str) -> str:
    """A heading's anchor on a rendered page."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@cache
def headings(path: Path) -> tuple[str, ...]:
    return tuple(re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE))


def named_tests(text: str) -> list[tuple[str, str]]:
    """(file below tests, name) of every test named; a test without a file belongs to the last file named."""
    found, path = [], ""
    for file, name in re.findall(r"`([\w/.]*)::(\w+)`", text):
        path = file or path
        found.append((path.removeprefix("tests/"), name))
    return found


def tables(text: str) -> Iterator[list[list[str]]]:
    """Tables of a document, row by row, without the line below the header."""
    for block in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in block.splitlines()]
        yield [rows[0], *rows[2:]]


def table(text: str, *head: str) -> list[list[str]]:
    """Rows of the only table whose header starts with ``head``."""
    (found,) = [rows for rows in tables(text) if tuple(rows[0][: len(head)]) == head]
    return found[1:]


SYMBOLS = [row for rows in tables(METHOD) if rows[0][-2:] == ["function", "tests"] for row in rows[1:]]


@pytest.mark.parametrize("row", SYMBOLS, ids=lambda row: row[0])
def test_every_symbol_has_its_functions_and_tests(row: list[str]) -> None:
    *_, functions, tests = row
    module = ""
    for name in re.findall(r"`([^`]+)`", functions):
        module, dotted = (name.rsplit(".", 1)[0], name) if "." in name else (module, f"{module}.{name}")
        assert resolves(dotted), f"kvpo.{dotted}"
    assert named_tests(tests) or "every" in tests, row
    for path, name in named_tests(tests):
        assert name in defined(ROOT / "tests" / path), f"tests/{path}::{name}"


@pytest.mark.parametrize("path", [*DOCUMENTS, *MODULES], ids=name_of)
def test_named_tests_exist(path: Path) -> None:
    for file, name in named_tests(prose(path)):
        assert name in defined(ROOT / "tests" / file), f"tests/{file}::{name}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    for target, place in re.findall(r"\]\(([^)#\s]*)(?:#([^)]*))?\)", prose(path)):
        if target.startswith(("http:", "https:", "mailto:")):
            continue
        file = path.parent / target if target else path
        assert file.exists(), target
        assert not place or place in map(anchor, headings(file)), f"{target}#{place}"


@pytest.mark.parametrize("path", [*TODAY, *MODULES], ids=name_of)
def test_files_that_are_named_exist(path: Path) -> None:
    roots = (ROOT, ROOT / "src" / "kvpo", ROOT / "tests", ROOT / "docs", ROOT / "benchmarks", path.parent)
    names = {module.name for module in MODULES}  # a bare name may be in any folder
    text = re.sub(r"https?://\S+", "", prose(path))
    for name in re.findall(r"(?<![\w/.:{-])([\w./{},-]+\.(?:py|md|svg|yaml))\b(?!\.)", text):
        for file in expanded(name):
            known = file in UPSTREAM | OF_A_RUN | names or any((root / file).exists() for root in roots)
            assert known, f"{name_of(path)} names {file}"


def expanded(name: str) -> list[str]:
    """Expand a name with braces into file names."""
    head, brace, rest = name.partition("{")
    if not brace:
        return [name]
    middle, _, tail = rest.partition("}")
    return [head + part.strip() + tail for part in middle.split(",")]


@pytest.mark.parametrize("path", [*TODAY, *MODULES], ids=name_of)
def test_modules_and_settings_that_are_named_exist(path: Path) -> None:
    for dotted in re.findall(r"`{1,2}-{0,2}([a-z_]\w*(?:\.\w+)+)(?:\(\))?[` ]", prose(path)):
        first, second = dotted.split(".")[:2]
        if dotted.endswith(
            (".py", ".md", ".json", ".jsonl", ".yaml", ".txt", ".html", ".pt", ".pth", ".safetensors")
        ):
            continue
        if first in sections() and second in sections()[first]:
            continue
        if first == "kvpo" or first in sections() or (ROOT / "src/kvpo" / first).exists():
            assert resolves(dotted.removeprefix("kvpo.")), f"{name_of(path)} names {dotted}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_flags_that_are_named_exist(path: Path) -> None:
    for section, field in re.findall(r"--(\w+)\.(\w+)", prose(path)):
        assert field in sections().get(section, ()), f"--{section}.{field}"


@pytest.mark.parametrize("path", [*TODAY, *(path for path in MODULES if "src" in path.parts)], ids=name_of)
def test_names_in_backticks_are_names_of_the_code(path: Path) -> None:
    for name in re.findall(r"`{1,2}(\w*_\w*|[A-Z][a-z]+[A-Z]\w*)(?:\(\))?`", prose(path)):
        assert name in words_of_the_code() | OTHERS_NAMES, f"{name_of(path)} names {name}"


@pytest.mark.parametrize("path", [*TODAY, *MODULES], ids=name_of)
def test_sections_that_are_named_exist(path: Path) -> None:
    """Sections are named by heading, because numbers change."""
    text = " ".join(prose(path).split())
    for document, heading in re.findall(r"docs/(\w+\.md)`*,? \"([^\"]+)\"", text):
        assert heading in headings(ROOT / "docs" / document), f"{name_of(path)} names {document}, {heading}"
    stale = re.search(r"\b(METHOD|MODELS|REWARDS)(\.md)?,? (section|notation|\d)", text)
    assert not stale or path == Path(__file__), f"{name_of(path)} names {stale and stale.group()}"


def test_the_lines_and_settings_of_every_method() -> None:
    folder = ROOT / "src" / "kvpo" / "method"
    rows = table(METHOD, "method", "files and lines")
    assert [row[0].strip("`") for row in rows] == list(METHODS)
    for name, files, settings in rows:
        found = re.findall(r"`(\w+\.py)` (\d+)", files)
        assert found[0][0].removesuffix(".py") == name.strip("`").replace("-", "_")
        lines = {file: len((folder / file).read_text().splitlines()) for file, _ in found}
        assert {file: int(count) for file, count in found} == lines, name
        section = name.strip("`").replace("-", "_")
        assert set(re.findall(r"`(\w+)`", settings)) == sections()[section], name


def test_every_method_and_explorer_is_in_the_tables() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert [row[0].strip("`") for row in table(readme, "method")] == list(METHODS)
    assert [row[0].strip("`") for row in table(METHOD, "explorer")] == list(EXPLORERS)
    explained = [heading.split("`")[1] for heading in headings(ROOT / "docs/method.md") if "`" in heading]
    assert explained == list(METHODS)
    assert len(readme.splitlines()) <= 150


def texts_of(path: Path) -> Iterator[tuple[int, str]]:
    """Every docstring and attribute description in a module, with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            if isinstance(node.value.value, str):
                yield node.lineno, node.value.value


@pytest.mark.parametrize("path", sorted((ROOT / "src").rglob("*.py")), ids=lambda path: path.stem)
def test_descriptions_say_it_and_do_not_ask(path: Path) -> None:
    questions = ("What", "How", "Which", "Whether", "Who", "Where", "When", "Why", "Of")
    asked = [
        f"{path}:{line}: {text[:60]!r}"
        for line, text in texts_of(path)
        if text.split(maxsplit=1)[:1] and text.split()[0] in questions
    ]
    assert not asked, "begin with a verb or a noun: " + "; ".join(asked)
