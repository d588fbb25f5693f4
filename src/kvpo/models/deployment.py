"""The pages that a block attends to.

These are the sink and window of LongLive, the full or rolling window of Self-Forcing, the memory bank of
MemFlow, and the routed histories of exploration.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kvpo.method.routing import visible_frames
from kvpo.models.cache import History
from kvpo.models.context import PageContext
from kvpo.models.settings import Deployment
from kvpo.prompts import VideoPrompt

RECORD_INTERVAL = 3
"""The memory bank records the first frame of every third block."""
TextKeys = Callable[[int], Tensor]
"""Cross-attention keys of a layer for a stream's prompt: layer -> [1, text_len, N, D]."""


def sink_frames(deployment: Deployment, prompt: VideoPrompt, start: int) -> range:
    """Frames in the sink slots of a stream before its block at ``start``, after any prompt switch there.

    Each switch moves the sink to the first frames that it re-encodes, unless the sink is kept or these frames
    reach back to the start of the video (see ``adopt_reencoded``).
    """
    acted = [prompt.acts_at(switch, deployment.block) for switch in prompt.switches]
    moves = [at for at in acted if at <= start and deployment.reencoded(at) < at]
    first = 0 if deployment.keep_sink_at_switch or not moves else moves[-1] - deployment.window
    return range(first, first + deployment.sink)


def deployment_context(deployment: Deployment, histories: Sequence[History]) -> PageContext:
    """The deployment context of each stream's next block; streams must see the same number of frames."""
    return routed_context(deployment, histories, [None] * len(histories), recent=0)


def routed_context(
    deployment: Deployment,
    histories: Sequence[History],
    routed_pages: Sequence[Sequence[int] | None],
    recent: int,
) -> PageContext:
    """Context of each stream's next block, routed where pages are given.

    A routed row sees sink ++ bank ++ its routed pages ++ the ``recent`` most recent past frames; a row with
    None sees its deployment context. The pages may belong to any stream of the cache (donor histories).
    """
    sinks, others = [], []
    for history, routed in zip(histories, routed_pages, strict=True):
        past = deployment.local_past if routed is None else recent
        sink, local = visible_frames(history.end, history.sink, past)
        sinks.append(history.page_ids(sink))
        others.append([*(routed or ()), *history.page_ids(local)])
    pages = _page_table(histories, sinks, others)
    return PageContext(
        cache=histories[0].cache,
        pages=pages,
        start_R=torch.tensor([history.end for history in histories], device=pages.device),
        sparse_pages=len(sinks[0]) + histories[0].bank_frames if deployment.sparse_activation else 0,
    )


def _page_table(
    histories: Sequence[History], sinks: Sequence[Sequence[int]], others: Sequence[Sequence[int]]
) -> Tensor:
    """Page ids of sink ++ bank ++ others of every row: [R, P], or [L, R, P] if there is a bank."""
    # A bank differs between layers; without one, a single empty layer stands for all.
    rows = [
        (sink, history.bank or [[]], own) for sink, history, own in zip(sinks, histories, others, strict=True)
    ]
    layers = range(len(rows[0][1]))
    table = [[[*sink, *bank[layer], *own] for sink, bank, own in rows] for layer in layers]
    device = histories[0].cache.keys_LQTND.device
    pages_LRP = torch.tensor(table, dtype=torch.int64, device=device).view(len(layers), len(rows), -1)
    return pages_LRP if histories[0].bank else pages_LRP[0]


def context_size(
    deployment: Deployment, history: History, routed_pages: Sequence[int] | None = None, recent: int = 0
) -> int:
    """Frames that the next block sees in addition to itself; streams of one forward pass must agree on it."""
    past = deployment.local_past if routed_pages is None else recent
    sink, local = visible_frames(history.end, history.sink, past)
    return len(sink) + len(routed_pages or ()) + len(local) + history.bank_frames


def reencoding_context(deployment: Deployment, histories: Sequence[History]) -> tuple[PageContext, int]:
    """Context for re-encoding the streams' last ``n`` frames under a new prompt, and ``n``.

    One call re-encodes them all. Its queries see the sink and the last ``window - sink`` frames of the call.
    If the frames reach back to the start, or the sink is to be replaced, the sink is part of the call.
    Streams must agree on that and on ``n``.
    """
    start = histories[0].end
    frames = deployment.reencoded(start)
    own_sink = frames == start or not deployment.keep_sink_at_switch
    sinks = [[] if own_sink else history.page_ids(history.sink) for history in histories]
    pages = _page_table(histories, sinks, [[]] * len(histories))
    context = PageContext(
        cache=histories[0].cache,
        pages=pages,
        start_R=torch.tensor([history.end - frames for history in histories], device=pages.device),
        own_frames=None if own_sink else frames - deployment.sink,
        sparse_pages=pages.shape[-1] if deployment.sparse_activation else 0,
        sparse_own=deployment.sink if own_sink and deployment.sparse_activation else 0,
    )
    return context, frames


