"""Whole runs on several ranks, as torchrun starts them: killed, stopped, and resumed on other numbers."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch

from kvpo.app.build import build_setup, checkpoint_of
from kvpo.prompts import ClipPrompt
from kvpo.training.checkpoint import checkpoint_update, resume_point, save_checkpoint
from kvpo.training.ranks import Ranks
from tests import processes
from tests.metrics import read_metrics
from tests.ranks import on_ranks as children
from tests.tiny_world import tiny_config, toy
from tests.training.test_resume import arguments, outcome, signal_at, uninterrupted

__all__ = ["arguments", "uninterrupted"]  # fixtures
GRADIENTS = "kvpo.training.trainer:accumulate_gradients"


def as_rank(rank: int, count: int, port: int, before: Callable[[], None]) -> None:
    """In a child: be one of the ranks that torchrun starts."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before()


def on_ranks(
    count: int,
    command: list[str | Path],
    logs: Path,
    disturbed: Mapping[int, Callable[[], None]] | None = None,
) -> list[tuple[int, str]]:
    """Exit status and output of every rank of a command."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = {rank: (disturbed or {}).get(rank, processes.nothing) for rank in range(count)}
    files = [logs / f"rank-{rank}.log" for rank in range(count)]
    started = [
        processes.start(command, file, partial(as_rank, rank, count, port, before[rank]))
        for rank, file in enumerate(files)
    ]
    for process in started:
        process.join(processes.TIME_LIMIT)
        assert process.exitcode is not None, f"still running after {processes.TIME_LIMIT} s"
    return [(process.exitcode, file.read_text()) for process, file in zip(started, files, strict=True)]


def test_a_run_killed_and_stopped_on_several_ranks_is_that_of_one_process(
    arguments: list[str | Path], uninterrupted: Path, tmp_path: Path
) -> None:
    """Rank 1 is killed in the fourth update, later gets SIGTERM, then all get Ctrl-C, and three finish."""
    directory = tmp_path / "run"
    command = [*arguments, "--out", directory, "--resume"]
    killed = {1: partial(signal_at, GRADIENTS, 4, signal.SIGKILL)}
    (code, printed), (gone, _) = on_ranks(2, command, tmp_path, killed)
    assert gone == -signal.SIGKILL and code == 1
    assert "error: rank 0 of 2 lost touch with another rank while computing gradients" in printed
    assert "Traceback" not in printed and list(directory.glob("flight-recorder-rank-0.json"))

    stopped = {1: partial(signal_at, GRADIENTS, 1, signal.SIGTERM)}
    (code, printed), (other_code, other) = on_ranks(2, command, tmp_path, stopped)
    assert (code, other_code) == (130, 130)
    assert "saved up to update" in printed and "kvpo: interrupted" in other

    all_at_once = dict.fromkeys(range(2), partial(signal_at, GRADIENTS, 1, signal.SIGINT))
    every = on_ranks(2, command, tmp_path, all_at_once)
    assert [code for code, _ in every] == [130, 130]
    assert not any("Traceback" in printed for _, printed in every)
    assert_last_update_is_saved(directory)

    assert [code for code, _ in on_ranks(3, command, tmp_path)] == [0, 0, 0]
    assert outcome(directory) == outcome(uninterrupted)
    ours, theirs = (json.loads((d / "summary.json").read_text()) for d in (directory, uninterrupted))
    assert ours["held_out"] == theirs["held_out"] and ours["checks"] == theirs["checks"]
    assert ours["diversity"] == theirs["diversity"] and ours["ranks"] == 3


def served(ranks: Ranks, base: Path) -> tuple[dict[str, list[float]], list[str]]:
    """Scores of a toy reward that the first of several ranks holds, and the names that a run has saved."""
    scorers = {"rewards__scorers": ("tests.tiny_world:toy",), "rewards__ranks": 1}
    setup = build_setup(tiny_config(base, **scorers), ranks)
    draws = torch.Generator().manual_seed(ranks.rank)
    clips = torch.rand(3, 4, 3, 8, 8, generator=draws)
    found = setup.judges.scorer(clips, [ClipPrompt("a clip")] * 3)
    expected = toy(clips, [])
    assert all(torch.allclose(found[name], expected[name], atol=1e-6) for name in expected)
    ranks.gather(None, "scoring")  # before the server goes
    return sorted(found), list(setup.config.rewards.scorers)


def test_rewards_of_some_ranks_score_the_clips_of_all(tiny_base: Path, tmp_path: Path) -> None:
    found = children(2, tmp_path / "ranks", served, tiny_base)
    assert found == [(["calm", "redness"], ["tests.tiny_world:toy"])] * 2


def chosen(ranks: Ranks, folder: Path) -> Path | None:
    """The latest checkpoint of a run that saves update 1 after rank 0 has looked, and before rank 1 does."""
    run = folder / f"as-rank-{ranks.rank}-sees-it"
    for update in range(ranks.rank + 1):
        save_checkpoint(run / "checkpoints", update, {"a": torch.zeros(1)}, {}, architecture={})
    return checkpoint_of(run, "latest", ranks)


def test_ranks_use_one_checkpoint_of_a_run_that_goes_on(tmp_path: Path) -> None:
    one, other = children(2, tmp_path / "ranks", chosen, tmp_path)
    assert one == other and one.name == "update-000000"


def files_of(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}


def test_two_ranks_evaluate_and_generate_what_one_does(uninterrupted: Path, tmp_path: Path) -> None:
    found = {}
    for count in (1, 2):
        numbers, videos = tmp_path / f"evaluation-{count}.json", tmp_path / f"videos-{count}"
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a red circle moves right\na blue square moves left\na red square moves left\n")
        for command in (
            ["evaluate", uninterrupted, "--out", numbers],
            ["generate", "--run", uninterrupted, "--prompts", prompts, "--out", videos],
        ):
            printed = on_ranks(count, command, tmp_path)
            assert [code for code, _ in printed] == [0] * count, printed
        found[count] = json.loads(numbers.read_text()), files_of(videos)
    (alone, videos), (shared, others) = found[1], found[2]
    assert alone["held_out"] == shared["held_out"] and alone["scored"] == shared["scored"]
    assert len(videos) > 6 and videos == others


def assert_last_update_is_saved(directory: Path) -> None:
    """The newest checkpoint can be read whole and is that of the last update in the metrics."""
    point, records = resume_point(directory / "checkpoints"), read_metrics(directory / "metrics.jsonl")
    assert point is not None and checkpoint_update(point) == records[-1]["update"]


def torchrun(command: Sequence[str | Path], log: Path) -> subprocess.Popen[bytes]:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    with log.open("wb") as file:
        return subprocess.Popen(
            [*launcher, "-m", "kvpo", *map(str, command)], stdout=file, stderr=file, start_new_session=True
        )


@pytest.mark.slow
@pytest.mark.parametrize("send", [os.kill, os.killpg])
def test_ctrl_c_on_torchrun_saves_and_the_same_command_goes_on(
    send: Callable[[int, int], None], arguments: list[str | Path], uninterrupted: Path, tmp_path: Path
) -> None:
    """The signal reaches torchrun, or its process group as from a terminal, and torchrun passes it on."""
    directory, log = tmp_path / "run", tmp_path / "log"
    command = [*arguments, "--out", directory, "--resume"]
    process = torchrun(command, log)
    processes.wait_for(lambda: processes.lines_in(directory / "metrics.jsonl") >= 2, Alive(process))
    send(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) != 0
    assert_last_update_is_saved(directory)
    printed = log.read_text()
    assert "saved up to update" in printed and printed.count("kvpo: interrupted") == 2
    ours, _, torchruns = printed.partition("Traceback")  # torchrun says like this that it got a signal
    assert torchruns.strip().splitlines()[-1].startswith("torch.distributed.elastic") and ours
    assert "Traceback" not in torchruns and "/kvpo/" not in torchruns
    assert torchrun(command, log).wait(processes.TIME_LIMIT) == 0, log.read_text()
    assert outcome(directory) == outcome(uninterrupted)


class Alive:
    """A launched process as ``processes.wait_for`` asks about it."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def is_alive(self) -> bool:
        return self.process.poll() is None
