"""Helpers for public reward checkpoints: weights, prompt templates, and warnings about cut texts."""

import ast
import hashlib
import logging
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from kvpo.files import read_bytes
from kvpo.models.tensor_files import assign_tensors, only_tensors, read_tensor_file

logger = logging.getLogger(__name__)

_WARNED: WeakSet[Any] = WeakSet()
"""Tokenizers that have already warned about a text that is too long."""
TEXT_PROMPT = "{text_prompt}"
"""Placeholder for the prompt in a template."""


def warn_if_cut(tokenizer: Any, text: str, limit: int, reward: str) -> None:
    """Warn, once per tokenizer, that a reward reads only the first ``limit`` tokens of a text."""
    if tokenizer in _WARNED or (length := len(tokenizer(text, verbose=False)["input_ids"])) <= limit:
        return
    _WARNED.add(tokenizer)
    logger.warning(
        "%s reads %d tokens of a prompt and ignores the rest; this one has %d: %r; others are not reported",
        reward,
        limit,
        length,
        text[:60],
    )


def without_weights(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a module without memory for its parameters; computed buffers (rotary frequencies) are real."""
    from accelerate import init_empty_weights  # imported late: rewards without weights start faster

    with init_empty_weights(include_buffers=False):
        return build().eval().requires_grad_(False)


def load_strict(module: nn.Module, weights: Mapping[str, Tensor], source: str, device: str) -> None:
    """Load ``weights`` into ``module`` strictly, on ``device`` in float32; buffers keep their dtype.

    Raises:
        ValueError: keys (named) are missing, unexpected or misshapen.
    """
    assign_tensors(module, weights, source, device=device, dtype=torch.float32)
    module.to(device).requires_grad_(False)


def entry_tensors(path: Path, entry: str) -> dict[str, Tensor]:
    """Read the tensors of a file, from ``entry`` if it has one. Raises ValueError."""
    content = read_tensor_file(path)
    held = content.get(entry)
    return only_tensors(held if isinstance(held, dict) else content, str(path))


def rename_keys(
    weights: Mapping[str, Tensor], patterns: Sequence[tuple[str, str]], left_out: str
) -> dict[str, Tensor]:
    """Rename weights by each (pattern, replacement) in turn; names that match ``left_out`` are dropped."""
    renamed = {}
    for name, value in weights.items():
        if re.search(left_out, name):
            continue
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        renamed[name] = value
    return renamed


def read_template(path: Path, sha256: str, parts: int = 1) -> str:
    """Read a prompt template and verify its hash.

    ``path`` is either the text itself in UTF-8 or the upstream Python file that defines it. A Python file is
    parsed, not run, and the string with that hash is returned (or the ``parts`` strings that join to it).

    Raises:
        ValueError: the file does not exist or is not valid Python, or nothing in it has the hash.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such prompt template")
    content = read_bytes(path)
    if hashlib.sha256(content).hexdigest() == sha256:
        return content.decode("utf-8")
    if path.suffix == ".py":
        try:
            tree = ast.parse(content)
        except (SyntaxError, ValueError) as error:
            raise ValueError(f"{path}: not a Python file: {error}") from error
        strings = [
            node.value
            for node in ast.walk(tree)
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        for pieces in product(strings, repeat=parts):
            text = "".join(pieces)
            if hashlib.sha256(text.encode("utf-8")).hexdigest() == sha256:
                return text
    raise ValueError(
        f"{path}: holds no prompt template with SHA-256 {sha256}; the score is only valid with the template "
        "the model was trained on: take the file unchanged from the model's repository"
    )


def filled(template: str, prompt: str) -> str:
    """Insert the prompt into the template."""
    return template.replace(TEXT_PROMPT, prompt)
