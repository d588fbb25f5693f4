"""Why updates teach nothing: said on the console, where a run would otherwise pass for one that trains."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kvpo.config import Config
from kvpo.method.diagnostics import GroupDiagnostics
from kvpo.models.finite import magnitudes
from kvpo.training.gradients import Trained

PATIENCE = 3
"""Updates in a row without a trained group or without a gradient, from which it is worth a warning."""


def why_nothing_is_learned(
    trained: Sequence[Trained],
    found: Sequence[GroupDiagnostics],
    parameters: Mapping[str, Tensor],
    config: Config,
) -> str:
    """One sentence for an update without a trained group, or with a gradient that is zero everywhere.

    Args:
        trained: the groups that were trained on.
        found: what exploration found in all groups.
        parameters: the trained tensors.
    """
    if not trained:
        spread = max(group.reward_spread for group in found)
        if spread == 0:
            return (
                f"the reward ({', '.join(config.rewards.scorers)}) gives every member of a group the same "
                "score; check that it sees these videos and prompts"
            )
        return (
            f"every group was skipped, its largest reward spread {spread:.2g} being within the noise floor "
            f"(objective.noise_floor = {config.objective.noise_floor:g}, rewards.noise_floors); measure the "
            "floor with kvpo calibrate, or use a reward that tells these branches apart"
        )
    if not magnitudes(parameters.values()).any():
        return (
            "all trained tensors are zero, and an adapter whose A and B are both zero has no gradient; start "
            "a fresh one (leave backbone.lora out, or set backbone.lora_start to merge)"
        )
    if not any(bool(item.credit.advantages_G.any()) for item in trained):
        return "all advantages are zero; check objective.advantages and the reward"
    return (
        "the gradient of every trained tensor is exactly zero; check that the trained layers "
        "(optim.lora_targets, backbone.lora) reach the output, and objective.temperature"
    )
