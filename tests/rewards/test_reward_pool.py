"""Several reward servers as one scorer."""

import time
from contextlib import ExitStack
from typing import Any

import pytest
import torch

from kvpo.app.configuration import parse_flags, whole_names
from kvpo.app.named_rewards import split_location
from kvpo.prompts import ClipPrompt
from kvpo.rewards.service.patience import GaveUp
from kvpo.rewards.service.pool import PooledScorer, connect_all
from tests.reward_servers import QUICK, Named, offer, serving

CLIPS = torch.rand(7, 2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [ClipPrompt(f"clip {n}") for n in range(len(CLIPS))]


class Counted:
    """The mean of a clip, and how many clips were asked about."""

    def __init__(self) -> None:
        self.clips = 0

    def __call__(self, video_BTCHW: Any, prompts: Any) -> Any:
        self.clips += len(prompts)
        return video_BTCHW.mean((1, 2, 3, 4))


def test_servers_share_clips_and_one_that_dies_costs_a_retry() -> None:
    expected = CLIPS.mean((1, 2, 3, 4))
    counts = [Counted(), Counted()]
    with serving(Named(counts[0])) as one, ExitStack() as second:
        other = second.enter_context(serving(Named(counts[1])))
        pool = connect_all([one, other], ["own"], patience=QUICK)
        assert isinstance(pool, PooledScorer) and pool.components == ("own",)
        torch.testing.assert_close(pool(CLIPS, PROMPTS)["own"], expected)
        assert [count.clips for count in counts] == [3, 4]
        torch.testing.assert_close(pool(CLIPS[:1], PROMPTS[:1])["own"], expected[:1])

        second.close()
        torch.testing.assert_close(pool(CLIPS, PROMPTS)["own"], expected)
        assert counts[0].clips >= 3 + 7
        started = time.monotonic()
        torch.testing.assert_close(pool(CLIPS, PROMPTS)["own"], expected)
        assert time.monotonic() - started < QUICK.outage  # it is not asked again for a while
    with pytest.raises(GaveUp, match="cannot connect"):
        pool(CLIPS, PROMPTS)
    pool.close()


def test_a_scorer_that_fails_everywhere_is_asked_so_many_times_with_pauses() -> None:
    asked = []

    def failing(video_BTCHW: Any, prompts: Any) -> Any:
        asked.append(time.monotonic())
        raise RuntimeError("out of memory")

    with serving(Named(failing)) as one, serving(Named(failing)) as other:
        pool = connect_all([one, other], ["own"], patience=QUICK)
        with pytest.raises(GaveUp, match="out of memory"):
            pool(CLIPS[:1], PROMPTS[:1])
        pool.close()
    assert len(asked) == QUICK.attempts and asked[1] - asked[0] >= QUICK.first_pause


def test_what_a_server_refuses_is_not_asked_of_another() -> None:
    def broken(video_BTCHW: Any, prompts: Any) -> Any:
        return video_BTCHW.mean((1, 2, 3, 4))

    with serving(Named(broken)) as one, serving(Named(broken), offer(Named(broken), "other")) as other:
        with pytest.raises(ValueError, match="does not have 'own'"):
            connect_all([one, other], ["own"], patience=QUICK)
    with serving(Named(broken, "own")) as one, serving(Named(broken, "mine")) as other:
        with pytest.raises(ValueError, match="differ in the declarations of own; start them alike"):
            connect_all([one, other], ["own"], patience=QUICK)


def test_addresses_stay_with_their_reward() -> None:
    text = "hpsv3@http://a:1,http://b:2,videoalign,mine@https://c"
    names = whole_names(parse_flags({"rewards.scorers": text})["rewards.scorers"])
    assert names == ["hpsv3@http://a:1,http://b:2", "videoalign", "mine@https://c"]
    assert split_location(names[0]) == ("hpsv3", "http://a:1,http://b:2")
