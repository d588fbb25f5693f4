"""The protocol of live sessions: client messages, their strict parser, and errors.

A message is one JSON object with a ``type``; its other fields are those of the dataclass for that type.
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
"""Error codes after which the same request may succeed later."""
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
    """Refuses a request, with a typed ``code`` and a one-line message for the user."""

    def __init__(self, code: Code, message: str) -> None:
        super().__init__(message)
        self.code = code

    def event(self) -> dict[str, Any]:
        """The error event to send to the client."""
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
    """Empty: all arms that the server has."""
    frames: int = 0
    """Latent frames that the prompt lasts before the queue continues; 0: until it is replaced."""
    speed: float = 1.0
    """Multiple of the video's own rate; 0: as fast as possible."""
    snapshot: str = ""
    """Name of a snapshot to continue; the values that it holds override the other fields."""


@dataclass(frozen=True)
class Watch:
    """Watch a session that another connection directs."""

    session: str


@dataclass(frozen=True)
class PromptUpdate:
    """Change the prompt from the next block on."""

    prompt: str
    frames: int = 0
    transition_blocks: int | None = None
    """Blocks over which the switch blends; null: the deployment's setting."""


@dataclass(frozen=True)
class Queue:
    """Replace the list of prompts that follow the current one."""

    prompts: tuple[PromptUpdate, ...]


@dataclass(frozen=True)
class Route:
    """Put past frames into the routed slots of the next blocks; none: return to the deployment context."""

    frames: tuple[int, ...]
    blocks: int = 1


@dataclass(frozen=True)
class Pin:
    """Keep past frames resident, or release them."""

    frames: tuple[int, ...]
    pinned: bool = True


@dataclass(frozen=True)
class ForkRequest:
    """Run routed continuations side by side from a past frame; -1: from the next block."""

    frame: int = -1
    branches: int = 5
    blocks: int = 3
    arm: Literal["base", "aligned", ""] = ""
    """The arm to continue; empty: the aligned arm if there is one."""


@dataclass(frozen=True)
class Choose:
    """Close the fork and continue along a branch; -1: from where the stream was."""

    branch: int
    ranking: tuple[int, ...] = ()
    """All branches, best first, beginning with the chosen one; empty: the chosen one beats all others."""


@dataclass(frozen=True)
class Pause:
    """Pause the stream, or resume it."""

    paused: bool = True


@dataclass(frozen=True)
class Speed:
    """Change the speed from the next block on."""

    speed: float


@dataclass(frozen=True)
class Reset:
    """Restart from the first frame; -1 and an empty prompt keep the current seed and prompt."""

    seed: int = -1
    prompt: str = ""


@dataclass(frozen=True)
class Snapshot:
    """Save the session; the answer holds the name under which it can be continued later."""


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
"""``type`` of a client's message -> the dataclass of its fields."""


def parse_message(text: str) -> tuple[str, Any]:
    """Parse a client's message into its type and its fields. Raises Refusal."""
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
    """Check that ``value`` is of ``kind`` and return it; only whole numbers are converted, to floats."""
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
    """Pack a binary message: length of the header (4 bytes, big-endian), header as JSON, parts in order."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join([struct.pack(">I", len(text)), text, *parts])
