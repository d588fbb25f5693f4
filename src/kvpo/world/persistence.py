"""Persistence: what a clip keeps unchanged within a segment and across a prompt switch.

Axes as in kvpo.world.requests; S scenes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.world.detector import Detection
from kvpo.world.grammar import RECOLOURS, RETURNS, REVISITS, UNNAMED_PLACE
from kvpo.world.requests import (
    Requested,
    as_tensors,
    assign_slots,
    at_slots,
    frame_mean,
    memberships,
    over_slots,
    read_caption,
)
from kvpo.world.vocabulary import MAX_ACTORS, ActorRequest, Request

APPEARANCE = ("colour", "shape", "size")
MEMORY_FRAMES = 6
"""Frames before a switch that define what was visible before it."""


def persistence(
    seen: Detection, asked: Requested, slot_BHR: Tensor, present_BT: Tensor, prompts: Sequence[ClipPrompt]
) -> Tensor:
    """Mean of constancy within the segment and, if something should stay, memory across the switch [B]."""
    inside_B = _constancy(seen, present_BT)
    across_B = _memory(seen, asked, slot_BHR, present_BT, prompts)
    return torch.stack([inside_B, across_B]).nanmean(0)


def _overlap(a: Tensor, b: Tensor) -> Tensor:
    """Sum over the last axis of the smaller membership, at most 1: 1 if both are sure of one value."""
    return torch.minimum(a, b).sum(-1).clamp(max=1)


def _constancy(seen: Detection, weight_BT: Tensor) -> Tensor:
    """Similarity of every frame to the segment's mean: scene, number of actors and their looks [B]."""
    share_BT = weight_BT / weight_BT.sum(1, keepdim=True)

    def segment_mean(value: Tensor) -> Tensor:
        return torch.einsum("bt,bt...->b...", share_BT, value)[:, None]

    scene_BT = _overlap(seen.scene_BTS, segment_mean(seen.scene_BTS))
    count_BTH = torch.minimum(seen.count_BT2, segment_mean(seen.count_BT2))
    looks = [
        _overlap(shown, segment_mean(shown))
        for kind, shown in memberships(seen).items()
        if kind in APPEARANCE
    ]
    actors_BT = (count_BTH * over_slots(torch.stack(looks).mean(0))).sum(2)
    return frame_mean((scene_BT + 2 * actors_BT) / 3, weight_BT)


def _memory(
    seen: Detection, asked: Requested, slot_BHR: Tensor, present_BT: Tensor, prompts: Sequence[ClipPrompt]
) -> Tensor:
    """Faithfulness to what the segment should keep from the previous one [B]; NaN if that is nothing.

    Values that both captions demand must be shown; what this caption leaves open must look as before.
    """
    frame = torch.arange(present_BT.shape[1])
    switch_B1 = torch.tensor([[prompt.switch] for prompt in prompts])
    before_BT = ((frame < switch_B1) & (frame >= switch_B1 - MEMORY_FRAMES)).float()
    share_BT = before_BT / before_BT.sum(1, keepdim=True).clamp(min=1)
    told = [p.before if p.switch > 0 else "" for p in prompts]
    earlier = as_tensors([read_caption(t) if t else Request(None, (ActorRequest(),)) for t in told])
    earlier_slot_BHR = assign_slots(seen, earlier, before_BT)
    stays = [_staying(str(prompt), text) for prompt, text in zip(prompts, told, strict=True)]

    total_B, weight_B = _scene_memory(seen, asked, earlier, share_BT, present_BT, stays)
    source_BR = torch.tensor([s.source for s in stays])
    earlier_BR = source_BR.clamp(min=0)
    for kind, shown_BTLV in memberships(seen).items():
        memory_BRV = _recall(shown_BTLV, seen.count_BT2, earlier_slot_BHR, share_BT)
        value_BR = asked.value_BR[kind]
        both_BR = (value_BR >= 0) & (value_BR == earlier.value_BR[kind].gather(1, earlier_BR))
        open_BR = (value_BR < 0) & torch.tensor([[kind != "colour" or not s.recoloured] for s in stays])
        kept_BR = ((both_BR | open_BR) & (source_BR >= 0)).float()
        index_BRV = earlier_BR[..., None].expand(-1, -1, memory_BRV.shape[2])
        target_BRV = _target(value_BR, both_BR, memory_BRV.gather(1, index_BRV))
        overlap_BTLR = _overlap(shown_BTLV[:, :, :, None], target_BRV[:, None, None])
        score_BT = (at_slots(overlap_BTLR, slot_BHR) * kept_BR[:, None, None]).sum(3)
        # The step into the segment belongs to neither motion.
        frames_BT = present_BT * (frame > switch_B1) if kind == "motion" else present_BT
        judged_B = frames_BT.sum(1) > 0
        total_B = total_B + frame_mean((score_BT * seen.count_BT2).sum(2), frames_BT).where(judged_B, 0.0)
        weight_B = weight_B + kept_BR.sum(1) * judged_B
    return total_B / weight_B.where(weight_B > 0, torch.nan)


