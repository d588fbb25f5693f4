"""Measure how close a GPU runs to its limits at the real 1.3B geometry, with random weights.

    python benchmarks/gpu.py [--rows 1 2] [--repeats N] [--json PATH] [any setting of the preset]
    python benchmarks/gpu.py --tiny     the same code with tiny sizes on the CPU: a check, not a measurement

Measures streaming, rollout (G = 8, P = 5) and replay with backward. The limits are measured in the same run:
the rate of large bfloat16 matrix products, and the device's copy bandwidth. Each row of the table is compared
with the time that its arithmetic or its unavoidable traffic would take at those rates, whichever is longer.
Without a GPU, it says so and exits 0.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from measuring import given_settings, machine, section, table, write_json
from shapes import with_shape
from torch import Tensor, nn

from kvpo.app.configuration import preset
from kvpo.app.sources.common import streaming_generator
from kvpo.config import Config
from kvpo.engine.forks import Fork
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.noise import SeededTape, keyed_generator
from kvpo.engine.pages import PlannedRollout, cache_pages, stream_pages
from kvpo.engine.replay import member_row, replay_context, replay_velocities
from kvpo.engine.rollout import Group, Rollout, roll_out
from kvpo.engine.stream import advance, open_stream
from kvpo.method.evidence import residual_table
from kvpo.models.adapters import add_adapter, trained_parameters
from kvpo.models.causal_wan import CausalWan
from kvpo.plan.cost import Costs, Work, blocks_work, replay_work
from kvpo.plan.phases import Rates
from kvpo.prompts import VideoPrompt

FORK, FRAMES = 39, 147
"""A fork with a full routing pool, and the length of the reported videos, in latent frames."""
PIXEL_FRAMES = 4
"""Pixel frames per latent frame of the Wan VAE (after the first)."""
GIB = 2.0**30


@dataclass(frozen=True)
class Subject:
    """A random generator on the device, a prompt for it, and the size of the measurement."""

    config: Config
    model: nn.Module
    generator: StreamingGenerator
    prompt: VideoPrompt
    texts: Mapping[str, Tensor]
    tape: SeededTape
    fork: int

    @property
    def device(self) -> torch.device:
        return torch.device(self.generator.device)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters, including the adapter."""
        return sum(parameter.nbytes for parameter in self.model.parameters())

    @property
    def page_bytes(self) -> int:
        """Bytes of the keys and values of one frame."""
        return self.generator.page_bytes

    @property
    def costs(self) -> Costs:
        """Lower bounds on the cost of this generator's passes."""
        return Costs(self.config, self.config.model, self.weight_bytes, self.page_bytes)


@dataclass(frozen=True)
class Clock:
    """Measures wall time and peak memory of work on a device."""

    device: torch.device

    def synchronise(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def median(self, run: Callable[[], Any], repeats: int) -> float:
        """Median seconds of ``run`` after one unmeasured call."""
        run()
        taken = []
        for _ in range(repeats):
            self.synchronise()
            started = time.perf_counter()
            run()
            self.synchronise()
            taken.append(time.perf_counter() - started)
        return statistics.median(taken)

    def forget_peak(self) -> None:
        """Reset the peak."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> float:
        """Peak bytes allocated since the last reset; always 0 on a CPU."""
        return float(torch.cuda.max_memory_allocated(self.device)) if self.device.type == "cuda" else 0.0


def precision(config: Config) -> torch.dtype:
    """Dtype of the matrix products: bfloat16, or float32 for the check on a CPU."""
    return torch.float32 if config.optim.autocast == "none" else torch.bfloat16


def measured_rates(clock: Clock, dtype: torch.dtype, *, size: int, copied: int, repeats: int) -> Rates:
    """The device's rates: a ``size`` x ``size`` matrix product, and a copy of ``copied`` bytes."""
    draws = torch.Generator(clock.device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=draws, device=clock.device, dtype=dtype) for _ in range(2))
    product = clock.median(lambda: a @ b, repeats)
    source = torch.empty(copied, dtype=torch.uint8, device=clock.device)
    target = torch.empty_like(source)
    copy = clock.median(lambda: target.copy_(source), repeats)
    return Rates(2 * size**3 / product, 2 * copied / copy)


def random_transformer(config: Config) -> CausalWan:
    """Random weights on the device, in the dtype of the matrix products."""
    with torch.device("meta"):
        model = CausalWan(config.model)
    model = model.to(precision(config)).to_empty(device=config.device)
    draws = torch.Generator(config.device).manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            fan = parameter[0].numel() if parameter.dim() > 1 else 1
            parameter.normal_(0, 0.02 if parameter.dim() == 1 else fan**-0.5, generator=draws)
    return model


