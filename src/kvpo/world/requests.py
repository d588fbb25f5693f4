"""Captions as tensors, and which actor in view plays which request.

Axes: B clips, T frames, L = 3 slots of the detector, R = 2 requested actors, H = 2 hypotheses (one actor in
view, or two), V values of an attribute.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvpo.world.detector import SLOT_LANES, SLOTS_OF_COUNT, Detection
from kvpo.world.grammar import parse
from kvpo.world.vocabulary import COLOURS, MAX_ACTORS, MOTIONS, SCENES, SHAPES, SIZES, ActorRequest, Request

ATTRIBUTES = {"colour": tuple(COLOURS), "shape": SHAPES, "size": tuple(SIZES), "motion": MOTIONS}


@lru_cache(maxsize=8192)
def read_caption(caption: str) -> Request:
    """Parse a caption, with a cache. Raises ValueError for a caption outside the grammar."""
    return parse(caption)


@dataclass(frozen=True)
class Requested:
    """Requests as indices into the vocabulary, -1 where a caption leaves a value open."""

    scene_B: Tensor
    actors_B: Tensor
    """Number of actors asked for; requests beyond it are all -1."""
    value_BR: dict[str, Tensor]
    """Attribute -> the value demanded of each actor."""

    @property
    def moving_BR(self) -> Tensor:
        """True where a request asks for movement."""
        return self.value_BR["motion"] > MOTIONS.index("still")


def as_tensors(requests: Sequence[Request]) -> Requested:
    """Index the requests of B clips."""
    padded = [(*r.actors, *[ActorRequest()] * (MAX_ACTORS - len(r.actors))) for r in requests]
    return Requested(
        scene_B=torch.tensor([_index(tuple(SCENES), r.scene) for r in requests]),
        actors_B=torch.tensor([len(r.actors) for r in requests]),
        value_BR={
            kind: torch.tensor([[_index(values, vars(actor)[kind]) for actor in row] for row in padded])
            for kind, values in ATTRIBUTES.items()
        },
    )


def _index(values: Sequence[str], value: str | None) -> int:
    return -1 if value is None else values.index(value)


def memberships(seen: Detection) -> dict[str, Tensor]:
    """Attribute -> memberships [B, T, L, V] of what every slot shows."""
    return {
        "colour": seen.colour_BTLC,
        "shape": seen.shape_BTLK,
        "size": seen.size_BTLZ,
        "motion": seen.motion_BTLM,
    }


def frame_mean(value_BT: Tensor, weight_BT: Tensor) -> Tensor:
    """Weighted mean over frames [B]; NaN where no frame counts."""
    return (value_BT * weight_BT).sum(1) / weight_BT.sum(1)


def demanded(seen: Detection, asked: Requested, kind: str) -> tuple[Tensor, Tensor]:
    """Degree to which slots meet each demand for one attribute [B, T, L, R]; True if there is one [B, R]."""
    value_BR = asked.value_BR[kind]
    shown_BTLV = memberships(seen)[kind]
    index_BTLR = value_BR.clamp(min=0)[:, None, None, :].expand(*shown_BTLV.shape[:3], -1)
    return shown_BTLV.gather(3, index_BTLR), value_BR >= 0


def assign_slots(seen: Detection, asked: Requested, weight_BT: Tensor) -> Tensor:
    """Slot that best matches each request over the clip under each hypothesis [B, H, R]; -1 for none."""
    total_BLR = torch.zeros(weight_BT.shape[0], len(SLOT_LANES), MAX_ACTORS)
    for kind in ATTRIBUTES:
        shown_BTLR, wanted_BR = demanded(seen, asked, kind)
        total_BLR += (shown_BTLR * weight_BT[:, :, None, None]).sum(1) * wanted_BR[:, None]
    (one,), (upper, lower) = SLOTS_OF_COUNT
    second_B1 = ((total_BLR[:, one, 1] > total_BLR[:, one, 0]) & (asked.actors_B == 2))[:, None]
    straight_B = total_BLR[:, upper, 0] + total_BLR[:, lower, 1]
    crossed_B1 = (total_BLR[:, lower, 0] + total_BLR[:, upper, 1] > straight_B)[:, None]
    single_BR = torch.where(second_B1, torch.tensor([-1, one]), torch.tensor([one, -1]))
    double_BR = torch.where(crossed_B1, torch.tensor([lower, upper]), torch.tensor([upper, lower]))
    return torch.stack([single_BR, double_BR], 1)


def at_slots(value_BTLR: Tensor, slot_BHR: Tensor) -> Tensor:
    """Values of each request's slot under each hypothesis [B, T, H, R], 0 if it has none."""
    index_BTHR = slot_BHR.clamp(min=0)[:, None].expand(-1, value_BTLR.shape[1], -1, -1)
    return value_BTLR.gather(2, index_BTHR) * (slot_BHR >= 0)[:, None]


def over_slots(value_BTL: Tensor) -> Tensor:
    """Mean over the slots in use under each hypothesis, [B, T, H]."""
    return torch.stack([value_BTL[:, :, list(slots)].mean(2) for slots in SLOTS_OF_COUNT], 2)
