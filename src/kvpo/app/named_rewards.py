"""Rewards by name: ids of the catalogue, "world", package.module:function, or preference:FILE.

``NAME@http://HOST:PORT`` is a reward on a server (``kvpo reward-server``), ``NAME@http://A,http://B`` one on
several servers that share its clips. ``NAME@openai:URL#MODEL`` is a judge: a vision-language model that
answers the rubric of ``NAME.rubric``.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.files import named_list
from kvpo.models.tensor_files import fingerprint
from kvpo.prompts import ClipPrompt
from kvpo.rewards.catalogue import (
    COMPARED,
    DECLARATIONS,
    FAMILIES,
    FRAME_REWARDS,
    REWARD_IDS,
    SD,
    VIDEOALIGN_SAMPLING,
    load_rewards,
)
from kvpo.rewards.preference import (
    Features,
    PreferenceScorer,
    ScorerFeatures,
    load_preference,
    pixel_features,
)
from kvpo.rewards.protocol import JUDGES, Declaration
from kvpo.rewards.reward import Reward
from kvpo.rewards.service.messages import TOKEN_VARIABLE

WORLD = "world"
PREFERENCE = "preference:"
FILE_RATE = VIDEOALIGN_SAMPLING.rate
"""Frame rate of the clips that self-sampling scorers receive: files are sampled when they are read."""


@dataclass(frozen=True)
class UserReward:
    """A user-defined reward: maps clips and prompts to one score each, or to named components of one each."""

    name: str
    components: tuple[str, ...]
    function: Callable[[Tensor, Sequence[ClipPrompt]], Any]

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> scores as tensors. Raises ValueError if the function fails or changes its clips."""
        before = _changes(video_BTCHW)
        with _users_code(f"reward {self.name!r}"):
            try:
                result = self.function(video_BTCHW, prompts)
                scores = result if isinstance(result, Mapping) else {self.components[0]: result}
                found = {component: _plain(values) for component, values in scores.items()}
            except (Exception, SystemExit) as error:  # somebody else's code may raise anything
                raise ValueError(f"reward {self.name!r} failed: {type(error).__name__}: {error}") from error
        # Other clips share these frames, and copying each clip could cost more than the reward itself.
        if _changes(video_BTCHW) != before:
            raise ValueError(
                f"reward {self.name!r} changed the clips it was given; let it change a copy: video.clone()"
            )
        if not found.keys() >= set(self.components):
            raise ValueError(
                f"reward {self.name!r} returned {named_list(found)} where {named_list(self.components)} was "
                "declared; give it an attribute `components` with the names of what it returns"
            )
        return found


def _plain(values: Any) -> Tensor:
    """Scores as a dense tensor. Raises ValueError if they are None, complex, or on the meta device."""
    if values is None:  # a forgotten return; torch would speak of dtypes
        raise ValueError("it returned None instead of scores")
    scores = torch.as_tensor(values)
    if scores.is_complex() or scores.is_meta:
        raise ValueError(f"its scores are {'complex' if scores.is_complex() else 'without content (meta)'}")
    return scores.to_dense()


def _changes(tensor: Tensor) -> int:
    """Number of in-place changes of a tensor or the one it is a view of, as far as torch counts them."""
    return 0 if tensor.is_inference() else tensor._version


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return ""


_PROCESS_WIDE: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "torch's default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "torch's default device": (torch.get_default_device, torch.set_default_device),
    "torch's number of threads": (torch.get_num_threads, torch.set_num_threads),
    "torch's deterministic algorithms": (
        torch.are_deterministic_algorithms_enabled,
        torch.use_deterministic_algorithms,
    ),
    "the working directory": (_directory, os.chdir),
}


@contextmanager
def _users_code(whose: str) -> Iterator[None]:
    """Refuse user code that changes process-wide settings, which all threads share.

    The settings are restored. So is the gradient mode, but changing it is no error: it is local to this
    thread.

    Raises:
        ConfigurationError: names what was changed.
    """
    before = {what: read() for what, (read, _) in _PROCESS_WIDE.items()}
    with torch.set_grad_enabled(torch.is_grad_enabled()):
        try:
            yield
        finally:
            found = {what: read() for what, (read, _) in _PROCESS_WIDE.items()}
            changed = [what for what in before if found[what] != before[what]]
            for what in changed:
                _PROCESS_WIDE[what][1](before[what])
    if changed:
        what = changed[0]
        raise ConfigurationError(
            f"{whose} changed {what} from {before[what]} to {found[what]}, for everything that runs in this "
            "process; have it name what it needs where it needs it (dtype=..., device=..., full paths)"
        )


def reach_servers(config: Config) -> None:
    """Check the names of a run's rewards, and that the servers they name can be reached.

    For commands that load much before their rewards; the servers may be loading theirs meanwhile. Raises
    ValueError for an unknown name, or a server that cannot be used.
    """
    located = []
    for field, names in (
        ("rewards.scorers", config.rewards.scorers), ("evaluation.watchers", config.evaluation.watchers)
    ):  # fmt: skip
        own = [split_location(name) for name in names]
        if own:
            _check_names(own, True, field)
        located += own
    for url in dict.fromkeys(url for _, url in located if url is not None and not url.startswith(JUDGES)):
        from kvpo.rewards.service.client import reach

        for one in url.split(","):
            reach(one, [name for name, its in located if its == url], token=os.environ.get(TOKEN_VARIABLE))


