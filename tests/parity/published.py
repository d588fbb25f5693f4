"""What is peculiar to the public implementations' caches, put into the package's contexts for parity runs."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import torch
from torch import Tensor

from kvpo.engine import stream as engine_stream
from kvpo.engine.stream import Stream, append_block
from kvpo.models.cache import FrameCache, History
from kvpo.models.context import PageContext
from kvpo.models.deployment import reencoding_context, routed_context
from tests.parity.fixtures import BLOCK, forgets_at_switch


@contextmanager
def published(meta: dict) -> Iterator[None]:
    """Inside, contexts have what is peculiar to the public caches.

    A prompt switch forgets what ``forgets_at_switch`` says; sink slots that no frame has filled yet are
    attended to as zeros (not by Self-Forcing); LongLive fills sink slots after the first block's once, with
    noise in them; a routed block of MemFlow sees no sink, and all of its bank.
    """

    def reencoding(deployment, histories):
        if forgets_at_switch(meta):
            for history in histories:
                forget(history, before=history.end - deployment.reencoded(history.end))
        context, frames = reencoding_context(deployment, histories)
        if frames == histories[0].end:
            context = with_empty_slots(meta, context, histories[0].cache, frames)
        return context, frames

    def routed(deployment, histories, routes, recent):
        if meta["model"] == "memflow" and routes[0] is not None:
            (history,) = histories
            sink, history.sink = history.sink, ()
            context = routed_context(replace(deployment, sparse_activation=False), histories, routes, recent)
            history.sink = sink
            return context
        context = routed_context(deployment, histories, routes, recent)
        context = with_empty_slots(meta, context, histories[0].cache, BLOCK)
        start = histories[0].end
        if meta["model"] == "longlive" and 0 < start < meta["sink"]:
            return FirstStepSink(context, min(BLOCK, meta["sink"] - start))
        return context

    def append(generator, streams, clean, text, context, **kept):
        append_block(generator, streams, clean, text, context, **kept)
        if isinstance(context, FirstStepSink):
            context.store(streams)

    with (
        patch.object(engine_stream, "reencoding_context", reencoding),
        patch.object(engine_stream, "routed_context", routed),
        patch.object(engine_stream, "append_block", append),
    ):
        yield


@dataclass
class FirstStepSink:
    """A block whose first ``own`` frames lie in sink slots: after its first solver step LongLive takes every
    call for a re-encoding, which leaves the sink slots as they are."""

    context: PageContext
    own: int
    kept: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    @property
    def start_R(self) -> Tensor:
        return self.context.start_R

    def read(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        own = self.own * self.context.cache.keys_LQTND.shape[2]
        first_k, first_v = self.kept.setdefault(layer, (k[:, :own], v[:, :own]))
        return self.context.read(
            layer, q, torch.cat([first_k, k[:, own:]], 1), torch.cat([first_v, v[:, own:]], 1)
        )

    def store(self, streams: Sequence[Stream]) -> None:
        """Put what the first step left in the slots into the pages that were just appended."""
        cache, start = self.context.cache, int(self.start_R[0])
        for row, stream in enumerate(streams):
            pages = stream.history.page_ids(range(start, start + self.own))
            for layer, (k, v) in self.kept.items():
                cache.keys_LQTND[layer, pages] = k[row].unflatten(0, (self.own, -1))
                cache.values_LQTND[layer, pages] = v[row].unflatten(0, (self.own, -1))


def with_empty_slots(meta: dict, context: PageContext, cache: FrameCache, frames: int) -> PageContext:
    """The context of a call of ``frames`` frames, zero pages standing in for empty sink slots."""
    empty = meta["sink"] - int(context.start_R[0])
    own, missing = min(frames, empty), max(0, empty - frames)
    if own <= 0 or meta["model"] == "selfforcing":
        return context
    zeros = context.pages.new_full((*context.pages.shape[:-1], missing), zero_page(cache))
    sparse = meta["sparse_activation"]
    return replace(
        context,
        pages=torch.cat([zeros, context.pages], -1),
        sparse_pages=context.sparse_pages + missing if sparse else 0,
        sparse_own=own if sparse else 0,
    )


def zero_page(cache: FrameCache) -> int:
    """A page of zeros, free to be overwritten by whatever is written next."""
    zeros = torch.zeros_like(cache.keys_LQTND[:, :1])[:, :, None]
    ((page,),) = cache.write(zeros, zeros)
    cache.release([page])
    return page


def forget(history: History, before: int) -> None:
    """Replace the pages of the frames ``before`` by zeros."""
    frames = [frame for frame in history.pages if frame < before]
    if frames:
        cache = history.cache
        zeros = torch.zeros_like(cache.keys_LQTND[:, :1])[:, :, None]
        ((page,),) = cache.write(zeros, zeros)
        for frame in frames:
            cache.share([page])
            cache.release([history.pages[frame]])
            history.pages[frame] = page
        cache.release([page])
