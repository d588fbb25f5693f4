"""The history that attention may see: passed as an argument, never stored in a layer."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvpo.models.cache import FrameCache

SPARSE_FRAMES = 3
"""Global frames that sparse memory activation keeps per head."""


class Context(Protocol):
    """Supplies the keys and values a layer attends to."""

    @property
    def start_R(self) -> Tensor:
        """First absolute frame of each row's call, ``[R]``."""

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values ``[R, K, N, D]`` to attend to, and a mask ``[R, 1, 1, K]`` (True: visible) or None.

        ``q``, ``k``, ``v`` are the call's own queries, keys and values in a layer, ``[R, F*T, N, D]`` each.
        """
        ...


@dataclass(frozen=True)
class PageContext:
    """Pages of a cache followed by the call's own frames.

    ``pages`` is ``[R, P]``, or ``[L, R, P]`` where layers see different frames (a memory bank).
    """

    cache: FrameCache
    pages: Tensor
    start_R: Tensor
    own_frames: int | None = None
    """Number of the call's most recent frames that are visible as keys (re-encoding); None: all."""
    sparse_pages: int = 0
    """Number of leading context frames (sink and bank) that sparse memory activation selects from; 0: off."""
    sparse_own: int = 0
    """Number of the call's leading frames to select from as well (re-encoding of the sink itself)."""
    gathered: dict[int, tuple[Tensor, Tensor]] | None = None
    """The pages' keys and values by layer, cached for further calls; None: every call gathers them again."""

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        tokens = self.cache.keys_LQTND.shape[2]
        if self.own_frames is not None:
            k, v = k[:, -self.own_frames * tokens :], v[:, -self.own_frames * tokens :]
        pages_RP = self.pages if self.pages.dim() == 2 else self.pages[layer]
        if pages_RP.shape[1] == 0:
            return k, v, None
        kept: dict[int, tuple[Tensor, Tensor]] = {} if self.gathered is None else self.gathered
        if layer not in kept:
            kept[layer] = self.cache.gather(layer, pages_RP)
        context_k, context_v = kept[layer]
        if self.sparse_pages:
            return self._read_sparse(tokens, q, (context_k.to(k.dtype), context_v.to(v.dtype)), (k, v))
        return torch.cat([context_k.to(k.dtype), k], 1), torch.cat([context_v.to(v.dtype), v], 1), None

    def _read_sparse(
        self, tokens: int, q: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keep, per head, the global frames whose mean key best matches the mean query."""
        cut, own_cut = self.sparse_pages * tokens, self.sparse_own * tokens
        split = [
            (o[:, :own_cut], c[:, :cut], c[:, cut:], o[:, own_cut:])
            for c, o in zip(context, own, strict=True)
        ]
        (global_k, local_k), (global_v, local_v) = (
            (torch.cat([a, b], 1), torch.cat([c, d], 1)) for a, b, c, d in split
        )
        rows, length, heads, width = global_k.shape
        frames = length // tokens
        if frames > SPARSE_FRAMES:
            chunks = (rows, frames, tokens, heads, width)
            mean_k = global_k.view(chunks).mean(2)
            score_RFN = torch.einsum("rnd,rfnd->rfn", q.mean(1), mean_k)
            chosen_RFN = score_RFN.topk(SPARSE_FRAMES, dim=1).indices.sort(1).values
            index = chosen_RFN[:, :, None, :, None].expand(-1, -1, tokens, -1, width)
            global_k = global_k.view(chunks).gather(1, index).flatten(1, 2)
            global_v = global_v.view(chunks).gather(1, index).flatten(1, 2)
        return torch.cat([global_k, local_k], 1), torch.cat([global_v, local_v], 1), None


@dataclass(frozen=True)
class TeacherContext:
    """Clean frames of a whole batch as context, for training many blocks of many videos in one pass.

    The call's first C rows are clean blocks. In every layer, all rows attend to the keys that these rows have
    just computed, so that the context needs no second pass.
    """

    start_R: Tensor
    frames_RP: Tensor
    """Context frames of each row, ``[R, P]``: indices into all clean frames in row order (row * block +
    frame), so a route may name another video's frames; -1 hides a slot."""
    block: int
    """Frames per block."""

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        rows, slots = self.frames_RP.shape
        tokens = k.shape[1] // self.block
        index = self.frames_RP.clamp_min(0).reshape(-1)

        def context(own: Tensor) -> Tensor:
            picked = own.reshape(-1, tokens, *own.shape[2:]).index_select(0, index)
            return torch.cat([picked.view(rows, slots * tokens, *own.shape[2:]), own], 1)

        visible = self.frames_RP >= 0
        visible = torch.cat([visible, visible.new_ones(rows, self.block)], 1).repeat_interleave(tokens, 1)
        return context(k), context(v), visible[:, None, None, :]
