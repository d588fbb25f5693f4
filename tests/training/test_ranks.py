"""What ranks say to one another, on two to four processes."""

import os
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed import HashStore, PrefixStore

from kvpo.config_checks import ConfigurationError
from kvpo.training.ranks import LostRank, RankError, Ranks, fresh_part, joined_ranks, teams_of
from tests.ranks import on_ranks


def exchanged(ranks: Ranks) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for items in range(6):
        own = ranks.share(range(items))
        found[f"order {items}"] = ranks.in_order([10 * item for item in own], "counting")
    found["any"] = [ranks.any(ranks.rank == 1, "asking"), ranks.any(False, "asking")]
    found["once"] = ranks.once("writing", lambda: ("by", ranks.rank))
    parts = ranks.exchange_parts(torch.arange(2.0 * ranks.count) + 100 * ranks.rank)
    found["parts"] = parts.tolist()
    found["joined"] = ranks.join_parts(torch.tensor([float(ranks.rank), -float(ranks.rank)])).tolist()
    ranks.demand_equal(lambda: {"update": 3}, "counting")
    return found


@pytest.mark.parametrize("count", [1, 2, 3])
def test_ranks_exchange_in_order(count: int, tmp_path: Path) -> None:
    every = on_ranks(count, tmp_path / "ranks", exchanged)
    for rank, found in enumerate(every):
        for items in range(6):
            assert found[f"order {items}"] == [10 * item for item in range(items)]
        assert found["any"] == [count > 1, False] and found["once"] == ("by", 0)
        assert found["parts"] == [[2.0 * rank + 100 * r, 2.0 * rank + 1 + 100 * r] for r in range(count)]
        assert found["joined"] == [number for r in range(count) for number in (float(r), -float(r))]


def failing(ranks: Ranks) -> None:
    with ranks.together("scoring"):
        if ranks.rank == 1:
            raise ValueError("the reward\nis not finite")


def failing_while_rank_0_saves(ranks: Ranks, folder: Path) -> None:
    try:
        failing(ranks)
    except RankError:
        time.sleep(1.0)  # saving the updates before the failed one
        raise
    finally:
        (folder / f"left-{ranks.rank}").touch()


def failing_before_teams(ranks: Ranks) -> None:
    with ranks.together("loading the generator and the rewards"):
        if ranks.rank == 3:
            raise ValueError("weights are missing here")
        teams_of(ranks, 2)


