"""Looks of clips in closed form."""

import pytest
import torch

from kvpo.rewards.pixel_statistics import LOOKS, brightness, looks, motion, saturation, sharpness


def clip(*frames: torch.Tensor) -> torch.Tensor:
    """Grey images [H, W] as one clip [1, T, 3, H, W]."""
    return torch.stack(frames)[None, :, None].expand(-1, -1, 3, -1, -1)


def board(squares: int, low: float = 0.0, high: float = 1.0) -> torch.Tensor:
    """A 16 x 16 board of squares of so many pixels, the two greys equally often."""
    place = torch.arange(16) // squares
    return torch.where((place[:, None] + place) % 2 == 0, high, low)


def test_brightness_is_luminance():
    colours = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [1.0, 1.0, 1.0]])
    clips = colours[:, None, :, None, None].expand(-1, 2, -1, 4, 4)
    torch.testing.assert_close(brightness(clips), torch.tensor([0.299, 0.587, 0.114, 1.0]))


def test_saturation_does_not_know_how_bright_a_colour_is():
    pure = torch.tensor([0.8, 0.0, 0.0])[None, None, :, None, None].expand(1, 2, 3, 4, 4)
    half = torch.tensor([0.8, 0.4, 0.4])[None, None, :, None, None].expand(1, 2, 3, 4, 4)
    for clips, expected in ((pure, 1.0), (0.1 * pure, 1.0), (half, 0.5), (clip(board(2), board(2)), 0.0)):
        assert float(saturation(clips)) == pytest.approx(expected)
    assert float(saturation(torch.zeros(1, 2, 3, 4, 4))) == 0


def test_sharpness_of_boards():
    """Every neighbour of a board of single pixels differs by twice the contrast, every second one of two."""
    assert float(sharpness(clip(board(1)))) == pytest.approx(2)
    assert float(sharpness(clip(board(2)))) == pytest.approx(2 * (7 / 15) ** 0.5)
    assert float(sharpness(clip(board(1, 0.4, 0.6)))) == pytest.approx(2)  # contrast alone is no sharpness
    assert float(sharpness(clip(torch.full((16, 16), 0.3)))) == pytest.approx(0, abs=1e-3)


def test_motion_of_boards():
    assert float(motion(clip(board(4), board(4), board(4)))) == 0
    assert float(motion(clip(board(4), 1 - board(4), board(4)))) == pytest.approx(2)
    turned = board(4).roll(2, 1)  # half of the pixels change
    assert float(motion(clip(board(4), turned))) == pytest.approx(2**0.5)
    assert float(motion(clip(board(4)))) == 0


def test_looks_of_a_clip_do_not_depend_on_its_neighbours():
    clips = torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    table_LB = looks(clips)
    assert table_LB.shape == (len(LOOKS), 3)
    assert torch.equal(table_LB[:, 1:2], looks(clips[1:2]))
