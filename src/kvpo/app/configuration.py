"""Loads and merges the configuration of a run.

Values come from a preset, then a YAML file, then command-line flags; later ones win. File and flags go
through the same strict conversion, so that a mistake gives the same message in both.
"""

import ast
import dataclasses
import difflib
import inspect
import math
import typing
from argparse import ArgumentTypeError
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import yaml

from kvpo.app.noise_files import NOISE_FLOORS, measured_floors
from kvpo.app.old_settings import OLD, OLD_SECTIONS
from kvpo.app.presets import PRESETS
from kvpo.app.yaml_files import StrictLoader, read_mapping, shown_value
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.files import local_path

PLACES = (
    "device",
    "rewards.cache",
    # Locations of weights and prompts; their content is checked by digest.
    "prompts.file",
    "backbone.geometry",
    "backbone.checkpoint",
    "backbone.lora",
    "backbone.offload",
)
"""Settings that say where a run's files and device are; they may change whenever the run is used again."""
REWARD_NAMES = ("rewards.scorers", "evaluation.watchers")
SHARING = ("distributed.branch_ranks", "distributed.shard", "rewards.ranks")
"""Settings for sharing a run among ranks; they change its results by rounding only."""
CHANGEABLE_ON_RESUME = (*PLACES, *SHARING, "optim.updates", "checkpoint.every")
PLACES_OF_A_RUN = (*PLACES, "backbone.encoders")
"""Settings of a run that `kvpo evaluate` and `kvpo export` accept."""


@dataclass(frozen=True)
class Setting:
    """One field of the configuration that holds a value: dotted path, type, docstring."""

    path: str
    type: Any
    doc: str


@cache
def settings() -> dict[str, Setting]:
    """Every setting by dotted path, in order of definition."""
    found = _settings_of(Config, "")
    for name, kind in sections().items():
        found += _settings_of(kind, f"{name}.")
    return {setting.path: setting for setting in found}


@cache
def sections() -> dict[str, type]:
    """The dataclass of every section of the configuration, by name."""
    hints: dict[str, type] = typing.get_type_hints(Config)
    return {name: kind for name, kind in hints.items() if dataclasses.is_dataclass(kind)}


def resolve(preset: str | None, file: Path | None, flags: Mapping[str, str]) -> Config:
    """The configuration of a new run from preset, file and flags (dotted path -> text).

    Without ``preset``, the file's preset applies, or ``demo`` if it names none. Raises ConfigurationError.
    """
    config = _unchecked(preset, file, flags)
    check(config)
    return config


def _unchecked(preset: str | None, file: Path | None, flags: Mapping[str, str]) -> Config:
    values = read_settings(file) if file is not None else {}
    given = parse_flags(flags)
    start = str(values.get("preset", "demo")) if preset is None else preset
    config = _start(start, given.get("method", values.get("method")))
    config = assign(config, {**values, "preset": config.preset})
    return assign(config, given)


def preset(name: str, changes: Mapping[str, Any] | None = None) -> Config:
    """A preset with some settings changed by dotted path, as in ``{"optim.updates": 20}``.

    Raises ConfigurationError for an unknown name, field or value.
    """
    changes = changes or {}
    config = assign(_start(name, changes.get("method")), {**changes, "preset": name})
    check(config)
    return config


def _start(name: str, method: Any = None) -> Config:
    """A preset's values; a method other than the preset's brings its own explorer and starting settings."""
    if name not in PRESETS:
        raise ConfigurationError(
            f"unknown preset {name!r}{nearest(name, PRESETS)}; presets: {', '.join(PRESETS)}"
        )
    config = PRESETS[name]()
    return config if method is None or method == config.method else with_method(config, method)


def with_method(config: Config, method: Any) -> Config:
    """``config`` with another method, that method's explorer and the settings it starts from."""
    config = assign(config, {"method": method})
    own = config.own_settings
    return assign(config, {"exploration.explorer": own.EXPLORERS[0], **own.STARTS_FROM})


def resolve_saved(saved: Path, flags: Mapping[str, str] | None = None) -> Config:
    """The configuration in a run's config.yaml, with some settings changed by ``flags``.

    Raises ConfigurationError; also for an empty or truncated file, which a preset would silently complete.
    """
    config = read_saved(saved, flags)
    check(config)
    return config


def read_saved(saved: Path, flags: Mapping[str, str] | None = None) -> Config:
    """As `resolve_saved`, but the settings are not checked, since the files that they name may have moved."""
    if not saved.is_file():
        raise ConfigurationError(
            f"{saved.parent} holds no run (no {saved.name}); give the directory that was given to "
            "`kvpo align --out`"
        )
    values = read_settings(saved)
    for path, value in values.items():
        _setting(path, value)  # an old setting raises, naming its replacement
    if missing := {"preset", "checkpoint.every"} - values.keys():  # the first and the last setting
        raise ConfigurationError(
            f"{saved} is not the whole configuration of a run: it lacks {' and '.join(sorted(missing))}; put "
            "the file back as the run wrote it"
        )
    return _unchecked(None, saved, flags or {})


