"""Calls beside the main thread: in order, errors handed back, nothing that can hold up the end."""

import gc
import threading
import time
import weakref

import pytest
import torch

from kvpo.engine import background
from kvpo.engine.background import in_background


def test_calls_run_in_order_in_one_other_thread():
    seen = []

    def call(number):
        seen.append((number, threading.current_thread()))
        return 10 * number

    with in_background() as submit:
        futures = [submit(lambda n=n: call(n)) for n in range(20)]
        assert [future.result() for future in futures] == [10 * n for n in range(20)]
    assert [number for number, _ in seen] == list(range(20))
    (thread,) = {thread for _, thread in seen}
    assert thread is not threading.main_thread() and thread.daemon
    assert not thread.is_alive()


def test_an_error_comes_out_at_the_result_and_at_the_next_call():
    def fail():
        raise ValueError("no such scale")

    with in_background() as submit:
        future = submit(fail)
        with pytest.raises(ValueError, match="no such scale"):
            future.result()
        with pytest.raises(ValueError, match="no such scale"):
            submit(lambda: 1)


def test_leaving_drops_what_has_not_begun_and_leaves_behind_what_hangs(monkeypatch):
    monkeypatch.setattr(background, "LEAVING_SECONDS", 0.1)
    hang, begun, ran = threading.Event(), threading.Event(), []

    def hanging():
        begun.set()
        hang.wait(60)

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt), in_background() as submit:
        submit(hanging)
        submit(lambda: ran.append(1))
        begun.wait(10)
        raise KeyboardInterrupt
    assert time.monotonic() - started < 10
    hang.set()
    time.sleep(0.05)
    assert ran == []


def test_what_a_call_held_is_freed_once_it_has_run():
    with in_background() as submit:
        tensor = torch.zeros(10)
        alive = weakref.ref(tensor)
        submit(lambda tensor=tensor: tensor.sum()).result()
        del tensor
        submit(lambda: None).result()
        gc.collect()
        assert alive() is None
