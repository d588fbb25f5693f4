"""Which pages a block sees: windows, sinks, routes, re-encoding, the memory bank."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.method.routing import route_pool
from kvpo.models.cache import FrameCache, History, PageShape
from kvpo.models.deployment import (
    adopt_reencoded,
    commit_bank,
    context_size,
    deployment_context,
    reachable_frames,
    record_block,
    reencoding_context,
    routed_context,
    sink_frames,
)
from kvpo.models.settings import Deployment, WanShape
from kvpo.prompts import VideoPrompt
from tests.method.test_routing import deployment_frames, exploration_frames
from tests.published_bank import PublishedBank

LAYERS = 2


def empty_history(sink, num_pages=200):
    cache = FrameCache(PageShape(LAYERS, 1, 1, 2), num_pages)
    return History(cache, sink)


def extend(history, frames, keys=None):
    """Append frames whose keys are drawn, or given per layer as ``[F, D]``."""
    shape = (LAYERS, 1, frames, 1, 1, 2)
    if keys is None:
        generator = torch.Generator().manual_seed(history.end)
        keys = torch.randn(shape, generator=generator)
    history.append(history.cache.write(keys.expand(shape), keys.expand(shape))[0])


def frames_of(history, pages):
    """The frames behind page ids."""
    frame = {page: frame for frame, page in history.pages.items()}
    return [frame[int(page)] for page in pages]


@given(
    window=st.sampled_from([-1, 7, 9, 12, 15]),
    sink=st.integers(0, 4),
    blocks=st.integers(1, 8),
    resident=st.integers(0, 24),
)
def test_the_deployment_context_is_sink_and_window_however_little_is_kept(window, sink, blocks, resident):
    deployment, history = Deployment(block=3, window=window, sink=sink), empty_history(sink)
    for _ in range(blocks):
        expected = deployment_frames(history.end, sink=sink, window=window, block=3)
        context = deployment_context(deployment, [history])
        assert sorted(frames_of(history, context.pages[0])) == list(expected)
        assert context_size(deployment, history) == len(expected)
        assert context.start_R.tolist() == [history.end] and context.pages.dtype == torch.int64
        extend(history, 3)
        history.keep(reachable_frames(deployment, history.end, resident))
    if window == -1 or not resident:
        assert len(history.pages) == history.end
    else:
        assert len(history.pages) <= max(resident, window - 3)


@pytest.mark.parametrize(
    "fields, message",
    [
        (dict(block=0, window=12, sink=3), "stream.block: must be at least 1, got 0"),
        (dict(block=3, window=12, sink=-1), "stream.sink: must be 0 or more, got -1"),
        (
            dict(block=3, window=5, sink=3),
            r"stream.window: must be .* at least stream.sink \+ stream.block = 6, got 5",
        ),
        (dict(block=3, window=0, sink=0), "stream.window: must be .* = 3, got 0"),
    ],
)
def test_impossible_windows_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        Deployment(**fields).check()


def test_the_smallest_settings_are_settings():
    Deployment(block=1, window=1, sink=0).check()
    WanShape(
        dim=2, num_heads=1, num_layers=1, ffn_dim=1, freq_dim=2, text_len=1, text_dim=1, channels=1,
        patch_size=(1, 1, 1), latent_height=1, latent_width=1,
    ).check()  # fmt: skip


def test_a_routed_row_sees_sink_routes_and_recent_frames_beside_an_unrouted_one():
    deployment, history = Deployment(block=3, window=12, sink=3), empty_history(3)
    extend(history, 18)
    routed = history.page_ids([5, 5, 9])
    context = routed_context(deployment, [history, history], [routed, None], recent=3)
    assert tuple(frames_of(history, context.pages[0])) == exploration_frames(18, (5, 5, 9), sink=3, recent=3)
    assert frames_of(history, context.pages[1]) == [0, 1, 2, *range(12, 18)]
    assert context_size(deployment, history, routed, 3) == 9


def test_routing_the_most_recent_frames_is_the_deployment_context():
    for window, sink in ((12, 3), (12, 0), (9, 3), (-1, 0), (-1, 3)):
        deployment, history = Deployment(block=3, window=window, sink=sink), empty_history(sink)
        extend(history, 18)
        past = 18 - sink if window == -1 else window - sink - 3
        routed = history.page_ids(range(18 - past, 15))
        both = routed_context(deployment, [history, history], [routed, None], recent=3)
        assert torch.equal(both.pages[0], both.pages[1])


def test_reencoding_sees_the_sink_and_the_window_of_its_own_frames():
    deployment, history = Deployment(block=3, window=12, sink=3), empty_history(3)
    extend(history, 18)
    context, frames = reencoding_context(deployment, [history])
    assert frames == 12 and context.own_frames == 9 and context.start_R.tolist() == [6]
    assert frames_of(history, context.pages[0]) == [0, 1, 2]


def test_reencoding_from_the_start_or_with_a_new_sink_sees_its_own_frames_only():
    keep, reset = (Deployment(block=3, window=12, sink=3, keep_sink_at_switch=k) for k in (True, False))
    for deployment, end in ((keep, 9), (keep, 12), (reset, 18)):
        history = empty_history(3)
        extend(history, end)
        context, frames = reencoding_context(deployment, [history])
        assert frames == min(12, end) and context.own_frames is None
        assert context.pages.shape == (1, 0)


def test_reencoded_pages_take_the_place_of_the_old_ones():
    for keep in (True, False):
        deployment = Deployment(block=3, window=12, sink=3, keep_sink_at_switch=keep)
        history = empty_history(3)
        extend(history, 18)
        history.keep(reachable_frames(deployment, history.end, 12))
        assert sorted(history.pages) == [0, 1, 2, *range(9, 18)]
        keys_LFTND = torch.arange(12.0).view(1, 12, 1, 1, 1).expand(LAYERS, 12, 1, 1, 2)
        adopt_reencoded(deployment, history, keys_LFTND, -keys_LFTND)
        keys, values = history.cache.gather(1, torch.tensor([history.page_ids(range(6, 18))]))
        assert keys[0, :, 0, 0].tolist() == [*range(12)] and torch.equal(values, -keys) and history.end == 18
        assert history.sink == ((0, 1, 2) if keep else (6, 7, 8))
        sink, context = [0, 1, 2] if keep else [6, 7, 8], deployment_context(deployment, [history])
        assert frames_of(history, context.pages[0]) == [*sink, *range(12, 18)]
        history.keep(reachable_frames(deployment, history.end, 12))
        assert history.cache.pages_in_use == len(history.pages) == 12
        history.release()
        assert history.cache.pages_in_use == 0


@pytest.mark.parametrize("sink, window, end", [(6, 12, 15), (3, 10, 12), (3, 12, 15)])
def test_a_kept_sink_keeps_its_pages_wherever_reencoding_begins(sink, window, end):
    """Also where the re-encoded frames begin inside the sink: a long sink, a window off the block grid."""
    deployment, history = Deployment(block=3, window=window, sink=sink), empty_history(sink)
    extend(history, end)
    before = history.page_ids(range(sink))
    _, frames = reencoding_context(deployment, [history])
    keys_LFTND = torch.arange(end - frames, end).view(1, frames, 1, 1, 1).expand(LAYERS, frames, 1, 1, 2)
    adopt_reencoded(deployment, history, keys_LFTND, -keys_LFTND)
    assert history.page_ids(range(sink)) == before
    rewritten = range(max(sink, end - frames), end)
    keys, _ = history.cache.gather(0, torch.tensor([history.page_ids(rewritten)]))
    assert keys[0, :, 0, 0].tolist() == [*rewritten]
    assert history.cache.pages_in_use == end
    history.release()
    assert history.cache.pages_in_use == 0


def grown_bank(deployment, blocks, keys, text):
    """The bank's frames per layer before every block, from first-frame keys ``[L, D]`` of each block."""
    history, seen = empty_history(deployment.sink), []
    for block in range(blocks):
        commit_bank(deployment, history, text)
        owners = {page: frame for frame, page in history.pages.items()}
        seen.append([[owners[page] for page in layer] for layer in history.bank])
        first = keys[block].view(LAYERS, 1, 1, 1, 1, 2)
        extend(history, 3, first.expand(LAYERS, 1, 3, 1, 1, 2))
        record_block(deployment, history)
    history.release()
    assert history.cache.pages_in_use == 0
    return seen