def resolve_resumed(saved: Path, preset: str | None, file: Path | None, flags: Mapping[str, str]) -> Config:
    """The configuration of a run that continues from ``saved``, its config.yaml.

    Preset, file and flags may be given again, but must agree with it except in CHANGEABLE_ON_RESUME:
    anything else would be another run. Raises ConfigurationError naming what differs.
    """
    before = read_saved(saved)
    given = {
        **(read_settings(file) if file is not None else {}),
        **({} if preset is None else {"preset": preset}),
    }
    after = assign(assign(before, given), parse_flags(flags))
    check(after)
    demand_same_run(saved, before, after, CHANGEABLE_ON_RESUME)
    return after


def resolve_run(run: Path, places: Mapping[str, Any] | None = None) -> Config:
    """The configuration of the run in ``run``, with its files now at ``places`` (dotted path -> value).

    Raises ConfigurationError for a setting that is not in PLACES_OF_A_RUN.
    """
    saved = run / "config.yaml"
    before = read_saved(saved)
    after = assign(before, places or {})
    check(after)
    demand_same_run(saved, before, after, PLACES_OF_A_RUN)
    return after


def demand_same_run(saved: Path, before: Config, after: Config, changeable: Sequence[str]) -> None:
    """Raise ConfigurationError if ``after`` differs from ``before`` in a setting not in ``changeable``."""
    old, new = flat(dataclasses.asdict(before)), flat(dataclasses.asdict(after))
    refused = [
        f"{path} is {old[path]} there, {new[path]} here"
        for path in old
        if old[path] != new[path] and path not in changeable
    ]
    if refused:
        raise ConfigurationError(
            f"{saved.parent} continues with its saved settings, but {'; '.join(refused)}; for other settings "
            "start another run"
        )


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a YAML file by dotted path, not yet converted. Raises ConfigurationError."""
    return flat(read_mapping(path))


def flag_text(value: Any) -> str:
    """A setting's value as a user would type it after its flag."""
    if isinstance(value, dict):
        return ",".join(f"{key}={item}" for key, item in value.items()) or "empty"
    if isinstance(value, (tuple, list)):
        return ",".join(map(str, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def parse_flags(flags: Mapping[str, str]) -> dict[str, Any]:
    """Parse command-line texts as YAML; text fields take them literally. Raises ConfigurationError."""
    return {path: _parse(_setting(path, text).type, text) for path, text in flags.items()}


def assign(config: Config, values: Mapping[str, Any]) -> Config:
    """``config`` with ``values`` (by dotted path) converted strictly. Raises ConfigurationError."""
    changes: dict[str, dict[str, Any]] = {}
    for path, value in values.items():
        section, _, name = path.rpartition(".")
        setting = _setting(path, value)
        if path == NOISE_FLOORS:
            value = measured_floors(value)
        if path in REWARD_NAMES:
            value = whole_names(value)
        changes.setdefault(section, {})[name] = _convert(setting.type, value, setting)
    top = changes.pop("", {})
    parts = {name: dataclasses.replace(vars(config)[name], **part) for name, part in changes.items()}
    return dataclasses.replace(config, **top, **parts)


def whole_names(names: Any) -> Any:
    """Rejoin names NAME@http://A,http://B that the command line has split at their commas."""
    if not isinstance(names, list | tuple):
        return names
    whole: list[Any] = []
    for name in names:
        if whole and isinstance(name, str) and name.startswith(("http://", "https://")):
            whole[-1] = f"{whole[-1]},{name}"
        else:
            whole.append(name)
    return whole


def flat(values: Mapping[Any, Any]) -> dict[str, Any]:
    """Flatten sections: {"optim": {"lr": 1}} becomes {"optim.lr": 1}; an empty section gives nothing.

    Raises ConfigurationError for a section that holds no fields, or a setting that is given twice.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        if key not in sections() and not (key in OLD_SECTIONS and isinstance(value, Mapping)):
            found = {str(key): value}
        elif isinstance(value, Mapping | NoneType):
            found = {f"{key}.{name}": item for name, item in (value or {}).items()}
        else:
            raise ConfigurationError(f"{key}: expected a section of fields, got {shown_value(value)}")
        for path in result.keys() & found.keys():
            both = f"{shown_value(result[path])} and as {shown_value(found[path])}"
            raise ConfigurationError(f"{path}: given twice, as {both}; keep one")
        result |= found
    return result


def path_argument(text: str) -> Path:
    """Parse a path for argparse; expands ``~``, which a shell does not in ``--out=~/x``."""
    try:
        return local_path(text, "path")
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("path: ")) from error


def nearest(name: str, known: Iterable[str]) -> str:
    """The suffix `` (did you mean 'x'?)`` for the known name closest to ``name``; empty if none is close."""
    words = {path.lstrip("-"): path for path in known}  # dashes make short options look alike
    same_ending = [word for word in words if _ending(word) == _ending(name)]
    match = same_ending or difflib.get_close_matches(name.lstrip("-"), words, 1, 0.6)
    return f" (did you mean {words[match[0]]!r}?)" if match else ""


def _ending(path: str) -> str:
    return path.rpartition(".")[2].lstrip("-")


def _setting(path: str, value: Any) -> Setting:
    if path in OLD:
        raise ConfigurationError(f"{path} (value {shown_value(value)}) is no longer a setting: {OLD[path]}")
    if path not in settings():
        raise ConfigurationError(
            f"unknown field {path!r} (value {shown_value(value)}){nearest(path, settings())}"
        )
    return settings()[path]


def _parse(kind: Any, text: str) -> Any:
    kind, optional = _without_none(kind)
    if optional and text.lower() in ("none", "null"):
        return None
    origin = typing.get_origin(kind)
    if kind is str or origin is Literal:
        return text
    if origin is tuple and not text.startswith("["):
        text = f"[{text}]"
    if origin is dict and not text.startswith("{"):
        # YAML could misread a path; numbers are converted from their text later.
        pairs = [part.partition("=") for part in text.split(",") if part]
        values = {name.strip(): value.strip() for name, _, value in pairs}
        return values if all(values.values()) and len(values) == len(pairs) else text
    try:
        return yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text  # the conversion refuses it and names the setting


def _convert(kind: Any, value: Any, setting: Setting) -> Any:
    """Convert ``value`` to ``kind``. Raises ConfigurationError that names the setting and its type."""
    kind, optional = _without_none(kind)
    if optional and value is None:
        return None
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal and value in arguments:
        return value
    if origin is tuple and isinstance(value, list | tuple):
        items = [arguments[0]] * len(value) if arguments[-1] is ... else arguments
        if len(items) == len(value):
            return tuple(_convert(item, part, setting) for item, part in zip(items, value, strict=True))
    if origin is dict and isinstance(value, Mapping):
        return {_convert(arguments[0], key, setting): _convert(arguments[1], item, setting)
                for key, item in value.items()}  # fmt: skip
    if kind in (bool, int, str) and type(value) is kind:
        return value
    if kind is float and (number := _number(value)) is not None:
        return number
    hint = nearest(str(value), arguments) if origin is Literal else ""
    raise ConfigurationError(
        f"{setting.path}: expected {kind_in_words(setting.type)}, got {shown_value(value)}{hint}"
    )


def _number(value: Any) -> float | None:
    """A finite float, or None. YAML 1.1 reads 1e-4, without a point, as text."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def kind_in_words(kind: Any) -> str:
    """A type in words, for messages."""
    kind, optional = _without_none(kind)
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    if origin is Literal:
        text = "one of " + ", ".join(map(str, arguments))
    elif origin is tuple:
        count = "a list, each" if arguments[-1] is ... else f"a list of {len(arguments)}, each"
        text = f"{count} {kind_in_words(arguments[0])}"
    elif origin is dict:
        text = f"name: value pairs, each value {words[arguments[1]]}"
    else:
        text = words[kind]
    return f"{text} or none" if optional else text


def _without_none(kind: Any) -> tuple[Any, bool]:
    """Split ``X | None`` into X and whether None is allowed."""
    arguments = typing.get_args(kind)
    if NoneType not in arguments:
        return kind, False
    (inner,) = (argument for argument in arguments if argument is not NoneType)
    return inner, True


def _settings_of(kind: type, prefix: str) -> list[Setting]:
    hints, docs = typing.get_type_hints(kind), _field_docs(kind)
    inner = sections() if kind is Config else {}
    names = [field.name for field in dataclasses.fields(kind) if field.name not in inner]
    return [Setting(prefix + name, hints[name], docs[name]) for name in names]


def _field_docs(kind: type) -> dict[str, str]:
    """The docstring below each field of a dataclass, which Python itself does not keep."""
    definitions = [ast.parse(inspect.getsource(own)).body[0] for own in kind.__mro__[-2::-1]]
    return {
        ast.unparse(field.target): " ".join(ast.literal_eval(text.value).split())
        for definition in definitions
        if isinstance(definition, ast.ClassDef)
        for field, text in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }
