"""Reads the embedded world's pixels: scene, number of actors, and each actor's look, place and motion.

Pixels are compared with the vocabulary's tones and shapes, vectorised over all frames. A frame is read
under two hypotheses at once, one actor or two, so there are three slots for actors: the only one, the
upper one and the lower one. Axes: B clips, T frames, N = B T, L = 3 slots, H, W pixels; S scenes, C colours,
K shapes, Z sizes, M motions in the vocabulary's order.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from kvpo.world.vocabulary import (
    BOB_AMPLITUDE,
    BOB_PERIOD,
    COLOURS,
    FRAME_SIZE,
    LANES,
    MOTIONS,
    SCENES,
    SHAPES,
    SIZES,
    SPEED,
    WIDTH,
)

SLOT_LANES = (*LANES[1], *LANES[2])
"""Vertical centre of the slots: the only actor, the upper one, the lower one."""
SLOTS_OF_COUNT = ((0,), (1, 2))
"""Slots in use when a frame shows one actor, and when it shows two."""

SCENE_TONES = {
    "night": ((0.06, 0.06, 0.13), (0.08, 0.08, 0.14)),
    "meadow": ((0.16, 0.30, 0.42), (0.08, 0.29, 0.08)),
    "desert": ((0.38, 0.24, 0.14), (0.39, 0.24, 0.08)),
    "sea": ((0.10, 0.20, 0.30), (0.03, 0.15, 0.34)),
    "cave": ((0.13, 0.07, 0.16), (0.22, 0.12, 0.24)),
}
"""The vocabulary's tones with each scene's texture averaged in: (upper rows, lower rows)."""
ABOVE_GROUND, GROUND, BELOW_GROUND = 16, 20, 26
"""Heights in units: above the ground line of every scene, near it, and below it."""

SCENE_WIDTH = 0.12
COLOUR_WIDTH = 0.25
"""RGB distances at which a pixel's membership in a tone or a colour falls to 1/e."""
GLYPH_TEMPERATURE = 0.025
"""Difference in explained energy that makes one glyph e times as likely as another."""
COUNT_TEMPERATURE = 0.04
X_WIDTH = 0.8
SWING_WIDTH = 1.2
"""Units per frame, and units of swing, at which a motion's membership falls to 1/e."""
EMPTY_ENERGY = 6.0
"""Foreground energy in square units below which a slot counts as empty rather than as a small glyph."""

COLOUR_AREA = 200
"""Area in square units that is compared with the colours: the pixels best covered by actors."""
BROKEN_BELOW = 0.535
"""Confidence below which a clip of 15 frames counts as broken: the 1st percentile of exact
renders after the latent codec. `python -m kvpo.world.calibration` recomputes it."""
BROKEN_FRAME_BELOW = 0.405
"""The same for the confidence of a single frame."""
HALF_WINDOW = 8
"""Half the side, in units, of the window around a glyph's centroid."""
OFFSETS = (-0.5, -0.25, 0.0, 0.25, 0.5)
"""Offsets of the glyph bank in pixels, in both directions."""


@dataclass(frozen=True)
class Detection:
    """Contents of every frame, as soft memberships in [0, 1]."""

    scene_BTS: Tensor
    count_BT2: Tensor
    """Degree to which one actor, or two, explain the foreground; sums to at most 1."""
    colour_BTLC: Tensor
    shape_BTLK: Tensor
    size_BTLZ: Tensor
    motion_BTLM: Tensor
    """Motion between the frame before and this one; frame 0 repeats frame 1."""
    centre_BTL2: Tensor
    """(x, y) of a slot's actor in units."""
    background_BT: Tensor
    """Mean brightness of the background."""
    brightness_BTL: Tensor
    """Mean brightness of a slot's actor."""
    confidence_BT: Tensor
    """Confidence that a frame shows the world at all: scene, glyphs and colours together."""

    @property
    def broken(self) -> Tensor:
        """True for clips that show the world too poorly to be read, [B]."""
        return self.confidence < BROKEN_BELOW

    @property
    def confidence(self) -> Tensor:
        """Confidence of a clip, [B]: the mean over its frames."""
        return self.confidence_BT.mean(1)


