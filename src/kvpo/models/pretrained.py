"""Strict loading of models and tokenizers from folders in the layout of transformers and diffusers."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from kvpo.files import named_list, refuse_pointers
from kvpo.models.finite import require_finite_weights

TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "vocab.txt", "spiece.model")


def strict_pretrained(kind: Any, directory: Path, **settings: Any) -> Any:
    """Load a frozen model with ``kind.from_pretrained``, treating its warnings about weights as errors.

    ``settings``, such as the precision, are passed on. Raises ValueError naming missing, unexpected and
    misshapen weights, or if the folder cannot be loaded or holds NaN or infinity.
    """
    refuse_pointers(directory)
    try:
        model, found = kind.from_pretrained(
            directory, local_files_only=True, output_loading_info=True, **settings
        )
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(
            f"{directory}: cannot be loaded as {kind.__name__} ({error}); it must hold the whole "
            "model as published"
        ) from error
    # Old checkpoints store the position indices, which the model computes.
    unexpected = [name for name in found["unexpected_keys"] if not name.endswith("position_ids")]
    problems = {
        "missing": sorted(found["missing_keys"]),
        "unexpected": sorted(unexpected),
        "misshapen": sorted(str(item[0]) for item in found["mismatched_keys"]),
    }
    if said := [f"{what} ({len(names)}): {named_list(names)}" for what, names in problems.items() if names]:
        raise ValueError(f"{directory}: the weights do not fit {kind.__name__}; {'; '.join(said)}")
    require_finite_weights(model.state_dict(), str(directory))
    return model.eval().requires_grad_(False)


def read_tokenizer(directory: Path) -> Any:
    """The tokenizer of a folder in transformers' layout.

    Raises:
        ValueError: no tokenizer there, or it cannot be read.
    """
    from transformers import AutoTokenizer

    # If the files are absent, transformers may return an empty tokenizer of the model's class.
    if not any((directory / name).is_file() for name in TOKENIZER_FILES):
        raise ValueError(f"{directory}: holds no tokenizer ({', '.join(TOKENIZER_FILES)})")
    refuse_pointers(directory)
    try:
        return AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"{directory}: the tokenizer cannot be read ({error})") from error
