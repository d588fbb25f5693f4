"""Reads and writes votes as tables of pairwise comparisons (CSV, Parquet) or Label Studio tasks (JSON).

The tables have the columns ``model_a, model_b, winner`` that arena-rank reads, and others that record who
voted on which files.
"""

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kvpo.arena.judgements import NO_RATER, WINNERS, Judgement
from kvpo.extras import extra
from kvpo.files import read_bytes, read_json, read_text, write_atomic, write_json

COLUMNS = (
    "model_a", "model_b", "winner", "question", "prompt", "rater", "kind", "milliseconds",
    "video_a", "video_b",
)  # fmt: skip
VOTE_SUFFIXES = (".csv", ".parquet", ".json")
PAIR_KINDS = ("pair", "repeat", "attention")
VIDEO_NAMES = ("video1", "video2")


def write_votes(path: Path, judgements: Sequence[Judgement]) -> None:
    """Write votes in the format of the file's suffix.

    Raises:
        ValueError: the suffix is not in ``VOTE_SUFFIXES``; for Parquet, pyarrow is not installed.
        StorageError: the file cannot be written.
    """
    _check_suffix(path)
    rows = [{column: asdict(one)[column] for column in COLUMNS} for one in judgements]
    if path.suffix == ".csv":
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(path, text.getvalue())
    elif path.suffix == ".parquet":
        with extra("parquet"):
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        buffer = io.BytesIO()
        parquet.write_table(arrow.Table.from_pylist(rows), buffer)
        write_atomic(path, buffer.getvalue())
    else:
        write_json(path, _tasks(judgements), ensure_ascii=False)


