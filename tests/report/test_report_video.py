"""Video files, sprite sheets and what a page can hold."""

import base64

import cv2
import numpy as np
import pytest
import torch
from drawn import draw
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image

from kvpo.report.clips import SHEET_HEIGHT, ClipStore, encode_clip, png_bytes, sprite_sheet
from kvpo.report.video import read_video, side_by_side, video_bytes, write_video

STORY = [(0, "red", "square", "meadow"), (6, "yellow", "circle", "sea")]


def test_mp4_keeps_frames_size_rate_and_colours(tmp_path):
    frames = draw(12, 32, STORY, seed=0)
    write_video(tmp_path / "a.mp4", torch.from_numpy(frames), 8, scale=4)
    found, rate = read_video(tmp_path / "a.mp4")
    assert (found.shape, found.dtype, rate) == ((12, 128, 128, 3), np.uint8, 8.0)
    error = np.abs(found[:, 2::4, 2::4].astype(int) - frames)
    assert error.mean() < 4


def test_a_file_that_states_no_frame_rate_has_the_nominal_one(tmp_path):
    """GIFs of one frame, or without delays."""
    Image.new("RGB", (16, 16), (90, 0, 0)).save(tmp_path / "a.gif")
    frames, rate = read_video(tmp_path / "a.gif")
    assert len(frames) == 1 and rate == 16


def test_odd_sizes_grow_by_the_last_row_and_column(tmp_path):
    frames = np.full((3, 33, 47, 3), 90, np.uint8)
    write_video(tmp_path / "odd.mp4", frames, 23.976)
    found, rate = read_video(tmp_path / "odd.mp4")
    assert found.shape == (3, 34, 48, 3)
    assert rate == pytest.approx(23.976, rel=1e-3)
    assert np.abs(found.astype(int) - 90).max() <= 3


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(9, 131, 133), (12, 64, 256), (7, 61, 93), (3, 1, 2)]
)
def test_equal_frames_give_equal_bytes(tmp_path, frames, height, width):
    """Whatever was in the memory that the encoder is given, and however many processors there are."""
    random = np.random.default_rng(0)
    video = np.cumsum(random.integers(-3, 4, (frames, height, width, 3)), axis=2).astype(np.uint8)
    found = set()
    for _ in range(50):
        used = [random.integers(0, 256, size, dtype=np.uint8) for size in random.integers(100, 400_000, 2)]
        write_video(tmp_path / "a.mp4", video, 8)
        found.add((tmp_path / "a.mp4").read_bytes())
        del used
    assert len(found) == 1


@pytest.mark.parametrize(
    ("frames", "rate", "scale", "message"),
    [
        (np.zeros((2, 8, 8, 3), np.float32), 8, 1, "float32"),
        (np.zeros((2, 8, 8), np.uint8), 8, 1, r"\(2, 8, 8\)"),
        (np.zeros((0, 8, 8, 3), np.uint8), 8, 1, "T > 0"),
        (np.zeros((2, 8, 8, 3), np.uint8), 0, 1, "fps"),
        (np.zeros((2, 8, 8, 3), np.uint8), float("nan"), 1, "fps"),
        (np.zeros((2, 8, 8, 3), np.uint8), 8, 0, "scale"),
    ],
)
def test_wrong_frames_are_named(tmp_path, frames, rate, scale, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "bad.mp4", frames, rate, scale=scale)
    assert not (tmp_path / "bad.mp4").exists()


def test_a_file_that_is_no_video_is_named(tmp_path):
    (tmp_path / "text.mp4").write_text("not a video")
    with pytest.raises(ValueError, match=r"text\.mp4"):
        read_video(tmp_path / "text.mp4")


def test_side_by_side_holds_the_shorter_video_and_leaves_a_gap():
    left, right = np.full((2, 4, 5, 3), 10, np.uint8), np.full((4, 4, 3, 3), 20, np.uint8)
    left[1] = 11
    joined = side_by_side([left, right], gap=2)
    assert joined.shape == (4, 4, 10, 3)
    assert (joined[:, 0, 0, 0] == [10, 11, 11, 11]).all()
    assert (joined[:, :, 5:7] == 128).all() and (joined[:, :, 7:] == 20).all()
    with pytest.raises(ValueError, match=r"\[4, 6\]"):
        side_by_side([left, np.zeros((2, 6, 5, 3), np.uint8)])
    with pytest.raises(ValueError, match="common height"):
        side_by_side([])


@settings(max_examples=20, deadline=None)
@given(arrays(np.uint8, st.tuples(st.integers(1, 9), st.integers(1, 9), st.just(3))))
def test_png_is_lossless(image):
    decoded = cv2.imdecode(np.frombuffer(png_bytes(image), np.uint8), cv2.IMREAD_COLOR)[..., ::-1]
    assert np.array_equal(decoded, image)


@pytest.mark.parametrize(("frames", "height", "width"), [(1, 32, 32), (300, 32, 20), (5, 96, 96)])
def test_sprite_sheet_holds_every_frame_where_the_page_looks(frames, height, width):
    video = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    sheet, per_column = sprite_sheet(video)
    assert sheet.shape[0] <= SHEET_HEIGHT
    for frame in range(frames):
        column, row = divmod(frame, per_column)
        cell = sheet[row * height : (row + 1) * height, column * width : (column + 1) * width]
        assert np.array_equal(cell, video[frame])


def test_frame_size_chooses_sprites_or_h264(tmp_path):
    small = encode_clip(draw(4, 96, STORY, seed=0), max_bytes=10**6)
    assert (small["kind"], small["frames"], small["width"]) == ("sprite", 4, 96)
    wide = np.tile(draw(2, 480, STORY, seed=0), (1, 1, 2, 1))[:, :, :832]
    large = encode_clip(wide, max_bytes=10**6)
    assert (large["kind"], large["height"], large["width"]) == ("video", 480, 832)
    (tmp_path / "large.mp4").write_bytes(base64.b64decode(large["source"]))
    assert read_video(tmp_path / "large.mp4")[0].shape == (2, 480, 832, 3)


def test_h264_shrinks_until_it_fits():
    noise = np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), dtype=np.uint8)
    sizes = [len(video_bytes(noise, 16, limit)) for limit in (10**6, 20_000, 1)]
    assert sizes[0] > 20_000 > sizes[1] > sizes[2] > 0


def test_clips_beyond_the_budget_are_counted_not_embedded():
    video = draw(6, 32, STORY, seed=0)
    size = len(encode_clip(video, max_bytes=10**6)["source"])
    store = ClipStore(budget=int(2.5 * size))
    store.add_all("gallery", ((f"v{i}", video) for i in range(4)), share=10**6)
    assert sorted(store.clips) == ["gallery/v0", "gallery/v1"]
    assert store.left_out == 2 and store.budget >= 0
