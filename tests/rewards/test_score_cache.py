"""The score cache: what is known is not scored again, and what is damaged is not known."""

import os
import sqlite3
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.prompts import ClipPrompt
from kvpo.rewards import cache as module
from kvpo.rewards.cache import Counts, ScoreCache, clip_digest, code_version, score_cache
from kvpo.rewards.reward import CombinedScorer, Reward
from tests.processes import CHILDREN


class Watched:
    """Two numbers per clip, and a record of what it was asked."""

    components = ("mean", "first")

    def __init__(self) -> None:
        self.batches: list[int] = []

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
        assert len(video_BTCHW) == len(prompts)
        self.batches.append(len(prompts))
        lengths = torch.tensor([float(len(prompt)) for prompt in prompts])
        return {"mean": video_BTCHW.mean((1, 2, 3, 4)) + lengths, "first": video_BTCHW[:, 0, 0, 0, 0]}


def clips(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, 3, 4, 5, generator=torch.Generator().manual_seed(seed))


PROMPTS = [ClipPrompt("a"), ClipPrompt("bb"), ClipPrompt("ccc")]


def asked(cache: ScoreCache, version: str = "v1") -> tuple[Reward, Watched]:
    watched = Watched()
    return Reward("watched", watched, version=version, cache=cache), watched


def counts_of(reward: Reward) -> Counts:
    assert reward.cache is not None
    return reward.cache.counts


class Here:
    """The mean of a clip, computed in this process; ``events`` says when."""

    def __init__(self, name: str, events: list[str]) -> None:
        self.components, self.events = (name,), events

    def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
        self.events.append(f"{self.components[0]} computes")
        return {self.components[0]: video_BTCHW.mean((1, 2, 3, 4))}


class Elsewhere(Here):
    """The same as if computed elsewhere."""

    def begin(self, video_BTCHW: Tensor, prompts: Any) -> Any:
        self.events.append(f"{self.components[0]} begins")
        return lambda: self(video_BTCHW, prompts)


def test_scorers_elsewhere_work_while_those_of_this_process_do(tmp_path: Path) -> None:
    events: list[str] = []
    cache = score_cache(str(tmp_path))
    known = Reward("elsewhere", Elsewhere("elsewhere", events), version="v1", cache=cache)
    combined = CombinedScorer((Here("here", events), known, Elsewhere("other", events)))
    found = combined(clips(3), PROMPTS)
    assert list(found) == ["here", "elsewhere", "other"] == list(combined.components)
    assert all(torch.equal(values, clips(3).mean((1, 2, 3, 4))) for values in found.values())
    assert events == [
        "elsewhere begins",
        "other begins",
        "here computes",
        "elsewhere computes",
        "other computes",
    ]
    events.clear()
    assert equal(combined(clips(3), PROMPTS), found) and "elsewhere begins" not in events
    assert cache.counts == Counts(hits=3, misses=3)


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def test_a_second_process_of_the_same_clips_scores_nothing(tmp_path: Path) -> None:
    scorer, watched = asked(score_cache(str(tmp_path / "new" / "scores")))
    found = scorer(clips(3), PROMPTS)
    assert equal(found, Watched()(clips(3), PROMPTS)) and watched.batches == [3]
    again, unused = asked(score_cache(str(tmp_path / "new" / "scores")))
    assert equal(again(clips(3), PROMPTS), found) and unused.batches == []
    assert counts_of(again) == Counts(hits=3)
    mixed = torch.cat([clips(1, seed=9), clips(3)])
    found = again(mixed, [ClipPrompt("z"), *PROMPTS])
    assert equal(found, Watched()(mixed, [ClipPrompt("z"), *PROMPTS])) and unused.batches == [1]
    assert counts_of(again) == Counts(hits=6, misses=1)


def test_equal_clips_of_one_call_are_scored_once_without_a_directory_too() -> None:
    scorer, watched = asked(score_cache(""))
    video = clips(2)[[0, 1, 0, 0]]
    prompts = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[1]]
    found = scorer(video, prompts)
    assert watched.batches == [3], "the fourth clip has the pixels of the first and another prompt"
    assert equal(found, Watched()(video, prompts))
    scorer(video, prompts)
    assert watched.batches == [3, 3], "nothing is kept between calls"
    assert counts_of(scorer) == Counts(repeats=2, misses=6)


def test_whatever_may_change_a_score_changes_its_key() -> None:
    video = clips(1)[0]
    same = clip_digest(video, ClipPrompt("a", "before", 1))
    assert clip_digest(video.clone(), ClipPrompt("a", "before", 1)) == same
    moved = video.clone()
    moved[0, 0, 0, 0] = torch.nextafter(moved[0, 0, 0, 0], torch.tensor(2.0))
    others = [
        (moved, ClipPrompt("a", "before", 1)),
        (video, ClipPrompt("b", "before", 1)),
        (video, ClipPrompt("a", "after", 1)),
        (video, ClipPrompt("a", "before", 2)),
        (video, ClipPrompt("a", "before", 1, 4.0)),
        (video, "a"),
        (video.flip(-1), ClipPrompt("a", "before", 1)),
        (video.reshape(3, 3, 5, 4), ClipPrompt("a", "before", 1)),
        (video.double(), ClipPrompt("a", "before", 1)),
    ]
    assert len({clip_digest(*other) for other in others} | {same}) == len(others) + 1
    assert clip_digest(video, "a") == clip_digest(video, ClipPrompt("a"))
    assert clip_digest(video.to(torch.bfloat16), "a") != clip_digest(video, "a")
    strided = video.movedim(0, 1).contiguous().movedim(0, 1)
    assert clip_digest(strided, "a") == clip_digest(video, "a")


