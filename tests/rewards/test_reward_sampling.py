"""Which frames are looked at, of a clip and of a file."""

from math import inf

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.prompts import ClipPrompt
from kvpo.rewards.catalogue import DECLARATIONS, VIDEOALIGN_SAMPLING
from kvpo.rewards.protocol import Declaration, Sampling
from kvpo.rewards.sampling import (
    CLIPS,
    NEIGHBOURS,
    checked_batch,
    file_clips,
    pooled_frames,
    present_frames,
    spread_indices,
)


@pytest.mark.parametrize(
    ("frames", "rate", "expected"),
    [
        (81, 16.0, [0, 9, 18, 27, 36, 44, 53, 62, 71, 80]),
        (17, 24.0, [0, 5, 11, 16]),
        (3, 24.0, [0, 2]),
        (2, 24.0, [0, 1]),
    ],
)
def test_videoalign_samples_the_known_frames(frames, rate, expected):
    assert spread_indices(frames, rate, VIDEOALIGN_SAMPLING) == expected


@given(st.integers(2, 3000), st.floats(1.0, 120.0))
def test_sampling_what_was_sampled_changes_nothing(frames, rate):
    chosen = spread_indices(frames, rate, VIDEOALIGN_SAMPLING)
    assert chosen == sorted(set(chosen)) and chosen[0] == 0 and chosen[-1] == frames - 1
    assert len(chosen) % 2 == 0 and len(chosen) <= 768
    # A file is sampled when it is read; the scorer is then told the sampled rate and must keep every frame.
    again = spread_indices(len(chosen), VIDEOALIGN_SAMPLING.rate, VIDEOALIGN_SAMPLING)
    assert again == list(range(len(chosen)))


def test_one_frame_is_too_few_for_pairs():
    with pytest.raises(ValueError, match="1 frame"):
        spread_indices(1, 16.0, VIDEOALIGN_SAMPLING)


@given(st.sampled_from(sorted(DECLARATIONS)), st.integers(1, 20_000), st.floats(1.0, 120.0))
def test_clips_of_a_file_lie_inside_it_and_are_bounded(name, frames, rate):
    declaration = DECLARATIONS[name]
    if frames < declaration.min_frames:
        with pytest.raises(ValueError, match=f"at least {declaration.min_frames} frames"):
            file_clips(declaration, frames, rate)
        return
    clips = file_clips(declaration, frames, rate)
    assert 1 <= len(clips) <= CLIPS
    for clip in clips:
        assert len(clip) >= min(declaration.min_frames, frames)
        assert clip == sorted(set(clip)) and 0 <= clip[0] and clip[-1] < frames
        assert len(clip) <= (declaration.sampling.most if declaration.sampling else NEIGHBOURS)


def test_neighbours_of_fast_files_are_thinned_and_long_files_cut():
    flicker = DECLARATIONS["flicker"]
    assert file_clips(flicker, 5, 16.0) == [[0, 1, 2, 3, 4]]
    assert file_clips(flicker, 12, 60.0) == [[0, 3, 6, 9]]
    clips = file_clips(flicker, 14_400, 24.0)
    assert len(clips) == CLIPS and clips[0][0] == 0 and clips[-1][-1] == 14_398
    assert all({b - a for a, b in zip(clip, clip[1:], strict=False)} == {2} for clip in clips)


def test_a_long_file_is_several_clips_of_the_given_seconds():
    short = Declaration("x", -inf, inf, False, 1, 1, Sampling(rate=1.0, least=1, most=99, seconds=4.0))
    clips = file_clips(short, 100, 10.0)
    assert [(clip[0], clip[-1]) for clip in clips] == [(0, 39), (30, 69), (60, 99)]
    whole = Declaration("x", -inf, inf, False, 1, 1, Sampling(rate=1.0, least=1, most=5, seconds=None))
    assert file_clips(whole, 100, 10.0) == [[0, 25, 50, 74, 99]]


def test_frames_before_a_switch_belong_to_the_previous_prompt():
    video = torch.arange(6.0)[:, None, None, None].expand(6, 3, 2, 2)
    assert present_frames(video, "plain text") is not None and len(present_frames(video, "plain text")) == 6
    assert present_frames(video, ClipPrompt("now", "before", 2))[:, 0, 0, 0].tolist() == [2, 3, 4, 5]
    with pytest.raises(ValueError, match="switches at frame 6 of a clip of 6"):
        present_frames(video, ClipPrompt("now", "before", 6))


def test_a_batch_of_another_form_is_named():
    video = torch.zeros(2, 4, 3, 8, 8)
    checked_batch(video, ["a", "b"], 4)
    with pytest.raises(ValueError, match="uint8"):
        checked_batch(video.to(torch.uint8), ["a", "b"], 1)
    with pytest.raises(ValueError, match=r"\[2, 3, 4, 8, 8\]"):
        checked_batch(video.transpose(1, 2), ["a", "b"], 1)
    with pytest.raises(ValueError, match="1 entries for 2 clips"):
        checked_batch(video, ["a"], 1)
    with pytest.raises(ValueError, match=r"4 frames, at least 5"):
        checked_batch(video, ["a", "b"], 5)


def test_frames_are_pooled_by_their_best_share():
    scores = torch.tensor([0.1, 0.9, 0.5, 0.3, 0.7, 0.2, 0.8, 0.4, 0.6, 1.0])
    assert pooled_frames(scores, 0.3).item() == pytest.approx(0.9)
    assert torch.equal(pooled_frames(scores, 1.0), scores.mean())
    assert pooled_frames(scores, 0.01).item() == 1.0 and pooled_frames(
        scores[:1], 0.3
    ).item() == pytest.approx(0.1)
    for share in (0.0, 1.1, -1.0):
        with pytest.raises(ValueError, match="top_share must be in"):
            pooled_frames(scores, share)
