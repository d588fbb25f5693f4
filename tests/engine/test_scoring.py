"""Which clips of a fork are cut, what they weigh, and that they show what they say."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.engine.generator import pixel_frame
from kvpo.engine.rollout import Group
from kvpo.engine.scoring import (
    decode_members,
    in_pixels,
    score_group,
    segment_clips,
    shared_clips,
    transition_clips,
)
from kvpo.method.evidence import Trajectories
from kvpo.prompts import VideoPrompt

BLOCK = 3
STORY = VideoPrompt(0, ("one", "two", "three"), (12, 18), 30)


def shown(clip: Any) -> tuple[Any, ...]:
    return clip.start, clip.stop, str(clip.prompt), clip.prompt.before, clip.prompt.switch


def test_one_clip_per_segment_after_the_fork() -> None:
    clips = segment_clips(STORY, 9, 24, block=BLOCK, lead=BLOCK)
    assert [shown(clip) for clip in clips] == [
        (9, 12, "one", "", 0),
        (9, 18, "two", "one", 3),
        (15, 24, "three", "two", 3),
    ]
    assert shown(segment_clips(STORY, 12, 18, block=BLOCK, lead=BLOCK)[0]) == (9, 18, "two", "one", 3)
    assert [clip.prompt.earlier for clip in clips] == [(), ("one",), ("one", "two")]
    assert in_pixels(clips[2], 4).prompt.earlier == ("one", "two")


def test_the_first_latent_frame_is_one_pixel_frame_and_every_other_one_is_as_many_as_the_codec_says() -> None:
    assert [pixel_frame(latent, 4) for latent in (0, 1, 2, 3, 21)] == [0, 1, 5, 9, 81]
    assert [pixel_frame(latent, 1) for latent in (0, 1, 2, 21)] == [0, 1, 2, 21]


def test_a_segment_begins_with_the_first_block_at_or_after_its_switch() -> None:
    story = VideoPrompt(0, ("one", "two", "three"), (10, 18), 30)
    clips = segment_clips(story, 0, 30, block=BLOCK, lead=0)
    assert [(clip.start, clip.stop) for clip in clips] == [(0, 12), (12, 18), (18, 30)]


def test_a_transition_is_half_before_and_half_after_its_switch() -> None:
    assert [shown(clip) for clip in transition_clips(STORY, 9, 24, block=BLOCK, half=6)] == [
        (6, 18, "two", "one", 6),
        (12, 24, "three", "two", 6),
    ]
    # cut by the end of what was generated, and by the start of the segment before
    second = transition_clips(STORY, 12, 20, block=BLOCK, half=9)[-1]
    assert shown(second) == (12, 20, "three", "two", 6)
    assert transition_clips(STORY, 21, 30, block=BLOCK, half=3) == []


def shares_of(transition_blocks: int) -> dict[tuple[int, int], float]:
    found = shared_clips(STORY, 9, 24, block=BLOCK, transition_blocks=transition_blocks)
    assert sum(share for _, share in found) == pytest.approx(1)
    return {(clip.start, clip.stop): share for clip, share in found}


def test_shares_go_with_frames() -> None:
    assert shares_of(0) == {(9, 12): 3 / 15, (9, 18): 6 / 15, (15, 24): 6 / 15}
    assert shares_of(1) == pytest.approx(
        {(9, 12): 3 / 21, (9, 18): 6 / 21, (15, 24): 6 / 21, (9, 15): 3 / 21, (15, 21): 3 / 21}
    )


@dataclass
class Frames:
    """A codec without loss: a latent frame is a picture."""

    frames_per_latent: int = 1
    frames_per_second: float = 8.0

    def decode(self, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
        return latents_BTCHW


class Recorder:
    """Scores the mean of the clip's own frames and remembers what it was shown."""

    components = ("mean", "twice")

    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
        for video, prompt in zip(video_BTCHW, prompts, strict=True):
            frames = video[:, 0, 0, 0].tolist()
            self.seen.append((frames[0], frames[-1], str(prompt), prompt.before, prompt.switch))
        means = [v[p.switch :].mean() for v, p in zip(video_BTCHW, prompts, strict=True)]
        return {"mean": torch.stack(means), "twice": 2 * torch.stack(means)}


