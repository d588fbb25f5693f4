"""Records content that a run's settings only name: prompts and split, text encoder, VAE, learned rewards.

``provenance.json`` is written when a run starts, and compared whenever the run is used again (resumed,
evaluated, its test prompts generated), so that held-out prompts stay held out.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import torch

from kvpo import __version__
from kvpo.app.build import source_of
from kvpo.app.named_rewards import PREFERENCE, split_location
from kvpo.app.prompt_sets import prompt_file
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.files import read_bytes, read_json, write_json
from kvpo.models.geometry import fields_of
from kvpo.prompt_files import prompt_record
from kvpo.prompts import VideoPrompt

logger = logging.getLogger(__name__)

PROVENANCE = "provenance.json"


def prompts_of(config: Config) -> dict[str, Any]:
    """The prompts of a configuration: SHA-256 of their file, and their split.

    Training prompts are listed by their position in the file; held-out ones are written out.
    """
    training, validation, test = source_of(config).split(config)
    file = config.prompts.file
    return {
        "sha256": hashlib.sha256(read_bytes(prompt_file(file))).hexdigest() if file else None,
        "training": [prompt.id for prompt in training],
        "validation": {kind: [_written(prompt) for prompt in own] for kind, own in validation.items()},
        "test": {kind: [_written(prompt) for prompt in own] for kind, own in test.items()},
    }


def _written(prompt: VideoPrompt) -> dict[str, Any]:
    return {"id": prompt.id, **prompt_record(prompt)}


def files_of(config: Config) -> dict[str, str]:
    """Digests of files other than weights and prompts: text encoder, VAE, rewards learned from votes.

    Raises ConfigurationError if one of them is missing.
    """
    digests = source_of(config).file_digests(config)
    for setting, names in (
        ("rewards.scorers", config.rewards.scorers),
        ("evaluation.watchers", config.evaluation.watchers),
    ):
        for name in names:
            if name.startswith(PREFERENCE) and split_location(name)[1] is None:
                try:
                    content = read_bytes(Path(name.removeprefix(PREFERENCE)))
                except ValueError as error:
                    raise ConfigurationError(f"{setting}: {error}") from error
                digests[f"{setting} {name}"] = hashlib.sha256(content).hexdigest()
    return digests


def keep_provenance(path: Path, config: Config) -> None:
    """Write a run's provenance to ``path``; if there is one already, demand that it matches."""
    if path.exists():
        demand_same_prompts(path.parent, config)
        demand_same_files(path.parent, config)
        return
    record = {
        "kvpo": __version__,
        "torch": torch.__version__,
        "geometry": fields_of(config.model),
        "threads": torch.get_num_threads(),
        "prompts": prompts_of(config),
        "files": files_of(config),
    }
    write_json(path, record)


def demand_same_prompts(run: Path, config: Config) -> None:
    """Raise ConfigurationError if the prompts of ``config`` differ from those that ``run`` was made with."""
    there, here = _recorded(run, "prompts"), json.loads(json.dumps(prompts_of(config)))
    if there is None:
        return
    if there["sha256"] != here["sha256"]:
        raise ConfigurationError(
            f"prompts.file: {config.prompts.file} has SHA-256 {here['sha256']}, {run} was made with "
            f"{there['sha256']}: its held-out prompts would move; give the file as it was (--prompts.file "
            "FILE), or start another run"
        )
    for part in ("training", "validation", "test"):
        if there[part] != here[part]:
            old, new = (hashlib.sha256(json.dumps(side[part]).encode()).hexdigest() for side in (there, here))
            raise ConfigurationError(
                f"the {part} prompts of {run} (in its {PROVENANCE}, SHA-256 {old}) are not those of these "
                f"settings ({new}); keep its settings evaluation.* and prompts.* and its version of kvpo, or "
                "start another run"
            )


def demand_same_files(run: Path, config: Config) -> None:
    """Raise ConfigurationError if text encoder, VAE or learned rewards differ from those of ``run``."""
    here = files_of(config)
    there = _recorded(run, "files") if here else None
    for setting, digest in (there or {}).items():
        if here.get(setting) != digest:
            places = f"give --{setting} PATH, where the files of that run lie now"
            learned = "put the file back as it was, or start another run"
            raise ConfigurationError(
                f"{setting}: its files have the digest {here.get(setting)}, {run} was made with {digest}; "
                f"{learned if PREFERENCE in setting else places}"
            )


def _recorded(run: Path, part: str) -> Any:
    """A part of a run's record; None, with a warning, if the run has none."""
    path = run / PROVENANCE
    if not path.exists():
        logger.warning("%s has no %s: whether its %s are the same cannot be told", run, PROVENANCE, part)
        return None
    try:
        return read_json(path)[part]
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigurationError(f"{path} is damaged ({error}); remove it to go on unchecked") from error