def adopt_reencoded(
    deployment: Deployment, history: History, keys_LFTND: Tensor, values_LFTND: Tensor
) -> None:
    """Replace the pages of the most recent frames by re-encoded ones; the old pages are released first.

    A sink that is replaced gets the first of these frames, a sink that is kept stays. If the frames reach
    back to the start, a kept sink is re-encoded with them.
    """
    start = history.end - keys_LFTND.shape[1]
    kept = 0
    if not deployment.keep_sink_at_switch:
        history.sink = tuple(range(start, start + deployment.sink))
    elif start > 0:
        kept = sum(frame >= start for frame in history.sink)
    history.rewind(start + kept)
    history.append(history.cache.write(keys_LFTND[:, None, kept:], values_LFTND[:, None, kept:])[0])


def reachable_frames(deployment: Deployment, start: int, resident: int) -> range:
    """Frames outside the sink that the window of the block at ``start``, or later routes, may need.

    ``resident`` counts the frames kept for routing, including the sink; 0 keeps everything. Re-encoding needs
    latents, not pages.
    """
    if deployment.local_past is None or resident == 0:
        return range(start)
    span = max(deployment.local_past, resident - deployment.sink)
    return range(max(0, start - span), start)


def record_block(deployment: Deployment, history: History) -> None:
    """After a block's clean pass, make its first frame the next one for the memory bank, if it records it."""
    index = history.end // deployment.block - 1
    if deployment.bank_size and (deployment.bank_every_block or index % RECORD_INTERVAL == 0):
        history.record(history.pages[history.end - deployment.block])


def commit_bank(deployment: Deployment, history: History, text_keys: TextKeys | None) -> None:
    """Before a block, add the recorded frame to the memory bank.

    While the bank has free slots, the frame takes the next one. A full bank keeps the frames that best match
    the current prompt's text keys. ``text_keys`` None stands for empty text keys.
    """
    if not deployment.bank_size or history.latest is None:
        return
    end = max(0, history.end // deployment.block - 1) // RECORD_INTERVAL + 1
    latest = history.latest
    bank = history.bank or [[] for _ in history.cache.keys_LQTND]
    if end <= deployment.bank_size:
        history.set_bank([[*layer[: end - 1], latest] for layer in bank])
        return
    if not deployment.bank_as_published and all(layer[-1] == latest for layer in bank):
        return
    keep = deployment.bank_size - 1
    chosen = []
    for n, layer in enumerate(bank):
        cached = history.cache.keys_LQTND[n]
        keys = cached[torch.tensor(layer, device=cached.device)]
        if text_keys is None:
            score = keys.new_zeros(len(layer), dtype=torch.float32)
        else:
            score = _agreement(text_keys(n)[0], keys, in_steps=deployment.bank_as_published)
        chosen.append([*(layer[i] for i in score.topk(keep).indices.tolist()), latest])
    history.set_bank(chosen)


def _agreement(text_LND: Tensor, keys_FTND: Tensor, *, in_steps: bool) -> Tensor:
    """Agreement of frames and text, up to a factor: mean text key . frame key over tokens and heads, [F].

    The mean over all token pairs factorises. ``in_steps`` forms every pair in the keys' dtype, as published:
    in bfloat16, its rounding decides between frames that match equally well.
    """
    if in_steps:
        text = text_LND.to(keys_FTND.dtype).transpose(0, 1)
        pairs = text @ keys_FTND.flatten(0, 1).permute(1, 2, 0) * keys_FTND.shape[-1] ** -0.5
        return pairs.mean(1).mean(0).unflatten(0, keys_FTND.shape[:2]).mean(1)
    wide = torch.promote_types(keys_FTND.dtype, torch.float32)
    query_ND, keys_FND = text_LND.to(wide).mean(0), keys_FTND.to(wide).mean(1)
    return (query_ND * keys_FND).sum((-2, -1))