def _scene_memory(
    seen: Detection,
    asked: Requested,
    earlier: Requested,
    share_BT: Tensor,
    present_BT: Tensor,
    stays: Sequence["_Staying"],
) -> tuple[Tensor, Tensor]:
    """The scene's contribution to memory and its weight (0 or 1), both [B]."""
    both_B = (asked.scene_B >= 0) & (asked.scene_B == earlier.scene_B)
    open_B = (asked.scene_B < 0) & torch.tensor([s.scene for s in stays])
    memory_BS = torch.einsum("bt,bts->bs", share_BT, seen.scene_BTS)
    target_BS = _target(asked.scene_B, both_B, memory_BS)
    weight_B = (both_B | open_B).float()
    return weight_B * frame_mean(_overlap(seen.scene_BTS, target_BS[:, None]), present_BT), weight_B


def _target(value: Tensor, both: Tensor, memory: Tensor) -> Tensor:
    """Values that should be shown [..., V]: those that both captions demand, or else the remembered ones."""
    one_hot = F.one_hot(value.clamp(min=0), memory.shape[-1]).to(memory)
    return torch.where(both[..., None], one_hot, memory)


def _recall(shown_BTLV: Tensor, count_BTH: Tensor, slot_BHR: Tensor, share_BT: Tensor) -> Tensor:
    """Mean membership before the switch of the actor that played each earlier request [B, R, V]."""
    frames, values = shown_BTLV.shape[1], shown_BTLV.shape[3]
    index_BTMV = slot_BHR.clamp(min=0).flatten(1)[:, None, :, None].expand(-1, frames, -1, values)
    shown_BTHRV = shown_BTLV.gather(2, index_BTMV).unflatten(2, slot_BHR.shape[1:])
    weight_BTHR = (share_BT[..., None] * count_BTH)[..., None] * (slot_BHR >= 0)[:, None]
    total_BRV = (shown_BTHRV * weight_BTHR[..., None]).sum((1, 2))
    # An actor that was hardly visible leaves no memory to compare with.
    return total_BRV / weight_BTHR.sum((1, 2)).clamp(min=0.25)[..., None]


@dataclass(frozen=True)
class _Staying:
    """Attributes that a caption keeps from the previous one."""

    scene: bool
    """True if an unnamed scene is the previous one."""
    source: tuple[int, ...]
    """Index of each actor in the previous caption, -1 if it is not there."""
    recoloured: bool
    """True if an unnamed colour is a new one."""


@lru_cache(maxsize=8192)
def _staying(caption: str, before: str) -> _Staying:
    """Match actors across captions: both name its shape, or it is unnamed and the previous one has just one.

    Returns and revisits reach back beyond the previous segment, so what they leave unnamed is not judged.
    """
    if not before:
        return _Staying(False, (-1,) * MAX_ACTORS, False)
    text = caption.lower()
    returns, revisits, unnamed_place, recolours = (
        any(phrase in text for phrase in phrases) for phrases in (RETURNS, REVISITS, UNNAMED_PLACE, RECOLOURS)
    )
    earlier = read_caption(before).actors
    shapes = [actor.shape for actor in earlier if actor.shape is not None]
    source = []
    for actor in read_caption(caption).actors:
        unnamed = (actor.colour, actor.shape, actor.size) == (None, None, None)
        if actor.shape in shapes:
            source.append([other.shape for other in earlier].index(actor.shape))
        else:
            source.append(0 if unnamed and len(earlier) == 1 and not (returns or revisits) else -1)
    padding = (-1,) * (MAX_ACTORS - len(source))
    return _Staying(not revisits and not unnamed_place, (*source, *padding), recolours)
