"""Layers of the package: a module imports only from lower layers, never sideways or upwards."""

import ast
from pathlib import Path
from typing import get_args, get_type_hints

import pytest

from kvpo.app.build import SOURCES
from kvpo.config import BackboneConfig

SOURCE = Path(__file__).resolve().parents[1] / "src"

# Room -> rooms it may import, besides itself. A module belongs to the room with the longest matching name.
MAY_IMPORT = {
    "kvpo.files": set(),
    "kvpo.progress": set(),
    "kvpo.threads": set(),
    "kvpo.extras": set(),
    "kvpo.method": set(),
    "kvpo.models.settings": set(),
    "kvpo.models.geometry": {"kvpo.files", "kvpo.models.settings"},
    "kvpo.config": {"kvpo.method", "kvpo.models.geometry", "kvpo.models.settings"},
    "kvpo.config_checks": {"kvpo.config", "kvpo.method", "kvpo.prompts"},
    "kvpo.serving": {"kvpo.config_checks", "kvpo.extras", "kvpo.files"},
    "kvpo.prompts": {"kvpo.method"},
    "kvpo.prompt_forms": {"kvpo.files"},
    "kvpo.prompt_files": {"kvpo.files", "kvpo.prompt_forms", "kvpo.prompts"},
    "kvpo.models": {
        "kvpo.extras",
        "kvpo.files",
        "kvpo.method",
        "kvpo.models.geometry",
        "kvpo.models.settings",
        "kvpo.prompts",
    },
    "kvpo.rewards.protocol": {"kvpo.method", "kvpo.prompts"},
}
MAY_IMPORT["kvpo.rewards"] = set(MAY_IMPORT)
MAY_IMPORT["kvpo.engine"] = set(MAY_IMPORT) - {"kvpo.rewards"}
LOWER_FLOORS = set(MAY_IMPORT)
MAY_IMPORT |= {room: LOWER_FLOORS for room in ("kvpo.training", "kvpo.world", "kvpo.report")}
MAY_IMPORT["kvpo.plan"] = LOWER_FLOORS | {"kvpo.training"}
MAY_IMPORT["kvpo.arena"] = LOWER_FLOORS | {"kvpo.report"}
MAY_IMPORT["kvpo.live"] = LOWER_FLOORS | {"kvpo.report", "kvpo.arena"}
MAY_IMPORT["kvpo.app"] = set(MAY_IMPORT)
MAY_IMPORT["kvpo.__main__"] = {"kvpo.app"}
MAY_IMPORT["kvpo"] = set(MAY_IMPORT)  # the package's front door

METHOD_MODULES = {"torch", "math", "collections", "dataclasses", "functools", "itertools", "typing", "kvpo"}


def module_name(path: Path) -> str:
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((SOURCE / "kvpo").rglob("*.py"))}


