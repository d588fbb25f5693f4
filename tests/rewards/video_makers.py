"""Video files as people have them: containers, pixel formats, frame rates, damage."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def numbered(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """Frames whose number can be read off their brightness, [T, H, W, 3]: 8 + 4 n on 60 levels."""
    levels = 8 + 4 * (np.arange(count) % 60)
    frames = np.repeat(levels[:, None, None, None], height, 1).repeat(width, 2).repeat(3, 3)
    return frames.astype(np.uint8)


def read_numbers(frames_THWC: np.ndarray) -> list[int]:
    """The numbers of frames of ``numbered``, modulo 60."""
    return np.round((frames_THWC.astype(float).mean((1, 2, 3)) - 8) / 4).astype(int).tolist()


def encode_turned(path: Path, frames_THWC: np.ndarray, degrees: int, mirrored: bool) -> Path:
    """Write frames with a header that asks players to turn them counterclockwise and then to mirror them."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=16, options={"crf": "1"})
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.set_display_rotation(degrees, hflip=mirrored)
        for image in frames_THWC:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())
    return path


def encode_tagged(path: Path, frame: av.VideoFrame, transfer: int, primaries: int) -> Path:
    """Write one frame of any format without loss, its colours named by numbers of ITU-T H.273."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=16)
        stream.height, stream.width, stream.pix_fmt = frame.height, frame.width, frame.format.name
        context = stream.codec_context
        context.color_trc, context.color_primaries, context.colorspace = transfer, primaries, 9
        context.color_range = 1
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def encode(
    path: Path,
    frames_THWC: np.ndarray,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    rate: float = 16,
    times: list[int] | None = None,
    aspect: Fraction = Fraction(1),
    **options: str,
) -> Path:
    """Write frames (RGB or RGBA); ``times`` are presentation times in milliseconds, ``aspect``
    is that of a pixel."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=Fraction(rate).limit_denominator(1001), options=options)
        stream.height, stream.width = frames_THWC.shape[1:3]
        stream.pix_fmt = pixel_format
        stream.codec_context.sample_aspect_ratio = aspect
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        kind = "rgba" if frames_THWC.shape[-1] == 4 else "rgb24"
        for index, image in enumerate(frames_THWC):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format=kind)
            if times is not None:
                frame.pts, frame.time_base = times[index], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
