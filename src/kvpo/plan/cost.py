"""Lower bounds on the work of a run's passes: arithmetic, and memory that must be read or written."""

from dataclasses import dataclass, replace

from kvpo.config import Config
from kvpo.models.settings import WanShape
from kvpo.plan.flops import (
    Call,
    adapter_flops,
    attention_flops,
    encode_flops,
    summing_flops,
    velocity_flops,
)


@dataclass(frozen=True)
class Work:
    """Lower bound on FLOPs and memory traffic."""

    flops: float
    bytes: float
    """Weights read once per forward or backward pass, pages read by every row, pages written."""

    def __add__(self, other: "Work") -> "Work":
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def times(self, count: float) -> "Work":
        """The same work ``count`` times."""
        return Work(count * self.flops, count * self.bytes)


@dataclass(frozen=True)
class Costs:
    """The cost of a generator's passes."""

    config: Config
    shape: WanShape
    weight_bytes: float
    """All parameters, including the adapter."""
    page_bytes: float
    frames: int = 0
    """Average number of past frames that an unlimited window sees; not used for a limited one."""

    @property
    def context(self) -> int:
        """Past frames that a block sees when deployed, including a full memory bank."""
        stream = self.config.stream.deployment
        past = self.frames if stream.local_past is None else stream.sink + stream.local_past
        return past + stream.bank_size

    @property
    def routed(self) -> int:
        """Past frames that a routed block sees, including a full memory bank."""
        stream, exploration = self.config.stream.deployment, self.config.exploration
        return stream.sink + exploration.routed + exploration.recent + stream.bank_size

    def call(self, rows: int, context: int | None = None) -> Call:
        """One forward pass over a block per row that sees ``context`` past frames; None: as deployed."""
        return Call(self.shape, rows, self.config.stream.block, self.context if context is None else context)

    def adapter(self, rows: int, passes: int = 1) -> float:
        """FLOPs that an adapter adds to ``passes`` forward passes with the same weights; 0 without one.

        In float32, it is added to the weights once; under autocast, it is computed beside them in every pass.
        """
        optim = self.config.optim
        if optim.autocast == "none":
            return summing_flops(self.shape, optim.lora_rank)
        return passes * self.beside(rows)

    def beside(self, rows: int) -> float:
        """FLOPs of an adapter computed beside the weights in one forward pass; 0 without one."""
        return adapter_flops(self.call(rows), self.config.optim.lora_rank)


def blocks_work(
    costs: Costs,
    blocks: int,
    rows: int,
    context: int | None = None,
    *,
    first: bool = False,
    last: bool = False,
) -> Work:
    """Generating some blocks of ``rows`` streams together: every solver step and the clean pass.

    ``context`` is the number of past frames that they see; None: as deployed. ``first``: the blocks begin
    videos, and a first block may take other solver steps. ``last``: nothing follows, so the last block has no
    clean pass.
    """
    stream, call = costs.config.stream, costs.call(rows, context)
    if first and stream.schedule_first:
        own = replace(stream, schedule=stream.schedule_first, schedule_first=())
        begun = replace(costs, config=replace(costs.config, stream=own))
        rest = blocks_work(costs, blocks - 1, rows, context, last=last)
        return blocks_work(begun, 1, rows, context) + rest
    steps = len(stream.schedule)
    read = costs.weight_bytes + rows * call.context * costs.page_bytes
    denoised = Work(steps * velocity_flops(call) + costs.adapter(rows, steps), steps * read)
    flops = steps * velocity_flops(call) + encode_flops(call) + costs.adapter(rows, steps + 1)
    written = rows * costs.config.stream.block * costs.page_bytes
    whole = Work(flops, (steps + 1) * read + written)
    return whole.times(blocks - last) + denoised.times(last)


def members_work(costs: Costs, groups: int, rows: int) -> Work:
    """Generating the members of a rollout's groups from their forks on, ``rows`` streams together.

    Branches see routed history in the window; anchors, and all members in the tail, the deployed history.
    """
    exploration = costs.config.exploration
    branches, members = groups * exploration.branches, groups * (exploration.branches + 1)
    tail = exploration.tail_blocks
    routed = blocks_work(costs, exploration.blocks, rows, costs.routed, last=not tail)
    anchors = blocks_work(costs, exploration.blocks, rows, last=not tail)
    after = blocks_work(costs, tail, rows, last=tail > 0)
    return routed.times(branches / rows) + anchors.times(groups / rows) + after.times(members / rows)


def forward_work(costs: Costs, rows: int) -> Work:
    """One forward pass over ``rows`` states."""
    flops = velocity_flops(costs.call(rows)) + costs.adapter(rows)
    return Work(flops, costs.weight_bytes + rows * costs.context * costs.page_bytes)


def backward_work(costs: Costs, rows: int) -> Work:
    """The backward pass over ``rows`` states, including the recomputation of activation checkpointing.

    Frozen matrices need only the gradient of their input, trained ones both gradients. Attention costs twice
    its forward pass.
    """
    forward, call = forward_work(costs, rows), costs.call(rows)
    attention = attention_flops(call)
    linear = velocity_flops(call) - attention
    trained = 2 * costs.beside(rows) if costs.config.optim.lora_rank else linear
    flops = velocity_flops(call) + attention + trained
    once = Work(flops, forward.bytes)
    return once + forward if costs.config.optim.checkpointing else once


def replay_work(
    costs: Costs, trajectories: int, together: int, states: int, steps: int, *, backward: bool = False
) -> Work:
    """Replaying trajectories once, ``together`` at a time with ``states`` states per forward pass.

    Their own blocks are encoded first. ``backward`` adds the backward passes.
    """
    blocks = costs.config.exploration.blocks
    clean = encode_flops(costs.call(together)) + costs.adapter(together)
    encoded = Work(clean, costs.weight_bytes + together * costs.context * costs.page_bytes)
    passes = together * blocks * steps / states
    batch = encoded.times(blocks - 1) + forward_work(costs, states).times(passes)
    if backward:
        batch += backward_work(costs, states).times(passes)
    return batch.times(trajectories / together)
