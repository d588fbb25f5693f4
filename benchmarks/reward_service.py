"""Measure the cost of a reward server, and how much of scoring overlaps with generation.

    python benchmarks/reward_service.py [--quick] [--repeats 5] [--parts throughput overlap] [--json PATH]

Both parts use a scorer that sleeps for a known time per clip, like one that waits for its own device.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import alternated, machine, reward_server, section, table, write_json
from torch import Tensor

from kvpo.app.build import build_setup
from kvpo.app.named_rewards import UserReward
from kvpo.app.presets import demo
from kvpo.config import Config
from kvpo.engine.background import in_background
from kvpo.engine.pages import cache_pages
from kvpo.engine.scoring import Clip, score_clips
from kvpo.prompts import ClipPrompt
from kvpo.rewards.protocol import Scorer
from kvpo.rewards.service.client import RemoteScorer
from kvpo.rewards.service.messages import eight_bit
from kvpo.training.collection import generate_rollout, plan_rollout
from kvpo.training.ranks import ALONE

SECONDS = "KVPO_BENCHMARK_CLIP_SECONDS"
"""Environment variable: seconds per clip in `paced`."""
MEMBERS = 9
"""Members of a group: eight branches and the anchor."""
BUSY = 4
"""Number of batches; sent two at a time, as by two processes of a run, they keep the server busy."""
BRANCHES, GROUPS = 4, 6


def paced(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """The scorer: sleeps for a fixed time per clip, then returns a number that depends on the pixels."""
    time.sleep(float(os.environ[SECONDS]) * len(prompts))
    # in double precision, because the order of a sum depends on batch and threads
    return video_BTCHW[..., ::8, ::8].double().mean((1, 2, 3, 4)).float()


def paced_rounding(video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> Tensor:
    """A scorer that rounds every pixel to 8 bits, as HPSv3 and VideoAlign do."""
    time.sleep(float(os.environ[SECONDS]) * len(prompts))
    return eight_bit(video_BTCHW[..., ::8, ::8]).double().mean((1, 2, 3, 4)).float()


paced_rounding.eight_bit = True  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Size:
    """The videos of a group as a run sends them: whole videos, and their first frames alone."""

    name: str
    frames: int
    local: int
    """Frames of the perturbed window."""
    height: int
    width: int
    dtype: torch.dtype
    costs: tuple[float, ...]
    """Seconds per clip to measure with."""
    scorer: Callable[[Tensor, Sequence[ClipPrompt]], Tensor] = paced

    @property
    def bytes_sent(self) -> int:
        """Bytes of one video."""
        width = 1 if self.scorer is paced_rounding else self.dtype.itemsize
        return self.frames * 3 * self.height * self.width * width


SIZES = (
    Size("15 frames of 32 × 32, float32", 15, 9, 32, 32, torch.float32, (0.005, 0.05, 0.2)),
    Size("33 frames of 240 × 416, float32", 33, 15, 240, 416, torch.float32, (0.05, 0.2)),
    Size("33 frames of 240 × 416, bfloat16", 33, 15, 240, 416, torch.bfloat16, (0.05, 0.2)),
    Size(
        "33 frames of 240 × 416, a scorer that rounds to 8 bits",
        33,
        15,
        240,
        416,
        torch.bfloat16,
        (0.05, 0.2),
        paced_rounding,
    ),
)


def server(cost: float, scorer: str = "paced") -> AbstractContextManager[RemoteScorer]:
    """`paced` or another scorer behind a server with as many threads as this process."""
    threads = str(torch.get_num_threads())
    return reward_server(f"reward_service:{scorer}", {SECONDS: str(cost), "OMP_NUM_THREADS": threads})


def throughput(size: Size, cost: float, repeats: int) -> dict[str, Any]:
    """Clips per second in process and through a server, which must give the same scores.

    First for a group as in a run: a local and a global clip of every member. Then for global clips alone: one
    batch, in which nothing hides the first clip's transfer, and several batches, two at a time.
    """
    generator = torch.Generator().manual_seed(0)
    shape = (MEMBERS, size.frames, 3, size.height, size.width)
    video, prompts = torch.rand(shape, generator=generator).to(size.dtype), [ClipPrompt("")] * MEMBERS
    clips = [
        (member, Clip(0, frames, ClipPrompt("")))
        for frames in (size.local, size.frames)
        for member in range(MEMBERS)
    ]
    os.environ[SECONDS] = str(cost)
    name = size.scorer.__name__
    here = UserReward(name, (name,), size.scorer)

    def group(scorer: Scorer) -> Tensor:
        return score_clips(scorer, video, clips, frames_per_latent=1)

    with server(cost, name) as remote:
        if not torch.equal(group(here), group(remote)):
            raise SystemExit("a server gave other scores than the same function here")

        def busy() -> None:
            with ThreadPoolExecutor(2) as threads:
                list(threads.map(lambda _: remote(video, prompts), range(BUSY)))

        arms = {
            "here": lambda: group(here),
            "server": lambda: group(remote),
            "batch here": lambda: here(video, prompts),
            "batch": lambda: remote(video, prompts),
            "busy": busy,
        }
        seconds = alternated(arms, repeats)
    return {
        "videos": size.name,
        "bytes of one": size.bytes_sent,
        "scorer (s per clip)": cost,
        "a group in process (clips/s)": len(clips) / seconds["here"],
        "server (clips/s)": len(clips) / seconds["server"],
        "slower by": 1 - seconds["here"] / seconds["server"],
        "one batch, slower by": 1 - seconds["batch here"] / seconds["batch"],
        "busy server, slower by": 1 - BUSY * seconds["batch here"] / seconds["busy"],
    }


def overlap_config(prompts: int) -> Config:
    """The demo with few branches and a short tail, exploring one group at a time."""
    config = demo()
    few = replace(config.exploration, branches=BRANCHES, tail_blocks=1, rows=BRANCHES + 1)
    return replace(
        config,
        exploration=few,
        optim=replace(config.optim, prompts_per_update=prompts),
        rewards=replace(config.rewards, scorers=("reward_service:paced",)),
    )


class Rollouts:
    """The same rollout repeated, with its scores computed in different ways."""

    def __init__(self, config: Config, scorer: Any) -> None:
        setup = build_setup(config)
        self.calls: list[int] = []
        self.setup = replace(setup, judges=replace(setup.judges, scorer=scorer))
        self.planned = plan_rollout(self.setup, 0)

    def generated(self, submit: Callable[[Callable[[], Any]], Future[Any]]) -> Any:
        """Generate, pass every group to ``submit``, wait for the scores, and release the pages."""
        cache = self.setup.generator.new_cache(cache_pages(self.setup.generator, [self.planned]))
        rollout, pending = generate_rollout(self.setup, 0, self.planned, submit, cache, ALONE)
        scores = [future.result() for future in pending]
        rollout.release()
        return scores

    def alone(self) -> None:
        """Generate without scoring."""

        def never(call: Callable[[], Any]) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(None)
            return done

        self.generated(never)

    def in_turn(self) -> Any:
        """Score every group before the next one is generated."""

        def at_once(call: Callable[[], Any]) -> Future[Any]:
            done: Future[Any] = Future()
            done.set_result(call())
            return done

        return self.generated(at_once)

    def overlapped(self) -> Any:
        """Score while the next groups are generated, as in training."""
        with in_background() as submit:
            return self.generated(submit)


@dataclass
class Counted:
    """A scorer that counts its clips."""

    scorer: Any
    clips: int = 0

    @property
    def components(self) -> tuple[str, ...]:
        """Components of the wrapped scorer."""
        return self.scorer.components

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        self.clips += len(prompts)
        return self.scorer(video_BTCHW, prompts)


def overlap(config: Config, share: float, repeats: int) -> dict[str, Any]:
    """Share of scoring that overlaps with generation if scoring takes ``share`` of generation's time."""
    os.environ[SECONDS] = "0"
    counted = Counted(build_setup(config).judges.scorer)
    probe = Rollouts(config, counted)
    probe.in_turn()
    clips = counted.clips
    generation = statistics.median(timed(probe.alone) for _ in range(repeats))
    cost = share * generation / clips
    os.environ[SECONDS] = str(cost)
    with server(cost) as remote:
        here, there = Rollouts(config, counted.scorer), Rollouts(config, remote)
        same = zip(here.in_turn(), here.overlapped(), there.overlapped(), strict=True)
        if any(not torch.equal(a.local_KM, x.local_KM) for a, *others in same for x in others):
            raise SystemExit("scores depend on where and when they are computed")
        arms = {"alone": here.alone, "in turn": here.in_turn, "overlapped": here.overlapped,
                "server": there.overlapped}  # fmt: skip
        seconds = alternated(arms, repeats)
    scoring = cost * clips
    return {
        "groups": len(here.planned.prompts),
        "clips": clips,
        "generation (s)": seconds["alone"],
        "scoring (s)": scoring,
        "in turn (s)": seconds["in turn"],
        "overlapped (s)": seconds["overlapped"],
        "hidden": (seconds["in turn"] - seconds["overlapped"]) / scoring,
        "overlapped, server (s)": seconds["server"],
        "hidden, server": (seconds["in turn"] - seconds["server"]) / scoring,
    }


