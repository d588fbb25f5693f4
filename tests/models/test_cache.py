"""Pages are written once, counted by reference, and all come back."""

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvpo.models.cache import FrameCache, History, PageShape

LAYERS, TOKENS, HEADS, WIDTH = 2, 3, 1, 2


def new_cache(num_pages):
    return FrameCache(PageShape(LAYERS, TOKENS, HEADS, WIDTH), num_pages)


def marked(*marks_RF):
    """Keys and values ``[L, R, F, T, N, D]`` filled with one number per frame."""
    marks = torch.tensor(marks_RF, dtype=torch.float32)
    keys = marks[None, :, :, None, None, None].expand(LAYERS, *marks.shape, TOKENS, HEADS, WIDTH)
    return keys, -keys


def mark_of(cache, page):
    """The number a page was filled with; both of its tensors must still hold it everywhere."""
    keys, values = cache.keys_LQTND[:, page], cache.values_LQTND[:, page]
    assert (keys == keys.flatten()[0]).all() and torch.equal(keys, -values)
    return float(keys.flatten()[0])


def test_what_is_written_is_gathered_in_the_order_of_the_table():
    cache = new_cache(6)
    (first, second) = cache.write(*marked([1, 2, 3], [4, 5, 6]))
    keys, values = cache.gather(1, torch.tensor([[first[2], second[0]], [first[0], first[0]]]))
    assert keys.shape == (2, 2 * TOKENS, HEADS, WIDTH)
    assert keys[:, ::TOKENS, 0, 0].tolist() == [[3, 4], [1, 1]]
    assert torch.equal(values, -keys)


def test_layers_are_told_apart():
    cache = new_cache(1)
    keys = (
        torch.arange(LAYERS).float()[:, None, None, None, None, None].expand(-1, 1, 1, TOKENS, HEADS, WIDTH)
    )
    ((page,),) = cache.write(keys, keys)
    for layer in range(LAYERS):
        assert (cache.gather(layer, torch.tensor([[page]]))[0] == layer).all()


def test_a_full_cache_says_so_and_stays_as_it_is():
    cache = new_cache(4)
    ((kept, *_),) = cache.write(*marked([1, 2, 3]))
    with pytest.raises(MemoryError, match="2 pages needed, 1 of 4 free"):
        cache.write(*marked([8, 9]))
    assert cache.pages_in_use == 3
    assert mark_of(cache, kept) == 1
    cache.write(*marked([4]))
    assert cache.pages_in_use == 4


def test_pages_carry_no_graph():
    cache = new_cache(1)
    keys, values = (part.clone().requires_grad_() for part in marked([1]))
    cache.write(keys * 2, values * 2)
    assert not cache.keys_LQTND.requires_grad and not cache.values_LQTND.requires_grad


def test_released_pages_can_neither_be_released_again_nor_shared():
    cache = new_cache(2)
    ((page, other),) = cache.write(*marked([1, 2]))
    cache.share([page])
    cache.release([page])
    assert cache.pages_in_use == 2
    cache.release([page])
    assert cache.pages_in_use == 1
    with pytest.raises(AssertionError, match="released twice"):
        cache.release([page])
    with pytest.raises(AssertionError, match="cannot be shared"):
        cache.share([page])
    cache.release([other])
    assert cache.pages_in_use == 0


@pytest.mark.parametrize("pages", [1, 5])
def test_page_bytes_are_those_of_the_tensors(pages):
    cache = new_cache(pages)
    assert cache.page_bytes * pages == cache.keys_LQTND.nbytes + cache.values_LQTND.nbytes


def test_a_fork_copies_no_page_and_lives_on_its_own():
    cache = new_cache(8)
    (pages,) = cache.write(*marked([1, 2, 3, 4]))
    root = History(cache, sink=1)
    root.append(pages)
    branch = root.fork()
    assert cache.pages_in_use == 4
    (own,) = cache.write(*marked([5]))
    branch.append(own)
    assert branch.page_ids([0, 4]) == [pages[0], own[0]] and root.end == 4
    branch.keep(range(3, 5))
    assert sorted(branch.pages) == [0, 3, 4] and cache.pages_in_use == 5
    root.release()
    assert cache.pages_in_use == 3
    branch.release()
    assert cache.pages_in_use == 0


