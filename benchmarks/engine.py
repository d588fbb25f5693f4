"""Compare batched branches over shared pages with single branches on copied caches, on the CPU.

    python benchmarks/engine.py [--quick] [--repeats N] [--threads 1 2] [--json PATH]

Uses random weights at the demo's geometry, so nothing has to be trained first. Writes Markdown to standard
output. The arms must agree (latents, energies and gradients, to 1e-5) or the benchmark stops.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from copied_caches import OneByOne
from measuring import alternated, machine, peak_pages, section, table, write_json
from torch import Tensor, nn

from kvpo.app.presets import demo
from kvpo.app.sources.common import streaming_generator
from kvpo.config import Config
from kvpo.engine.explorers import Member, Site, routes
from kvpo.engine.forks import Fork
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import SeededTape, keyed_generator
from kvpo.engine.pages import PlannedRollout, cache_pages, stream_pages
from kvpo.engine.replay import member_row, replay_context, replay_velocities
from kvpo.engine.rollout import Group, Ran, Rollout
from kvpo.engine.stream import advance, open_stream
from kvpo.method.evidence import residual_table
from kvpo.models.adapters import add_adapter, trained_parameters
from kvpo.models.causal_wan import CausalWan
from kvpo.models.deployment import reachable_frames
from kvpo.prompts import VideoPrompt

TOLERANCE = 1e-5
MIB = 2.0**20
FORK, FRAMES = 36, 60
"""The groups' fork and the length of the videos, in latent frames."""

BATCHED = "shared pages, batched"
SINGLE = "shared pages, one at a time"
COPIED = "copied caches, one at a time"


@dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement."""

    groups: int
    branches: tuple[int, ...]
    blocks: tuple[int, ...]
    lengths: tuple[int, ...]
    repeats: int


FULL = Sizes(groups=8, branches=(2, 4, 8, 16), blocks=(1, 2, 3, 5), lengths=(30, 60, 120, 240), repeats=3)
QUICK = Sizes(groups=2, branches=(2, 3), blocks=(1, 5), lengths=(18, 36), repeats=1)


@dataclass(frozen=True)
class Bench:
    """A random generator with an adapter, and prompts for it."""

    config: Config
    model: nn.Module
    generator: StreamingGenerator
    prompts: tuple[VideoPrompt, ...]
    texts: Mapping[str, Tensor]
    tape: SeededTape

    @property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """The adapter's parameters."""
        return trained_parameters(self.model)


def bench(config: Config, groups: int) -> Bench:
    """Random weights of the demo's shape, with a random adapter so that all of it gets a gradient."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # module initialisers use only the global generator
        model = CausalWan(config.model)
    model.to(torch.bfloat16 if config.optim.autocast == "bfloat16" else torch.float32)
    draws = keyed_generator("benchmark")
    optim = config.optim
    add_adapter(model, optim.lora_rank, generator=draws)
    for parameter in trained_parameters(model).values():
        parameter.data.normal_(0, 0.05, generator=draws)
    prompts = tuple(VideoPrompt(n, (f"prompt {n}",), (), FRAMES) for n in range(groups))
    size = (config.model.text_len, config.model.text_dim)
    texts = {prompt.segments[0]: torch.randn(size, generator=draws) for prompt in prompts}
    generator = streaming_generator(config, model)
    return Bench(config, model, generator, prompts, texts, SeededTape(("benchmark",), generator.block_shape))


def members_of(subject: Bench) -> list[Member]:
    """Every group's branches, routed within their own history, and its anchor."""
    site = Site(subject.generator, planned_rollout(subject), subject.tape, ("benchmark",))
    groups = range(len(subject.prompts))
    return [member for index in groups for member in (*routes(site, index), Member(index))]


def planned_rollout(subject: Bench) -> PlannedRollout:
    """A rollout whose prompts all fork at the same frame."""
    forks = [Fork(FORK, subject.config.exploration)] * len(subject.prompts)
    return PlannedRollout(subject.prompts, forks, keep_pool=True)


@contextmanager
def roots_of(subject: Bench) -> Iterator[Rollout]:
    """Streams grown to the fork; their pages are released on exit."""
    planned = planned_rollout(subject)
    cache = subject.generator.new_cache(cache_pages(subject.generator, [planned]))
    rollout = Rollout(subject.generator, planned, subject.texts, subject.tape, cache)
    rollout.grow_roots(range(len(subject.prompts)))
    yield rollout
    rollout.release()