def timed(call: Callable[[], Any]) -> float:
    """Seconds of one call."""
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def shown(rows: Sequence[dict[str, Any]], shares: Sequence[str]) -> str:
    """The rows as a table, with ``shares`` in per cent."""
    cells = [[f"{row[c]:.1%}" if c in shares else row[c] for c in row] for row in rows]
    return table(list(rows[0]), cells)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one size, one share, one repeat: a check")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--parts", nargs="+", choices=["throughput", "overlap"], default=["throughput", "overlap"]
    )
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    repeats = 1 if options.quick else options.repeats
    numbers: dict[str, Any] = {"machine": machine()}
    section("Machine", ", ".join(f"{name} {value}" for name, value in numbers["machine"].items()))
    if "throughput" in options.parts:
        sizes = (replace(SIZES[0], costs=(0.05,)),) if options.quick else SIZES
        numbers["throughput"] = [throughput(size, cost, repeats) for size in sizes for cost in size.costs]
        section(
            f"A group of {MEMBERS} members, in process and through a server",
            shown(
                numbers["throughput"],
                ["slower by", "one batch, slower by", "busy server, slower by"],
            ),
        )
    if "overlap" in options.parts:
        config = overlap_config(2 if options.quick else GROUPS)
        shares = (0.5,) if options.quick else (0.5, 1.0, 2.0)
        numbers["overlap"] = [overlap(config, share, repeats) for share in shares]
        section(
            "Scoring beside generation, one group's rows at a time",
            shown(numbers["overlap"], ["hidden", "hidden, server"]),
        )
    write_json(options.json, numbers)


if __name__ == "__main__":
    main()
