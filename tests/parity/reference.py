"""The streaming generators as their public code runs them, slot by slot.

An independent second implementation for parity tests: rolling slots and pointers instead of pages and tables,
one stream at a time, nothing shared with the package. A slot holds one frame's keys (or values) of one layer,
``[T, N, D]``; a layer's cache is a Python list of slots.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

SIGMAS = (1.0, 0.9375, 2.5 / 3.0, 0.625)
BLOCK = 3


@cache
def turns(frame: int, rows: int, columns: int, pairs: int) -> Tensor:
    """Unit complex numbers ``[rows * columns, 1, pairs]`` that rotate a frame's tokens."""
    spatial = pairs // 3
    parts = (pairs - 2 * spatial, spatial, spatial)
    angle = torch.zeros(rows, columns, pairs, dtype=torch.float64)
    for row in range(rows):
        for column in range(columns):
            at = 0
            for part, position in zip(parts, (frame, row, column), strict=True):
                frequency = 10000.0 ** (-torch.arange(part, dtype=torch.float64) / part)
                angle[row, column, at : at + part] = position * frequency
                at += part
    return torch.polar(torch.ones_like(angle), angle).reshape(rows * columns, 1, pairs)


@dataclass(frozen=True)
class Place:
    """Where a call's frames go in the slots."""

    evicted: int
    start: int
    end: int
    protected: int
    """Slots below this are not overwritten."""
    pointers_move: bool


@dataclass
class Route:
    """Frames that the blocks starting in ``[first, stop)`` see in place of the local window."""

    frames: Sequence[int]
    nearest: int
    first: int
    stop: int
    slots: dict[int, list[int]] = field(default_factory=dict)
    taken: dict[int, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)


