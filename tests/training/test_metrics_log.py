import json
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kvpo.training.metrics_log import MetricsLog, truncate_metrics
from tests.metrics import read_metrics


def logged(path: Path, updates: range, resumed_at: int | None = None) -> None:
    with MetricsLog(path / "metrics.jsonl", path / "tensorboard", resumed_at=resumed_at) as log:
        for update in updates:
            log.write(update, {"reward": update / 10, "kind": "train"})


def test_a_resumed_log_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    whole.mkdir()
    resumed.mkdir()
    logged(whole, range(1, 9))
    logged(resumed, range(1, 7))
    with (resumed / "metrics.jsonl").open("a") as file:
        file.write('{"update": 7, "rew')  # killed in the middle of a line
    logged(resumed, range(5, 9), resumed_at=4)

    def timeless(path: Path) -> list[dict]:
        return [{**record, "time": 0} for record in read_metrics(path / "metrics.jsonl")]

    assert timeless(resumed) == timeless(whole)
    assert all(json.loads(line) for line in (resumed / "metrics.jsonl").read_text().splitlines())
    events = EventAccumulator(str(resumed / "tensorboard"))
    events.Reload()
    assert sorted(event.step for event in events.Scalars("reward")) == list(range(1, 9))


def test_a_new_run_starts_from_nothing(tmp_path: Path) -> None:
    logged(tmp_path, range(0, 3))
    logged(tmp_path, range(0, 2))
    assert [record["update"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [0, 1]


def test_non_finite_numbers_are_null_in_valid_json(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as log:
        log.write(1, {"loss": float("nan"), "ratio": float("inf"), "count": 3})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert (record["loss"], record["ratio"], record["count"]) == (None, None, 3)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


def test_groups_of_metrics_nest(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as log:
        log.write(4, {"kind": "validation", "short": {"gain": 0.5, "parts": {"motion": float("nan")}}})
    (record,) = read_metrics(tmp_path / "metrics.jsonl")
    assert record["short"] == {"gain": 0.5, "parts": {"motion": None}}
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("short/gain")] == [(4, 0.5)]


def test_truncating_what_is_missing_or_already_short(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    truncate_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"update": 1}\n{"update": 2}')  # killed just before the line end
    truncate_metrics(path, 3)
    assert path.read_text() == '{"update": 1}\n{"update": 2}\n'


def test_a_validation_that_no_checkpoint_knows_is_dropped(tmp_path: Path) -> None:
    with MetricsLog(tmp_path / "metrics.jsonl", tmp_path / "tensorboard") as log:
        for update in (1, 2):
            log.write(update, {"kind": "update"})
            log.write(update, {"kind": "validation"})
        log.drop_validation(2)
    kept = [(record["update"], record["kind"]) for record in read_metrics(tmp_path / "metrics.jsonl")]
    assert kept == [(1, "update"), (1, "validation"), (2, "update")]
