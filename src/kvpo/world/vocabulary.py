"""Plain data on everything the embedded world can show: acts, and what a caption can ask for."""

from dataclasses import dataclass

WIDTH = 32
"""Side of a frame in units of length, regardless of its number of pixels."""
FRAME_SIZE = 48
"""Height and width of a frame in pixels."""

COLOURS: dict[str, tuple[float, float, float]] = {
    "red": (0.93, 0.16, 0.18),
    "orange": (1.00, 0.55, 0.10),
    "yellow": (0.98, 0.92, 0.25),
    "green": (0.25, 0.88, 0.35),
    "blue": (0.25, 0.50, 1.00),
    "pink": (1.00, 0.45, 0.80),
    "white": (0.97, 0.97, 0.97),
}
"""Actor colours, RGB in [0, 1]: bright, so that they stand out from every scene."""

SHAPES = ("circle", "square", "triangle", "cross", "ring")
SIZES: dict[str, float] = {"small": 4.0, "large": 5.75}
"""Half extent of an actor in units."""

MAX_ACTORS = 2
"""Maximum number of actors in a segment."""
MOTIONS = ("still", "left", "right", "bob")
"""left and right move at SPEED around the torus; bob swings vertically by BOB_AMPLITUDE over BOB_PERIOD."""
SPEED = 1.25
"""Units per frame."""
BOB_AMPLITUDE = 2.5
BOB_PERIOD = 8.0

SCENES: dict[str, tuple[tuple[float, float, float], tuple[float, float, float]]] = {
    "night": ((0.03, 0.03, 0.10), (0.08, 0.08, 0.14)),
    "meadow": ((0.16, 0.30, 0.42), (0.07, 0.26, 0.08)),
    "desert": ((0.38, 0.24, 0.14), (0.30, 0.19, 0.05)),
    "sea": ((0.10, 0.20, 0.30), (0.02, 0.12, 0.30)),
    "cave": ((0.14, 0.08, 0.17), (0.22, 0.12, 0.24)),
}
"""Backgrounds: (upper, lower) RGB, dark so that actors stand out; the ground begins near HORIZON * height."""
HORIZON = 0.6

LANES = {1: (16.0,), 2: (8.0, 24.0)}
"""Vertical centres of the actors in units, by number of actors: two actors never overlap."""


@dataclass(frozen=True)
class Actor:
    """One actor in view."""

    colour: str
    shape: str
    size: str
    motion: str


@dataclass(frozen=True)
class Act:
    """One prompt segment as rendered: a scene and one or two actors, from latent frame ``start`` on."""

    scene: str
    actors: tuple[Actor, ...]
    caption: str
    start: int
    event: str


@dataclass(frozen=True)
class Story:
    """A captioned video: acts in order, ``num_frames`` frames in all."""

    acts: tuple[Act, ...]
    num_frames: int


@dataclass(frozen=True)
class ActorRequest:
    """Demands of a caption on one actor; None leaves the attribute open."""

    colour: str | None = None
    shape: str | None = None
    size: str | None = None
    motion: str | None = None


@dataclass(frozen=True)
class Request:
    """Demands of a caption on its segment: as many actors as listed; None leaves the scene open."""

    scene: str | None
    actors: tuple[ActorRequest, ...]