def groups_of(rollout: Rollout, members: Sequence[Member], ran: Sequence[Ran]) -> list[Group]:
    """The rollout's groups, from their members and the members' trajectories."""
    size, following = len(members) // len(rollout.roots), iter(ran)
    starts = range(0, len(members), size)
    return [rollout.group_of(members[at : at + size], following) for at in starts]


def replay(
    subject: Bench, members: Sequence[tuple[Group, int]], coefficients: Tensor, *, rows: int
) -> Tensor:
    """Energies ``[R]`` of members, ``rows`` at a time; gradients of sum_g c_g E_g are accumulated."""
    energies = []
    for at in range(0, len(members), rows):
        batch, steps = members[at : at + rows], subject.config.objective.grad_steps
        asked = [member_row(group, index, steps) for group, index in batch]
        own = torch.stack([group.trajectories.velocities_MPSFCHW[n, :, :steps] for group, n in batch])
        with replay_context(subject.generator, asked) as context:
            velocities = replay_velocities(subject.generator, asked, context, range(own.shape[1]))
            energy = residual_table(torch.ones(own.shape[:3]), own, velocities).sum((1, 2))
            (coefficients[at : at + rows] * energy).sum().backward()
        energies.append(energy.detach())
    return torch.cat(energies)


def cleared(subject: Bench, run: Any) -> Any:
    """``run``, with gradients cleared first."""

    def arm() -> Any:
        subject.model.zero_grad(set_to_none=True)
        return run()

    return arm


def gradients_after(subject: Bench, run: Any) -> tuple[Tensor, Tensor]:
    """The energies of a replay, and the adapter's gradient as one vector."""
    energies = cleared(subject, run)()
    return energies, torch.cat([p.grad.flatten() for p in subject.trained.values() if p.grad is not None])


def agree(what: str, expected: Tensor, found: Tensor) -> float:
    """Largest difference relative to the largest value. Raises SystemExit if it exceeds the tolerance."""
    difference = float((expected - found).abs().max() / expected.abs().max())
    if not difference <= TOLERANCE:
        raise SystemExit(f"the arms disagree in {what}: {difference:.2e} > {TOLERANCE:.0e}")
    return difference


def arms_of(subject: Bench, rollout: Rollout) -> tuple[dict[str, Any], dict[str, Any]]:
    """The arms of the rollout and of the replay with backward, each run once and checked to agree."""
    config, members = subject.config, members_of(subject)
    exploration = config.exploration
    copied = OneByOne.of(subject.generator, list(rollout.roots.values()))
    counts = {name: vars(exploration)[name] for name in ("blocks", "tail_blocks", "recent")}

    def rolled_out(rows: int) -> tuple[Tensor, Tensor, Tensor]:
        ran = list(rollout.run(members, rows=rows))
        return (
            torch.stack([one.states_PSFCHW for one in ran]),
            torch.stack([one.velocities_PSFCHW for one in ran]),
            torch.stack([one.clean_TCHW for one in ran]),
        )

    rollouts = {
        BATCHED: lambda: rolled_out(0),
        SINGLE: lambda: rolled_out(1),
        COPIED: lambda: copied.roll_out(members, **counts),
    }
    expected = rollouts[BATCHED]()
    for name in (SINGLE, COPIED):
        others = rollouts[name]()
        for what, one, other in zip(("states", "velocities", "latents"), expected, others, strict=True):
            agree(f"{what} ({name})", one, other)

    kept = sum(config.objective.keep)
    trained = range(min(kept, exploration.branches) or exploration.branches)
    groups = groups_of(rollout, members, [Ran(*own) for own in zip(*expected, strict=True)])
    replayed = [(group, branch) for group in groups for branch in trained]
    coefficients = torch.randn(len(replayed), generator=keyed_generator("benchmark coefficients"))
    steps = config.objective.grad_steps
    replays = {
        BATCHED: cleared(subject, lambda: replay(subject, replayed, coefficients, rows=len(replayed))),
        SINGLE: cleared(subject, lambda: replay(subject, replayed, coefficients, rows=1)),
        COPIED: cleared(subject, lambda: copied.replay(replayed, coefficients, steps)),
    }
    energies, gradients = gradients_after(subject, replays[BATCHED])
    for name in (SINGLE, COPIED):
        found = gradients_after(subject, replays[name])
        agree(f"energies ({name})", energies, found[0])
        agree(f"gradients ({name})", gradients, found[1])
    return rollouts, replays


