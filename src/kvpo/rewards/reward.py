"""Rewards as runs and commands use them: named, declared, cached, and offloaded where the run asks for it."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from kvpo.models.offload import on_device
from kvpo.prompts import ClipPrompt
from kvpo.rewards.cache import DIGEST_BYTES, ScoreCache, clip_digest, code_version
from kvpo.rewards.protocol import Declaration, Scorer, checked, start_scoring


@dataclass(frozen=True)
class Reward:
    """A scorer with its name, its declared properties and its cache; itself a scorer."""

    name: str
    """A component's name if components are reported separately; otherwise the name of their sum."""
    scorer: Scorer
    declarations: tuple[Declaration, ...] = ()
    version: str = ""
    """Digest of everything that determines the scores besides clip, prompt and kvpo's code; "" if unknown:
    then nothing is stored on disk."""
    code: str = ""
    """Digest of the file that a user's own scorer is in."""
    cache: ScoreCache | None = None
    """If given, the scorer is called only once for each distinct clip."""
    device: torch.device | str | None = None
    """Device to which the networks are moved from host memory while they score; None: not moved."""

    @property
    def components(self) -> tuple[str, ...]:
        return self.scorer.components

    @property
    def identity(self) -> str:
        """Differs after a change of what the scores depend on, as far as that is known."""
        return f"{self.name} {self.version} {self.code}"

    @property
    def weights(self) -> dict[str, float]:
        """Share of each component in the reward's sum, unless settings say otherwise."""
        return {declaration.name: declaration.weight for declaration in self.declarations}

    def numbers(self) -> dict[str, dict[str, float]]:
        """The numbers that the reward is reported as: name -> weight of each component in it."""
        if self.name in self.components:
            return {component: {component: 1.0} for component in self.components}
        return {self.name.rpartition(":")[2]: self.weights}

    def offloaded(self, device: torch.device | str) -> "Reward":
        """The reward with its networks moved to host memory; unchanged if it has none."""
        networks = list(networks_of(self.scorer))
        for network in networks:
            network.to("cpu")
        return replace(self, device=device) if networks else self

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B] on the CPU; ValueError for missing, misshapen or non-finite scores."""
        return self.begin(video_BTCHW, prompts)()

    def begin(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Callable[[], dict[str, Tensor]]:
        """Start scoring the clips that the cache lacks; the returned function waits for all scores."""
        if self.cache is None:
            return self._ask(video_BTCHW, prompts)
        cache, size = self.cache, len(self.components)
        kept = bool(self.version) and cache.file is not None
        keys = [self._key(video, prompt) for video, prompt in zip(video_BTCHW, prompts, strict=True)]
        first = {key: index for index, key in reversed(list(enumerate(keys)))}
        known = cache.read(list(first), size) if kept else {}
        hits = len(known)
        missing = sorted(index for key, index in first.items() if key not in known)
        unknown_BTCHW = video_BTCHW if len(missing) == len(keys) else video_BTCHW[missing]
        answer = self._ask(unknown_BTCHW, [prompts[index] for index in missing]) if missing else None

        def scores() -> dict[str, Tensor]:
            if answer is not None:
                table = torch.stack(list(answer().values()), 1)
                new = {keys[index]: row for index, row in zip(missing, table.tolist(), strict=True)}
                if kept:
                    cache.write(new)
                known.update(new)
            cache.counts.hits += hits
            cache.counts.misses += len(missing)
            cache.counts.repeats += len(keys) - len(first)
            columns = torch.tensor([known[key] for key in keys]).reshape(len(keys), size).unbind(1)
            return dict(zip(self.components, columns, strict=True))

        return scores

    def _ask(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Callable[[], dict[str, Tensor]]:
        """Start scoring clips, cached or not."""
        answer = start_scoring(self.scorer, video_BTCHW, prompts)

        def scores() -> dict[str, Tensor]:
            networks = networks_of(self.scorer)
            place = nullcontext() if self.device is None else on_device(networks, self.device)
            with torch.no_grad(), place:
                found = answer()
            return {name: checked(name, found, len(prompts)) for name in self.components}

        return scores

    def _key(self, video_TCHW: Tensor, prompt: str) -> bytes:
        version = self.version and f"{self.version} {code_version()}"
        own = json.dumps([version, self.components]).encode()
        return hashlib.blake2b(own + clip_digest(video_TCHW, prompt), digest_size=DIGEST_BYTES).digest()


@dataclass(frozen=True)
class CombinedScorer:
    """Several scorers as one, with all their components in the order of the scorers.

    Raises ValueError if two components have the same name.
    """

    scorers: tuple[Scorer, ...]

    def __post_init__(self) -> None:
        names = self.components
        if twice := [name for name in names if names.count(name) > 1]:
            raise ValueError(
                f"two rewards have a component called {twice[0]!r}; components are {', '.join(names)}"
            )

    @property
    def components(self) -> tuple[str, ...]:
        return tuple(name for scorer in self.scorers for name in scorer.components)

    @property
    def identity(self) -> str:
        """Those of its rewards."""
        return ", ".join(getattr(scorer, "identity", "") for scorer in self.scorers)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]."""
        return self.begin(video_BTCHW, prompts)()

    def begin(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Callable[[], dict[str, Tensor]]:
        """Start scorers in other processes at once; local ones compute while those work."""
        answers = [start_scoring(scorer, video_BTCHW, prompts) for scorer in self.scorers]

        def scores() -> dict[str, Tensor]:
            return {name: values for answer in answers for name, values in answer().items()}

        return scores


def networks_of(value: object) -> Iterator[nn.Module]:
    """The networks among the fields of a dataclass and the arguments of a partial, at any depth."""
    if isinstance(value, nn.Module):
        yield value
    elif is_dataclass(value):
        yield from networks_of([vars(value)[field.name] for field in fields(value)])
    elif isinstance(value, partial):
        yield from networks_of([*value.args, *value.keywords.values()])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from networks_of(item)