def subject_of(config: Config, fork: int, frames: int) -> Subject:
    """Random weights on the device, in bfloat16, with a float32 adapter to train."""
    model, draws = random_transformer(config), torch.Generator(config.device).manual_seed(1)
    optim = config.optim
    add_adapter(model, optim.lora_rank, generator=keyed_generator("benchmark"))
    model.checkpointing = optim.checkpointing
    if optim.compile:
        model.compile_blocks()
    prompt = VideoPrompt(0, ("prompt",), (), frames)
    size = (config.model.text_len, config.model.text_dim)
    texts = {"prompt": torch.randn(size, generator=draws, device=config.device)}
    generator = streaming_generator(config, model)
    return Subject(config, model, generator, prompt, texts, SeededTape(("gpu",), generator.block_shape), fork)


def measure_streaming(subject: Subject, clock: Clock, repeats: int) -> tuple[float, Work]:
    """Seconds and work of one block with a full window."""
    generator, window = subject.generator, subject.config.stream.window
    cache = generator.new_cache(
        stream_pages(generator, subject.prompt.num_frames, window, switches=bool(subject.prompt.switches))
    )
    stream = open_stream(generator, cache, subject.prompt, subject.texts, subject.tape)

    def block() -> None:
        advance(generator, [stream], resident=window)

    while stream.start < window:
        block()
    seconds = clock.median(block, repeats)
    stream.history.release()
    return seconds, blocks_work(subject.costs, 1, 1)


def measure_rollout(
    subject: Subject, clock: Clock, rows: int, repeats: int
) -> tuple[float, float, Rollout, Work]:
    """Seconds for the root, seconds for branches and anchor, the rollout, and the work of the branches."""
    exploration = replace(subject.config.exploration, rows=rows)
    made: list[Rollout] = []

    generator, of_subject = subject.generator, (subject.texts, subject.tape)
    planned = PlannedRollout([subject.prompt], [Fork(subject.fork, exploration)])

    def run() -> None:
        if made:
            made.pop().release()
        made.append(roll_out(generator, planned, *of_subject, ("gpu",)))

    def root() -> None:
        whole = replace(planned, keep_pool=True)
        cache = generator.new_cache(cache_pages(generator, [whole]))
        rollout = Rollout(generator, whole, *of_subject, cache)
        rollout.grow_roots(range(1))
        rollout.release()

    growing = clock.median(root, repeats)
    seconds = clock.median(run, repeats) - growing
    members, blocks = exploration.branches + 1, exploration.blocks + exploration.tail_blocks
    sizes = [min(rows, members - at) for at in range(0, members, rows)]
    works = [blocks_work(subject.costs, blocks, size, last=True) for size in sizes]
    total = Work(sum(work.flops for work in works), sum(work.bytes for work in works))
    return growing, seconds, made.pop(), total


def measure_replay(
    subject: Subject, clock: Clock, group: Group, rows: int, repeats: int
) -> tuple[float, Work]:
    """Seconds and work of replaying every branch with backward, ``rows`` branches at a time."""
    steps = subject.config.objective.grad_steps
    members = [member_row(group, branch, steps) for branch in range(group.branches)]
    own_GPSFCHW = group.trajectories.velocities_MPSFCHW[:, :, :steps]
    optimizer = torch.optim.AdamW(list(trained_parameters(subject.model).values()), lr=1e-5)

    def run() -> None:
        for at in range(0, len(members), rows):
            batch = members[at : at + rows]
            own = own_GPSFCHW[at : at + len(batch)]
            with replay_context(subject.generator, batch) as replay:
                velocities = replay_velocities(subject.generator, batch, replay, range(group.blocks))
                ones = torch.ones(own.shape[:3], device=own.device)
                residual_table(ones, own, velocities).sum().backward()

    run()
    optimizer.step()  # so that the optimiser's state counts in the peak
    seconds = clock.median(run, repeats)
    subject.model.zero_grad(set_to_none=True)
    steps = subject.config.objective.grad_steps
    states = rows * subject.config.exploration.blocks * steps
    return seconds, replay_work(subject.costs, len(members), rows, states, steps, backward=True)


def row_of(name: str, seconds: float, work: Work, rates: Rates, peak: float) -> list[object]:
    """One line of the table."""
    least = (work.flops / rates.flops, work.bytes / rates.bandwidth)
    return [name, seconds, *least, f"{seconds / rates.seconds(work):.2f}x", peak / GIB if peak else "-"]


