"""Messages of a live session: what clients may say, strictly parsed, and how they are refused.

A message is one JSON object with a ``type``; its other fields are those of the dataclass of that type.
``docs/live.md`` has an example of each.
"""

import json
import struct
import sys
import typing
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any, Literal

from kvpo.files import parse_json

RETRYABLE = frozenset({"busy", "failed"})
"""Codes of errors that may be gone when the same is asked for again."""
Code = Literal[
    "malformed",
    "too_large",
    "unknown_type",
    "out_of_order",
    "busy",
    "not_found",
    "not_resident",
    "out_of_range",
    "no_fork",
    "unavailable",
    "failed",
]


class Refusal(Exception):
    """A request that is not carried out: a typed ``code`` and one line for the user."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code

    def event(self) -> dict[str, Any]:
        """The event that tells the client."""
        return {
            "type": "error",
            "code": self.code,
            "message": str(self),
            "retryable": self.code in RETRYABLE,
        }


@dataclass(frozen=True)
class Start:
    """Open a session, from a prompt or from a snapshot."""

    prompt: str = ""
    seed: int = 0
    arms: Literal["base", "aligned", "both", ""] = ""
    """Empty: those that the server has."""
    frames: int = 0
    """Latent frames that the prompt lasts before the queue goes on; 0: until it is replaced."""
    speed: float = 1.0
    """Multiple of the video's own rate."""
    snapshot: str = ""
    """Continue this snapshot; what it holds replaces the other fields."""


@dataclass(frozen=True)
class Watch:
    """See a session that another connection directs."""

    session: str


@dataclass(frozen=True)
class PromptUpdate:
    """Another prompt from the next block on."""

    prompt: str
    frames: int = 0
    transition_blocks: int | None = None
    """Blocks over which the switch blends; null: those of the deployment."""


@dataclass(frozen=True)
class Queue:
    """Prompts that follow the current one, which they replace as a list."""

    prompts: tuple[PromptUpdate, ...]


@dataclass(frozen=True)
class Route:
    """Past frames in the routed slots of the next blocks; none: back to the deployment context."""

    frames: tuple[int, ...]
    blocks: int = 1


@dataclass(frozen=True)
class Pin:
    """Keep past frames resident, or let them go."""

    frames: tuple[int, ...]
    pinned: bool = True


@dataclass(frozen=True)
class ForkRequest:
    """Run routed continuations from a past moment side by side; -1: from the next block."""

    frame: int = -1
    branches: int = 5
    blocks: int = 3
    arm: Literal["base", "aligned", ""] = ""
    """Whose continuations; empty: the aligned arm's where there is one."""


@dataclass(frozen=True)
class Choose:
    """Close the fork and go on along a branch; -1: where the stream was."""

    branch: int
    ranking: tuple[int, ...] = ()
    """All branches, the best first, which is the chosen one; empty: that it is better than each."""


@dataclass(frozen=True)
class Pause:
    """Hold the stream, or let it go on."""

    paused: bool = True


@dataclass(frozen=True)
class Speed:
    """Another pace from the next block on."""

    speed: float


@dataclass(frozen=True)
class Reset:
    """Begin again from the first frame; -1 and an empty prompt: as before."""

    seed: int = -1
    prompt: str = ""


@dataclass(frozen=True)
class Snapshot:
    """Save the session, to continue it later under the name that the answer gives."""


@dataclass(frozen=True)
class Export:
    """Write the session as a file: a video, a prompt file, or a line of the training prompts."""

    what: Literal["mp4", "prompts", "training"]


@dataclass(frozen=True)
class Stop:
    """End the session."""


MESSAGES: dict[str, type] = {
    "session.start": Start,
    "session.watch": Watch,
    "session.prompt_update": PromptUpdate,
    "session.queue": Queue,
    "session.route": Route,
    "session.pin": Pin,
    "session.fork": ForkRequest,
    "session.choose": Choose,
    "session.pause": Pause,
    "session.speed": Speed,
    "session.reset": Reset,
    "session.snapshot": Snapshot,
    "session.export": Export,
    "session.stop": Stop,
}
"""``type`` of a client's message -> its fields."""


def parse_message(text: str) -> tuple[str, Any]:
    """The type and the fields of a client's message. Raises Refusal."""
    try:
        value = parse_json(text)
    except ValueError as error:
        raise Refusal("malformed", f"a message is one JSON object: {error}") from error
    if not isinstance(value, dict) or not isinstance(value.get("type"), str):
        raise Refusal("malformed", 'a message is one JSON object with a "type"')
    name = value.pop("type")
    if name not in MESSAGES:
        raise Refusal("unknown_type", f"type: {name[:60]!r} is none of {', '.join(MESSAGES)}")
    return name, _built(MESSAGES[name], value)


def _built(kind: type, given: Mapping[str, Any]) -> Any:
    hints = typing.get_type_hints(kind)
    known = ", ".join(hints) or "none"
    if unknown := sorted(given.keys() - hints.keys()):
        raise Refusal("malformed", f"{unknown[0][:60]}: no such field; there are {known}")
    for field in fields(kind):
        if field.default is MISSING and field.name not in given:
            raise Refusal("malformed", f"{field.name}: missing")
    return kind(**{name: _converted(hints[name], value, name) for name, value in given.items()})


def _converted(kind: Any, value: Any, name: str) -> Any:
    """``value`` as ``kind``; a whole number will do for a float, nothing else is converted."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        if value in arguments and isinstance(value, str):
            return value
        choices = ", ".join(repr(choice) for choice in arguments)
        raise Refusal("malformed", f"{name}: must be one of {choices}, got {_shown(value)}")
    if type(None) in arguments:
        return None if value is None else _converted(arguments[0], value, name)
    if origin is tuple and isinstance(value, list):
        return tuple(_converted(arguments[0], item, f"{name}[{n}]") for n, item in enumerate(value))
    if isinstance(value, dict) and kind in MESSAGES.values():
        return _built(kind, value)
    if kind is float and type(value) in (int, float) and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (bool, int, str) and type(value) is kind and (kind is not int or abs(value) < 2**53):
        return value
    words = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
    word = words.get(kind, "a list" if origin is tuple else "an object")
    raise Refusal("malformed", f"{name}: must be {word}, got {_shown(value)}")


def _shown(value: Any) -> str:
    return json.dumps(value)[:60]


def packed(header: Mapping[str, Any], parts: Sequence[bytes]) -> bytes:
    """A binary message: length of the header (4 bytes, big-endian), the header as JSON, the parts in turn."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([struct.pack(">I", len(text)), text, *parts])
