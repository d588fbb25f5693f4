"""The process around a run: its threads, its kernels, and the memory that it reports."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvpo.config import Config
from kvpo.training import run
from kvpo.training.device import computing
from tests.metrics import read_metrics
from tests.training.test_resume import ToyRun


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("device", "threads", "inside"), [("cpu", 0, 1), ("cpu", 3, 3), ("cuda", 0, 2)])
def test_threads_are_one_on_a_cpu_unless_said_otherwise(
    two_threads: None, device: str, threads: int, inside: int
) -> None:
    with computing(replace(Config(), device=device, threads=threads)):
        assert torch.get_num_threads() == inside
    assert torch.get_num_threads() == 2


def test_the_process_is_as_it_was_whatever_a_run_does() -> None:
    def settings() -> tuple[object, ...]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.is_deterministic_algorithms_warn_only_enabled(),
            torch.utils.deterministic.fill_uninitialized_memory,
            torch.get_default_dtype(),
        )

    before, noise = settings(), torch.random.get_rng_state()
    with pytest.raises(RuntimeError, match="inside"), computing(Config()):
        assert settings() == (True, True, False, torch.float32)
        torch.set_default_dtype(torch.float64)
        torch.rand(3)
        raise RuntimeError("inside")
    assert settings() == before and torch.equal(torch.random.get_rng_state(), noise)


def test_metrics_hold_the_peak_of_each_update(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    peaks = iter([1.5, 0.5])
    monkeypatch.setattr(run, "peak", lambda device: {"device_peak_gb": next(peaks)})
    assert ToyRun(tiny_base, tmp_path, optim__updates=2, evaluation__every=0).go()
    updates = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "update"]
    assert [record["device_peak_gb"] for record in updates] == [1.5, 0.5]
