"""YAML as people mean it: numbers are decimal, and nothing is given twice."""

import re
from pathlib import Path
from types import NoneType
from typing import Any

import yaml

from kvpo.config_checks import ConfigurationError
from kvpo.files import read_text, refuse_halves


class StrictLoader(yaml.SafeLoader):
    """YAML loader that refuses duplicate keys instead of silently keeping the last, and reads 010 as ten.

    YAML 1.1 reads integers with a leading 0 in base 8, and numbers with colons in base 60; the latter are
    texts here.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for position, (key_node, _) in enumerate(node.value):
            if keys[position] in keys[:position]:
                problem = f"{keys[position]!r} is given twice"
                raise yaml.constructor.ConstructorError(None, None, problem, key_node.start_mark)
        return super().construct_mapping(node, deep)

    def construct_decimal(self, node: yaml.ScalarNode) -> int | float | str:
        """The number of a node: decimal, or in base 2 or 16 as 0b1 and 0x1. One with colons stays text."""
        text = str(node.value)
        if ":" in text:
            return text
        if node.tag == FLOAT:
            return float(self.construct_yaml_float(node))
        return int(text, 0 if text.lstrip("+-")[:2] in ("0b", "0x") else 10)


INT, FLOAT = "tag:yaml.org,2002:int", "tag:yaml.org,2002:float"
for tag in (INT, FLOAT):
    StrictLoader.add_constructor(tag, StrictLoader.construct_decimal)
StrictLoader.add_implicit_resolver(INT, re.compile(r"[-+]?0[0-9]+$"), list("-+0"))  # 08: text in YAML 1.1


def read_mapping(path: Path) -> dict[Any, Any]:
    """Read the mapping in a YAML file; an empty file gives an empty one. Raises ConfigurationError."""
    try:
        text = read_text(path)
    except ValueError as error:
        raise ConfigurationError(f"cannot read configuration file {error}") from error
    try:
        values = yaml.load(text, Loader=StrictLoader)
        refuse_halves(values)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigurationError(f"configuration file {path}, line {line}: {error.problem}") from error
    except yaml.YAMLError as error:
        raise ConfigurationError(
            f"configuration file {path} is not YAML: {' '.join(str(error).split())}"
        ) from error
    except RecursionError as error:
        raise ConfigurationError(f"configuration file {path}: nested too deeply") from error
    except (TypeError, ValueError) as error:  # invalid dates or numbers, recursive lists
        raise ConfigurationError(f"configuration file {path}: {error}") from error
    if not isinstance(values, dict | NoneType):
        raise ConfigurationError(
            f"configuration file {path} must hold sections and fields, got {shown_value(values)}"
        )
    return values or {}


def shown_value(value: object) -> str:
    """A value for messages, long ones shortened."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