def along(*weights):
    """Keys whose agreement with the text direction [1, 0] is given per block, opposite in the two layers."""
    return [torch.tensor([[weight, 1.0], [-weight, 1.0]]) for weight in weights]


def text(layer):
    return torch.tensor([1.0, 0.0]).expand(1, 4, 1, 2)


def test_the_bank_takes_every_third_block_and_keeps_what_the_text_matches():
    deployment = Deployment(block=3, window=12, sink=3, bank_size=3)
    weights = along(1, 9, 9, 3, 9, 9, 2, 9, 9, 0, 9, 9, 5, 9)
    seen = grown_bank(deployment, 14, weights, text)
    assert seen[0] == [] and seen[1] == [[0], [0]] and seen[4] == [[0, 9], [0, 9]]
    assert seen[7] == seen[9] == [[0, 9, 18], [0, 9, 18]]
    # Frame 27 arrives: the first layer's keys prefer larger weights, the second layer's smaller ones.
    assert seen[10] == seen[12] == [[9, 18, 27], [0, 18, 27]]
    assert seen[13] == [[9, 18, 36], [27, 0, 36]]


def test_the_published_bank_takes_the_same_frame_again():
    published = PublishedBank(block=3, window=12, sink=3, bank_size=3)
    seen = grown_bank(published, 12, along(1, 9, 9, 3, 9, 9, 2, 9, 9, 7, 9, 9), text)
    assert seen[10][0] == [9, 18, 27] and seen[11][0] == [27, 9, 27]


