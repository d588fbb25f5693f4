"""What attention sees: pages, own frames, sparse activation, and whole videos at once."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from kvpo.engine.generator import TextRows
from kvpo.models.cache import FrameCache, PageShape
from kvpo.models.context import PageContext, TeacherContext
from tests.engine import tiny

TOKENS, HEADS, WIDTH = 2, 3, 4


def filled_cache(pages=8, layers=2):
    """A cache whose pages hold random numbers."""
    cache = FrameCache(PageShape(layers, TOKENS, HEADS, WIDTH), pages, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    shape = (layers, 1, pages, TOKENS, HEADS, WIDTH)
    keys, values = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    (ids,) = cache.write(keys, values)
    return cache, ids


def own(frames, rows=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, frames * TOKENS, HEADS, WIDTH)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(3)]


def frame(cache, layer, page):
    return cache.keys_LQTND[layer, page], cache.values_LQTND[layer, page]


def test_pages_come_first_in_table_order_then_the_call():
    cache, ids = filled_cache()
    q, k, v = own(2, rows=2)
    pages = torch.tensor([[ids[4], ids[1], ids[1]], [ids[0], ids[7], ids[2]]])
    keys, values, mask = PageContext(cache, pages, torch.zeros(2)).read(1, q, k, v)
    for row in range(2):
        shown = [frame(cache, 1, page) for page in pages[row]]
        assert torch.equal(keys[row], torch.cat([*(part for part, _ in shown), k[row]]))
        assert torch.equal(values[row], torch.cat([*(part for _, part in shown), v[row]]))
    assert mask is None


def test_layers_may_see_different_pages():
    cache, ids = filled_cache()
    q, k, v = own(1)
    context = PageContext(cache, torch.tensor([[[ids[3]]], [[ids[5]]]]), torch.zeros(1))
    for layer, page in ((0, ids[3]), (1, ids[5])):
        assert torch.equal(context.read(layer, q, k, v)[0][0, :TOKENS], frame(cache, layer, page)[0])


def test_pages_that_are_gathered_once_give_the_same_bits_and_gradients(monkeypatch):
    cache, ids = filled_cache()
    pages = torch.tensor([[ids[4], ids[1]], [ids[0], ids[7]]])
    plain = PageContext(cache, pages, torch.zeros(2))
    kept = replace(plain, gathered={})
    asked, gather = [], cache.gather
    monkeypatch.setattr(cache, "gather", lambda layer, pages: asked.append(layer) or gather(layer, pages))
    found = {}
    for context in (plain, kept):
        found[context is kept] = results = []
        for layer in (0, 1, 0, 1):
            q, k, v = (one.requires_grad_() for one in own(2, rows=2))
            keys, values, _ = context.read(layer, q, k, v)
            out = F.scaled_dot_product_attention(*(one.transpose(1, 2) for one in (q, keys, values)))
            results += [keys, values, *torch.autograd.grad(out.square().sum(), (q, k, v))]
            assert all(gradient.abs().max() > 0 for gradient in results[-3:])
    assert all(map(torch.equal, found[True], found[False]))
    assert asked == [0, 1, 0, 1, 0, 1] and plain.gathered is None


def test_without_pages_only_the_call_is_seen():
    cache, _ = filled_cache()
    q, k, v = own(2)
    keys, values, _ = PageContext(cache, torch.zeros(1, 0, dtype=torch.long), torch.zeros(1)).read(0, q, k, v)
    assert torch.equal(keys, k) and torch.equal(values, v)


def test_only_the_most_recent_own_frames_are_keys_when_reencoding():
    cache, ids = filled_cache()
    q, k, v = own(4)
    context = PageContext(cache, torch.tensor([[ids[0]]]), torch.zeros(1), own_frames=3)
    keys, values, _ = context.read(0, q, k, v)
    assert torch.equal(keys[:, TOKENS:], k[:, TOKENS:]) and torch.equal(values[:, TOKENS:], v[:, TOKENS:])


def chosen_by_hand(q, candidates):
    """Keys and values of the three best frames of each head, in their order of appearance."""
    keys, values = (
        torch.empty(3 * TOKENS, HEADS, WIDTH).double(),
        torch.empty(3 * TOKENS, HEADS, WIDTH).double(),
    )
    for head in range(HEADS):
        scores = [float(q[:, head].mean(0) @ k[:, head].mean(0)) for k, _ in candidates]
        best = sorted(sorted(range(len(scores)), key=scores.__getitem__)[-3:])
        keys[:, head] = torch.cat([candidates[n][0][:, head] for n in best])
        values[:, head] = torch.cat([candidates[n][1][:, head] for n in best])
    return keys, values


@pytest.mark.parametrize("sparse_own", [0, 2])
def test_sparse_activation_keeps_three_global_frames_of_each_head(sparse_own):
    cache, ids = filled_cache()
    q, k, v = own(4, rows=2)
    table = [[ids[n] for n in row] for row in ([0, 1, 2, 3, 4, 6], [7, 5, 3, 1, 0, 2])]
    context = PageContext(cache, torch.tensor(table), torch.zeros(2), sparse_pages=5, sparse_own=sparse_own)
    keys, values, _ = context.read(1, q, k, v)
    cut = sparse_own * TOKENS
    for row in range(2):
        first = list(zip(k[row, :cut].split(TOKENS), v[row, :cut].split(TOKENS), strict=True)) if cut else []
        candidates = first + [frame(cache, 1, page) for page in table[row][:5]]
        local = frame(cache, 1, table[row][5])
        expected = chosen_by_hand(q[row], candidates)
        for found, best, last, rest in zip((keys, values), expected, local, (k, v), strict=True):
            assert torch.equal(found[row], torch.cat([best, last, rest[row, cut:]]))


def test_sparse_activation_drops_nothing_of_three_frames():
    cache, ids = filled_cache()
    q, k, v = own(2)
    pages = torch.tensor([ids[:4]])
    dense = PageContext(cache, pages, torch.zeros(1)).read(0, q, k, v)
    sparse = PageContext(cache, pages, torch.zeros(1), sparse_pages=3).read(0, q, k, v)
    assert torch.equal(dense[0], sparse[0]) and torch.equal(dense[1], sparse[1])


def teacher_pass(model, clean_BTCHW, noisy_BTCHW, sigma, text_RLD, frames_CP):
    """Velocities of every noisy block in one pass, ``[B, T, C, H, W]``."""
    videos, num_frames = clean_BTCHW.shape[:2]
    blocks = num_frames // 3
    rows = torch.cat([part.unflatten(1, (blocks, 3)).flatten(0, 1) for part in (clean_BTCHW, noisy_BTCHW)])
    levels = torch.cat([torch.zeros(videos * blocks), torch.full((videos * blocks,), sigma)])
    start = (3 * torch.arange(blocks)).repeat(2 * videos)
    text_rows = torch.arange(videos).repeat_interleave(blocks).repeat(2)
    context = TeacherContext(start, frames_CP.repeat(2, 1), block=3)
    velocity = model(rows, levels, text_RLD, context, text_rows=text_rows)
    return velocity[videos * blocks :].unflatten(0, (videos, blocks)).flatten(1, 2)


def streamed(generator, clean_BTCHW, noisy_BTCHW, sigma, texts, contexts_of):
    """The same velocities block by block over pages; ``contexts_of(block)`` names (video, frame) per row."""
    videos, num_frames = clean_BTCHW.shape[:2]
    cache = generator.new_cache(videos * num_frames)
    written = {}
    velocities = []
    for block in range(num_frames // 3):
        frames = slice(3 * block, 3 * block + 3)
        pages = torch.tensor([[written[at] for at in row] for row in contexts_of(block)], dtype=torch.long)
        context = PageContext(cache, pages.view(videos, -1), torch.full((videos,), 3 * block))
        level = torch.full((videos,), sigma)
        velocities.append(generator.velocity(noisy_BTCHW[:, frames], level, texts, context))
        ids = cache.write(*generator.encode(clean_BTCHW[:, frames], texts, context))
        for video, own_pages in enumerate(ids):
            written |= {(video, 3 * block + n): page for n, page in enumerate(own_pages)}
    return torch.cat(velocities, 1)


@pytest.mark.parametrize("routed", [False, True])
def test_one_teacher_pass_equals_block_by_block_streaming(routed):
    """Also where blocks see unequal pasts, and where a route names another video's frames."""
    generator = tiny.generator(torch.float64)
    blocks, draws = 5, torch.Generator().manual_seed(2)
    clean, noisy = (
        torch.randn(2, 3 * blocks, *tiny.FRAME, generator=draws, dtype=torch.float64) for _ in range(2)
    )

    def contexts_of(block):
        start = 3 * block
        local = [*range(min(3, start)), *range(max(3, start - 6), start)]
        rows = [[(video, frame) for frame in local] for video in range(2)]
        if routed and block == 4:
            rows = [[*row[:3], (0, 4), (1, 5), (0, 7), *row[6:]] for row in rows]
        return rows

    slots = 9
    table = torch.full((2 * blocks, slots), -1)
    for block in range(blocks):
        for video, row in enumerate(contexts_of(block)):
            for slot, (owner, frame_) in enumerate(row):
                table[video * blocks + block, slot] = owner * 3 * blocks + frame_
    embeddings = torch.stack([tiny.texts()[segment] for segment in tiny.SEGMENTS[:2]])
    text = TextRows(embeddings, torch.arange(2))
    with torch.no_grad():
        once = teacher_pass(generator.transformer, clean, noisy, 0.7, embeddings, table)
        by_block = streamed(generator, clean, noisy, 0.7, text, contexts_of)
    assert (once - by_block).abs().max() <= 1e-10
    assert once.std() > 0.1