class ReferenceStream:
    """One public-style stream over a rolling cache of ``slots`` frames."""

    def __init__(self, weights: dict[str, Tensor], meta: dict, *, num_heads: int, slots: int) -> None:
        self.weights, self.meta, self.num_heads = weights, meta, num_heads
        self.layers = 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("blocks."))
        self.dtype = weights["patch_embedding.weight"].dtype
        self.window, self.sink = meta["window"], meta["sink"]
        self.size = slots
        # None is a slot of zeros.
        self.keys: list[list[Tensor | None]] = [[None] * slots for _ in range(self.layers)]
        self.values: list[list[Tensor | None]] = [[None] * slots for _ in range(self.layers)]
        self.global_end = self.local_end = 0
        self.text: list[tuple[Tensor, Tensor] | None] = [None] * self.layers
        self.bank: list[list[tuple[Tensor, Tensor]]] = [[] for _ in range(self.layers)]
        self.bank_new: list[tuple[Tensor, Tensor] | None] = [None] * self.layers
        self.bank_end = 0
        self.route: Route | None = None

    # ---- layers ----

    def linear(self, name: str, x: Tensor) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def rms(self, name: str, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        wide = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return wide.to(x.dtype) * self.weights[f"{name}.weight"]

    def norm(self, x: Tensor, name: str | None = None) -> Tensor:
        wide = x.float() if x.dtype != torch.float64 else x
        centred = wide - wide.mean(-1, keepdim=True)
        out = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        if name is not None:
            out = out * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]
        return out.to(x.dtype)

    def heads(self, x: Tensor) -> Tensor:
        return x.reshape(len(x), self.num_heads, -1)

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keys ``[K, N, D]`` -> ``[Q, dim]``, in float32 or wider."""
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k, v = q.to(wide), k.to(wide), v.to(wide)
        weights = torch.einsum("qnd,knd->nqk", q, k).div(math.sqrt(q.shape[-1])).softmax(-1)
        return torch.einsum("nqk,knd->qnd", weights, v).flatten(1).to(self.dtype)

    def rope(self, x_TND: Tensor, frame: int) -> Tensor:
        """Rotate one frame's tokens at temporal position ``frame``, as complex numbers."""
        pairs = x_TND.shape[-1] // 2
        turn = turns(frame, *self.grid, pairs)
        as_complex = torch.view_as_complex(x_TND.double().reshape(*x_TND.shape[:-1], pairs, 2))
        return torch.view_as_real(as_complex * turn).flatten(-2).to(x_TND.dtype)

    # ---- cache ----

    def place(self, start: int, frames: int, sink_recache: bool) -> Place:
        end = start + frames
        recompute = end <= self.global_end and start > 0
        if self.window != -1 and end > self.global_end and self.local_end + frames > self.size:
            evicted = frames + self.local_end - self.size
            return Place(evicted, self.size - frames, self.size, 0, True)
        local_end = self.local_end + end - self.global_end
        protects = self.meta["model"] != "selfforcing" and not sink_recache
        protected = self.sink if recompute and protects else 0
        return Place(0, local_end - frames, local_end, protected, not recompute)

    def placed(self, slots: list, place: Place, own: Sequence[Tensor]) -> list:
        """The slots with the call's frames in them."""
        slots = list(slots)
        if place.evicted:
            del slots[self.sink : self.sink + place.evicted]
            slots += [None] * place.evicted
        for slot, frame in zip(range(place.start, place.end), own, strict=True):
            if slot >= place.protected:
                slots[slot] = frame
        return slots

    def visible_bank(self, start: int, frames: int, recache: bool) -> int:
        size = self.meta["bank_size"]
        if recache:
            return min(((start + frames) // BLOCK - 1) // 3 + 1, size)
        block = start // BLOCK
        return min(block // 3 + (0 if block % 3 == 0 else 1), size)

    def self_attention(self, layer: int, x: Tensor, start: int, place: Place, recache: bool):
        name = f"blocks.{layer}.self_attn"
        q = self.heads(self.rms(f"{name}.norm_q", self.linear(f"{name}.q", x)))
        k = self.heads(self.rms(f"{name}.norm_k", self.linear(f"{name}.k", x)))
        v = self.heads(self.linear(f"{name}.v", x))
        frames = len(x) // self.tokens
        q, k, v = list(q.split(self.tokens)), list(k.split(self.tokens)), list(v.split(self.tokens))
        relative = self.meta["relative_positions"]
        if not relative:
            q = [self.rope(part, start + n) for n, part in enumerate(q)]
            k = [self.rope(part, start + n) for n, part in enumerate(k)]
        all_k = self.placed(self.keys[layer], place, k)
        all_v = self.placed(self.values[layer], place, v)
        shown_k = [torch.zeros_like(k[0]) if part is None else part for part in all_k]
        shown_v = [torch.zeros_like(v[0]) if part is None else part for part in all_v]
        if relative:
            q = [self.rope(part, place.start + n) for n, part in enumerate(q)]
            shown_k = [self.rope(part, n) for n, part in enumerate(shown_k)]
        slots = list(zip(shown_k, shown_v, strict=True))
        routed = None
        if self.route is not None and not recache and self.route.first <= start < self.route.stop:
            routed = self.routed(layer, self.route, slots, place, start)
        visible = self.visible_bank(start, frames, recache)
        shown = self.shown(slots, place.end, self.bank[layer][:visible], routed, torch.cat(q))
        out = self.attend(
            torch.cat(q), torch.cat([part for part, _ in shown]), torch.cat([part for _, part in shown])
        )
        return self.linear(f"{name}.o", out), (all_k, all_v), (k, v)

    def shown(self, slots: list, end: int, bank: list, routed: list | None, q: Tensor) -> list:
        """Keys and values that a call attends to, its own frames being in the slots up to ``end``."""
        window, sink = self.window, self.sink
        if self.meta["model"] == "selfforcing" or not sink:
            if routed is not None and self.meta["model"] == "longlive":
                return routed + slots[end - self.route.nearest : end]
            return slots[:end] if window == -1 else slots[max(0, end - window) : end]
        first = sink if window == -1 else max(sink, end - (window - sink))
        if routed is not None:
            nearest = slots[max(first, end - self.route.nearest) : end]
            return (
                [*bank, *routed, *nearest]
                if self.meta["model"] == "memflow"
                else [*slots[:sink], *routed, *nearest]
            )
        everywhere = [*slots[:sink], *bank]
        if self.meta["sparse_activation"]:
            everywhere = self.sparse(q, everywhere)
        return everywhere + slots[first:end]

    def sparse(self, q: Tensor, shown: list[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
        """Per head, the three frames whose mean key agrees best with the mean query."""
        if len(shown) <= 3:
            return shown
        keys: list[list[Tensor]] = [[] for _ in range(3)]
        values: list[list[Tensor]] = [[] for _ in range(3)]
        for head in range(self.num_heads):
            mean_q = q[:, head].mean(0)
            scores = torch.stack([(mean_q * k[:, head].mean(0)).sum() for k, _ in shown])
            for slot, frame in enumerate(sorted(scores.topk(3).indices.tolist())):
                keys[slot].append(shown[frame][0][:, head])
                values[slot].append(shown[frame][1][:, head])
        return [(torch.stack(k, 1), torch.stack(v, 1)) for k, v in zip(keys, values, strict=True)]

    def routed(self, layer: int, route: Route, slots: list, place: Place, start: int) -> list:
        """The routed frames: of LongLive taken from the slots at the window's first call and kept from then
        on; of MemFlow the same slots, read anew at every call."""
        if layer not in route.slots:
            assert start == route.first
            ends = place.end, start + BLOCK
            route.slots[layer] = [f if f < self.sink else ends[0] - (ends[1] - f) for f in route.frames]
            assert all(n >= self.sink or n in route.frames for n in route.slots[layer])
            route.taken[layer] = [slots[n] for n in route.slots[layer]]
        if self.meta["model"] == "memflow":
            return [slots[n] for n in route.slots[layer]]
        return route.taken[layer]

    # ---- one call ----

    def call(
        self,
        x_FCHW: Tensor,
        sigma: float,
        prompt_LD: Tensor,
        start: int,
        *,
        write: bool = True,
        commit: bool = False,
        record: bool = False,
        recache: bool = False,
        sink_recache: bool = False,
    ) -> Tensor:
        """One forward pass: velocity ``[F, C, H, W]``; ``write`` leaves the call's keys in the slots."""
        frames, channels, height, width = x_FCHW.shape
        kernel = self.weights["patch_embedding.weight"]
        ph, pw = kernel.shape[3:]
        self.grid = (height // ph, width // pw)
        self.tokens = self.grid[0] * self.grid[1]
        patches = x_FCHW.to(self.dtype).reshape(frames, channels, self.grid[0], ph, self.grid[1], pw)
        patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(frames * self.tokens, -1)
        x = patches @ kernel.flatten(1).T + self.weights["patch_embedding.bias"]
        width_in = self.weights["time_embedding.0.weight"].shape[1]
        angle = 1000.0 * sigma * 10000.0 ** (-torch.arange(width_in // 2, dtype=torch.float64) * 2 / width_in)
        sinusoid = torch.cat([angle.cos(), angle.sin()]).to(self.dtype)
        silu = torch.nn.functional.silu
        e = self.linear("time_embedding.2", silu(self.linear("time_embedding.0", sinusoid)))
        e0 = self.linear("time_projection.1", silu(e)).reshape(6, -1)
        text = torch.nn.functional.gelu(
            self.linear("text_embedding.0", prompt_LD.to(self.dtype)), approximate="tanh"
        )
        text = self.linear("text_embedding.2", text)
        if commit and self.meta["bank_size"] and self.bank_end:
            self.commit_bank()
        place = self.place(start, frames, sink_recache)
        updates = []
        for layer in range(self.layers):
            block = f"blocks.{layer}"
            m = self.weights[f"{block}.modulation"][0] + e0
            attended, slots, own = self.self_attention(
                layer, self.norm(x) * (1 + m[1]) + m[0], start, place, recache
            )
            updates.append((slots, own))
            x = x + m[2] * attended
            x = x + self.cross_attention(layer, self.norm(x, f"{block}.norm3"), text)
            hidden = self.linear(f"{block}.ffn.0", self.norm(x) * (1 + m[4]) + m[3])
            x = x + m[5] * self.linear(f"{block}.ffn.2", torch.nn.functional.gelu(hidden, approximate="tanh"))
        if write:
            self.write(updates, place, start + frames, record)
        m = self.weights["head.modulation"][0] + e
        out = self.linear("head.head", self.norm(x) * (1 + m[1]) + m[0])
        out = out.reshape(frames, *self.grid, ph, pw, channels).permute(0, 5, 1, 3, 2, 4)
        return out.reshape(frames, channels, height, width)

    def cross_attention(self, layer: int, x: Tensor, text: Tensor) -> Tensor:
        name = f"blocks.{layer}.cross_attn"
        if self.text[layer] is None:
            self.text[layer] = (
                self.heads(self.rms(f"{name}.norm_k", self.linear(f"{name}.k", text))),
                self.heads(self.linear(f"{name}.v", text)),
            )
        q = self.heads(self.rms(f"{name}.norm_q", self.linear(f"{name}.q", x)))
        return self.linear(f"{name}.o", self.attend(q, *self.text[layer]))

    def write(self, updates: list, place: Place, end: int, record: bool) -> None:
        for layer, ((keys, values), (own_k, own_v)) in enumerate(updates):
            self.keys[layer], self.values[layer] = keys, values
            if record:
                self.bank_new[layer] = (own_k[0], own_v[0])
        if place.pointers_move:
            self.global_end, self.local_end = end, place.end
        if record:
            self.bank_end = (end // BLOCK - 1) // 3 + 1

    def commit_bank(self) -> None:
        size = self.meta["bank_size"]
        for layer in range(self.layers):
            bank, new = self.bank[layer], self.bank_new[layer]
            if self.bank_end <= size:
                self.bank[layer] = [*bank[: self.bank_end - 1], new]
                continue
            scores = torch.zeros(size, dtype=self.dtype)
            if self.text[layer] is not None:
                text = self.text[layer][0].transpose(0, 1)
                for n, (keys, _) in enumerate(bank):
                    pairs = text @ keys.permute(1, 2, 0) / math.sqrt(keys.shape[-1])
                    scores[n] = pairs.mean(1).mean(0).mean(0)
            self.bank[layer] = [*(bank[n] for n in scores.topk(size - 1).indices.tolist()), new]

    def switch(self, clean_TCHW: Tensor, prompt_LD: Tensor) -> None:
        """Take over a new prompt before the block at the end of ``clean``: re-encode its last frames."""
        end = len(clean_TCHW)
        keep = self.meta["keep_sink_at_switch"]
        if not keep:
            for slots in (*self.keys, *self.values):
                slots[:] = [None] * len(slots)
        self.text = [None] * self.layers
        frames = end if self.window == -1 else min(self.window, end)
        self.call(
            clean_TCHW[-frames:], 0.0, prompt_LD, end - frames,
            commit=True, recache=True, sink_recache=not keep and self.meta["model"] != "memflow",
        )  # fmt: skip
        self.text = [None] * self.layers


def solve(
    stream: ReferenceStream, noises: dict[str, Tensor], prompt_LD: Tensor, start: int
) -> tuple[Tensor, list[Tensor]]:
    """One block by re-noising: clean latents and the velocity of every step."""
    every_call_writes = stream.meta["model"] != "memflow"
    x, velocities = noises["initial"].to(stream.dtype), []
    for step, sigma in enumerate(SIGMAS):
        velocity = stream.call(x, sigma, prompt_LD, start, write=every_call_writes, commit=step == 0)
        velocities.append(velocity)
        x = (x.double() - sigma * velocity.double()).to(stream.dtype)
        if step + 1 < len(SIGMAS):
            x = noised(x, noises[f"renoise {step + 1}"], SIGMAS[step + 1])
    return x, velocities


def noised(clean: Tensor, noise: Tensor, sigma: float) -> Tensor:
    """(1 - sigma) x0 + sigma eps in float32, in the clean latents' type."""
    wide = clean if clean.dtype == torch.float64 else clean.float()
    return ((1 - sigma) * wide + sigma * noise.to(wide)).to(clean.dtype)


def context_pass(stream: ReferenceStream, clean: Tensor, prompt_LD: Tensor, start: int) -> None:
    """The clean pass of a block; MemFlow's bank remembers its first frame."""
    every_block = stream.meta["bank_every_block"]
    record = bool(stream.meta["bank_size"]) and (every_block or start // BLOCK % 3 == 0)
    stream.call(clean, 0.0, prompt_LD, start, record=record)


def generate(
    stream: ReferenceStream,
    tape,
    prompts: Sequence[Tensor],
    segments: Sequence[int],
    clean_TCHW: Tensor,
    num_frames: int,
    *,
    context_noise: float = 0.0,
    observe=lambda block, velocities: None,
) -> Tensor:
    """Continue ``clean`` to ``num_frames`` frames: all latents. ``segments`` names every block's prompt.

    ``tape(block, kind)`` gives ``initial``, ``renoise 1`` to ``3`` and, with context noise, ``context``.
    """
    for start in range(len(clean_TCHW), num_frames, BLOCK):
        block = start // BLOCK
        segment = segments[block]
        if block and segment != segments[block - 1]:
            stream.switch(clean_TCHW, prompts[segment])
        kinds = ["initial", "renoise 1", "renoise 2", "renoise 3"]
        noises = {kind: tape(block, kind) for kind in kinds}
        clean, velocities = solve(stream, noises, prompts[segment], start)
        observe(block, velocities)
        seen = noised(clean, tape(block, "context"), context_noise) if context_noise else clean
        context_pass(stream, seen, prompts[segment], start)
        clean_TCHW = torch.cat([clean_TCHW, clean])
    return clean_TCHW
