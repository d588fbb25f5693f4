"""Calls beside the main thread: in order, errors handed back, nothing that can hold up the end."""

import gc
import threading
import time
import weakref

import pytest
import torch

from kvpo.engine import background
from kvpo.engine.background import in_background
from kvpo.prompts import ClipPrompt
from kvpo.rewards.service.messages import ScoreRequest
from kvpo.rewards.service.scoring_queue import ScoringQueue
from tests.reward_servers import Named


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


def test_calls_in_other_threads_find_the_device_of_the_thread_that_started_these(monkeypatch):
    """A new thread's own current device is the first one of the machine."""

    class Current(threading.local):
        device = 0

    current = Current()
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current.device)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: setattr(current, "device", device))
    torch.cuda.set_device(3)
    with in_background() as submit:
        assert submit(torch.cuda.current_device).result() == 3
    queue = ScoringQueue([Named(lambda video, prompts: torch.full([1], float(current.device)))], batch=1)
    question = ScoreRequest(torch.zeros(1, 1, 3, 8, 8), (ClipPrompt(""),), ("own",))
    assert queue.put(question).result(20)["own"].tolist() == [3]
    queue.close()