def detect(video_BTCHW: Tensor) -> Detection:
    """Read clips [B, T, 3, H, W] in [0, 1], H = W = FRAME_SIZE; raises ValueError for another shape."""
    if video_BTCHW.ndim != 5 or tuple(video_BTCHW.shape[2:]) != (3, FRAME_SIZE, FRAME_SIZE):
        raise ValueError(
            f"video has shape {list(video_BTCHW.shape)}: the embedded world's detector reads "
            f"[B, T, 3, {FRAME_SIZE}, {FRAME_SIZE}]; use another reward for other videos"
        )
    batch, frames = video_BTCHW.shape[:2]
    pixels_NCHW = video_BTCHW.detach().to("cpu", torch.float32).clamp(0, 1).flatten(0, 1)
    scene_NS, background_N = _scenes(pixels_NCHW)
    cover_NHW = _cover(pixels_NCHW, scene_NS)
    cover_NLHW = _slots(cover_NHW)
    energy_NL = cover_NLHW.square().sum((2, 3)) * (WIDTH / cover_NLHW.shape[3]) ** 2
    centroid_NL2 = _centroid(cover_NLHW)
    fit_NLG, offset_NL2, glyph_NLG = _glyphs(cover_NLHW, centroid_NL2, energy_NL)
    presence_NL = fit_NLG.amax(2)
    count_N2 = _count(presence_NL, energy_NL)
    colour_NLC, brightness_NL = _colours(pixels_NCHW, cover_NLHW)
    centre_NL2 = centroid_NL2 + offset_NL2
    look_NLKZ = glyph_NLG.unflatten(2, (len(SHAPES), len(SIZES)))
    purity_NL = colour_NLC.amax(2) * presence_NL
    both_N2 = torch.stack([purity_NL[:, 0], purity_NL[:, 1:].mean(1)], 1)
    confidence_N = scene_NS.amax(1) * (both_N2 * count_N2).sum(1)

    def frames_of(x: Tensor) -> Tensor:
        return x.unflatten(0, (batch, frames))

    centre_BTL2 = frames_of(centre_NL2)
    return Detection(
        scene_BTS=frames_of(scene_NS),
        count_BT2=frames_of(count_N2),
        colour_BTLC=frames_of(colour_NLC),
        shape_BTLK=frames_of(look_NLKZ.sum(3)),
        size_BTLZ=frames_of(look_NLKZ.sum(2)),
        motion_BTLM=_motions(centre_BTL2),
        centre_BTL2=centre_BTL2,
        background_BT=frames_of(background_N),
        brightness_BTL=frames_of(brightness_NL),
        confidence_BT=frames_of(confidence_N),
    )


def _scenes(pixels_NCHW: Tensor) -> tuple[Tensor, Tensor]:
    """Membership in each scene [N, S] and the background's mean brightness [N]."""
    tones_S2C = torch.tensor(list(SCENE_TONES.values()))
    # Actors are bright and scenes dark, so the largest channel alone separates them well enough here.
    weight_NHW = (1 - (pixels_NCHW.amax(1) - 0.5).clamp(0, 0.25) / 0.25).square()
    halves = []
    unit = pixels_NCHW.shape[2] / WIDTH
    for half, rows in enumerate((slice(round(ABOVE_GROUND * unit)), slice(round(BELOW_GROUND * unit), None))):
        member_NPS = _membership(pixels_NCHW[:, :, rows].flatten(2), tones_S2C[:, half], SCENE_WIDTH)
        weight_NP = weight_NHW[:, rows].flatten(1)
        # The denominator's floor counts every pixel, so a frame without background shows no scene.
        total_N1 = weight_NP.sum(1, keepdim=True).clamp(min=0.3 * weight_NP.shape[1])
        halves.append((weight_NP[:, None] @ member_NPS)[:, 0] / total_N1)
    member_NS = torch.stack(halves).mean(0)
    likely_NS = member_NS.square() / member_NS.square().sum(1, keepdim=True).clamp(min=1e-6)
    light_NHW = pixels_NCHW.mean(1)
    background_N = (light_NHW * weight_NHW).sum((1, 2)) / weight_NHW.sum((1, 2)).clamp(min=1)
    return likely_NS * member_NS.amax(1, keepdim=True), background_N


