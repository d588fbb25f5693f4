"""Arms of a comparison: their settings, and the trials that tune a method before it is compared."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from kvpo.app.configuration import assign, flat, nearest, parse_flags, read_settings, with_method
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError, check
from kvpo.engine.noise import keyed_generator
from kvpo.method.methods import METHODS

PRETRAINING = "pretraining"
"""The arm that continues the pretraining of the base, without a reward."""
MOST_UPDATES = 10_000
"""Upper limit on updates; the budget ends every run before it."""
TRIAL_SEED = 1_000_000
"""Seed of the trials; no reported run has it."""


@dataclass(frozen=True)
class TrainingArm:
    """One row of the comparison."""

    name: str
    method: str
    """The method that it trains with, under the settings that trials chose for it."""
    changes: Mapping[str, Any] = field(default_factory=dict)
    """Settings that it changes, by dotted path."""

    @property
    def tuned(self) -> bool:
        """True for a plain method, whose settings are chosen by trials."""
        return self.name == self.method


CONTROLS = {
    "null": TrainingArm("null", "kvpo", {"objective.advantages": "random"}),
    "best-of-n": TrainingArm("best-of-n", "rvm", {"objective.keep": (1, 0)}),
    PRETRAINING: TrainingArm(PRETRAINING, PRETRAINING),
}
"""Control arms: random advantages, training on the best branch alone, more pretraining."""

RATES, RATES_ALONE = (0.5, 1.0, 2.0), (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
"""Learning rates to try, relative to the comparison's own; more for methods without shared settings."""
OWN: dict[str, dict[str, Sequence[Any]]] = {
    "kvpo": {
        "exploration.donor": (0, 1),
        "exploration.distinct": (1, 2),
        "objective.temperature": (None, 1.0),
    },
    "latent-distance": {
        "latent_distance.space": ("latent", "velocity"),
        "exploration.explorer": ("routes", "neighbour"),
    },
    "flow-grpo": {"exploration.noise": (0.3, 0.5, 0.7, 1.0)},
    "cm-grpo": {"objective.clip": ((0.2, 0.2), (0.1, 0.2)), "objective.grad_steps": (2, 3)},
    "nft": {
        "nft.beta": (0.1, 0.3, 1.0),
        "nft.old": ("rollout", "average"),
        "exploration.explorer": ("fresh", "neighbour"),
    },
    "rvm": {"exploration.explorer": ("fresh", "neighbour"), "objective.grad_steps": (2, 4)},
    "self-distill": {"exploration.distinct": (1, 2)},
}
"""Further settings to tune, by method; methods without an entry tune the shared ones alone."""
SHARED = {"preset", "seed", "device", "threads", "backbone", "prompts", "evaluation", "distributed",
          "checkpoint", "rewards.scorers", "rewards.weights", "rewards.sources", "rewards.top_share",
          "optim.updates", "optim.autocast"}  # fmt: skip
"""Settings and sections that no arm may change: they define the test, or the budget decides them."""


def chosen_arms(names: Sequence[str], given: Sequence[str]) -> list[TrainingArm]:
    """The arms of ``--methods`` and ``--arms``, with distinct names. Raises ConfigurationError."""
    known = {name: TrainingArm(name, name) for name in METHODS} | CONTROLS
    if unknown := [name for name in names if name not in known]:
        raise ConfigurationError(
            f"--methods: unknown {unknown[0]!r}{nearest(unknown[0], known)}; there are {', '.join(known)}"
        )
    arms = [known[name] for name in names] + [arm for text in given for arm in _given(text)]
    every = [arm.name for arm in arms]
    if twice := [name for name in every if every.count(name) > 1]:
        raise ConfigurationError(f"--methods and --arms: {twice[0]!r} is named twice; rename one")
    if not arms:
        raise ConfigurationError("--methods: empty; name at least one method, as in --methods kvpo,nft")
    return arms