def imported_modules(name: str) -> set[str]:
    """Absolute names of everything that a module imports, including lazy imports."""
    path = MODULES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from package import submodule` imports the submodule, `from module import name` the module.
            submodules = {f"{origin}.{alias.name}" for alias in node.names} & set(MODULES)
            found |= submodules or {origin}
    return found


def room_of(name: str) -> str:
    """Room of a module; a module outside every room is its own room, which no list names."""
    rooms = [room for room in MAY_IMPORT if name == room or name.startswith(room + ".") and room != "kvpo"]
    return max(rooms, key=len, default=name)


def defines_network(name: str) -> bool:
    """True if a module of the package defines a torch network class."""
    classes = (n for n in ast.walk(ast.parse(MODULES[name].read_text())) if isinstance(n, ast.ClassDef))
    return any(ast.unparse(base).split(".")[-1] == "Module" for node in classes for base in node.bases)


def test_the_room_of_every_module_is_known():
    assert {room_of(name) for name in MODULES} <= set(MAY_IMPORT)


def test_floors_have_no_cycle():
    for room, allowed in MAY_IMPORT.items():
        assert all(room not in MAY_IMPORT[lower] for lower in allowed), room


@pytest.mark.parametrize("name", MODULES)
def test_imports_only_from_floors_below(name):
    room = room_of(name)
    rooms = {room_of(target) for target in imported_modules(name) if target.split(".")[0] == "kvpo"}
    upward = rooms - {room, "kvpo"} - MAY_IMPORT[room]
    assert not upward, f"{name} ({room}) imports {sorted(upward)}"


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "kvpo.method"])
def test_the_method_imports_torch_and_plain_python_only(name):
    assert {target.split(".")[0] for target in imported_modules(name)} <= METHOD_MODULES


@pytest.mark.parametrize("name", [name for name in MODULES if room_of(name) == "kvpo.engine"])
def test_the_engine_knows_models_by_protocol_only(name):
    concrete = {target for target in imported_modules(name) & set(MODULES) if defines_network(target)}
    assert not concrete, f"{name} imports the network classes of {sorted(concrete)}"


def test_the_checker_sees_lazy_relative_and_submodule_imports(tmp_path, monkeypatch):
    module = tmp_path / "stray.py"
    module.write_text(
        "def late():\n    from ..app import config\n    from . import cache\n    import numpy.linalg\n"
    )
    monkeypatch.setitem(MODULES, "kvpo.models.stray", module)
    monkeypatch.setitem(MODULES, "kvpo.app.config", module)
    monkeypatch.setitem(MODULES, "kvpo.models.cache", module)
    assert imported_modules("kvpo.models.stray") == {"kvpo.app.config", "kvpo.models.cache", "numpy.linalg"}
    assert room_of("kvpo.rewards.protocol") == "kvpo.rewards.protocol"
    assert room_of("kvpo.rewards.motion") == "kvpo.rewards"


def test_files_import_each_other_in_no_circle():
    modules = set(MODULES) - {"kvpo"}  # modules that it exports read its version number
    edges = {name: imported_modules(name) & modules - {name} for name in modules}
    while leaves := {name for name, lower in edges.items() if not lower}:
        edges = {name: lower - leaves for name, lower in edges.items() if name not in leaves}
    assert not edges, f"a circle among {sorted(edges)}"


def test_every_kind_of_generator_has_a_source_and_no_other_file_names_one():
    kinds = get_args(get_type_hints(BackboneConfig)["kind"])
    assert set(SOURCES) == set(kinds) and set(SOURCES.values()) <= set(MODULES)
    compared = [
        f"{name}:{node.lineno}"
        for name, path in MODULES.items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Compare) and "backbone.kind" in ast.unparse(node)
    ]
    assert not compared


OPENS_NO_TEXT = {"av.open", "os.open", "self.scheduler.open"}


def without_encoding(source: str) -> list[str]:
    """Calls that read or write text in the locale's encoding."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        given = {one.arg: one.value for one in node.keywords}
        of_path, function = isinstance(node.func, ast.Attribute), ast.unparse(node.func)
        mode = given.get("mode", next(iter(node.args[not of_path :]), None))  # open takes the path first
        binary = isinstance(mode, ast.Constant) and "b" in str(mode.value)
        opened = function.split(".")[-1] == "open" and function not in OPENS_NO_TEXT and not binary
        text = opened or (of_path and function.split(".")[-1] in {"read_text", "write_text"})
        found += [ast.unparse(node)] if text and "encoding" not in given else []
    return found


@pytest.mark.parametrize("name", MODULES)
def test_text_is_utf_8_whatever_the_locale(name):
    assert not without_encoding(MODULES[name].read_text(encoding="utf-8"))


def test_every_way_to_open_text_is_seen():
    calls = [
        "open('b')",
        "open('b', 'w')",
        "Path('b').open()",
        "p.open('a+')",
        "p.open(mode)",
        "p.read_text()",
    ]
    assert without_encoding("\n".join(calls)) == calls
    assert not without_encoding(
        "open('a', 'rb'), p.open(mode='wb'), p.open(encoding='utf-8'), os.open('a', 0)"
    )


@pytest.mark.parametrize("name", MODULES)
def test_files_and_functions_stay_short(name):
    text = MODULES[name].read_text(encoding="utf-8")
    functions = [
        n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    long = [f.name for f in functions if f.end_lineno is not None and f.end_lineno - f.lineno >= 60]
    assert not long, f"{name}: {', '.join(long)} have more than 60 lines"
    assert len(text.splitlines()) <= 400, f"{name} has more than 400 lines"


# Names that several modules may define, because they are called in the same way or by convention.
DEFINED_IN_SEVERAL = {
    "logger": "every module's own",
    "main": "what `python -m` runs",
    "T": "a type variable",
    "METHOD": "what METHODS collects",
    "METRICS": "the metrics of a method",
    "evidence": "a method's function of this name",
    "loss": "a method's function of this name",
    "SOURCE": "what SOURCES leads to",
    "longest_prompt": "a source's function of this name",
    "text_limits": "a source's function of this name",
    "TEMPLATE_FILE": "a reward's file with its question to the model",
    "TEMPLATE_SHA256": "the digest of that file",
    "MEAN": "what a reward subtracts from its scores",
    "STD": "what a reward divides them by",
    "TEXT_TOKENS": "tokens that a reward's text encoder reads",
    "prepared": "pixels as a reward's model takes them",
    "empty_model": "a reward's network without weights",
}


def public_definitions(name: str) -> set[str]:
    """Public functions, classes and constants at the top level of a module."""
    found: set[str] = set()
    for node in ast.parse(MODULES[name].read_text(encoding="utf-8")).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found |= {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return {one for one in found if not one.startswith("_")}


def test_a_name_means_one_thing():
    places: dict[str, list[str]] = {}
    for module in MODULES:
        for name in public_definitions(module):
            places.setdefault(name, []).append(module)
    several = {name: modules for name, modules in places.items() if len(modules) > 1}
    assert not {name: modules for name, modules in several.items() if name not in DEFINED_IN_SEVERAL}
    assert set(several) == set(DEFINED_IN_SEVERAL), "an allowed name is defined once by now"