def _membership(pixels_NCP: Tensor, tones_KC: Tensor, width: float) -> Tensor:
    """exp(-(distance / width)^2) of every pixel to every tone, [N, P, K]."""
    cross_NPK = pixels_NCP.transpose(1, 2) @ tones_KC.T
    square_NP1 = pixels_NCP.square().sum(1)[..., None]
    distance_NPK = square_NP1 + tones_KC.square().sum(1) - 2 * cross_NPK
    return distance_NPK.clamp_(min=0).mul_(-1 / width**2).exp_()


def _cover(pixels_NCHW: Tensor, scene_NS: Tensor) -> Tensor:
    """Coverage of each pixel by an actor [N, H, W]: its largest channel above the scene's own."""
    tones_S2 = torch.tensor(list(SCENE_TONES.values())).amax(2)
    size = pixels_NCHW.shape[2]
    ground = round(GROUND * size / WIDTH)
    floor_SH = tones_S2.repeat_interleave(torch.tensor([ground, size - ground]), 1)
    weight_NS = scene_NS + 1e-3
    floor_NH1 = ((weight_NS / weight_NS.sum(1, keepdim=True)) @ floor_SH)[..., None]
    # Twelve per cent of slack keeps the scenes' texture out of the cover.
    return ((pixels_NCHW.amax(1) - floor_NH1) / (0.95 - floor_NH1)).sub_(0.12).div_(0.88).clamp_(0, 1)


