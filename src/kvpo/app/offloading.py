"""Rewards whose networks wait in host memory while nothing is scored."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace

import torch
from torch import Tensor, nn

from kvpo.models.offload import resident
from kvpo.prompts import ClipPrompt
from kvpo.rewards.cache import CachedScorer
from kvpo.rewards.combined import CombinedScorer
from kvpo.rewards.protocol import Scorer


@dataclass(frozen=True)
class VisitingScorer:
    """A scorer whose networks wait in host memory and visit the device while it scores."""

    scorer: Scorer
    components: tuple[str, ...]
    networks: tuple[nn.Module, ...]
    device: torch.device | str

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        with resident(self.networks, self.device):
            return self.scorer(video_BTCHW, prompts)


def visiting(scorer: Scorer, device: torch.device | str) -> Scorer:
    """The scorer with its networks moved to host memory; one without networks as it is."""
    if isinstance(scorer, CombinedScorer):  # one after another, so that the largest decides the memory
        return CombinedScorer(tuple(visiting(one, device) for one in scorer.scorers))
    if isinstance(scorer, CachedScorer):  # what is known already moves nothing
        return replace(scorer, scorer=visiting(scorer.scorer, device))
    networks = tuple(networks_of(scorer))
    for network in networks:
        network.to("cpu")
    return VisitingScorer(scorer, scorer.components, networks, device) if networks else scorer


def networks_of(value: object) -> Iterator[nn.Module]:
    """The networks among the fields of a dataclass, at any depth."""
    if isinstance(value, nn.Module):
        yield value
    elif is_dataclass(value):
        for field in fields(value):
            yield from networks_of(vars(value)[field.name])
    elif isinstance(value, list | tuple):
        for item in value:
            yield from networks_of(item)
