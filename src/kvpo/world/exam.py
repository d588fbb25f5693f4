"""Right or wrong: the demands of captions that the likeliest reading of the pixels meets, counted."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.world.detector import Detection, detect
from kvpo.world.grammar import event_of
from kvpo.world.requests import as_tensors, assign_slots, memberships, read_caption

JUDGED = ("colour", "shape", "motion", "count", "scene")
ABOUT = {
    "return": ("colour", "shape"),
    "revisit": ("scene",),
    "recolour": ("colour",),
    "leave": ("count", "colour", "shape"),
}
"""Attributes in which all demands must be met where a caption tells of an event."""
SUBJECTS = (*JUDGED, *ABOUT)


@dataclass(frozen=True)
class WorldExam:
    """Counts the demands of each clip: those met by every subject's name, then all by "asked" and its name.

    What a clip shows is the value that is likeliest over its frames. A caption that leaves an attribute open
    demands nothing of it: one of an event that leaves open all that the event is about is not counted.
    """

    components: tuple[str, ...] = (*SUBJECTS, *(f"asked {subject}" for subject in SUBJECTS))

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]; the clips must begin with their segment. ValueError as the world's rewards."""
        met, asked = _attributes(detect(video_BTCHW), prompts)
        events = [event_of(str(prompt)) for prompt in prompts]
        for event, kinds in ABOUT.items():
            demands_B = torch.stack([asked[kind] for kind in kinds]).sum(0)
            right_B = torch.stack([met[kind] for kind in kinds]).sum(0) == demands_B
            asked[event] = torch.tensor([own == event for own in events]) & (demands_B > 0)
            met[event] = asked[event] & right_B
        return {kind: met[kind].float() for kind in SUBJECTS} | {
            f"asked {kind}": asked[kind].float() for kind in SUBJECTS
        }


def _attributes(
    seen: Detection, prompts: Sequence[ClipPrompt]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Demands met and demands made by attribute, [B] each."""
    asked = as_tensors([read_caption(str(prompt)) for prompt in prompts])
    every_BT = torch.ones(seen.scene_BTS.shape[:2])
    count_B, scene_B = seen.count_BT2.mean(1).argmax(1), seen.scene_BTS.mean(1).argmax(1)
    slot_BR = assign_slots(seen, asked, every_BT)[torch.arange(len(prompts)), count_B]
    met = {"count": count_B + 1 == asked.actors_B, "scene": scene_B == asked.scene_B}
    made = {"count": torch.ones_like(count_B), "scene": asked.scene_B >= 0}
    for kind, shown_BTLV in memberships(seen).items():
        value_BR = asked.value_BR[kind]
        shown_BR = shown_BTLV.mean(1).argmax(2).gather(1, slot_BR.clamp(min=0))
        met[kind] = ((shown_BR == value_BR) & (slot_BR >= 0) & (value_BR >= 0)).sum(1)
        made[kind] = (value_BR >= 0).sum(1)
    return met, made
