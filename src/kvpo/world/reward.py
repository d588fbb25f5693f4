"""Verifiable rewards of the embedded world, measured on pixels: prompt following, persistence, clarity, calm.

Content is judged separately from clarity: a demand scores the probability of its value among all values of
the attribute, and an attribute that cannot be made out may have any of them. So a sharper picture of the
wrong thing earns nothing; ``clarity`` is rewarded by itself. All components are continuous, lie in [0, 1] and
are higher-is-better. Axes as in kvpo.world.requests.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards.sampling import checked_batch
from kvpo.world.detector import SLOT_LANES, Detection, detect, torus_difference
from kvpo.world.persistence import persistence
from kvpo.world.requests import (
    Requested,
    as_tensors,
    assign_slots,
    at_slots,
    demanded,
    frame_mean,
    over_slots,
    read_caption,
)
from kvpo.world.vocabulary import BOB_PERIOD, MAX_ACTORS, SPEED

DEFAULT_WEIGHTS = {
    "colour": 0.24,
    "shape": 0.22,
    "scene": 0.05,
    "count": 0.08,
    "motion": 0.22,
    "persistence": 0.08,
    "clarity": 0.03,
    "smoothness": 0.04,
    "no_flicker": 0.04,
}
"""Weights of the total; the first five, 0.81 together, are prompt following."""

DOUBT = 0.2
"""Summed membership at which an attribute counts as half made out."""

CLEAR = 0.9
"""Confidence of the clearest pictures."""
JERK_WIDTH = 1.5
"""Units of unexpected second difference at which smoothness falls to a half."""
CALM_WIDTH = 0.25
"""Relative change of brightness at which calm falls to 1/e."""
SETTLING_FRAMES = 4
"""Frames an actor may take to reach its new height when the number of actors changes."""
FROZEN = 0.25
"""Factor on the calm components of a video that lacks the requested movement."""


@dataclass(frozen=True)
class WorldScorer:
    """Scores clips [B, T, 3, H, W] of the embedded world against captions of its grammar.

    Frames before a prompt's ``switch`` show the previous segment; they serve as memory only. A component with
    nothing to judge in a clip (a caption that leaves every colour open, a clip of one frame) takes the
    mean of the clip's other components, so that it is neutral.
    """

    components: tuple[str, ...] = tuple(DEFAULT_WEIGHTS)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        """Component -> [B]; ValueError for a caption outside the grammar or a switch outside the clip."""
        checked_batch(video_BTCHW, prompts, 1)
        scores = score_detection(detect(video_BTCHW), prompts)
        return {name: scores[name] for name in self.components}


def weighted_total(scores: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Sum over components of weight times score, [B]."""
    return torch.stack([weight * scores[name] for name, weight in weights.items()]).sum(0)