def fits(subject: Subject, rows: int) -> bool:
    """True if a rollout's pages for this many rows leave a quarter of the device's free memory."""
    if subject.device.type != "cuda":
        return True
    exploration = replace(subject.config.exploration, rows=rows)
    planned = PlannedRollout([subject.prompt], [Fork(subject.fork, exploration)])
    pages = cache_pages(subject.generator, [planned])
    free, _ = torch.cuda.mem_get_info(subject.device)
    return pages * subject.page_bytes < 0.75 * free


def measure(subject: Subject, rates: Rates, rows: Sequence[int], repeats: int) -> Iterator[list[object]]:
    """Yield every line of the table as soon as it is measured."""
    clock, exploration = Clock(subject.device), subject.config.exploration
    clock.forget_peak()
    seconds, work = measure_streaming(subject, clock, 4 * repeats)
    latent = subject.config.stream.block / seconds
    name = f"one streamed block ({latent:.3g} latent, {PIXEL_FRAMES * latent:.3g} pixel frames per second)"
    yield row_of(name, seconds, work, rates, clock.peak())
    for count in rows:
        if not fits(subject, count):
            yield [f"{count} branches at a time: the pages do not fit this device", *["-"] * 5]
            continue
        clock.forget_peak()
        growing, seconds, rollout, work = measure_rollout(subject, clock, count, repeats)
        blocks = subject.fork // subject.config.stream.block
        root = f"root up to the fork, {blocks} blocks"
        name = (
            f"rollout, {exploration.branches} branches and anchor, {exploration.blocks} + "
            f"{exploration.tail_blocks} blocks, {count} at a time"
        )
        yield row_of(root, growing, blocks_work(subject.costs, blocks, 1), rates, 0.0)
        yield row_of(name, seconds, work, rates, clock.peak())
        clock.forget_peak()
        seconds, work = measure_replay(subject, clock, rollout.groups[0], count, repeats)
        name = f"replay and backward, {exploration.branches} branches, {count} at a time"
        yield row_of(name, seconds, work, rates, clock.peak())
        rollout.release()
        del rollout


def tiny(config: Config) -> Config:
    """The same settings at sizes that a CPU runs in a second."""
    config = with_shape(
        config, dim=64, num_heads=2, num_layers=2, ffn_dim=96, text_len=8, text_dim=16,
        latent_height=4, latent_width=8,
    )  # fmt: skip
    exploration = replace(config.exploration, branches=2, blocks=2, tail_blocks=1)
    return replace(
        config,
        device="cpu",
        exploration=exploration,
        optim=replace(config.optim, lora_rank=4, autocast="none"),
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tiny", action="store_true", help="tiny sizes on the CPU: checks this benchmark")
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2], help="branches at a time (1 2)")
    parser.add_argument("--repeats", type=int, default=3, help="measured rounds (default 3)")
    parser.add_argument("--json", type=Path, help="write every number to this file too")
    options, rest = parser.parse_known_args(arguments)
    if not options.tiny and not torch.cuda.is_available():
        sys.stdout.write("no CUDA device here: nothing measured (--tiny runs the same code on the CPU)\n")
        return
    config = preset("longlive-1.3b", given_settings(rest))
    config = tiny(config) if options.tiny else config
    sizes = {"size": 64, "copied": 2**16} if options.tiny else {"size": 8192, "copied": 2**32}
    subject = subject_of(config, *((12, 24) if options.tiny else (FORK, FRAMES)))
    rates = measured_rates(Clock(subject.device), precision(config), repeats=10, **sizes)
    about = machine(config.device)
    parameters = sum(parameter.numel() for parameter in subject.model.parameters())
    columns = ["section", "seconds", "arithmetic (s)", "traffic (s)", "over the limit", "peak GiB"]
    measured = {"flops": rates.flops, "bandwidth": rates.bandwidth}
    numbers = {"machine": about, "limits": measured, "config": asdict(config)}
    lines = []
    for line in measure(subject, rates, options.rows, options.repeats):
        lines.append(line)  # keeps what was measured if the run is cut off
        sys.stderr.write(f"{line[0]}: {line[1]} s, {line[4]} the limit\n")
        write_json(options.json, numbers | {"rows": [dict(zip(columns, row, strict=True)) for row in lines]})
    dtype = str(precision(config)).removeprefix("torch.")
    section(
        "GPU benchmark",
        f"{about['device']}, torch {about['torch']}: {rates.flops / 1e12:.3g} TFLOP/s in {dtype} matrix "
        f"products, {rates.bandwidth / 1e9:.3g} GB/s copying. {parameters / 1e9:.3g} billion random "
        f"parameters with the adapter, {config.model.tokens_per_frame} tokens per frame, median of "
        f"{options.repeats} rounds.",
        table(columns, lines),
    )


if __name__ == "__main__":
    main()
