"""Diagnosis of updates that teach nothing, so that a run cannot merely seem to train."""

from collections.abc import Collection, Mapping, Sequence

from torch import Tensor

from kvpo.config import TOTAL, WORLD_NOISE_FLOOR, Config
from kvpo.method.evidence import Credit, Metrics
from kvpo.models.finite import magnitudes

IDLE_UPDATES = 3
"""Updates in a row without a trained group or without a gradient after which to warn."""


def why_nothing_is_learned(
    credits: Collection[Credit], found: Sequence[Metrics], parameters: Mapping[str, Tensor], config: Config
) -> str:
    """Explain, in one sentence, an update without a trained group or whose gradient is zero everywhere.

    Args:
        credits: credits of the groups that were trained on.
        found: exploration metrics of all groups.
        parameters: the trained tensors.
    """
    if not credits:
        spread = max(group["reward_spread"] for group in found)
        if spread == 0:
            return (
                f"the reward ({', '.join(config.rewards.scorers)}) gives every member of a group the same "
                "score; check that it sees these videos and prompts"
            )
        floors = {TOTAL: WORLD_NOISE_FLOOR} | config.rewards.noise_floors
        floors[TOTAL] = floors.pop(TOTAL)  # last: it applies to components without their own
        named = ", ".join(f"{name} = {floor:g}" for name, floor in floors.items())
        return (
            f"every group was skipped, its largest reward spread {spread:.2g} being within the noise floor "
            f"(rewards.noise_floors, {named}); measure the floor with kvpo calibrate, or use a reward that "
            "tells these branches apart"
        )
    if not magnitudes(parameters.values()).any():
        return (
            "all trained tensors are zero, and an adapter whose A and B are both zero has no gradient; start "
            "a fresh one (leave backbone.lora out, or set backbone.lora_start to merge)"
        )
    if not any(bool(credit.advantages_G.any()) for credit in credits):
        return "all advantages are zero; check objective.advantages and the reward"
    return (
        "the gradient of every trained tensor is exactly zero; check that the trained layers "
        "(backbone.lora) reach the output, and the temperature of the method"
    )