def score_detection(seen: Detection, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
    """Score clips that have been detected already: all components, [B] each. Raises as `WorldScorer`."""
    frames = seen.scene_BTS.shape[1]
    for index, prompt in enumerate(prompts):
        if not 0 <= prompt.switch < frames:
            raise ValueError(
                f"prompt {index} switches at frame {prompt.switch} of a clip of {frames} frames: "
                f"the clip must hold at least one frame of the segment it is scored against"
            )
    switch_B1 = torch.tensor([[prompt.switch] for prompt in prompts])
    present_BT = (torch.arange(frames) >= switch_B1).float()
    # Steps between frames of the segment, counted at their second frame.
    step_BT = (torch.arange(frames) > switch_B1).float()
    asked = as_tensors([read_caption(str(prompt)) for prompt in prompts])
    clarity_B = (frame_mean(seen.confidence_BT, present_BT) / CLEAR).clamp(max=1)
    seen = made_out(seen)
    likely = likeliest(seen)
    slot_BHR = assign_slots(seen, asked, present_BT)
    settled_BT = _settled(step_BT, asked, prompts)
    lively_B = _liveliness(seen, asked, slot_BHR, step_BT)
    scores = {
        "colour": _following(likely, asked, slot_BHR, present_BT, ("colour",)),
        "shape": _following(likely, asked, slot_BHR, present_BT, ("shape", "size")),
        "scene": _scene_following(likely, asked, present_BT),
        "count": _count_following(likely, asked, present_BT),
        "motion": _following(likely, asked, slot_BHR, settled_BT, ("motion",)),
        "persistence": persistence(seen, asked, slot_BHR, present_BT, prompts) * lively_B,
        "clarity": clarity_B,
        "smoothness": _smoothness(seen, settled_BT) * lively_B,
        "no_flicker": _no_flicker(seen, step_BT) * lively_B,
    }
    table_BK = torch.stack([scores[name] for name in DEFAULT_WEIGHTS], 1)
    table_BK = torch.where(table_BK.isnan(), table_BK.nanmean(1, keepdim=True), table_BK)
    return dict(zip(DEFAULT_WEIGHTS, table_BK.unbind(1), strict=True))


def made_out(seen: Detection) -> Detection:
    """Convert memberships to shares among an attribute's values, smaller where no value is clear.

    The shares add up to t^2 / (t^2 + DOUBT^2), where t is the sum of the memberships.
    """

    def share(member: Tensor) -> Tensor:
        total = member.sum(-1, keepdim=True)
        return member * total / (total.square() + DOUBT**2)

    return _changed(seen, share)


def likeliest(seen: Detection) -> Detection:
    """Convert shares to probabilities: what they lack to a sum of 1 is spread evenly over all V values."""
    return _changed(seen, lambda share: share + (1 - share.sum(-1, keepdim=True)) / share.shape[-1])


def _changed(seen: Detection, change: Callable[[Tensor], Tensor]) -> Detection:
    """Apply ``change`` to the memberships ``[..., V]``; shapes and sizes are probabilities already."""
    return replace(
        seen,
        scene_BTS=change(seen.scene_BTS),
        count_BT2=change(seen.count_BT2),
        colour_BTLC=change(seen.colour_BTLC),
        motion_BTLM=change(seen.motion_BTLM),
    )


def _following(
    seen: Detection, asked: Requested, slot_BHR: Tensor, weight_BT: Tensor, kinds: tuple[str, ...]
) -> Tensor:
    """Share of the demands that is shown, mean over frames and demands [B]; NaN without a demand."""
    score_BT, demands_B = torch.zeros_like(weight_BT), torch.zeros(weight_BT.shape[0])
    for kind in kinds:
        shown_BTLR, wanted_BR = demanded(seen, asked, kind)
        shown_BTHR = at_slots(shown_BTLR, slot_BHR) * wanted_BR[:, None, None]
        score_BT = score_BT + (shown_BTHR.sum(3) * seen.count_BT2).sum(2)
        demands_B = demands_B + wanted_BR.sum(1)
    return frame_mean(score_BT, weight_BT) / demands_B.where(demands_B > 0, torch.nan)


def _scene_following(seen: Detection, asked: Requested, weight_BT: Tensor) -> Tensor:
    index_BT1 = asked.scene_B.clamp(min=0)[:, None, None].expand(*weight_BT.shape, 1)
    shown_BT = seen.scene_BTS.gather(2, index_BT1)[..., 0]
    return torch.where(asked.scene_B >= 0, frame_mean(shown_BT, weight_BT), torch.nan)


def _count_following(seen: Detection, asked: Requested, weight_BT: Tensor) -> Tensor:
    index_BT1 = (asked.actors_B - 1)[:, None, None].expand(*weight_BT.shape, 1)
    return frame_mean(seen.count_BT2.gather(2, index_BT1)[..., 0], weight_BT)


def _settled(step_BT: Tensor, asked: Requested, prompts: Sequence[ClipPrompt]) -> Tensor:
    """``step_BT`` without the first steps after a change in the number of actors, if enough steps remain.

    An actor that stays while another joins or leaves glides to its new height first.
    """
    crowds = [len(read_caption(p.before).actors) if p.before and p.switch else -1 for p in prompts]
    before_B = torch.tensor(crowds)
    changes_B = (before_B > 0) & (before_B != asked.actors_B)
    settled_BT = step_BT * (step_BT.cumsum(1) > SETTLING_FRAMES)
    return torch.where((changes_B & (settled_BT.sum(1) >= 3))[:, None], settled_BT, step_BT)


def _liveliness(seen: Detection, asked: Requested, slot_BHR: Tensor, step_BT: Tensor) -> Tensor:
    """Factor on the calm components [B]: a frozen video's calm is worth little if movement is requested.

    Compares the distance an actor covers per frame, in any direction, with the world's speed, which is also
    the mean speed of bobbing. The factor is 1 for anything that moves; only frozen actors lower it.
    """
    if step_BT.shape[1] < 2:
        return torch.ones(step_BT.shape[0])
    distance_BTL = torus_difference(seen.centre_BTL2).norm(dim=3).clamp(max=2 * SPEED)
    distance_BTHR = at_slots(distance_BTL[..., None].expand(-1, -1, -1, MAX_ACTORS), slot_BHR)
    weight_BTH = seen.count_BT2[:, 1:] * step_BT[:, 1:, None]
    played_BTHR = weight_BTH[..., None] * (slot_BHR >= 0)[:, None]
    speed_BR = (distance_BTHR * played_BTHR).sum((1, 2)) / played_BTHR.sum((1, 2)).clamp(min=1e-3)
    # A few bobbing steps can be slower than the mean: four fifths of the speed are enough.
    lively_BR = (speed_BR / (0.8 * SPEED)).clamp(max=1)
    lively_B = (lively_BR * asked.moving_BR).sum(1) / asked.moving_BR.sum(1).clamp(min=1)
    judged_B = asked.moving_BR.any(1) & (step_BT.sum(1) > 0)
    return torch.where(judged_B, FROZEN + (1 - FROZEN) * lively_B, 1.0)


def _smoothness(seen: Detection, step_BT: Tensor) -> Tensor:
    """Calm of the actors' paths [B]: no bends that neither gliding nor bobbing explains; NaN if too short."""
    if step_BT.shape[1] < 3:
        return torch.full(step_BT.shape[:1], torch.nan)
    step_BTL2 = torus_difference(seen.centre_BTL2)
    bend_x, bend_y = (step_BTL2[:, 1:] - step_BTL2[:, :-1]).unbind(3)
    # Bobbing is harmonic: its second difference is proportional to the height above the lane.
    stiffness = 2 - 2 * torch.cos(torch.tensor(2 * torch.pi / BOB_PERIOD))
    swing_y = bend_y + stiffness * (seen.centre_BTL2[:, 1:-1, :, 1] - torch.tensor(SLOT_LANES))
    calm = []
    for residual_y in (bend_y, swing_y):
        calm_BTL = 1 / (1 + (bend_x.square() + residual_y.square()) / JERK_WIDTH**2)
        calm_BT = (over_slots(calm_BTL) * seen.count_BT2[:, 1:-1]).sum(2)
        calm.append(frame_mean(calm_BT, step_BT[:, 1:-1] * step_BT[:, 2:]))
    return torch.maximum(*calm)


def _no_flicker(seen: Detection, step_BT: Tensor) -> Tensor:
    """Calm of the brightness of background and actors from frame to frame [B]; NaN for a single frame."""
    if step_BT.shape[1] < 2:
        return torch.full(step_BT.shape[:1], torch.nan)
    background_BT = _steadiness(seen.background_BT) * seen.scene_BTS[:, 1:].amax(2)
    actors_BT = (over_slots(_steadiness(seen.brightness_BTL)) * seen.count_BT2[:, 1:]).sum(2)
    return frame_mean((background_BT + actors_BT) / 2, step_BT[:, 1:])


def _steadiness(light: Tensor) -> Tensor:
    """Steadiness of a brightness [B, T, ...], relative to itself, from each frame to the next."""
    change = (light[:, 1:] - light[:, :-1]).abs() / ((light[:, 1:] + light[:, :-1]) / 2 + 0.02)
    return (-change / CALM_WIDTH).exp()
