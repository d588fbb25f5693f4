"""A decoded frame as a player shows it: upright, on black, in its proportions, in standard dynamic range."""

from fractions import Fraction

import av
import numpy as np

from kvpo.extras import extra

with extra("rewards"):
    import cv2

PQ, HLG, BT2020 = 16, 18, 9
"""Numbers of transfer functions and primaries in ITU-T H.273."""
WHITE = 203.0
"""cd/m2 that become white: reference white of ITU-R BT.2408; brighter light is cut off."""
GAMMA = 2.4
"""Gamma of a display in standard dynamic range, ITU-R BT.1886."""
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
"""Linear light with the primaries of BT.2020 to those of BT.709, ITU-R BT.2087."""
MOST_STRETCHED = 16


def shown(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> np.ndarray:
    """A decoded frame as uint8 RGB [H, W, 3].

    Transparent pixels are shown on black, high dynamic range is converted (``standard_range``), pixels that
    are not square (width by height, ``pixel_aspect``) change the width, and the header's rotation is applied.

    Raises:
        ValueError: a rotation by other than quarter turns, pixels stretched beyond 16:1.
    """
    wide = frame.color_trc in (PQ, HLG) or frame.color_primaries == BT2020
    if any(component.is_alpha for component in frame.format.components):
        rgba = frame.to_ndarray(format="rgba")
        image = standard_range(frame) if wide else rgba[..., :3]
        image = ((image.astype(np.uint16) * rgba[..., 3:] + 127) // 255).astype(np.uint8)
    else:
        image = standard_range(frame) if wide else frame.to_ndarray(format="rgb24")
    if pixel_aspect and pixel_aspect != 1:
        if not 1 / MOST_STRETCHED <= pixel_aspect <= MOST_STRETCHED:
            raise ValueError(f"the header says that pixels are {pixel_aspect} times as wide as they are high")
        image = cv2.resize(image, (max(1, round(image.shape[1] * pixel_aspect)), image.shape[0]))
    return np.ascontiguousarray(upright(image, frame))


def standard_range(frame: av.VideoFrame) -> np.ndarray:
    """A frame of BT.2020 primaries, of PQ, HLG (both ITU-R BT.2100) or BT.1886, as uint8 RGB of BT.709."""
    # White is 255 * 256 in what FFmpeg makes of limited range.
    signal = (frame.to_ndarray(format="rgb48le").astype(np.float32) / 65280).clip(max=1)
    if frame.color_trc == PQ:
        power = signal ** (4096 / 2523 / 128)
        light = 1e4 * (np.maximum(power - 3424 / 4096, 0) / ((2413 - 2392 * power) / 128)) ** (16384 / 2610)
    elif frame.color_trc == HLG:
        scene = np.where(
            signal <= 0.5, signal**2 / 3, (np.exp((signal - 0.55991073) / 0.17883277) + 0.28466892) / 12
        )
        light = 1e3 * (scene @ LUMINANCE)[..., None] ** 0.2 * scene
    else:
        light = WHITE * signal**GAMMA
    return (255 * np.clip(light / WHITE @ TO_BT709.T, 0, 1) ** (1 / GAMMA)).round().astype(np.uint8)


def upright(image: np.ndarray, frame: av.VideoFrame) -> np.ndarray:
    """An image [H, W, 3] of ``frame``, turned and mirrored as its display matrix says."""
    matrices = [bytes(data) for data in frame.side_data if data.type.name == "DISPLAYMATRIX"]
    if not matrices:
        return image
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(matrices[0], np.int32)[:5].tolist()
    if (a or d) and (b or c):
        raise ValueError(f"the header turns it by {frame.rotation} degrees; only quarter turns can be read")
    if b or c:
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
