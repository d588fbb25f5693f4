"""Snapshots of sessions, which outlive the server: pages, latents and script in one file."""

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, astuple
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvpo.files import new_file, parse_json
from kvpo.live.protocol import Refusal
from kvpo.live.script import Cue, Script
from kvpo.live.session import Session, Stage
from kvpo.models.cache import FrameCache, History
from kvpo.models.tensor_files import storable

SNAPSHOT_NAME = re.compile(r"[0-9a-f]{1,32}-[0-9]{1,12}")
"""Names of snapshots: an id and the latent frame that the session was at."""
FORMAT = 1
"""Version of a snapshot's record; increased whenever its contents change."""


def snapshot_of(session: Session) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Capture a session as tensors and plain data; ``restored`` continues it with equal latents."""
    tensors: dict[str, Tensor] = {}
    arms: dict[str, Any] = {}
    for name, arm in session.arms.items():
        history = arm.stream.history
        ids = sorted(set(history.all_references()))
        at = {page: n for n, page in enumerate(ids)}
        tensors[f"{name}.keys"] = history.cache.keys_LQTND[:, ids].clone()
        tensors[f"{name}.values"] = history.cache.values_LQTND[:, ids].clone()
        tensors[f"{name}.latents"] = arm.spool.read(0, session.start)
        arms[name] = {
            "pages": [[frame, at[page]] for frame, page in history.pages.items()],
            "sink": history.sink,
            "bank": [[at[page] for page in layer] for layer in history.bank],
            "latest": None if history.latest is None else at[history.latest],
            "segment": arm.stream.segment,
            "fresh_prompt": arm.stream.fresh_prompt,
        }
    record = {
        "format": FORMAT,
        "identity": session.stage.identity,
        "start": session.start,
        "script": {**asdict(session.script), "routes": sorted(session.script.routes.items())},
        "cue": astuple(session.cue),
        "cue_start": session.cue_start,
        "coming": None if session.coming is None else astuple(session.coming),
        "queue": [astuple(cue) for cue in session.queue],
        "pins": sorted(session.pins),
        "arms": arms,
    }
    return tensors, record


def restored(
    stage: Stage, cache: FrameCache, tensors: Mapping[str, Tensor], record: Mapping[str, Any]
) -> Session:
    """Rebuild the session of a snapshot. Raises Refusal if it is of another generator or damaged."""
    if record.get("format") != FORMAT:
        raise Refusal("not_found", "snapshot: it is of another version of kvpo, which can continue it")
    if record.get("identity") != stage.identity:
        raise Refusal("not_found", "snapshot: it was taken under other weights or another deployment")
    try:
        session = Session(stage, cache, [*record["arms"]], Cue(*record["cue"]), record["script"]["seed"])
        try:
            _take_up(session, tensors, record)
        except BaseException:
            session.release()
            raise
    except (AttributeError, LookupError, TypeError, ValueError, RuntimeError) as error:
        raise Refusal("not_found", f"snapshot: it is damaged ({error!r})") from error
    return session


def _take_up(session: Session, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Bring a new session to the state that a record describes."""
    script = record["script"]
    session.cue_start, session.pins = record["cue_start"], frozenset(record["pins"])
    if record["coming"] is not None:
        session.show(Cue(*record["coming"]))
    session.line_up(Cue(*cue) for cue in record["queue"])
    session.script = Script(
        script["seed"],
        tuple(script["segments"]),
        tuple(script["switches"]),
        tuple(script["transitions"]),
        {block: tuple(route) for block, route in script["routes"]},
    )
    for name, own in record["arms"].items():
        arm = session.arms[name]
        _fill(arm.stream.history, tensors[f"{name}.keys"], tensors[f"{name}.values"], own)
        arm.stream.history.end = record["start"]
        arm.spool.append(tensors[f"{name}.latents"])
        arm.stream.latents = session.before(arm.spool, record["start"])
        arm.stream.prompt = session.script.shown()
        arm.stream.segment, arm.stream.fresh_prompt = own["segment"], own["fresh_prompt"]
        arm.decoding = session.decoding_at(arm, record["start"])
    session.hold()


def _fill(history: History, keys: Tensor, values: Tensor, record: Mapping[str, Any]) -> None:
    """Write a snapshot's pages and restore the history's references to them."""
    if not keys.shape[1]:
        return
    if keys.shape != values.shape or keys[:, 0].shape != history.cache.keys_LQTND[:, 0].shape:
        raise ValueError(f"pages of {list(keys.shape)}")
    (ids,) = history.cache.write(keys[:, None], values[:, None])
    try:
        pages = {frame: ids[n] for frame, n in record["pages"]}
        bank = [[ids[n] for n in layer] for layer in record["bank"]]
        latest = None if record["latest"] is None else ids[record["latest"]]
        sink = tuple(record["sink"])  # read everything before the history refers to any page
        history.pages, history.bank, history.latest, history.sink = pages, bank, latest, sink
        history.cache.share(history.all_references())
    finally:
        history.cache.release(ids)


def save_snapshot(out: Path, name: str, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> Path:
    """Write a snapshot atomically and return its path. Raises StorageError."""
    path = out / "snapshots" / f"{name}.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    with new_file(path, failures=(SafetensorError,)) as temporary:
        save_file(storable(dict(tensors)), temporary, metadata={"session": json.dumps(record)})
    return path


def load_snapshot(out: Path, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Load the tensors and the record of a snapshot. Raises Refusal if it is missing or damaged."""
    path = out / "snapshots" / f"{name}.safetensors"
    if not SNAPSHOT_NAME.fullmatch(name) or not path.is_file():
        raise Refusal("not_found", f"snapshot: there is none called {name[:60]!r}")
    try:
        with safe_open(path, framework="pt") as file:
            record = dict(parse_json((file.metadata() or {})["session"]))
        return load_file(path), record
    except (SafetensorError, KeyError, TypeError, ValueError) as error:
        raise Refusal("not_found", f"snapshot: {name} is damaged ({error!r})") from error