def failing_once(ranks: Ranks) -> None:
    ranks.once("saving", lambda: 1 // 0)


def differing(ranks: Ranks) -> None:
    adapter = "stale" if ranks.rank == 1 else "fresh"
    ranks.demand_equal(lambda: {"update": 7, "adapter": adapter}, "update 7")


def slow(ranks: Ranks) -> float:
    """One rank waits longer for a reward than the short time-out: status first, then the sum."""
    with ranks.together("scoring"):
        time.sleep(2.0 * ranks.rank)
    return float(ranks.exchange_parts(torch.ones(2)).sum())


def killed(ranks: Ranks) -> None:
    ranks.gather(None, "meeting")  # a rank that dies before the other has connected is another error
    if ranks.rank == 1:
        time.sleep(0.3)
        os.kill(os.getpid(), signal.SIGKILL)
    with ranks.together("scoring"):
        pass


def silent(ranks: Ranks) -> None:
    if ranks.rank == 1:
        time.sleep(4.0)
    else:
        ranks.exchange_parts(torch.ones(2))


def test_a_failure_on_one_rank_is_a_failure_of_all_and_names_it(tmp_path: Path) -> None:
    own, other = on_ranks(2, tmp_path / "one", failing)[::-1]
    assert isinstance(own, ValueError) and not isinstance(own, RankError)
    assert isinstance(other, RankError)
    assert str(other) == "stopped with rank 1, which failed while scoring: the reward is not finite"
    main, other = on_ranks(2, tmp_path / "once", failing_once)
    assert isinstance(main, ZeroDivisionError)
    assert "rank 0, which failed while saving: integer division" in str(other)


def test_a_rank_that_has_failed_stays_until_rank_0_has_saved(tmp_path: Path) -> None:
    """torchrun kills the others once it has ended, which took updates with it that rank 0 was saving."""
    _, own = on_ranks(2, tmp_path / "ranks", failing_while_rank_0_saves, tmp_path)
    assert str(own) == "the reward\nis not finite"
    saved, ended = (tmp_path / "left-0").stat(), (tmp_path / "ranks" / "found-1").stat()
    assert saved.st_mtime_ns <= ended.st_mtime_ns


def test_teams_are_not_formed_with_a_rank_that_has_failed(tmp_path: Path) -> None:
    *others, own = on_ranks(4, tmp_path / "ranks", failing_before_teams)
    assert str(own) == "weights are missing here"
    said = f"stopped with rank 3, which failed while loading the generator and the rewards: {own}"
    assert all(isinstance(other, RankError) and str(other) == said for other in others)


def test_a_rank_that_differs_is_named(tmp_path: Path) -> None:
    for error in on_ranks(3, tmp_path / "ranks", differing):
        assert isinstance(error, RankError)
        assert str(error).startswith(
            "rank 1 differs from rank 0 in its adapter after update 7: stale there, fresh on rank 0"
        )


def test_waiting_for_a_reward_outlasts_the_time_out_of_gradients(tmp_path: Path) -> None:
    assert on_ranks(2, tmp_path / "ranks", slow, short=1.0) == [2.0, 2.0]


def test_a_lost_or_silent_rank_ends_the_others_with_the_phase_and_a_trace(tmp_path: Path) -> None:
    error, gone = on_ranks(2, tmp_path / "killed", killed)
    assert gone is None and isinstance(error, LostRank)
    assert str(error).startswith("rank 0 of 2 lost touch with another rank while scoring")
    assert (tmp_path / "killed" / "flight-recorder-rank-0.json").stat().st_size
    started = time.monotonic()
    error, _ = on_ranks(2, tmp_path / "silent", silent, short=1.0)
    assert isinstance(error, LostRank) and "while adding up gradients" in str(error)
    assert time.monotonic() - started < 30


def test_a_sum_that_only_fails_when_it_is_waited_for_is_a_lost_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NCCL, whose synchronous operations are only launched."""

    class Work:
        def wait(self) -> None:
            raise RuntimeError("timed out in blocking wait")

    def launch(*tensors: Any, group: Any, async_op: bool = False) -> Work | None:
        return Work() if async_op else None

    monkeypatch.setattr(dist, "all_to_all_single", launch)
    monkeypatch.setattr(dist, "all_gather", launch)
    ranks = Ranks(0, 2, traces=tmp_path)
    for sums in (ranks.exchange_parts, ranks.join_parts):
        with pytest.raises(LostRank, match="while adding up gradients.*timed out in blocking wait"):
            sums(torch.ones(2))


@pytest.mark.parametrize(("place", "sharded", "waits"), [(0, False, "1"), (0, True, None), (2, False, None)])
def test_ranks_on_cuda_need_a_device_each_and_wait_for_sums_unless_layers_are_sharded(
    place: int, sharded: bool, waits: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[object] = []

    def new_group(*, backend: str, **named: Any) -> None:
        found.extend([backend, os.environ.get("TORCH_NCCL_BLOCKING_WAIT")])
        raise RuntimeError("no device")

    monkeypatch.setattr(os, "environ", {"LOCAL_RANK": str(place)})
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", found.append)
    monkeypatch.setattr(dist, "init_process_group", lambda *words, **named: None)
    monkeypatch.setattr(dist, "new_group", new_group)
    with pytest.raises((ConfigurationError, LostRank)) as caught:
        with joined_ranks("cuda", sharded=sharded, rendezvous=(HashStore(), 0, 1)):
            pass
    if place < 2:
        assert found == [place, "nccl", waits] and "no device" in str(caught.value)
        return
    assert found == [] and str(caught.value) == (
        "device: 'cuda' cannot be used by local rank 2: torch finds 2 CUDA devices here; start at most one "
        "process for each, or use --device cpu"
    )


def test_a_lost_rank_is_named_where_its_trace_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("kvpo.training.ranks._dump_fr_trace_json", lambda: b"{}")
    ranks = Ranks(traces=tmp_path / "missing")
    with pytest.raises(LostRank, match="while counting"), ranks._in_touch("counting"):
        raise RuntimeError("connection reset")
    assert "the flight recorder could not be written" in caplog.text


def test_ranks_meet_where_ranks_of_before_have_left_their_addresses() -> None:
    store = HashStore()
    for rank in (1, 2):
        store.set(f"here/{rank}", f"killed-{rank}")
    store.set("part/killed-1", "dead")
    with ThreadPoolExecutor(3) as threads:
        meet = partial(fresh_part, store, count=3, patience=timedelta(seconds=20))
        first = threads.submit(meet, 0)
        while not store.check(["part/killed-2"]):  # rank 0 has answered one that is dead
            time.sleep(0.001)
        others = [threads.submit(meet, rank) for rank in (2, 1)]
        parts = [meeting.result() for meeting in (first, *others)]
    parts[0].set("address", "here")
    assert [part.get("address") for part in parts] == [b"here"] * 3
    assert not PrefixStore("dead", store).check(["address"]) and not store.check(["address"])


@pytest.mark.parametrize("rank", [0, 1])
def test_who_does_not_come_is_not_waited_for_for_ever(rank: int) -> None:
    with pytest.raises(LostRank, match=f"rank {1 - rank} did not come within 0:00:00.1"):
        fresh_part(HashStore(), rank, 2, timedelta(seconds=0.1))
