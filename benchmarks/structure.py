"""Count the operations, bytes and graphs of a block and of a replay, without computing anything.

    python benchmarks/structure.py [--json PATH]

The code runs on torch's fake tensors, so the 1.3B geometry needs neither a GPU nor its memory. Two layers
stand for all, because operations are reported per layer. To compare before and after a change, run it again
with ``PYTHONPATH`` set to the other checkout's ``src``.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from engine import Bench, bench
from measuring import section, table, write_json
from shapes import with_shape
from torch import Tensor
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kvpo.app.configuration import preset
from kvpo.config import Config
from kvpo.engine.generator import StreamingGenerator
from kvpo.engine.replay import ReplayRow, replay_context, replay_velocities
from kvpo.engine.stream import Stream, advance, open_stream

LAYERS, BLOCKS = 2, 40
COPIES = (
    "_to_copy",
    "copy_",
    "_foreach_copy_",
    "clone",
    "cat",
    "stack",
    "index_select",
    "index",
    "index_put_",
)
"""Operations that only move data."""
ALLOCATIONS = ("empty", "empty_strided", "new_empty", "empty_like")


class Counted(TorchDispatchMode):
    """Counts operations that run a kernel, those of them that only move data, and their bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations = self.copies = self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        alias = func._schema.returns[0].alias_info if func._schema.returns else None
        name = func._schema.name.removeprefix("aten::")
        in_lists = func._schema.is_mutable and not func._schema.returns  # one call for many tensors
        computed = in_lists or any(isinstance(one, Tensor) for one in tree_leaves(out))
        if computed and (alias is None or alias.is_write) and name not in ALLOCATIONS:
            self.operations += 1
            self.copies += name in COPIES
            moved = [one for one in tree_leaves((args, kwargs, out)) if isinstance(one, Tensor)]
            self.bytes += sum(one.numel() * one.element_size() for one in moved)
        return out


def counted(run: Callable[[], Any], layer_calls: int) -> dict[str, float]:
    """Operations and copies per layer and call, and total bytes and matrix-product FLOPs."""
    own = torch.backends.mkldnn.flags(enabled=False)  # the FLOP counter does not know oneDNN's products
    with own, FlopCounterMode(display=False) as flops, Counted() as found:
        run()
    return {
        "operations per layer and call": found.operations / layer_calls,
        "copies per layer and call": found.copies / layer_calls,
        "GB read and written": found.bytes / 1e9,
        "TFLOP of matrix products": flops.get_total_flops() / 1e12,
    }


@contextmanager
def full_window(config: Config) -> Iterator[tuple[Bench, Stream]]:
    """A random generator's stream with a full window, on fake tensors."""
    subject = bench(config, 1)
    with FakeTensorMode(allow_non_fake_inputs=True), patch.object(StreamingGenerator, "require_finite"):
        generator = subject.generator
        cache = generator.new_cache(8 * generator.deployment.window)
        stream = open_stream(generator, cache, subject.prompts[0], subject.texts, subject.tape)
        while stream.start < generator.deployment.window:
            advance(generator, [stream])
        yield subject, stream


def structure(config: Config) -> dict[str, dict[str, float]]:
    """Count a streamed block, a replayed trajectory without gradients, and one with its backward pass."""
    steps, layers = config.objective.grad_steps, config.model.num_layers
    with full_window(config) as (subject, stream):
        generator = subject.generator

        def block() -> None:
            advance(generator, [stream.fork()])

        past = torch.zeros(2, *generator.block_shape)
        states = torch.zeros(2, steps, *generator.block_shape)
        row = ReplayRow(stream, past, states)

        def replay(gradients: bool) -> None:
            with replay_context(generator, [row]) as context, torch.set_grad_enabled(gradients):
                velocities = replay_velocities(generator, [row], context, range(2))
                if gradients:
                    velocities.square().sum().backward()

        return {
            "streamed block": counted(block, layers * (len(generator.sigmas) + 1)),
            "replay, no gradient": counted(lambda: replay(False), 2 * layers),
            "replay and backward": counted(lambda: replay(True), 2 * layers),
        }


def graphs(blocks: int) -> dict[str, int]:
    """Graphs compiled while a stream of the demo's generator grew, and the number of sizes it saw."""
    config = with_shape(preset("demo", {}), num_layers=1)
    subject = bench(config, 1)
    subject.model.compile_blocks()  # type: ignore[operator]
    generator = subject.generator
    prompt = replace(subject.prompts[0], num_frames=blocks * generator.block)
    stream = open_stream(generator, generator.new_cache(60), prompt, subject.texts, subject.tape)
    counters.clear()
    sizes = set()
    with torch.compiler.set_stance("default", force_backend="eager"):
        for _ in range(blocks):
            sizes.add(min(stream.start, generator.deployment.window))
            advance(generator, [stream], resident=generator.deployment.window)
    return {"blocks": blocks, "graphs": counters["stats"]["unique_graphs"], "window sizes": len(sizes)}


def main(arguments: Sequence[str] | None = None) -> None:
    """Count and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=BLOCKS, help=f"blocks for the graphs ({BLOCKS})")
    parser.add_argument("--json", type=Path, help="write every number to this file too")
    options = parser.parse_args(arguments)
    wan = with_shape(preset("longlive-1.3b", {"device": "cpu"}), num_layers=LAYERS)
    numbers: dict[str, Any] = {}
    for name, config in (("1.3B, bfloat16", wan), ("demo, float32", preset("demo", {}))):
        numbers[name] = structure(config)
        rows = [[what, *found.values()] for what, found in numbers[name].items()]
        columns = ["one row", *next(iter(numbers[name].values()))]
        section(f"Structure, {name}, {config.model.num_layers} layers", table(columns, rows))
    numbers["compiled"] = graphs(options.blocks)
    section(
        "Graphs of a compiled layer", table(list(numbers["compiled"]), [list(numbers["compiled"].values())])
    )
    write_json(options.json, numbers)


if __name__ == "__main__":
    main()
