"""Draws the embedded world: a story's states per frame, and anti-aliased shapes on quiet textured scenes."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from kvpo.world.vocabulary import (
    BOB_AMPLITUDE,
    BOB_PERIOD,
    COLOURS,
    FRAME_SIZE,
    HORIZON,
    LANES,
    MAX_ACTORS,
    SCENES,
    SHAPES,
    SIZES,
    SPEED,
    WIDTH,
    Act,
    Actor,
    Story,
)

GLIDE = 4.0
"""Frames over which an actor eases to a new height when it changes lane or stops bobbing."""

_COLOUR_INDEX = {name: index for index, name in enumerate(COLOURS)}
_SHAPE_INDEX = {name: index for index, name in enumerate(SHAPES)}
_SCENE_INDEX = {name: index for index, name in enumerate(SCENES)}
_VELOCITY = {"still": 0.0, "left": -SPEED, "right": SPEED, "bob": 0.0}

Cast = tuple[int, ...]
"""One identity per actor of an act; an actor that was in the previous act continues from its place there."""


@dataclass(frozen=True)
class FrameStates:
    """Contents of every frame. N frames, A = 2 actor slots."""

    scene_N: Tensor
    """Index into SCENES."""
    colour_NA: Tensor
    """Index into COLOURS."""
    shape_NA: Tensor
    """Index into SHAPES, -1 where the slot is empty."""
    extent_NA: Tensor
    """Half extent in units."""
    centre_NA2: Tensor
    """(x, y) in units; x lives on a torus of WIDTH."""

    def at(self, frames: Tensor) -> "FrameStates":
        """Select the states of some frames, in the order given."""
        return FrameStates(**{field.name: getattr(self, field.name)[frames] for field in fields(self)})


def casts(story: Story) -> list[Cast]:
    """Identities of the actors of each act: an actor stays the same through turns and recolours.

    Across a switch an actor is recognised by shape and size, and by colour unless the event is a recolour.
    """
    result: list[Cast] = []
    fresh = 0
    previous: Act | None = None
    for act in story.acts:
        cast = []
        for actor in act.actors:
            identity = None
            for index, before in enumerate(previous.actors if previous else ()):
                same_look = (before.shape, before.size) == (actor.shape, actor.size)
                if same_look and (before.colour == actor.colour or act.event == "recolour"):
                    identity = result[-1][index]
            if identity is None:
                identity, fresh = fresh, fresh + 1
            cast.append(identity)
        result.append(tuple(cast))
        previous = act
    return result


@dataclass(frozen=True)
class _Place:
    """Place of an actor as an act begins: centre in units, and how many frames it has been bobbing."""

    x: float
    y: float
    phase: float


def stage(story: Story, acts_cast: Sequence[Cast], tiring: Sequence[float] = ()) -> FrameStates:
    """Per-frame states: positions are continuous while an actor stays; actors enter in the middle.

    If an act's ``tiring`` is not 0, its movement dies away, to 1/e in that many frames.
    """
    frames = story.num_frames
    states = FrameStates(
        scene_N=torch.zeros(frames, dtype=torch.long),
        colour_NA=torch.zeros(frames, MAX_ACTORS, dtype=torch.long),
        shape_NA=torch.full((frames, MAX_ACTORS), -1),
        extent_NA=torch.ones(frames, MAX_ACTORS),
        centre_NA2=torch.zeros(frames, MAX_ACTORS, 2),
    )
    ends = [act.start for act in story.acts[1:]] + [frames]
    where: dict[int, _Place] = {}
    for act, cast, end, tires in zip(story.acts, acts_cast, ends, tiring or [0.0] * len(ends), strict=True):
        states.scene_N[act.start : end] = _SCENE_INDEX[act.scene]
        following = {}
        for slot, (actor, identity) in enumerate(zip(act.actors, cast, strict=True)):
            lane = LANES[len(act.actors)][slot]
            place = where.get(identity, _Place(WIDTH / 2, lane, 0.0))
            centre_T2, following[identity] = _move(actor, lane, place, end - act.start, tires)
            states.centre_NA2[act.start : end, slot] = centre_T2
            states.colour_NA[act.start : end, slot] = _COLOUR_INDEX[actor.colour]
            states.shape_NA[act.start : end, slot] = _SHAPE_INDEX[actor.shape]
            states.extent_NA[act.start : end, slot] = SIZES[actor.size]
        where = following
    return states


def _move(actor: Actor, lane: float, place: _Place, length: int, tires: float) -> tuple[Tensor, _Place]:
    """Centres [length, 2] of an actor over one act, and its place in the next frame."""
    frame_T = torch.arange(length + 1)
    time_T = tires * (1 - (-frame_T / tires).exp()) if tires else frame_T
    bob = BOB_AMPLITUDE if actor.motion == "bob" else 0.0
    phase = place.phase if bob else 0.0
    swing_T = bob * torch.sin(2 * math.pi / BOB_PERIOD * (time_T + phase))
    # Ease from the height the actor had to the height it should have.
    ease_T = (place.y - lane - float(swing_T[0])) * (1 - frame_T / GLIDE).clamp(min=0)
    centre_T2 = torch.stack((place.x + _VELOCITY[actor.motion] * time_T, lane + swing_T + ease_T), dim=1)
    x, y = centre_T2[-1].tolist()
    return centre_T2[:-1], _Place(x, y, phase + float(time_T[-1]) if bob else 0.0)


def concatenate(states: Sequence[FrameStates]) -> FrameStates:
    """The frames of several stories, one after another."""
    return FrameStates(
        **{field.name: torch.cat([getattr(s, field.name) for s in states]) for field in fields(FrameStates)}
    )


def paint(states: FrameStates) -> Tensor:
    """Frames [N, 3, FRAME_SIZE, FRAME_SIZE] in [0, 1]: shapes anti-aliased by their signed distance."""
    frames_NCHW = backgrounds()[states.scene_N]
    palette = torch.tensor(list(COLOURS.values()))
    unit = FRAME_SIZE / WIDTH
    pixel = (torch.arange(FRAME_SIZE) + 0.5) / unit
    half = WIDTH / 2
    for slot in range(MAX_ACTORS):
        for index, shape in enumerate(SHAPES):
            rows = (states.shape_NA[:, slot] == index).nonzero()[:, 0]
            if len(rows) == 0:
                continue
            centre = states.centre_NA2[rows, slot]
            dx_MW = torch.remainder(pixel - centre[:, :1] + half, WIDTH) - half
            dy_MH = pixel - centre[:, 1:]
            extent_M = states.extent_NA[rows, slot][:, None, None]
            distance_MHW = _signed_distance(shape, dx_MW[:, None, :], dy_MH[:, :, None], extent_M)
            cover = (0.5 - unit * distance_MHW).clamp(0, 1)[:, None]
            colour = palette[states.colour_NA[rows, slot]][:, :, None, None]
            frames_NCHW[rows] = torch.lerp(frames_NCHW[rows], colour, cover)
    return frames_NCHW


def _signed_distance(shape: str, dx: Tensor, dy: Tensor, extent: Tensor) -> Tensor:
    """Distance in units to the outline, negative inside; broadcasts dx [.., 1, W] with dy [.., H, 1]."""
    if shape == "circle":
        return torch.sqrt(dx * dx + dy * dy) - extent
    if shape == "ring":
        return (torch.sqrt(dx * dx + dy * dy) - 0.75 * extent).abs() - 0.27 * extent
    if shape == "square":
        return torch.maximum(dx.abs(), dy.abs()) - 0.86 * extent
    if shape == "triangle":
        base, half_width = 0.8 * extent, 1.04 * extent
        height = extent + base
        side = (dx.abs() * height - (dy + extent) * half_width) / torch.sqrt(height**2 + half_width**2)
        return torch.maximum(side, dy - base)
    arm = 0.33 * extent
    upright = torch.maximum(dx.abs() - arm, dy.abs() - extent)
    across = torch.maximum(dx.abs() - extent, dy.abs() - arm)
    return torch.minimum(upright, across)


@lru_cache
def backgrounds() -> Tensor:
    """The scenes without actors, [len(SCENES), 3, FRAME_SIZE, FRAME_SIZE]; seamless across the torus."""
    unit = FRAME_SIZE / WIDTH
    pixel = (torch.arange(FRAME_SIZE) + 0.5) / unit
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    turn = 2 * math.pi / WIDTH
    level = HORIZON * WIDTH
    ground_level = {
        "night": level + 1.5 * torch.sin(turn * x + 1) + 2,
        "meadow": level + 1.2 * torch.sin(turn * x),
        "desert": level + 2.6 * torch.sin(turn * x + 2.5),
        "sea": torch.full_like(x, level),
        "cave": level + 5 + 0.8 * torch.sin(3 * turn * x),
    }
    scenes = []
    for name, (upper, lower) in SCENES.items():
        ground = (unit * (y - ground_level[name]) + 0.5).clamp(0, 1)
        scene = torch.lerp(torch.tensor(upper)[:, None, None], torch.tensor(lower)[:, None, None], ground)
        scenes.append((scene + _texture(name, x, y, ground, unit)).clamp(0, 1))
    return torch.stack(scenes)


def _texture(scene: str, x: Tensor, y: Tensor, ground: Tensor, unit: float) -> Tensor:
    """Quiet detail that tells scenes apart, as an offset [3, H, W] to the two tones."""
    turn = 2 * math.pi / WIDTH
    if scene == "night":
        stars = ((3, 4), (9, 11), (14, 2), (20, 7), (27, 3), (30, 13), (23, 15), (5, 17))
        light = torch.zeros_like(x)
        for column, row in stars:
            near = torch.maximum((x - column - 0.5).abs(), (y - row - 0.5).abs())
            light += 0.34 * (unit * (0.5 - near) + 0.5).clamp(0, 1)
        return light * torch.tensor((0.9, 0.9, 1.0))[:, None, None]
    if scene == "meadow":
        blades = torch.sin(8 * turn * x + 0.9 * y).clamp(min=0) * ground
        return blades * torch.tensor((0.02, 0.10, 0.01))[:, None, None]
    if scene == "desert":
        second_dune = (unit * (y - (25 + 2.2 * torch.sin(turn * x)))).add(0.5).clamp(0, 1)
        return second_dune * torch.tensor((0.10, 0.06, 0.03))[:, None, None]
    if scene == "sea":
        waves = torch.sin(1.6 * y + 1.2 * torch.sin(4 * turn * x)).clamp(min=0) * ground
        return waves * torch.tensor((0.02, 0.08, 0.12))[:, None, None]
    # Cave: rock teeth hanging from the roof.
    above = (x.remainder(8) - 4).abs() * 1.6 + y - (5 + 1.5 * torch.sin(turn * x))
    tooth = (unit * above).neg().clamp(0, 1)
    return -tooth * torch.tensor((0.10, 0.05, 0.12))[:, None, None]


def render(story: Story) -> Tensor:
    """Render a story exactly as its acts say: [T, 3, FRAME_SIZE, FRAME_SIZE] in [0, 1]."""
    return paint(stage(story, casts(story)))