def _slots(cover_NHW: Tensor) -> Tensor:
    """The cover as each slot sees it [N, L, H, W]: the whole frame, its upper half, its lower half."""
    size = cover_NHW.shape[1]
    half_HL = torch.zeros(size, len(SLOT_LANES))
    half_HL[:, 0] = 1
    half_HL[: size // 2, 1] = 1
    half_HL[size // 2 :, 2] = 1
    return cover_NHW[:, None] * half_HL.T[..., None]


def _centroid(cover_NLHW: Tensor) -> Tensor:
    """Centre of mass (x, y) in units [N, L, 2], circular in x; the slot's lane where the cover is empty."""
    size = cover_NLHW.shape[3]
    pixel = (torch.arange(size) + 0.5) * (WIDTH / size)
    turn = 2 * math.pi / WIDTH
    columns_NLW = cover_NLHW.sum(2)
    x_NL = torch.atan2(columns_NLW @ (turn * pixel).sin(), columns_NLW @ (turn * pixel).cos()) / turn
    rows_NLH = cover_NLHW.sum(3)
    lane_L = torch.tensor(SLOT_LANES)
    mass_NL = rows_NLH.sum(2)
    y_NL = (rows_NLH @ pixel + 0.01 * lane_L) / (mass_NL + 0.01)
    return torch.stack([x_NL.remainder(WIDTH), y_NL], 2)


def _glyphs(cover_NLHW: Tensor, centroid_NL2: Tensor, energy_NL: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Compare every slot with the G = shapes x sizes glyphs.

    Returns the explained share of the energy [N, L, G], the glyph's centre minus the centroid [N, L, 2] and
    the glyphs' posterior [N, L, G]. The window around the centroid is matched at every sub-pixel offset.
    """
    size = cover_NLHW.shape[3]
    unit = size / WIDTH
    bank_GOP, moved_G2 = _glyph_bank(unit)
    half = round(HALF_WINDOW * unit)
    corner_NL2 = (centroid_NL2 * unit).floor().long() - half
    span = torch.arange(2 * half + 1)
    columns_NLQ = (corner_NL2[..., 0, None] + span).remainder(size)
    rows_NLQ = corner_NL2[..., 1, None] + span
    inside_NLQ = (rows_NLQ >= 0) & (rows_NLQ < size)
    index_NLQQ = rows_NLQ.clamp(0, size - 1)[..., None] * size + columns_NLQ[..., None, :]
    window_NLP = cover_NLHW.flatten(2).gather(2, index_NLQQ.flatten(2))
    window_NLP = (window_NLP.unflatten(2, (len(span), len(span))) * inside_NLQ[..., None]).flatten(2)
    match_NLGO = (window_NLP @ bank_GOP.flatten(0, 1).T).unflatten(2, bank_GOP.shape[:2])
    # Glyphs have unit norm, so a squared product is the explained energy; the floor mutes near-empty slots.
    floor_NL1 = (EMPTY_ENERGY * (-energy_NL / EMPTY_ENERGY).exp())[..., None]
    explained_NLG = match_NLGO.amax(3).square() / unit**2
    fit_NLG = (explained_NLG / (energy_NL[..., None] + floor_NL1)).clamp(max=1)
    glyph_NLG = (fit_NLG / GLYPH_TEMPERATURE).softmax(2)
    return fit_NLG, glyph_NLG @ moved_G2, glyph_NLG


@lru_cache
def _glyph_bank(unit: float) -> tuple[Tensor, Tensor]:
    """Glyphs of norm 1, ``unit`` pixels to a unit, at sub-pixel offsets of their centroid.

    Returns them as [G, O, P] and (centre - centroid) in units [G, 2].
    """
    fine, half = 8, round(HALF_WINDOW * unit)
    window = 2 * half + 1
    grid = (torch.arange(window * fine) + 0.5) / fine - half
    y, x = torch.meshgrid(grid, grid, indexing="ij")
    bank, moved = [], []
    for shape in SHAPES:
        for extent in (unit * size for size in SIZES.values()):
            solid = inside(shape, x, y, extent).float()
            centroid_y = float((solid * y).sum() / solid.sum())
            moved.append((0.0, -centroid_y / unit))
            glyphs = []
            for offset_y in OFFSETS:
                for offset_x in OFFSETS:
                    # The centroid's pixel spans [0, 1): its middle is 0.5.
                    mask = inside(shape, x - 0.5 - offset_x, y - 0.5 - offset_y + centroid_y, extent).float()
                    cells = mask.unflatten(0, (window, fine)).unflatten(2, (window, fine)).mean((1, 3))
                    glyphs.append((cells / cells.norm()).flatten())
            bank.append(torch.stack(glyphs))
    return torch.stack(bank), torch.tensor(moved)


def inside(shape: str, x: Tensor, y: Tensor, extent: float) -> Tensor:
    """True for points (x, y), relative to the actor's centre and in the unit of ``extent``, in its shape."""
    if shape == "circle":
        return x.square() + y.square() < extent**2
    if shape == "ring":
        radius = (x.square() + y.square()).sqrt()
        return (radius > 0.48 * extent) & (radius < 1.02 * extent)
    if shape == "square":
        return (x.abs() < 0.86 * extent) & (y.abs() < 0.86 * extent)
    if shape == "triangle":
        # Apex at -extent, base at 0.8 extent, 2.08 extents wide.
        return (y < 0.8 * extent) & (x.abs() < (y + extent) * (1.04 / 1.8))
    assert shape == "cross", shape
    arm = 0.33 * extent
    return ((x.abs() < arm) & (y.abs() < extent)) | ((x.abs() < extent) & (y.abs() < arm))


def _count(presence_NL: Tensor, energy_NL: Tensor) -> Tensor:
    """Evidence for one and for two actors in the foreground [N, 2]: a posterior times the explained share."""
    # Two actors must both be there: a lone large glyph must not pass for two halves.
    halves_N2, weights_N2 = presence_NL[:, 1:], energy_NL[:, 1:]
    weighted_N = (halves_N2 * weights_N2).sum(1) / (weights_N2.sum(1) + 1e-3)
    two_N = weighted_N * (halves_N2.amin(1) / 0.6).clamp(max=1)
    fit_N2 = torch.stack([presence_NL[:, 0], two_N], 1)
    return (fit_N2 / COUNT_TEMPERATURE).softmax(1) * fit_N2


def _colours(pixels_NCHW: Tensor, cover_NLHW: Tensor) -> tuple[Tensor, Tensor]:
    """Membership of a slot's well-covered pixels in each colour [N, L, C]; mean brightness [N, L]."""
    # Compare only the best covered pixels: more than two large actors cover, at a fifth of the cost.
    weight_NLP = (cover_NLHW.flatten(2) - 0.5).clamp_(min=0)
    pixels = weight_NLP.shape[2]
    count = round(COLOUR_AREA * pixels / WIDTH**2)
    weight_NP, best_NP = weight_NLP[:, 0].topk(count, dim=1, sorted=False)
    upper_NP = best_NP < pixels // 2
    weight_NLP = torch.stack([weight_NP, weight_NP * upper_NP, weight_NP * ~upper_NP], 1)
    pixels_NCP = pixels_NCHW.flatten(2).gather(2, best_NP[:, None].expand(-1, 3, -1))
    total_NL1 = weight_NLP.sum(2, keepdim=True) + 0.5
    member_NPC = _membership(pixels_NCP, torch.tensor(list(COLOURS.values())), COLOUR_WIDTH)
    brightness_NL1 = weight_NLP @ pixels_NCP.mean(1)[..., None] / total_NL1
    return weight_NLP @ member_NPC / total_NL1, brightness_NL1[..., 0]


def _motions(centre_BTL2: Tensor) -> Tensor:
    """Membership of every step between frames in each motion [B, T, L, M]; all ones for a single frame.

    Sideways motions are judged by the step in x, bobbing by the swing: with y - lane = a sin(phase) at the
    ends of a step, their mean and difference give the phasor a exp(i phase), which must have the right
    length and advance by a constant angle.
    """
    batch, frames, slots, _ = centre_BTL2.shape
    if frames < 2:
        return centre_BTL2.new_ones(batch, frames, slots, len(MOTIONS))
    step_x = torus_difference(centre_BTL2)[..., 0]
    height = centre_BTL2[..., 1] - torch.tensor(SLOT_LANES)
    turn = 2 * math.pi / BOB_PERIOD
    swing = torch.complex(
        (height[:, 1:] - height[:, :-1]) / (2 * math.sin(turn / 2)),
        (height[:, 1:] + height[:, :-1]) / (2 * math.cos(turn / 2)),
    )
    expected = {"still": 0.0, "left": -SPEED, "right": SPEED, "bob": 0.0}
    level = (-(swing.abs() / SWING_WIDTH).square()).exp()
    swinging = (-((swing.abs() - BOB_AMPLITUDE) / SWING_WIDTH).square()).exp()
    if frames > 2:
        advance = (swing[:, 1:] - swing[:, :-1] * complex(math.cos(turn), math.sin(turn))).abs()
        steady = (-(advance / SWING_WIDTH).square()).exp()
        # The better of the two neighbouring advances: a cut on one side of a step says nothing about it.
        before, after = torch.cat([steady[:, :1], steady], 1), torch.cat([steady, steady[:, -1:]], 1)
        swinging = swinging * torch.maximum(before, after)
    motion_BTLM = torch.stack(
        [
            (-((step_x - expected[name]) / X_WIDTH).square()).exp() * (swinging if name == "bob" else level)
            for name in MOTIONS
        ],
        3,
    )
    return torch.cat([motion_BTLM[:, :1], motion_BTLM], 1)


def torus_difference(centre_BTL2: Tensor) -> Tensor:
    """Steps (x, y) in units between frames [B, T - 1, L, 2], the short way around in x."""
    step_BTL2 = centre_BTL2[:, 1:] - centre_BTL2[:, :-1]
    half = WIDTH / 2
    around_BTL = (step_BTL2[..., 0] + half).remainder(WIDTH) - half
    return torch.stack([around_BTL, step_BTL2[..., 1]], 3)


def attributes(detection: Detection) -> list[tuple]:
    """Decode each clip: (scene, (colour, shape, size, motion), ...).

    Actors are listed from top to bottom. In a single frame, motion is read as the first of MOTIONS.
    """
    scene_B = detection.scene_BTS.mean(1).argmax(1)
    count_B = detection.count_BT2.mean(1).argmax(1)
    named = (
        (tuple(COLOURS), detection.colour_BTLC),
        (SHAPES, detection.shape_BTLK),
        (tuple(SIZES), detection.size_BTLZ),
        (MOTIONS, detection.motion_BTLM[:, min(1, detection.motion_BTLM.shape[1] - 1) :]),
    )
    decoded = [(names, score.mean(1).argmax(2)) for names, score in named]
    return [
        (
            tuple(SCENES)[scene_B[clip]],
            *(
                tuple(names[int(best_BL[clip, slot])] for names, best_BL in decoded)
                for slot in SLOTS_OF_COUNT[int(count_B[clip])]
            ),
        )
        for clip in range(len(scene_B))
    ]