def compare(config: Config, groups: int, repeats: int) -> dict[str, dict[str, float]]:
    """Median seconds of every arm, for the rollout and for the replay with backward."""
    subject = bench(config, groups)
    with roots_of(subject) as rollout:
        rollouts, replays = arms_of(subject, rollout)
        return {"rollout": alternated(rollouts, repeats), "replay and backward": alternated(replays, repeats)}


def memory(config: Config, groups: int) -> dict[str, float]:
    """Bytes of keys and values for a rollout's roots and branches, by storage scheme."""
    subject = bench(config, groups)
    exploration = config.exploration
    with roots_of(subject) as rollout:
        members = members_of(subject)
        with peak_pages(rollout.cache) as peak:
            list(rollout.run(members))
        copied = OneByOne.of(subject.generator, list(rollout.roots.values()))
        roots = float(sum(cache.bytes for cache in copied.caches))
        room = (exploration.blocks + exploration.tail_blocks) * subject.generator.block
        copies = [copied.caches[member.group].copy(room).bytes for member in members]
        return {
            "shared pages in use, all branches at once": float(peak[0] * rollout.cache.page_bytes),
            "shared pages preallocated": float(rollout.cache.num_pages * rollout.cache.page_bytes),
            "copied caches, all branches at once": roots + sum(copies),
            "copied caches, one branch at a time": roots + max(copies),
        }


def grown(config: Config, repeats: int) -> dict[str, float]:
    """One group at another G or P: seconds of its rollout and of its replay with backward, and pages."""
    subject = bench(config, 1)
    deployment = subject.generator.deployment
    with roots_of(subject) as rollout, roots_of(subject) as explored:
        members = members_of(subject)
        roots = rollout.cache.pages_in_use
        with peak_pages(rollout.cache) as peak:
            ran = list(rollout.run(members))
        # A run drops frames that only routes reach before its replay; the root of the rollout must keep them.
        history = explored.roots[0].history
        history.keep(reachable_frames(deployment, history.end, max(1, deployment.sink)))
        (group,) = groups_of(explored, members, ran)
        replayed = [(group, branch) for branch in range(group.branches)]
        weights = torch.ones(len(replayed))
        arms = {
            "rollout": lambda: list(rollout.run(members)),
            "replay": cleared(subject, lambda: replay(subject, replayed, weights, rows=len(replayed))),
        }
        arms["replay"]()
        seconds = alternated(arms, repeats)
        return {
            "rollout_s": seconds["rollout"],
            "replay_s": seconds["replay"],
            "root_pages": roots,
            "pages": peak[0],
        }