def forked(fork: int, window: int, tail: int, members: int = 2) -> Group:
    """Member m shows the number of the frame, plus 100 m after the fork."""
    frames = torch.arange(30.0)[:, None, None, None].expand(30, 3, 2, 2)
    own = frames[fork : fork + window + tail]
    clean = torch.stack([own + 100 * member for member in range(members)])
    states = torch.zeros(members, window // BLOCK, 1, BLOCK, 3, 2, 2)
    seen = Trajectories(states, states, clean[:, :window].unflatten(1, (-1, BLOCK)), (1.0,))
    root: Any = SimpleNamespace(prompt=STORY, latents=list(frames[:fork].split(BLOCK)))
    return Group(0, root, fork, 0, (None,) * (members - 1), seen, clean)


def test_scores_are_the_shares_of_what_each_clip_shows() -> None:
    recorder = Recorder()
    scores = score_group(forked(9, 3, 12), Frames(), recorder, block=BLOCK, transition_blocks=2)
    assert scores.local_KM[0].tolist() == [10, 110]
    means = {(9, 12): 10, (9, 18): 14.5, (15, 24): 20.5, (6, 18): 14.5, (12, 24): 20.5}
    found = shared_clips(STORY, 9, 24, block=BLOCK, transition_blocks=2)
    shares = {(clip.start, clip.stop): share for clip, share in found}
    assert shares.keys() == means.keys()
    expected = sum(shares[key] * means[key] for key in means)
    torch.testing.assert_close(scores.global_KM[0], torch.tensor([expected, expected + 100]))
    torch.testing.assert_close(scores.global_KM[1], 2 * scores.global_KM[0])
    assert (6.0, 17.0, "two", "one", 6) in recorder.seen, "the transition reaches behind the fork"
    assert (6.0, 117.0, "two", "one", 6) in recorder.seen, "what lies behind it is the root's own"
    assert min(first for first, *_ in recorder.seen) == 6


@pytest.mark.parametrize("lead", [0, 3, 9])
def test_members_are_decoded_behind_the_frames_before_the_first_that_is_shown(lead: int) -> None:
    given: list[tuple[list[float], list[float]]] = []

    class Causal(Frames):
        def decode(self, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
            before = [] if before_TCHW is None else before_TCHW[:, 0, 0, 0].tolist()
            given.append((before, latents_BTCHW[0, :, 0, 0, 0].tolist()))
            return latents_BTCHW

    decode_members(forked(9, 3, 3), Causal(), lead=lead)
    assert given == [([*map(float, range(9 - lead))], [*map(float, range(9 - lead, 15))])]


def test_all_clips_are_handed_out_before_a_score_is_waited_for() -> None:
    """And the same frames of every member are not copied for it."""
    events, storages = [], set()

    class Elsewhere(Recorder):
        def begin(self, video_BTCHW: Tensor, prompts: Any) -> Any:
            events.append(f"{video_BTCHW.shape[1]} frames begin")
            storages.add(video_BTCHW.untyped_storage().data_ptr())

            def answer() -> dict[str, Tensor]:
                events.append(f"{video_BTCHW.shape[1]} frames are waited for")
                return self(video_BTCHW, prompts)

            return answer

    story = VideoPrompt(0, ("one",), (), 30)
    group = forked(9, 3, 12)
    group.root.prompt = story
    scores = score_group(group, Frames(), Elsewhere(), block=BLOCK)
    assert events == [
        "3 frames begin",
        "15 frames begin",
        "3 frames are waited for",
        "15 frames are waited for",
    ]
    assert storages == {group.clean_MTCHW.untyped_storage().data_ptr()}
    expected = score_group(group, Frames(), Recorder(), block=BLOCK)
    assert torch.equal(scores.local_KM, expected.local_KM) and torch.equal(
        scores.global_KM, expected.global_KM
    )
    assert scores.global_KM[0].tolist() == [16, 116]


def test_nothing_before_the_fork_is_shown_unless_a_clip_begins_at_a_switch() -> None:
    recorder = Recorder()
    score_group(forked(21, 3, 6), Frames(), recorder, block=BLOCK)
    assert {seen[0] for seen in recorder.seen} == {21.0, 121.0}
    recorder = Recorder()
    score_group(forked(12, 3, 3), Frames(), recorder, block=BLOCK)
    assert {seen[0] for seen in recorder.seen} == {9.0} and {seen[4] for seen in recorder.seen} == {3}
