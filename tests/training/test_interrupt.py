import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from kvpo.training.interrupt import StopAtOnce, stop_on_signal


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