def _given(text: str) -> list[TrainingArm]:
    """The arms of a YAML file, or the single arm of ``NAME:setting=value,setting=value``."""
    name, colon, settings = text.partition(":")
    if not colon:
        if not Path(text).is_file():
            raise ConfigurationError(f"--arms: {text!r} is neither NAME:setting=value,... nor a YAML file")
        arms = [_arm(name, own) for name, own in read_settings(Path(text)).items()]
        if not arms:
            raise ConfigurationError(f"--arms: {text} holds no arm, such as P3: {{optim.lr: 1e-3}}")
        return arms
    pairs = [pair.partition("=") for pair in re.split(r",(?=[\w.]+=)", settings)]
    if not all(path and equals for path, equals, _ in pairs):
        raise ConfigurationError(f"--arms: {text!r}; write NAME:setting=value,setting=value or a YAML file")
    with _named("--arms", name):
        changes = parse_flags({path.strip(): value.strip() for path, _, value in pairs})
    return [_arm(name, changes)]


@contextmanager
def _named(flag: str, arm: str) -> Iterator[None]:
    """Name the flag and the arm in a ConfigurationError that the block raises."""
    try:
        yield
    except ConfigurationError as error:
        raise ConfigurationError(f"{flag}: {arm}: {error}") from error


def _arm(name: str, settings: Any) -> TrainingArm:
    if not re.fullmatch(r"[\w.+-]+", name):
        raise ConfigurationError(f"--arms: {name!r} names files: use letters, digits and . + - _ only")
    if not isinstance(settings, Mapping):
        raise ConfigurationError(f"--arms: {name} must have settings, as in {name}:optim.lr=1e-3")
    changes = flat(settings)
    if shared := [path for path in changes if {path, path.partition(".")[0]} & SHARED]:
        raise ConfigurationError(
            f"--arms: {name}: {shared[0]} is the same for all arms, or their tests could not be "
            "compared; leave it out here"
        )
    method = str(changes.pop("method", "kvpo"))
    if method not in METHODS:
        raise ConfigurationError(f"--arms: {name}: no method {method!r}{nearest(method, METHODS)}")
    if name == method:
        raise ConfigurationError(f"--arms: {name!r} is the name of a method; give the arm another")
    return TrainingArm(name, method, changes)


def configured(start: Config, arm: TrainingArm, tuned: Mapping[str, Any], seed: int) -> Config:
    """The configuration of an arm's run.

    It combines the comparison's settings, the method's, those that trials chose and the arm's own changes;
    later ones win. Raises ConfigurationError if they contradict each other.
    """
    ours = {"seed": seed, "threads": 1, "optim.updates": MOST_UPDATES, "evaluation.every": 0}
    with _named("--methods" if arm.tuned or arm.name in CONTROLS else "--arms", arm.name):
        config = assign(_start_of(start, arm.method), {**tuned, **arm.changes, **ours})
        check(config)
    return config


def _start_of(start: Config, method: str) -> Config:
    """The comparison's configuration with another method and the settings that method starts from."""
    return start if method in (start.method, PRETRAINING) else with_method(start, method)


def grid(start: Config, method: str) -> dict[str, Sequence[Any]]:
    """Settings to tune for a method, with the values to try: the shared ones and its own."""
    rewarded = method in METHODS and METHODS[method].rewarded
    rates = {"optim.lr": [factor * start.optim.lr for factor in (RATES if rewarded else RATES_ALONE)]}
    if not rewarded:
        return rates | OWN.get(method, {})
    blocks, weight = start.exploration.blocks, _start_of(start, method).objective.velocity_kl
    shared = {
        "objective.keep": ((2, 2), (0, 0)),
        "exploration.blocks": (blocks, blocks + 1),
        "objective.velocity_kl": (0.0, weight / 4, weight),
    }
    return rates | shared | OWN.get(method, {})


def trials(start: Config, arm: TrainingArm, count: int) -> list[dict[str, Any]]:
    """Settings to try for a method: its defaults, then distinct points of its grid, drawn by its name.

    Combinations that the configuration refuses are skipped; a small grid gives fewer than ``count``.
    """
    tried = grid(start, arm.method)
    every = [dict(zip(tried, values, strict=True)) for values in product(*tried.values())]
    order = torch.randperm(len(every), generator=keyed_generator("tuning", arm.method)).tolist()
    found: list[dict[str, Any]] = [{}]
    configs = [configured(start, arm, {}, TRIAL_SEED)]
    for settings in (every[n] for n in order):
        if len(found) >= count:
            break
        try:
            config = configured(start, arm, settings, TRIAL_SEED)
        except ConfigurationError:
            continue
        if config not in configs:
            found.append(settings)
            configs.append(config)
    return found
