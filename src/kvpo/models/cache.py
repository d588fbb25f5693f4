"""Write-once frame pages and the per-stream tables that refer to them.

A *page* holds the keys and values of all layers for one clean latent frame. Pages never change; only the page
ids in a stream's table do. A fork therefore copies a list of integers, and a routed history, the anchor and a
replay are the same call with different page ids.

Shape legend: L layers, Q pages of the pool, R rows (streams batched together), F frames of the call, P frames
of the context, T tokens per frame, N heads, D head width.
"""

from collections.abc import Iterable, Sequence
from copy import copy
from dataclasses import astuple, dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PageShape:
    """Geometry of cache pages."""

    num_layers: int
    tokens: int
    num_heads: int
    head_dim: int


class FrameCache:
    """A preallocated pool of reference-counted pages."""

    def __init__(
        self,
        pages: PageShape,
        num_pages: int,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> None:
        num_layers, *page = astuple(pages)
        shape = (num_layers, num_pages, *page)
        self.keys_LQTND = torch.empty(shape, device=device, dtype=dtype)
        self.values_LQTND = torch.empty(shape, device=device, dtype=dtype)
        self._references = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))

    @property
    def num_pages(self) -> int:
        """Capacity in pages."""
        return len(self._references)

    @property
    def pages_in_use(self) -> int:
        """Pages that some stream still refers to."""
        return self.num_pages - len(self._free)

    @property
    def page_bytes(self) -> int:
        """Bytes of one page: keys and values of all layers."""
        return 2 * self.keys_LQTND[:, 0].numel() * self.keys_LQTND.element_size()

    def write(self, keys_LRFTND: Tensor, values_LRFTND: Tensor) -> list[list[int]]:
        """Store keys and values in fresh pages and return their ids ``[R][F]``, each with one reference.

        Raises MemoryError if the pool has too few free pages.
        """
        _, rows, frames = keys_LRFTND.shape[:3]
        needed = rows * frames
        if needed > len(self._free):
            raise MemoryError(
                f"frame cache: {needed} pages needed, {len(self._free)} of {self.num_pages} free; "
                "give the cache more pages or release streams"
            )
        ids = [self._free.pop() for _ in range(needed)]
        for page in ids:
            self._references[page] = 1
        index = torch.tensor(ids, device=self.keys_LQTND.device)
        # Pages are data, not graph: gradients never flow through stored history.
        self.keys_LQTND[:, index] = keys_LRFTND.detach().flatten(1, 2).to(self.keys_LQTND.dtype)
        self.values_LQTND[:, index] = values_LRFTND.detach().flatten(1, 2).to(self.values_LQTND.dtype)
        return [ids[row * frames : (row + 1) * frames] for row in range(rows)]

    def gather(self, layer: int, pages_RP: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of a layer, each ``[R, P*T, N, D]``."""
        flat = pages_RP.reshape(-1)
        keys, values = (
            pool[layer].index_select(0, flat).view(*pages_RP.shape, *pool.shape[2:]).flatten(1, 2)
            for pool in (self.keys_LQTND, self.values_LQTND)
        )
        return keys, values

    def share(self, pages: Iterable[int]) -> None:
        """Add one reference to each page."""
        for page in pages:
            assert self._references[page] > 0, "a released page cannot be shared"
            self._references[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Drop one reference from each page; a page without references becomes free."""
        for page in pages:
            assert self._references[page] > 0, "page released twice"
            self._references[page] -= 1
            if self._references[page] == 0:
                self._free.append(page)


class History:
    """The pages one stream can refer to: absolute frame -> page id, plus its sink and its memory bank.

    ``sink`` lists the frames in the sink slots (a prompt switch may move them), and ``bank`` the pages of a
    memory bank per layer. ``latest`` is the page that enters the bank next.
    """

    def __init__(self, cache: FrameCache, sink: int) -> None:
        self.cache = cache
        self.end = 0
        self.sink: tuple[int, ...] = tuple(range(sink))
        self.pages: dict[int, int] = {}
        self.bank: list[list[int]] = []
        self.latest: int | None = None

    def append(self, pages: Sequence[int]) -> None:
        """Take ownership of the pages of the next frames."""
        for page in pages:
            self.pages[self.end] = page
            self.end += 1

    def rewind(self, frame: int) -> None:
        """Go back to before ``frame``: release its page and all later ones, but keep the memory bank."""
        self.cache.release([self.pages.pop(later) for later in sorted(self.pages) if later >= frame])
        self.end = frame

    def page_ids(self, frames: Iterable[int]) -> list[int]:
        """Page ids of absolute frames. Raises KeyError for a frame that is not resident."""
        return [self.pages[frame] for frame in frames]

    def keep(self, frames: Iterable[int]) -> None:
        """Release all pages except those of ``frames`` and of the sink."""
        wanted = set(frames) | set(self.sink)
        for frame in [f for f in self.pages if f not in wanted]:
            self.cache.release([self.pages.pop(frame)])

    @property
    def bank_frames(self) -> int:
        """Frames in the memory bank."""
        return len(self.bank[0]) if self.bank else 0

    def set_bank(self, bank: list[list[int]]) -> None:
        """Replace the memory bank's page ids (one list per layer)."""
        for layer in bank:
            self.cache.share(layer)
        for layer in self.bank:
            self.cache.release(layer)
        self.bank = bank

    def record(self, page: int) -> None:
        """Make ``page`` the one that enters the memory bank next."""
        self.cache.share([page])
        if self.latest is not None:
            self.cache.release([self.latest])
        self.latest = page

    def fork(self) -> "History":
        """A second stream over the same pages; copies integers, never a tensor."""
        twin = copy(self)
        twin.pages = dict(self.pages)
        twin.bank = [list(layer) for layer in self.bank]
        self.cache.share(self.all_references())
        return twin

    def all_references(self) -> list[int]:
        """Every page id this stream holds a reference to, with repeats."""
        held = list(self.pages.values()) + [page for layer in self.bank for page in layer]
        return held if self.latest is None else [*held, self.latest]

    def release(self) -> None:
        """Release all pages; the history is empty afterwards."""
        self.cache.release(self.all_references())
        self.pages, self.bank, self.latest = {}, [], None