def named_rewards(
    names: Sequence[str],
    sources: Mapping[str, str] | None = None,
    *,
    prompts: bool,
    field: str = "--reward",
    frame_rate: float = FILE_RATE,
    top_share: float = 1.0,
    device: str = "cpu",
) -> list[Reward]:
    """Load the rewards of ``names`` in order; catalogue ids that share a model share a scorer.

    Args:
        sources: where parts of catalogue rewards are, by ``id.part``.
        prompts: whether prompts were given; rewards that read them are refused otherwise.
        field: the setting or flag that gave the names, for messages.
        frame_rate: frames per second of the clips that will be scored.
        top_share: share of a clip's frames, best first, that per-frame rewards average.

    Raises:
        ConfigurationError: unknown or repeated names, or prompts that are needed but not given.
        ValueError: a part of a reward cannot be found or does not fit, a server does not answer.
    """
    located = [split_location(name) for name in names]
    _check_names(located, prompts, field)
    here = [name for name, url in located if url is None and name in REWARD_IDS]
    judges = {name for name, url in located if url is not None and url.startswith(JUDGES)}
    sources = dict(sources or {})
    rubrics = {name: sources.pop(f"{name}.rubric", None) for name in judges}
    loaded = load_rewards(here, sources, frame_rate=frame_rate, top_share=top_share, device=device)
    found = {reward.name: reward for reward in loaded}
    rewards: list[Reward] = []
    for name, url in located:
        if url is not None and name in judges:
            rewards.append(_judge(name, url, rubrics[name], field))
        elif url is not None:
            together = [other for other, its in located if its == url and _share_a_model(name, other)]
            if together[0] == name:
                rewards.append(_remote(together, url, field, frame_rate, top_share))
        elif name == WORLD:
            rewards.append(_world())
        elif name in found:
            rewards.append(found[name])
        elif name.startswith(PREFERENCE):
            rewards.append(_preference(name, field, prompts, frame_rate, device))
        elif name not in REWARD_IDS:
            rewards.append(_users_own(name, field))
    return rewards


def _check_names(located: Sequence[tuple[str, str | None]], prompts: bool, field: str) -> None:
    plain = [name for name, _ in located]
    if not plain or len(set(plain)) < len(plain):
        raise ConfigurationError(f"{field}: name every reward once, got {', '.join(plain) or 'none'}")
    for name in (name for name, url in located if url is None):
        if name not in REWARD_IDS and name != WORLD and ":" not in name:
            raise ConfigurationError(
                f"{field}: unknown reward {name!r}; there are {', '.join(REWARD_IDS)}, {WORLD}, "
                "your own as package.module:function, one learned from votes as preference:FILE, and any of "
                "a server as NAME@http://HOST:PORT; NAME@openai:URL#MODEL is a judge with a rubric"
            )
    readers = [n for n in plain if n == WORLD or n in DECLARATIONS and DECLARATIONS[n].reads_prompt]
    if readers and not prompts:
        verb = "reads" if len(readers) == 1 else "read"
        raise ConfigurationError(f"{field}: {', '.join(readers)} {verb} the prompt: give --prompts FILE")


def split_location(name: str) -> tuple[str, str | None]:
    """Split ``NAME@http://HOST:PORT,...`` into reward and server addresses; None for a name alone."""
    plain, at, url = name.partition("@")
    return (plain, url) if at else (name, None)


def sources_of(names: Sequence[str], sources: Mapping[str, str]) -> dict[str, str]:
    """The entries of ``sources``, by ``id.part``, that belong to these rewards."""
    own = [split_location(name)[0] for name in names]
    return {part: at for part, at in sources.items() if part.rpartition(".")[0] in own}


def _share_a_model(one: str, other: str) -> bool:
    return one == other or any(one in family.ids and other in family.ids for family in FAMILIES)


def _remote(names: Sequence[str], url: str, field: str, frame_rate: float, top_share: float) -> Reward:
    """Rewards that share a model on a server."""
    if top_share != 1 and names[0] in FRAME_REWARDS:
        raise ConfigurationError(
            f"{field}: a server averages all frames of a clip, and the best {top_share:g} of them are asked "
            f"for; set top_share to 1, or have {names[0]} score in this process"
        )
    from kvpo.rewards.service.pool import connect_all

    scorer = connect_all(url.split(","), names, token=os.environ.get(TOKEN_VARIABLE))
    samplings = [(one.name, one.sampling) for one in scorer.declarations]
    sampled = [name for name, how in samplings if how is not None and how.least < how.most]
    if sampled and scorer.frame_rate != frame_rate:
        raise ConfigurationError(
            f"{field}: {sampled[0]} takes its frames by time, and {url} was started for clips of "
            f"{scorer.frame_rate:g} frames per second; these have {frame_rate:g}: start a server with "
            f"--frame-rate {frame_rate:g}"
        )
    return Reward(names[0], scorer, scorer.declarations)