def read_votes(path: Path) -> list[Judgement]:
    """Read votes that `write_votes` wrote, or a bare table of ``model_a, model_b, winner``.

    Raises:
        ValueError: unknown suffix, malformed file, missing column or invalid value; the message names the
            line or row.
    """
    _check_suffix(path)
    if path.suffix == ".json":
        return _from_tasks(path)
    if path.suffix == ".csv":
        reader = csv.DictReader(io.StringIO(read_text(path), newline=""), strict=True)
        try:
            rows: list[dict[str, Any]] = list(reader)
        except csv.Error as error:
            line = reader.reader.line_num
            raise ValueError(f"{path}, line {line}: not CSV ({error}); is every quote closed?") from error
        columns = list(reader.fieldnames or ())
    else:
        with extra("parquet"):
            import pyarrow as arrow
            import pyarrow.parquet as parquet
        try:
            table = parquet.read_table(io.BytesIO(read_bytes(path)))
        except arrow.ArrowInvalid as error:
            raise ValueError(f"{path}: not a Parquet file ({error})") from error
        rows, columns = table.to_pylist(), table.column_names
    if missing := [name for name in COLUMNS[:3] if name not in columns]:
        raise ValueError(f"{path}: no column {missing[0]!r}; there are {', '.join(columns)[:200] or 'none'}")
    return [_judgement(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _check_suffix(path: Path) -> None:
    if path.suffix not in VOTE_SUFFIXES:
        raise ValueError(f"{path}: votes are kept in {', '.join(VOTE_SUFFIXES)} files")


def _judgement(where: str, row: dict[str, Any]) -> Judgement:
    given = {name: value for name, value in row.items() if name in COLUMNS and value not in (None, "")}
    values: dict[str, Any] = {"rater": NO_RATER, "prompt": where, "question": "overall"} | given
    if absent := [name for name in COLUMNS[:3] if name not in values]:
        raise ValueError(f"{where}: no {absent[0]}")
    if values["winner"] not in WINNERS.values():
        raise ValueError(f"{where}: winner is {values['winner']!r}, not one of {', '.join(WINNERS.values())}")
    if values.get("kind", "pair") not in PAIR_KINDS:
        raise ValueError(f"{where}: kind is {values['kind']!r}, not one of {', '.join(PAIR_KINDS)}")
    try:
        milliseconds = int(values.get("milliseconds", 0))
        if not 0 <= milliseconds < 2**63:
            raise ValueError
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(
            f"{where}: milliseconds is {values['milliseconds']!r}, not a whole number from 0 to 2^63 - 1"
        ) from error
    texts = {field.name: str(values[field.name]) for field in fields(Judgement)
             if field.name in values and field.name != "milliseconds"}  # fmt: skip
    return Judgement(**texts, milliseconds=milliseconds)


def _tasks(judgements: Sequence[Judgement]) -> list[dict[str, Any]]:
    """One task per ordered pair, one annotation per ballot, one result per answer.

    A side that won is a result of type ``pairwise``. Label Studio has no ties there, so "same" and "both bad"
    are results of type ``choices``.
    """
    tasks: dict[tuple[str, ...], dict[str, Any]] = {}
    ballots: dict[tuple[object, ...], dict[str, Any]] = {}
    for one in judgements:
        pair = (one.prompt, one.video_a, one.video_b, one.model_a, one.model_b)
        task = tasks.setdefault(
            pair,
            {
                "id": len(tasks) + 1,
                "data": dict(zip(VIDEO_NAMES, (f"{one.video_a}.mp4", f"{one.video_b}.mp4"), strict=True))
                | {"prompt": one.prompt, "model_a": one.model_a, "model_b": one.model_b},
                "annotations": [],
            },
        )
        key = (*pair, one.rater, one.kind, one.milliseconds)
        if key not in ballots:
            ballots[key] = {"result": [], "lead_time": one.milliseconds / 1000,
                            "meta": {"rater": one.rater, "kind": one.kind}}  # fmt: skip
            task["annotations"].append(ballots[key])
        side = {"model_a": "left", "model_b": "right"}.get(one.winner)
        ballots[key]["result"].append(
            {"from_name": one.question, "to_name": ",".join(VIDEO_NAMES)}
            | (
                {"type": "pairwise", "value": {"selected": side}}
                if side
                else {"type": "choices", "value": {"choices": [one.winner]}}
            )
        )
    return list(tasks.values())


def _from_tasks(path: Path) -> list[Judgement]:
    given = read_json(path)
    if not isinstance(given, list):
        raise ValueError(f"{path}: expected a list of Label Studio's tasks")
    found = []
    for number, task in enumerate(given, 1):
        where = f"{path}, task {number}"
        try:
            data, annotations = dict(task["data"]), list(task.get("annotations", ()))
            files = [Path(str(data[side])).stem for side in VIDEO_NAMES]
            for annotation in annotations:
                meta = annotation.get("meta") or {}
                rater = meta.get("rater", annotation.get("completed_by", NO_RATER))
                for result in annotation["result"]:
                    found.append(
                        _judgement(
                            where,
                            {
                                "model_a": data.get("model_a", "video1"),
                                "model_b": data.get("model_b", "video2"),
                                "winner": _winner(result),
                                "question": result["from_name"],
                                "prompt": data.get("prompt", ""),
                                "rater": rater,
                                "kind": meta.get("kind", "pair"),
                                "milliseconds": _milliseconds(where, annotation.get("lead_time")),
                                "video_a": files[0],
                                "video_b": files[1],
                            },
                        )
                    )
        except (KeyError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{where}: not a pairwise task of Label Studio ({error!r})") from error
    return found


def _milliseconds(where: str, lead_time: Any) -> int:
    try:
        return round(1000 * float(lead_time or 0))
    except (OverflowError, TypeError, ValueError) as error:
        raise ValueError(f"{where}: lead_time is {lead_time!r}, not a number of seconds") from error


def _winner(result: dict[str, Any]) -> str:
    value = result["value"]
    if result["type"] == "pairwise":
        return WINNERS.get(value["selected"], str(value["selected"]))
    return str(value["choices"][0])