def test_another_version_or_other_components_are_other_scores(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        scorer, watched = asked(score_cache(str(tmp_path)), version)
        scorer(clips(2), PROMPTS[:2])
        assert watched.batches == [2]
    fewer, watched = asked(score_cache(str(tmp_path)))
    watched.components = ("mean",)
    assert list(fewer(clips(2), PROMPTS[:2])) == ["mean"] and watched.batches == [2]
    for _ in range(2):
        unknown, watched = asked(score_cache(str(tmp_path)), "")
        unknown(clips(2), PROMPTS[:2])
        assert watched.batches == [2], "a reward of unknown version is never remembered"


def test_a_damaged_entry_is_scored_again_and_mended(tmp_path: Path) -> None:
    cache = score_cache(str(tmp_path))
    first, _ = asked(cache)
    expected = first(clips(3), PROMPTS)
    with sqlite3.connect(cache.file) as connection:
        rows = connection.execute("SELECT rowid, value FROM scores ORDER BY rowid").fetchall()
        flipped = bytearray(rows[0][1])
        flipped[-1] ^= 1
        connection.execute("UPDATE scores SET value = ? WHERE rowid = ?", (bytes(flipped), rows[0][0]))
        connection.execute("UPDATE scores SET value = ? WHERE rowid = ?", (rows[2][1], rows[1][0]))
        connection.execute("UPDATE scores SET value = ? WHERE rowid = ?", (rows[2][1][:-1], rows[2][0]))
    connection.close()
    for batches in ([3], []):
        scorer, watched = asked(cache)
        assert equal(scorer(clips(3), PROMPTS), expected)
        assert watched.batches == batches


@pytest.mark.parametrize("content", [b"", b"not a database at all, but long enough " * 40])
def test_a_damaged_file_is_set_aside(
    tmp_path: Path, content: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    cache = score_cache(str(tmp_path))
    assert cache.file is not None
    cache.file.write_bytes(content)
    scorer, watched = asked(cache)
    assert equal(scorer(clips(3), PROMPTS), Watched()(clips(3), PROMPTS))
    scorer(clips(3), PROMPTS)
    assert watched.batches == [3]
    assert cache.file.with_suffix(".damaged").exists() == ("is damaged" in caplog.text) == bool(content)


def test_a_damaged_file_that_another_process_has_set_aside_ends_no_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache, rename = score_cache(str(tmp_path)), os.replace
    assert cache.file is not None
    cache.file.write_bytes(b"not a database at all, but long enough " * 40)

    def second(source: Path, target: Path) -> None:
        rename(source, target)
        rename(source, target)

    monkeypatch.setattr(os, "replace", second)
    assert cache.read([b"x"], 1) == {} and not cache.file.exists()


def test_a_truncated_file_costs_its_scores_only(tmp_path: Path) -> None:
    cache = score_cache(str(tmp_path))
    scorer, _ = asked(cache)
    for seed in range(60):
        scorer(clips(3, seed), PROMPTS)
    assert cache.file is not None
    content = cache.file.read_bytes()
    cache.file.write_bytes(content[: len(content) // 2])
    for seed in range(60):
        assert equal(scorer(clips(3, seed), PROMPTS), Watched()(clips(3, seed), PROMPTS))


def test_a_cache_that_another_process_holds_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(module, "WRITER_SECONDS", 0.05)
    cache = score_cache(str(tmp_path))
    holder = sqlite3.connect(cache.file, isolation_level=None)
    holder.execute("BEGIN EXCLUSIVE")
    scorer, watched = asked(cache)
    assert equal(scorer(clips(3), PROMPTS), Watched()(clips(3), PROMPTS)) and watched.batches == [3]
    assert "passed over: database is locked" in caplog.text
    holder.close()
    scorer(clips(3), PROMPTS)
    scorer(clips(3), PROMPTS)
    assert watched.batches == [3, 3]


def fill(directory: str, seed: int) -> None:
    scorer, _ = asked(score_cache(directory))
    for step in range(10):
        scorer(clips(3, 100 * seed + step), PROMPTS)


def test_processes_and_threads_share_a_cache(tmp_path: Path) -> None:
    workers = [CHILDREN.Process(target=fill, args=(str(tmp_path), seed)) for seed in range(2)]
    threads = [threading.Thread(target=fill, args=(str(tmp_path), seed)) for seed in range(2, 4)]
    for worker in [*workers, *threads]:
        worker.start()
    for worker in [*workers, *threads]:
        worker.join()
    scorer, watched = asked(score_cache(str(tmp_path)))
    for seed in range(4):
        for step in range(10):
            video = clips(3, 100 * seed + step)
            assert equal(scorer(video, PROMPTS), Watched()(video, PROMPTS))
    assert watched.batches == []


def test_the_oldest_entries_make_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MOST", 4)
    cache = score_cache(str(tmp_path))
    scorer, watched = asked(cache)
    for seed in range(3):
        scorer(clips(2, seed), PROMPTS[:2])
    connection = sqlite3.connect(cache.file)
    assert connection.execute("SELECT count(*) FROM scores").fetchone() == (4,)
    connection.close()
    scorer(clips(2, 2), PROMPTS[:2])
    assert watched.batches == [2, 2, 2]
    scorer(clips(2, 0), PROMPTS[:2])
    assert watched.batches == [2, 2, 2, 2]


def test_what_cannot_be_scored_is_not_kept(tmp_path: Path) -> None:
    class Broken(Watched):
        def __call__(self, video_BTCHW: Tensor, prompts: Any) -> dict[str, Tensor]:
            scores = super().__call__(video_BTCHW, prompts)
            scores["mean"][0] = torch.nan
            return scores

    cache = score_cache(str(tmp_path))
    with pytest.raises(ValueError, match="'mean' is nan for clip 0"):
        Reward("broken", Broken(), version="v1", cache=cache)(clips(3), PROMPTS)
    scorer, watched = asked(cache)
    scorer(clips(3), PROMPTS)
    assert watched.batches == [3]


def test_a_directory_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"rewards.cache: .*file/scores cannot be used as a directory"):
        score_cache(str(tmp_path / "file" / "scores"))


def test_counts_since_and_the_version_of_the_code() -> None:
    assert Counts(5, 2, 9).since(Counts(1, 2, 3)) == {
        "reward_cache_hits": 4.0,
        "reward_cache_repeats": 0.0,
        "reward_cache_misses": 6.0,
    }
    assert len(code_version()) == 48
