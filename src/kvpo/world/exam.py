"""A pass/fail exam: counts the caption demands that the likeliest reading of the pixels meets."""

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
"""Event -> attributes in which all demands must be met for the event to count as right."""
SUBJECTS = (*JUDGED, *ABOUT)


@dataclass(frozen=True)
class WorldExam:
    """Counts each clip's demands: those met under the subject's name, all under "asked" and the name.

    A clip shows the value that is likeliest over its frames. An attribute that a caption leaves open is not
    demanded; an event is not counted if its caption leaves open everything that the event is about.
    """

    components: tuple[str, ...] = (*SUBJECTS, *(f"asked {subject}" for subject in SUBJECTS))

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]; clips must begin with their segment. Raises ValueError as the world's rewards."""
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