def test_a_frame_that_is_not_resident_is_a_key_error():
    cache = new_cache(3)
    history = History(cache, sink=1)
    history.append(cache.write(*marked([1, 2, 3]))[0])
    history.keep([2])
    with pytest.raises(KeyError):
        history.page_ids([1])


class Streams(RuleBasedStateMachine):
    """Random lives of several streams over one small cache, against plain dictionaries of numbers."""

    def __init__(self):
        super().__init__()
        self.cache = new_cache(24)
        self.streams = [(History(self.cache, sink=1), {}, {})]
        self.next_mark = 1.0

    def write(self, count):
        marks = [self.next_mark + n for n in range(count)]
        try:
            (pages,) = self.cache.write(*marked(marks))
        except MemoryError:
            assert self.cache.num_pages - self.cache.pages_in_use < count
            return [], []
        self.next_mark += count
        return marks, pages

    def pick(self, data):
        return self.streams[data.draw(st.integers(0, len(self.streams) - 1))]

    @rule(data=st.data(), count=st.integers(1, 3))
    def append(self, data, count):
        history, frames, _ = self.pick(data)
        marks, pages = self.write(count)
        frames.update(zip(range(history.end, history.end + len(marks)), marks, strict=True))
        history.append(pages)

    @rule(data=st.data(), count=st.integers(1, 3))
    def reencode(self, data, count):
        history, frames, _ = self.pick(data)
        if history.end >= count:
            marks, pages = self.write(count)
            start = history.end - len(marks)
            frames.update(zip(range(start, history.end), marks, strict=True))
            history.rewind(start)
            history.append(pages)

    @rule(data=st.data(), recent=st.integers(0, 4))
    def keep(self, data, recent):
        history, frames, _ = self.pick(data)
        wanted = {*range(history.end - recent, history.end), 0}
        history.keep(wanted)
        for frame in [f for f in frames if f not in wanted]:
            del frames[frame]

    @rule(data=st.data())
    def record_and_bank(self, data):
        history, frames, bank = self.pick(data)
        if frames:
            frame = data.draw(st.sampled_from(sorted(frames)))
            history.record(history.pages[frame])
            chosen = data.draw(st.lists(st.sampled_from(sorted(frames)), max_size=3))
            history.set_bank([[history.pages[f] for f in chosen], [history.pages[frame]]])
            bank.update(latest=frames[frame], bank=[[frames[f] for f in chosen], [frames[frame]]])

    @precondition(lambda self: len(self.streams) < 4)
    @rule(data=st.data())
    def fork(self, data):
        history, frames, bank = self.pick(data)
        before = self.cache.pages_in_use
        self.streams.append((history.fork(), dict(frames), dict(bank)))
        assert self.cache.pages_in_use == before

    @precondition(lambda self: len(self.streams) > 1)
    @rule(data=st.data())
    def release(self, data):
        self.streams.remove(stream := self.pick(data))
        stream[0].release()

    @invariant()
    def every_stream_reads_what_it_wrote(self):
        for history, frames, bank in self.streams:
            assert {f: mark_of(self.cache, page) for f, page in history.pages.items()} == frames
            if bank:
                assert mark_of(self.cache, history.latest) == bank["latest"]
                marks = [[mark_of(self.cache, page) for page in layer] for layer in history.bank]
                assert marks == bank["bank"]

    @invariant()
    def no_page_leaks(self):
        held = {page for history, _, _ in self.streams for page in history.all_references()}
        assert self.cache.pages_in_use == len(held)

    def teardown(self):
        for history, _, _ in self.streams:
            history.release()
        assert self.cache.pages_in_use == 0


TestStreams = Streams.TestCase
TestStreams.settings = settings(max_examples=15, stateful_step_count=20, deadline=None, derandomize=True)