def streamed(config: Config, frames: int, repeats: int) -> dict[str, float]:
    """One video that switches prompts halfway: seconds per block in the second half, and pages in use."""
    subject = bench(config, 1)
    generator, resident = subject.generator, config.exploration.resident_frames
    middle = frames // 2 // generator.block * generator.block
    texts = dict(subject.texts) | {"another": next(iter(subject.texts.values())).flip(0)}
    prompt = VideoPrompt(0, ("prompt 0", "another"), (middle,), frames)
    seconds, peaks, kept = [], [], []
    for _ in range(repeats):
        cache = generator.new_cache(stream_pages(generator, frames, resident, switches=True))
        stream = open_stream(generator, cache, prompt, texts, subject.tape)
        with peak_pages(cache) as peak:
            for _ in range(frames // generator.block // 2):
                advance(generator, [stream], resident=resident)
            blocks = (frames - stream.start) // generator.block

            def second_half(stream: Any = stream, blocks: int = blocks) -> None:
                for _ in range(blocks):
                    advance(generator, [stream], resident=resident)

            seconds.append(alternated({"half": second_half}, 1)["half"] / blocks)
        peaks.append(peak[0])
        kept.append(cache.pages_in_use)
        stream.history.release()
    return {"block_s": sorted(seconds)[len(seconds) // 2], "peak_pages": max(peaks), "pages_after": max(kept)}


def report_comparison(config: Config, sizes: Sizes, threads: Sequence[int]) -> dict[str, Any]:
    """Report seconds and ratios per number of threads, for the demo's update and for one group."""
    exploration = config.exploration
    rows, numbers = [], []
    for count in threads:
        torch.set_num_threads(count)
        for groups in dict.fromkeys((1, sizes.groups)):
            for what, seconds in compare(config, groups, sizes.repeats).items():
                batched, single, copied = (seconds[name] for name in (BATCHED, SINGLE, COPIED))
                rows.append(
                    [count, groups, what, copied, single, batched, f"{copied / batched:.2f}x",
                     f"{copied / single:.2f}x"]
                )  # fmt: skip
                numbers.append({"threads": count, "groups": groups, "what": what, "seconds": seconds})
    torch.set_num_threads(threads[0])
    kept = sum(config.objective.keep)
    section(
        "Batched branches over shared pages, against one branch at a time with copied caches",
        f"Median seconds of {sizes.repeats} alternating rounds. Rollout: {exploration.branches} branches "
        f"and an anchor per group, {exploration.blocks} routed and {exploration.tail_blocks} tail blocks "
        f"from the fork. Replay and backward: {min(kept, exploration.branches)} branches per group, "
        f"{config.objective.grad_steps} solver steps of the routed blocks.",
        table(
            ["threads", "groups", "phase", "copied, one at a time (s)", "pages, one at a time (s)",
             "pages, batched (s)", "batched over copied", "pages alone"],
            rows,
        ),
    )  # fmt: skip
    return {"comparison": numbers}


def report_memory(config: Config, sizes: Sizes) -> dict[str, Any]:
    """Report the bytes that each way of keeping histories holds."""
    held = memory(config, sizes.groups)
    least = held["shared pages in use, all branches at once"]
    section(
        "Keys and values held",
        f"{sizes.groups} groups of {config.exploration.branches} branches and an anchor, forked at frame "
        f"{FORK}.",
        table(
            ["how", "MiB", "relative to pages in use"],
            [[name, bytes_ / MIB, f"{bytes_ / least:.2f}x"] for name, bytes_ in held.items()],
        ),
    )
    return {"memory_bytes": held}


def report_growth(config: Config, sizes: Sizes) -> dict[str, Any]:
    """Measure how time and pages grow with branches, routed blocks and video length."""
    base = replace(config.exploration, branches=8)
    variants = [("branches G", g, replace(base, branches=g)) for g in sizes.branches]
    variants += [("routed blocks P", p, replace(base, blocks=p)) for p in sizes.blocks]
    rows, numbers = [], []
    for name, value, exploration in variants:
        found = grown(replace(config, exploration=exploration), sizes.repeats)
        rows.append(
            [f"{name} = {value}", found["rollout_s"], found["replay_s"], found["root_pages"], found["pages"]]
        )
        numbers.append({name: value} | found)
    section(
        "Growth with branches and routed blocks",
        "One group, batched; G = 8 and P = 2 where not varied; all branches are replayed.",
        table(["varied", "rollout (s)", "replay and backward (s)", "pages of the root", "peak pages"], rows),
    )
    lengths = {frames: streamed(config, frames, sizes.repeats) for frames in sizes.lengths}
    section(
        "Growth with video length",
        "One stream with one prompt switch, with the routing pool kept; per-block time in its second half.",
        table(
            ["latent frames", "ms per block", "peak pages in use", "pages in use at the end"],
            [
                [frames, 1000 * found["block_s"], found["peak_pages"], found["pages_after"]]
                for frames, found in lengths.items()
            ],
        ),
    )
    return {"growth": numbers, "length": lengths}


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small counts: checks the benchmark itself")
    parser.add_argument("--repeats", type=int, help="alternating rounds (default 3; quick: 1)")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2], help="torch threads (default 1 2)")
    parser.add_argument("--json", type=Path, help="write every number to this file too")
    options = parser.parse_args(arguments)
    sizes = QUICK if options.quick else FULL
    sizes = replace(sizes, repeats=options.repeats or sizes.repeats)
    config = demo()
    config = replace(config, exploration=replace(config.exploration, rows=0))  # all groups at once
    if options.quick:
        config = replace(config, exploration=replace(config.exploration, branches=2, blocks=1, tail_blocks=1))
    numbers: dict[str, Any] = {"machine": machine(), "sizes": asdict(sizes), "config": asdict(config)}
    about = numbers["machine"]
    section(
        "Engine benchmark",
        f"{about['cpu']}, {about['cores']} cores, torch {about['torch']}, load average "
        f"{about['load_average']:.1f} at the start; random weights at the demo's geometry, float32.",
    )
    numbers |= report_comparison(config, sizes, options.threads)
    numbers |= report_memory(config, sizes)
    numbers |= report_growth(config, sizes)
    write_json(options.json, numbers)


if __name__ == "__main__":
    main()
