import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from kvpo.training.held_out import evaluate_base
from kvpo.training.interrupt import StopAtOnce, stop_on_signal
from kvpo.training.policy import swapped_parameters
from kvpo.training.run import Run
from kvpo.training.trainer import Trainer
from tests.tiny_world import tiny_config, toy_setup


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_asks_the_second_saves_the_third_stops(
    number: signal.Signals, caplog: pytest.LogCaptureFixture
) -> None:
    former = signal.getsignal(number)
    with stop_on_signal() as interrupted:
        assert not interrupted()
        signal.raise_signal(number)
        assert interrupted() and "press Ctrl-C again to stop at once" in caplog.text
        with pytest.raises(KeyboardInterrupt) as second:
            signal.raise_signal(number)
        assert not isinstance(second.value, StopAtOnce)
        for _ in range(2):
            with pytest.raises(StopAtOnce):
                signal.raise_signal(number)
    assert signal.getsignal(number) is former


def test_where_torchrun_would_kill_soon_a_step_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "0.1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with stop_on_signal() as interrupted:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt) as given_up:
            time.sleep(30)
        assert not isinstance(given_up.value, StopAtOnce) and interrupted()
    for asked in (True, False):  # a safe point, and the end of the block, are in time
        with stop_on_signal() as interrupted:
            signal.raise_signal(signal.SIGINT)
            if asked:
                assert interrupted()
                time.sleep(0.1)
        time.sleep(0.1)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    with stop_on_signal():
        signal.raise_signal(signal.SIGINT)
        time.sleep(0.1)


def test_outside_the_main_thread_nothing_is_installed() -> None:
    former, seen = signal.getsignal(signal.SIGINT), []

    def work() -> None:
        with stop_on_signal() as interrupted:
            seen.append((interrupted(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, former)]


def test_a_loop_finishes_its_step_and_exits_cleanly() -> None:
    code = (
        "import time\nfrom kvpo.training.interrupt import stop_on_signal\n"
        "with stop_on_signal() as interrupted:\n    print('ready', flush=True)\n"
        "    while not interrupted():\n        time.sleep(0.05)\n        print('step', flush=True)\n"
        "print('saved', flush=True)\n"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None and child.stdout.readline() == "ready\n"
    time.sleep(0.1)
    os.kill(child.pid, signal.SIGTERM)
    out, err = child.communicate(timeout=30)
    assert child.returncode == 0, err
    assert out.splitlines()[-2:] == ["step", "saved"]


def stopped_at(line: int, name: str, call: Callable[[], Any]) -> bool:
    """Make ``call``, stopped as by a signal before a line of the function ``name``; False: it has ended."""
    passed = 0

    def trace(frame: Any, event: str, _: Any) -> Any:
        nonlocal passed
        if frame.f_code.co_name == name and event == "line":
            passed += 1
            if passed == line:
                raise KeyboardInterrupt
        return trace

    former = sys.gettrace()
    sys.settrace(trace)
    try:
        call()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(former)
    return False


def test_weights_are_whole_after_a_signal_at_any_line_of_a_swap() -> None:
    parameters = {name: nn.Parameter(torch.zeros(1)) for name in "abc"}
    averages = {name: torch.ones(1) for name in parameters}

    def swap() -> None:
        with swapped_parameters(parameters, averages):
            pass

    line = 1
    while stopped_at(line, "exchange", swap):
        assert not any(bool(value.detach()) for value in parameters.values()), line
        line += 1
    assert line > 2 * 3 * len(parameters), "both ways were stopped"


def test_what_is_noted_agrees_after_a_signal_at_any_line(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An update and that its validation is due; a validation, that it is made, and the best checkpoint."""
    notes: list[Callable[[], None]] = []
    monkeypatch.setattr(Run, "_write", lambda self, numbers, note: notes.append(note))
    setup = toy_setup(tiny_config(tiny_base, optim__updates=2, evaluation__every=1))
    trainer = Trainer(setup)
    base = evaluate_base(setup, trainer, setup.validation)
    run, line, best = Run(setup, trainer, tmp_path, None, lambda *_: None, base), 1, (0, -1e9)
    trainer.update = 1
    while stopped_at(line, "_note_update", run._note_update):
        assert (run.written, run.unvalidated) == (0, False), line
        line += 1
    assert (run.written, run.unvalidated) == (1, True) and line > 2
    run.best, line = best, 1
    run.validate()
    while stopped_at(line, "note", notes[0]):
        assert (run.readings, run.unvalidated, run.best) == ([], True, best), line
        line += 1
    assert len(run.readings) == 1 and not run.unvalidated and run.best[0] == 1 and line > 2
