"""The baseline of the engine benchmark: one branch at a time, each with its own copy of the cache.

This is the obvious first implementation. A branch owns contiguous keys and values, cloned from the root's
at the fork; the transformer runs one state of one branch at a time; the clean pass writes into the branch's
copy. Transformer, solver, noise, routes and residual are the engine's own: both arms do the same arithmetic.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kvpo.engine.explorers import Member
from kvpo.engine.generator import StreamingGenerator, TextRows
from kvpo.engine.rollout import Group
from kvpo.engine.stream import Stream, denoise_block, text_of
from kvpo.method.routing import visible_frames
from kvpo.models.cache import History


@dataclass
class CopiedCache:
    """Contiguous keys and values ``[L, slots, T, N, D]`` of one stream."""

    keys: Tensor
    values: Tensor
    slots: dict[int, int]
    """Absolute frame -> slot."""
    end: int

    @classmethod
    def of(cls, history: History) -> "CopiedCache":
        """The resident frames of a history, laid out one after another."""
        frames = sorted(history.pages)
        pages = torch.tensor(history.page_ids(frames))
        slots = {frame: slot for slot, frame in enumerate(frames)}
        cache = history.cache
        return cls(cache.keys_LQTND[:, pages], cache.values_LQTND[:, pages], slots, history.end)

    @property
    def bytes(self) -> int:
        """Memory of the keys and values."""
        return self.keys.nbytes + self.values.nbytes

    def copy(self, room: int) -> "CopiedCache":
        """A branch's own cache: everything is cloned, with free slots for ``room`` more frames."""
        layers, held, *page = self.keys.shape

        def cloned(source: Tensor) -> Tensor:
            target = source.new_empty(layers, held + room, *page)
            target[:, :held] = source
            return target

        return CopiedCache(cloned(self.keys), cloned(self.values), dict(self.slots), self.end)

    def context(self, frames: Sequence[int]) -> "SlotContext":
        """The keys and values of a block that attends to these frames."""
        return SlotContext(self, _runs([self.slots[frame] for frame in frames]), torch.tensor([self.end]))

    def append(self, keys_LRFTND: Tensor, values_LRFTND: Tensor) -> None:
        """Append the next frames."""
        frames = keys_LRFTND.shape[2]
        first = len(self.slots)
        self.keys[:, first : first + frames] = keys_LRFTND[:, 0]
        self.values[:, first : first + frames] = values_LRFTND[:, 0]
        self.slots |= {self.end + n: first + n for n in range(frames)}
        self.end += frames


@dataclass(frozen=True)
class SlotContext:
    """Slices of a copied cache, then the call's own frames: a concatenation without a gather."""

    cache: CopiedCache
    runs: tuple[slice, ...]
    start_R: Tensor

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, None]:
        keys = [self.cache.keys[layer, run].flatten(0, 1)[None] for run in self.runs]
        values = [self.cache.values[layer, run].flatten(0, 1)[None] for run in self.runs]
        return torch.cat([*keys, k], 1), torch.cat([*values, v], 1), None


def _runs(slots: Sequence[int]) -> tuple[slice, ...]:
    """Consecutive slots as slices."""
    runs: list[slice] = []
    for slot in slots:
        if runs and runs[-1].stop == slot:
            runs[-1] = slice(runs[-1].start, slot + 1)
        else:
            runs.append(slice(slot, slot + 1))
    return tuple(runs)


@dataclass(frozen=True)
class OneByOne:
    """Generator, roots and caches of the loops below."""

    generator: StreamingGenerator
    roots: Sequence[Stream]
    caches: Sequence[CopiedCache] = field(default=())

    @classmethod
    def of(cls, generator: StreamingGenerator, roots: Sequence[Stream]) -> "OneByOne":
        """Copy every root's history into a contiguous cache, once."""
        return cls(generator, roots, [CopiedCache.of(root.history) for root in roots])

    def text(self, group: int) -> TextRows:
        """The text of a root's current segment, as a batch of one."""
        return text_of([self.roots[group]])

    def deployed(self, cache: CopiedCache) -> SlotContext:
        """The deployment context of the next block."""
        deployment = self.generator.deployment
        sink, local = visible_frames(cache.end, range(deployment.sink), deployment.local_past)
        return cache.context([*sink, *local])

    def roll_out(
        self,
        members: Sequence[Member],
        *,
        blocks: int,
        tail_blocks: int,
        recent: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """States and velocities ``[R, P, S, F, C, H, W]`` and clean latents ``[R, T, C, H, W]``."""
        states, velocities, clean = [], [], []
        for member in members:
            group, routes = member.group, member.routes
            cache = self.caches[group].copy((blocks + tail_blocks) * self.generator.block)
            text = self.text(group)
            trajectories = []
            for block in range(blocks + tail_blocks):
                context: Any = self.deployed(cache)  # not of the generator's own page type
                if routes is not None and block < blocks:
                    routed = [slot.frame for slot in routes[block]]
                    sink, local = visible_frames(cache.end, range(self.generator.deployment.sink), recent)
                    context = cache.context([*sink, *sorted(routed), *local])
                one, noise = self.generator, self._noise(group, cache.end)
                with torch.no_grad():
                    trajectory = denoise_block(one, noise.__getitem__, text, context, one.step, one.sigmas)
                cache.append(*self.generator.encode(trajectory.clean_RFCHW, text, context))
                trajectories.append(trajectory)
            window = trajectories[:blocks]
            states.append(torch.stack([t.states_RSFCHW[0] for t in window]))
            velocities.append(torch.stack([t.velocities_RSFCHW[0] for t in window]))
            clean.append(torch.cat([t.clean_RFCHW[0] for t in trajectories]))
        return torch.stack(states), torch.stack(velocities), torch.stack(clean)

    def _noise(self, group: int, start: int) -> dict[str, Tensor]:
        """The tape's tensors of one block; the embedded generator's solver needs only the first."""
        assert not self.generator.step.draws and not self.generator.context_noise
        root = self.roots[group]
        return {"initial": root.tape(root.prompt.id, start // self.generator.block, "initial")[None]}

    def replay(self, members: Sequence[tuple[Group, int]], coefficients: Tensor, steps: int) -> Tensor:
        """Energies ``[R]`` under the deployment context; gradients of sum_g c_g E_g are accumulated."""
        generator, energies = self.generator, []
        for (group, index), coefficient in zip(members, coefficients, strict=True):
            cache = self.caches[group.index].copy(group.window_frames)
            text = self.text(group.index)
            energy = coefficient.new_zeros(())
            for block in range(group.blocks):
                context = self.deployed(cache)
                for step in range(steps):
                    state = group.trajectories.states_MPSFCHW[index, block, step]
                    own = group.trajectories.velocities_MPSFCHW[index, block, step]
                    sigma = torch.tensor([generator.sigmas[step]], dtype=torch.float32)
                    velocity = generator.velocity(state[None], sigma, text, context)
                    energy = energy + (own - velocity[0]).square().mean()
                if block < group.blocks - 1:
                    frames = slice(block * generator.block, (block + 1) * generator.block)
                    clean = group.clean_MTCHW[index, frames]
                    cache.append(*generator.encode(clean[None], text, context))
            (coefficient * energy).backward()
            energies.append(energy.detach())
        return torch.stack(energies)
