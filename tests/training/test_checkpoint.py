import hashlib
import itertools
import json
import math
import multiprocessing
import os
import pickle
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from kvpo.files import StorageError
from kvpo.training.checkpoint import (
    CheckpointError,
    best_checkpoint,
    checkpoints,
    find_checkpoint,
    latest_checkpoint,
    load_checkpoint,
    mark_best,
    prune,
    require_tensors,
    resume_point,
    save_checkpoint,
)
from kvpo.training.run_directory import resume_hint
from kvpo.training.state import expected_moments, load_moments, moments_of

FORK = multiprocessing.get_context("fork")  # a fork has torch loaded already
ARCHITECTURE = {"dim": 8, "patch_size": (1, 2, 2)}
TENSORS = {
    "weight": torch.arange(6.0).reshape(2, 3),
    "half": torch.tensor([1.0, 3.14159], dtype=torch.bfloat16),
    "step": torch.tensor(7.0),
    "generator": torch.Generator().manual_seed(3).get_state(),
}


def saved(directory: Path, update: int = 20, best: tuple[int, float] | None = None) -> Path:
    return save_checkpoint(directory, update, TENSORS, {"best": best, "seed": 3}, architecture=ARCHITECTURE)


def refusal(path: Path, **arguments: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(path, **arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_is_saved_loads_to_the_bit(tmp_path: Path) -> None:
    path = saved(tmp_path, best=(10, 0.1))
    assert path.name == "update-000020"
    tensors, state = load_checkpoint(path, architecture=ARCHITECTURE)
    assert state == {"best": [10, 0.1], "seed": 3}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor)


def test_views_and_shared_tensors_are_saved_apart(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(3, 4)
    shared = {"a": whole, "b": whole, "row": whole[1], "column": whole[:, 1]}
    tensors, _ = load_checkpoint(save_checkpoint(tmp_path, 1, shared, {}, architecture={}))
    assert all(torch.equal(tensors[name], shared[name]) for name in shared)


def test_a_truncated_checkpoint_is_refused_and_skipped(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    older, newer = saved(tmp_path, 10), saved(tmp_path, 20)
    file = newer / "state.safetensors"
    file.write_bytes(file.read_bytes()[:-5])
    assert "truncated" in refusal(newer)
    assert latest_checkpoint(tmp_path) == older
    assert caplog.messages == [f"skipped: checkpoint {newer} is truncated"]


def test_a_tampered_checkpoint_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    file = path / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert "changed after it was saved: state.safetensors" in refusal(path)


def test_a_tampered_state_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path)
    record = json.loads((path / "state.json").read_text())
    record["state"]["seed"] = 4
    (path / "state.json").write_text(json.dumps(record))
    assert "changed after it was saved: state.json" in refusal(path)
    del record["sha256"]
    (path / "state.json").write_text(json.dumps(record))
    assert "lacks sha256" in refusal(path)
    (path / "state.json").write_text('{"state": ')
    assert "state.json is not JSON" in refusal(path)
    (path / "state.json").unlink()
    assert "no state.json" in refusal(path)
    assert latest_checkpoint(tmp_path) is None


def test_a_record_is_the_same_in_another_order_of_its_keys(tmp_path: Path) -> None:
    path = saved(tmp_path, best=(10, 0.1))
    record = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps(dict(reversed(record.items()))))
    assert load_checkpoint(path)[1] == {"best": [10, 0.1], "seed": 3}


@pytest.mark.parametrize("part", ["architecture", "state"])
def test_a_record_of_another_form_is_refused_although_its_sum_fits(tmp_path: Path, part: str) -> None:
    path = saved(tmp_path)
    record = json.loads((path / "state.json").read_text())
    record[part] = []
    del record["record_sha256"]
    digest = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
    (path / "state.json").write_text(json.dumps(record | {"record_sha256": digest}))
    assert "architecture and state must be JSON objects" in refusal(path)


def test_another_architecture_is_named(tmp_path: Path) -> None:
    said = refusal(saved(tmp_path), architecture={**ARCHITECTURE, "dim": 16})
    assert "another architecture: dim is 8 there, 16 here" in said


def test_missing_unexpected_and_misshapen_tensors_are_named(tmp_path: Path) -> None:
    path = saved(tmp_path)
    tensors, _ = load_checkpoint(path)
    require_tensors(path, tensors, TENSORS)
    expected = {**TENSORS, "weight": torch.zeros(3, 3), "bias": torch.zeros(1)}
    del expected["half"]
    with pytest.raises(CheckpointError) as caught:
        require_tensors(path, tensors, expected)
    said = str(caught.value)
    assert "bias missing" in said and "half unexpected" in said
    assert "weight is [2, 3], expected [3, 3]" in said


class Planted:
    """Unpickling this creates a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
        return Path.touch, (self.mark,)


def test_a_pickle_is_refused_without_being_read(tmp_path: Path) -> None:
    mark = tmp_path / "executed"
    evil = tmp_path / "evil.pt"
    evil.write_bytes(pickle.dumps(Planted(mark)))
    assert "pickle can run code" in refusal(evil)
    # the same bytes planted as the tensors of a checkpoint, with sums that fit
    path = saved(tmp_path / "checkpoints")
    shutil.copy(evil, path / "state.safetensors")
    record = json.loads((path / "state.json").read_text())
    record["bytes"] = evil.stat().st_size
    (path / "state.json").write_text(json.dumps(record))
    refusal(path)
    assert not mark.exists()


def test_a_missing_checkpoint_is_named(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "update-000001")
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_a_damaged_later_checkpoint_takes_no_place_of_those_that_are_kept(tmp_path: Path) -> None:
    for update in (8, 10, 12, 20):
        saved(tmp_path, update)
    (tmp_path / "update-000020" / "state.safetensors").write_bytes(b"cut")
    prune(tmp_path, up_to=12)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "update-000010",
        "update-000012",
        "update-000020",
    ]
    for update in (10, 12):
        (tmp_path / f"update-{update:06d}" / "state.json").unlink()
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged .* remove that directory"):
        resume_point(tmp_path)
    assert resume_point(tmp_path / "nothing") is None


def test_a_resumed_run_passes_over_what_it_cannot_read(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A whole file of bad numbers or flipped bits is damaged, as a file cut short is."""
    good = saved(tmp_path, 10)
    flipped = saved(tmp_path, 20) / "state.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"!")
    save_checkpoint(tmp_path, 30, {"optimizer.0": torch.tensor([math.nan])}, {}, architecture={})
    assert resume_point(tmp_path) == good
    assert "update-000030: optimizer.0 holds NaN" in caplog.messages[0]
    assert "fails its SHA-256" in caplog.messages[1]
    shutil.rmtree(good)
    with pytest.raises(CheckpointError, match="every checkpoint in .* is damaged"):
        resume_point(tmp_path)


def test_a_copy_under_another_name_is_no_checkpoint_of_the_run(tmp_path: Path) -> None:
    run = tmp_path / "run"
    for update in (20, 999_999, 1_000_000):
        saved(run / "checkpoints", update)
    copy = shutil.copytree(run / "checkpoints" / "update-1000000", run / "checkpoints" / "update-000020-mine")
    assert [path.name for path in checkpoints(run / "checkpoints")][-1] == "update-1000000"
    assert "saved up to update 1000000;" in resume_hint(run)
    assert resume_point(run / "checkpoints") == run / "checkpoints" / "update-1000000"
    prune(run / "checkpoints", up_to=1_000_000)
    kept = {path.name for path in (run / "checkpoints").iterdir()}
    assert kept == {copy.name, "update-999999", "update-1000000"}


def test_retention_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    assert best_checkpoint(tmp_path) is None
    for update in (10, 20, 30, 40):
        path = saved(tmp_path, update)
        if update == 10:
            mark_best(tmp_path, path, 0.7)
        prune(tmp_path)
    assert [path.name for path in checkpoints(tmp_path)] == [
        "update-000010",
        "update-000030",
        "update-000040",
    ]
    assert best_checkpoint(tmp_path) == (tmp_path / "update-000010", 0.7)
    mark_best(tmp_path, tmp_path / "update-000040", 0.8)
    prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best.json", "update-000030", "update-000040"]
    with pytest.raises(CheckpointError, match="update-000010, is gone; put it back, or start another run"):
        mark_best(tmp_path, tmp_path / "update-000010", 0.9)
    (tmp_path / "best.json").write_text("{")
    with pytest.raises(CheckpointError, match="best.json is damaged"):
        best_checkpoint(tmp_path)


def test_the_best_checkpoint_of_one_that_is_kept_is_kept_too(tmp_path: Path) -> None:
    """Should the newest be damaged, the run goes on from the one before, and with its best."""
    kept = []
    for update, best in ((10, 10), (20, 10), (30, 10), (40, 40), (50, 40)):
        mark_best(tmp_path, saved(tmp_path, update, best=(best, 0.1)).with_name(f"update-{best:06d}"), 0.1)
        prune(tmp_path)
        kept.append([int(path.name.removeprefix("update-")) for path in checkpoints(tmp_path)])
    assert kept == [[10], [10, 20], [10, 20, 30], [10, 30, 40], [40, 50]]
    (tmp_path / "update-000050" / "state.json").write_text("{")
    prune(tmp_path)
    assert (tmp_path / "update-000040").is_dir()


def test_a_best_checkpoint_that_is_gone_is_not_replaced_by_another(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 10), saved(tmp_path, 20)
    mark_best(tmp_path, first, 1.0)
    shutil.rmtree(first)
    for name in (None, "best"):
        with pytest.raises(CheckpointError, match="update-000010, is gone; .* there is update-000020"):
            find_checkpoint(tmp_path, name)
    assert find_checkpoint(tmp_path, "latest") == find_checkpoint(tmp_path, "20") == second


def test_a_checkpoint_is_found_by_what_one_would_type(tmp_path: Path) -> None:
    first, second = saved(tmp_path, 10), saved(tmp_path, 20)
    assert find_checkpoint(tmp_path, None) == second
    mark_best(tmp_path, first, 1.0)
    assert find_checkpoint(tmp_path, None) == find_checkpoint(tmp_path, "best") == first
    assert find_checkpoint(tmp_path, "latest") == second
    for name in ("20", 20, "update-000020", str(second), second):
        assert find_checkpoint(tmp_path, name) == second
    with pytest.raises(CheckpointError, match="'30'.*update-000010, update-000020"):
        find_checkpoint(tmp_path, "30")
    with pytest.raises(CheckpointError, match="no checkpoint '0' in"):
        find_checkpoint(tmp_path, 0)


def test_a_full_disk_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    older = saved(tmp_path, 10)

    def full(tensors: object, file: Path) -> None:
        file.write_bytes(b"half")
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr("kvpo.training.checkpoint.save_file", full)
    for update in (10, 20):
        with pytest.raises(StorageError, match="the disk is full"):
            saved(tmp_path, update)
    assert list(tmp_path.iterdir()) == [older]
    load_checkpoint(older)


def limited(directory: Path) -> None:
    """Save what fits under a limit on the size of files, then what does not."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    save_checkpoint(directory, 1, {"a": torch.zeros(10)}, {}, architecture={})
    with pytest.raises(StorageError, match="cannot save"):
        save_checkpoint(directory, 2, {"a": torch.zeros(10_000)}, {}, architecture={})


def test_a_real_write_limit_loses_nothing(tmp_path: Path) -> None:
    child = FORK.Process(target=limited, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["update-000001"]
    load_checkpoint(tmp_path / "update-000001")


def save_for_ever(directory: Path, first: int) -> None:
    for update in itertools.count(first):
        tensors = {"a": torch.full((20_000,), float(update)), "b": torch.tensor(update)}
        path = save_checkpoint(directory, update, tensors, {"update": update}, architecture={})
        if update % 5 == 0:
            mark_best(directory, path, float(update))
        prune(directory)


def test_killed_at_any_moment_the_latest_checkpoint_is_whole(tmp_path: Path) -> None:
    last = 0
    for delay in torch.rand(15, generator=torch.Generator().manual_seed(0)).mul(0.03).tolist():
        child = FORK.Process(target=save_for_ever, args=(tmp_path, last + 1))
        child.start()
        while not any(path.name > f"update-{last + 2:06d}" for path in tmp_path.glob("update-*")):
            time.sleep(0.001)  # the machine may be busy: let it save a few first
        time.sleep(delay)
        child.kill()
        child.join()
        path = latest_checkpoint(tmp_path)
        assert path is not None
        tensors, state = load_checkpoint(path)
        assert state["update"] >= last
        last = state["update"]
        assert torch.equal(tensors["a"], torch.full((20_000,), float(last))) and tensors["b"] == last
        best = best_checkpoint(tmp_path)
        if best is not None:
            load_checkpoint(best[0])
        # a checkpoint of the same update may be there already: saving it again replaces it whole
        last -= 1


def model_and_optimizer() -> tuple[dict[str, torch.nn.Parameter], torch.optim.AdamW]:
    generator = torch.Generator().manual_seed(0)
    parameters = {
        name: torch.nn.Parameter(torch.randn(3, generator=generator)) for name in ("a", "b", "un.used")
    }
    return parameters, torch.optim.AdamW(list(parameters.values()), lr=0.1)


def step(parameters: dict[str, torch.nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    (parameters["a"].square().sum() + parameters["b"].sin().sum()).backward()
    optimizer.step()


def test_an_optimiser_continues_bit_for_bit_through_a_checkpoint(tmp_path: Path) -> None:
    parameters, optimizer = model_and_optimizer()
    assert moments_of(optimizer, parameters) == {}
    for _ in range(3):
        step(parameters, optimizer)
    weights = {f"weights.{name}": value for name, value in parameters.items()}
    path = save_checkpoint(tmp_path, 3, weights | moments_of(optimizer, parameters), {}, architecture={})
    for _ in range(3):
        step(parameters, optimizer)

    tensors, _ = load_checkpoint(path)
    resumed, other = model_and_optimizer()
    step(resumed, other)  # whatever was there before is replaced
    with torch.no_grad():
        for name, parameter in resumed.items():
            parameter.copy_(tensors[f"weights.{name}"])
    load_moments(other, resumed, tensors)
    for _ in range(3):
        step(resumed, other)
    assert all(torch.equal(resumed[name], parameters[name]) for name in parameters)
    ours, theirs = moments_of(other, resumed), moments_of(optimizer, parameters)
    assert ours.keys() == theirs.keys() and "un.used.step" not in ours
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_moments_of_other_parameters_or_with_one_missing_are_named(tmp_path: Path) -> None:
    parameters, optimizer = model_and_optimizer()
    step(parameters, optimizer)
    saved_moments = moments_of(optimizer, parameters)
    require_tensors(tmp_path, saved_moments, expected_moments(parameters, saved_moments))
    for name, words in (
        ("z.exp_avg", r"z\.exp_avg unexpected"),
        ("b.step", r"b\.step missing"),
        ("a.exp_avg_sq", r"a\.exp_avg_sq is \[2\], expected \[3\] of the wrong shape"),
    ):
        changed = {**saved_moments, name: torch.zeros(2)}
        if "missing" in words:
            del changed[name]
        with pytest.raises(CheckpointError, match=words):
            require_tensors(tmp_path, changed, expected_moments(parameters, changed))