def test_single_prompt_streams_record_every_block():
    deployment = Deployment(block=3, window=12, sink=3, bank_size=3, bank_every_block=True)
    seen = grown_bank(deployment, 9, along(*range(9)), text)
    assert [layers[0] for layers in seen[1:]] == [
        [0], [3], [6], [6, 9], [6, 12], [6, 15], [6, 15, 18], [6, 15, 21],
    ]  # fmt: skip


@pytest.mark.parametrize("as_published", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
def test_the_bank_keeps_the_frames_whose_keys_agree_most_with_the_text(layers, as_published):
    """The mean over pairs of text and frame tokens, over heads, with several of each."""
    draws = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(shape, generator=draws, dtype=torch.float64)

    settings = dict(block=3, window=12, sink=3, bank_size=3, bank_every_block=True)
    deployment = (PublishedBank if as_published else Deployment)(**settings)
    orders = set()
    for _ in range(20):
        cache = FrameCache(PageShape(layers, 2, 3, 4), 50, dtype=torch.float64)
        history, words = History(cache, 3), drawn(layers, 5, 3, 4)
        keys = drawn(layers, 1, 12, 2, 3, 4)
        history.append(cache.write(keys, keys)[0])
        candidates = history.page_ids([0, 3, 6])
        history.set_bank([candidates] * layers)
        history.record(history.pages[9])
        history.end = 30  # late enough for the bank to be full
        commit_bank(deployment, history, words.unsqueeze(1).__getitem__)
        for layer in range(layers):
            scores = [torch.einsum("lnd,tnd->", words[layer], keys[layer, 0, frame]) for frame in (0, 3, 6)]
            best = sorted(range(3), key=lambda n: -scores[n])[:2]
            assert history.bank[layer] == [*(candidates[n] for n in best), history.pages[9]]
            orders.add(tuple(best))
        history.end = 12
        assert context_size(deployment, history) == 3 + 3 + 6
    assert len(orders) > 3


def test_bank_pages_outlive_the_window():
    deployment, history = Deployment(block=3, window=12, sink=3, bank_size=3), empty_history(3)
    for _ in range(6):
        commit_bank(deployment, history, text)
        extend(history, 3)
        record_block(deployment, history)
        history.keep(reachable_frames(deployment, history.end, 12))
    commit_bank(deployment, history, text)
    context = deployment_context(deployment, [history])
    assert context.pages.shape == (LAYERS, 1, 3 + 2 + 6)
    assert context_size(deployment, history) == 3 + 2 + 6
    reencoding, _ = reencoding_context(deployment, [history])
    sink = history.page_ids(range(3))
    assert reencoding.pages.tolist() == [[[*sink, *layer]] for layer in history.bank]
    branch = history.fork()
    assert branch.bank == history.bank and branch.latest == history.latest
    for either in (branch, history):
        either.release()
    assert history.cache.pages_in_use == 0


@given(
    blocks=st.integers(5, 25),
    switches=st.sets(st.integers(1, 74), max_size=3),
    window=st.sampled_from([-1, 9, 12]),
    keep=st.booleans(),
)
def test_what_a_sink_will_hold_is_known_beforehand(blocks, switches, window, keep):
    """Against a history that is switched and extended; what may be routed is resident and not the sink's."""
    deployment = Deployment(block=3, window=window, sink=3, keep_sink_at_switch=keep)
    switches = tuple(sorted(s for s in switches if s < 3 * blocks))
    video = VideoPrompt(0, ("a",) * (len(switches) + 1), switches, 3 * blocks)
    history, segment = empty_history(3), 0
    for start in range(0, 3 * blocks, 3):
        if start and video.segment_at(start) != segment:
            segment, frames = video.segment_at(start), deployment.reencoded(start)
            adopt_reencoded(deployment, history, *torch.zeros(2, LAYERS, frames, 1, 1, 2))
        assert history.sink == tuple(sink_frames(deployment, video, start))
        pool = route_pool(start, sink=history.sink, recent=3, resident=21)
        assert set(pool) <= set(history.pages) - set(history.sink)
        extend(history, 3)
        history.keep(reachable_frames(deployment, history.end, 21))
