"""Known motion is measured as such."""

import cv2
import pytest
import torch
from tiny_rewards import gliding, texture

from kvpo.rewards.motion import MotionScorer, dis_flow, measured_flow, visibility

GLIDE = gliding(128, 160, 9, 5, 2)


def test_a_shift_of_5_and_2_pixels_is_measured_as_such():
    flow = dis_flow(GLIDE)
    assert flow.shape == (8, 2, 128, 160)
    inner = flow[..., 12:-12, 12:-12]
    assert inner.mean((0, 2, 3)).tolist() == pytest.approx([5.0, 2.0], abs=0.02)
    assert (inner - torch.tensor([5.0, 2.0])[:, None, None]).norm(dim=1).quantile(0.95) < 0.1


@pytest.mark.parametrize("size", [(32, 48), (64, 64), (256, 448), (480, 640)])
def test_flow_is_a_share_of_the_diagonal_at_any_size(size):
    flow = measured_flow(gliding(*size, 2, size[1] // 16, 0), dis_flow)
    expected = (size[1] // 16) / (size[0] ** 2 + size[1] ** 2) ** 0.5
    assert flow[:, 0].median().item() == pytest.approx(expected, rel=0.03)
    assert flow[:, 1].median().item() == pytest.approx(0, abs=0.002)


def test_gliding_is_smooth_shuffled_is_not_frozen_has_no_motion():
    order = torch.tensor([4, 0, 7, 2, 8, 1, 5, 3, 6])
    clips = torch.stack([GLIDE, GLIDE[order], GLIDE[:1].expand(9, -1, -1, -1)])
    scores = MotionScorer()(clips, [""] * 3)
    smooth, motion = scores["motion_smoothness"], scores["dynamic_degree"]
    assert smooth[0] > 0.98 and smooth[1] < 0.5 and smooth[2] == 1
    assert motion[2] == 0 and motion[0] > 0.1 and motion[1] > motion[0]
    diagonal = (128**2 + 160**2) ** 0.5
    assert motion[0].item() == pytest.approx(29**0.5 / (0.15 * diagonal), rel=0.08)


def test_jitter_lowers_smoothness_by_degrees():
    large = texture(200, 200)
    generator = torch.Generator().manual_seed(3)

    def path(jitter: int) -> torch.Tensor:
        steps = torch.randint(-jitter, jitter + 1, (9, 2), generator=generator)
        return torch.stack(
            [
                large[:, 30 + y : 158 + y, 60 - 3 * t + x :][..., :128]
                for t, (x, y) in enumerate(steps.tolist())
            ]
        )

    scores = MotionScorer(("motion_smoothness",))(torch.stack([path(j) for j in (0, 1, 3)]), [""] * 3)
    calm, shaky, wild = scores["motion_smoothness"].tolist()
    assert calm > 0.95 > shaky + 0.05 > wild + 0.15


def test_a_clip_scores_alone_as_in_company():
    other = gliding(128, 160, 9, -3, 1, seed=5)
    together = MotionScorer()(torch.stack([other, GLIDE]), ["", ""])
    alone = MotionScorer()(GLIDE[None], [""])
    assert all(torch.equal(together[name][1:], alone[name]) for name in alone)


def test_only_what_is_asked_for_is_needed():
    assert set(MotionScorer(("dynamic_degree",))(GLIDE[None, :2], [""])) == {"dynamic_degree"}
    with pytest.raises(ValueError, match=r"2 frames, at least 3"):
        MotionScorer(("motion_smoothness",))(GLIDE[None, :2], [""])


def test_a_flow_of_ones_own():
    def constant(video_TCHW: torch.Tensor) -> torch.Tensor:
        return torch.full((len(video_TCHW) - 1, 2, *video_TCHW.shape[-2:]), 3.0)

    scores = MotionScorer(flow=constant)(GLIDE[None], [""])
    assert scores["motion_smoothness"].item() == pytest.approx(1, abs=1e-3)
    expected = 18**0.5 / (0.15 * (128**2 + 160**2) ** 0.5)
    assert scores["dynamic_degree"].item() == pytest.approx(expected, rel=1e-3)


def test_noise_on_flat_ground_is_not_motion():
    generator = torch.Generator().manual_seed(0)
    flat = torch.full((9, 3, 128, 128), 0.4)
    flat[:, :, 40:80, 40:80] = GLIDE[:1, :, 40:80, 40:80]
    noisy = flat + torch.randint(-1, 2, flat.shape, generator=generator) / 255
    assert visibility(noisy)[:, :, 5:30].max() < 0.2 and visibility(noisy)[:, :, 50:70, 50:70].min() > 0.9
    scores = MotionScorer()(torch.stack([flat, noisy]), ["", ""])
    assert scores["motion_smoothness"].min() > 0.9 and scores["dynamic_degree"].max() < 0.02
    assert dis_flow(noisy)[..., 5:30].norm(dim=1).mean() > 0.1  # what would count otherwise


def test_opencv_is_not_asked_for_randomness():
    cv2.setRNGSeed(1)
    first = dis_flow(GLIDE[:2])
    cv2.setRNGSeed(2)
    assert torch.equal(first, dis_flow(GLIDE[:2]))