def _judge(name: str, place: str, rubric: str | None, field: str) -> Reward:
    if rubric is None:
        raise ConfigurationError(
            f"{field}: judge {name} needs a rubric: give --source {name}.rubric=FILE "
            f"(in a run: --rewards.sources {name}.rubric=FILE)"
        )
    from kvpo.rewards.service.judge import KEY_VARIABLE, connect_judge, read_rubric

    return connect_judge(name, place, read_rubric(Path(rubric)), key=os.environ.get(KEY_VARIABLE))


def _world() -> Reward:
    from kvpo.world.reward import DEFAULT_WEIGHTS, WorldScorer
    from kvpo.world.vocabulary import FRAME_SIZE

    scorer = WorldScorer()
    declarations = tuple(
        Declaration(name, 0.0, 1.0, True, 3, FRAME_SIZE**2, weight=DEFAULT_WEIGHTS[name])
        for name in scorer.components
    )
    return Reward(WORLD, scorer, declarations, WORLD)


def _preference(name: str, field: str, prompts: bool, frame_rate: float, device: str) -> Reward:
    """A reward learned from votes, with one component named after its file."""
    path = Path(name.removeprefix(PREFERENCE))
    try:
        preference, record = load_preference(path)
    except ValueError as error:
        raise ConfigurationError(f"{field}: {error}") from error
    features, needs = frozen_features(
        record["features"], record["sources"], prompts=prompts, frame_rate=frame_rate, device=device
    )
    scorer = PreferenceScorer((path.stem,), features, preference)
    declaration = replace(needs, name=path.stem, low=-inf, high=inf, weight=1.0, unit=COMPARED)
    looked_at = features.version if isinstance(features, ScorerFeatures) else "pixels"
    version = fingerprint([path], PREFERENCE + looked_at) if looked_at else ""
    return Reward(path.stem, scorer, (declaration,), version)


def frozen_features(
    names: Sequence[str], sources: Mapping[str, str], *, prompts: bool, frame_rate: float, device: str
) -> tuple[Features, Declaration]:
    """The features that a learned reward uses, from these rewards or from pixels, and what they need.

    Raises:
        ConfigurationError: invalid reward names, or rewards that need different frames.
    """
    if not names:
        return pixel_features, Declaration("pixels", -inf, inf, False, 3, SD)
    rewards = named_rewards(
        names, sources, prompts=prompts, field="--features", frame_rate=frame_rate, device=device
    )
    needs = [declaration for reward in rewards for declaration in reward.declarations]
    if len({one.sampling for one in needs}) > 1:
        raise ConfigurationError(f"--features: {', '.join(names)} look at different frames; take one of them")
    common = replace(
        max(needs, key=lambda one: one.min_frames),
        reads_prompt=any(one.reads_prompt for one in needs),
        max_pixels=max(one.max_pixels for one in needs),
    )
    versions = [reward.version for reward in rewards]
    version = " ".join(versions) if all(versions) else ""
    return ScorerFeatures(tuple(reward.scorer for reward in rewards), version), common


def _users_own(name: str, field: str) -> Reward:
    scorer = user_reward(name, field)
    rounds = bool(getattr(scorer.function, "eight_bit", False))
    declarations = tuple(Declaration(c, -inf, inf, False, 1, SD, eight_bit=rounds) for c in scorer.components)
    # Only the author knows what a function's scores depend on: they are cached only if it states a version.
    version = f"{name} {scorer.function.version}" if hasattr(scorer.function, "version") else ""
    file = getattr(sys.modules[name.partition(":")[0]], "__file__", None) or ""
    code = fingerprint([Path(file)]) if Path(file).is_file() else ""
    return Reward(name, scorer, declarations, version, code)


def user_reward(name: str, field: str) -> UserReward:
    """Import a function or scorer object as ``package.module:attribute``, also from the working directory.

    Raises ConfigurationError, beginning with ``field``, if it does not exist or cannot be called.
    """
    module, _, attribute = name.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    with _users_code(f"{field}: importing {module!r}"):
        try:
            content = vars(importlib.import_module(module))
        except (Exception, SystemExit) as error:  # importing runs somebody else's code
            raise ConfigurationError(
                f"{field}: cannot import {module!r}: {type(error).__name__}: {error}"
            ) from error
    if attribute not in content:
        raise ConfigurationError(f"{field}: module {module!r} has no {attribute!r}")
    found = content[attribute]
    if not callable(found):
        raise ConfigurationError(f"{field}: {name!r} is not callable")
    components = found.components if hasattr(found, "components") else (attribute,)
    named = isinstance(components, tuple | list) and components
    if not named or not all(isinstance(component, str) and component for component in components):
        raise ConfigurationError(f"{field}: {name!r}: components must be a list of names, got {components!r}")
    if len(set(components)) < len(components):
        raise ConfigurationError(f"{field}: {name!r}: components must differ, got {components!r}")
    return UserReward(name, tuple(components), found)
