"""Reads selected frames of video files: only what is needed is decoded and held in memory.

Frames look as in a player: upright, on black, with the right aspect ratio, in standard dynamic range.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from kvpo.extras import extra
from kvpo.files import refuse_pointers
from kvpo.rewards.sampling import stated_rate

with extra("rewards"):
    import cv2

SEE_THROUGH = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Codecs with transparency -> the decoder that reads it, which is not FFmpeg's default."""
RATE_TOLERANCE = 0.01
"""Largest relative difference from the timestamps at which the frame rate in a header is trusted."""

PQ, HLG, BT2020 = 16, 18, 9
"""Codes of transfer functions and primaries in ITU-T H.273."""
WHITE = 203.0
"""Luminance in cd/m2 that maps to white: reference white of ITU-R BT.2408; brighter light is clipped."""
GAMMA = 2.4
"""Gamma of a display in standard dynamic range, ITU-R BT.1886."""
LUMINANCE = np.array([0.2627, 0.6780, 0.0593], np.float32)
TO_BT709 = np.array(
    [[1.6605, -0.5876, -0.0728], [-0.1246, 1.1329, -0.0083], [-0.0182, -0.1006, 1.1187]], np.float32
)
"""Converts linear light from BT.2020 to BT.709 primaries, ITU-R BT.2087."""
MOST_STRETCHED = 16


@dataclass(frozen=True)
class VideoFile:
    """Number and times of a video file's frames, read without decoding them."""

    path: Path
    frame_rate: float
    """Mean frames per second."""
    timestamps: tuple[int | None, ...]
    """Presentation time of every frame in the stream's units, in order; None where the file has none."""
    key_times: tuple[int, ...]
    """Times at which decoding can start."""

    @property
    def num_frames(self) -> int:
        return len(self.timestamps)


def probe(path: Path) -> VideoFile:
    """Count a file's frames and read their times; memory does not grow with the size of the video.

    Raises:
        ValueError: the file is empty or damaged, or has no video or no frame.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError("the file is empty")
    refuse_pointers(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("the file has no video in it")
            stream = container.streams.video[0]
            rate, unit = stated_rate(stream), stream.time_base
            packets = [
                (packet.pts, packet.is_keyframe)
                for packet in container.demux(stream)
                if packet.size and not packet.is_discard
            ]
    except av.FFmpegError as error:
        raise ValueError(f"not a readable video: {_reason(error)}") from error
    if not packets:
        raise ValueError("the file holds no video frame")
    times = [time for time, _ in packets]
    if None in times:
        return VideoFile(path, rate, tuple([None] * len(times)), ())
    times.sort()
    span = float((times[-1] - times[0]) * unit) if unit else 0.0
    if len(times) > 1 and span > 0:
        measured = (len(times) - 1) / span
        rate = rate if abs(rate / measured - 1) <= RATE_TOLERANCE else measured
    return VideoFile(path, rate, tuple(times), tuple(sorted(t for t, key in packets if key)))


def read_frames(video: VideoFile, indices: Sequence[int], max_pixels: int) -> np.ndarray:
    """Decode frames ``indices`` (ascending) to uint8 RGB [n, H, W, 3], shrunk to at most ``max_pixels`` each.

    Pixels look as in a player (``render_frame``). If the frame size changes, frames are resized to the first
    one's.

    Raises:
        ValueError: the data is damaged, or its rotation or pixel aspect is not supported.
    """
    try:
        frames = _images(video, indices, max_pixels, jump=True)
        if len(frames) < len(indices):  # some containers (MPEG program streams) cannot seek everywhere
            frames = _images(video, indices, max_pixels, jump=False)
    except av.FFmpegError as error:
        raise ValueError(f"damaged video: {_reason(error)}") from error
    if len(frames) < len(indices):
        raise ValueError(
            f"damaged video: frame {indices[len(frames)] + 1} of {video.num_frames} cannot be decoded"
        )
    return np.stack(frames)


def _images(video: VideoFile, indices: Sequence[int], max_pixels: int, *, jump: bool) -> list[np.ndarray]:
    """The frames at ``indices``, up to the first one that is not found."""
    images: list[np.ndarray] = []
    with av.open(str(video.path)) as container:
        aspect = container.streams.video[0].sample_aspect_ratio
        for frame in _decode(container, video, indices, jump):
            image = render_frame(frame, aspect)
            size = images[0].shape[:2] if images else fitting(*image.shape[:2], max_pixels)
            if image.shape[:2] != size:
                image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
            images.append(image)
    return images


def _decode(
    container: av.container.InputContainer, video: VideoFile, indices: Sequence[int], jump: bool
) -> Iterator[av.VideoFrame]:
    """Yield the frames at ``indices``; with ``jump``, seek to the last key frame before a distant one.

    Stops if a frame is not found or a seek went too far.
    """
    stream = container.streams.video[0]
    stream.thread_type = "AUTO"
    if None in video.timestamps:
        wanted = set(indices)
        for position, frame in enumerate(_decoded(container, stream)):
            if position in wanted:
                yield frame
            if position >= indices[-1]:
                return
        return
    frames, now, frame = _decoded(container, stream), None, None
    for index in indices:
        target = video.timestamps[index]
        key = max((time for time in video.key_times if time <= target), default=None)
        if jump and key is not None and key > (video.timestamps[0] if now is None else now):
            container.seek(key, stream=stream, backward=True)
            frames = _decoded(container, stream)
            frame = next(frames, None)
            if frame is None or frame.pts is None or frame.pts > target:
                return
        while frame is None or frame.pts is None or frame.pts < target:
            frame = next(frames, None)
            if frame is None:
                return
        now = frame.pts
        yield frame


def _decoded(container: av.container.InputContainer, stream: av.VideoStream) -> Iterator[av.VideoFrame]:
    """Decode frames, including transparency, from the container's current position."""
    codec = stream.codec_context.name
    if stream.metadata.get("alpha_mode") != "1" or codec not in SEE_THROUGH:
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create(SEE_THROUGH[codec], "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def fitting(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) of at most ``max_pixels`` with the same aspect ratio."""
    if height * width <= max_pixels:
        return height, width
    scale = (max_pixels / (height * width)) ** 0.5
    return max(1, int(height * scale)), max(1, int(width * scale))


def _reason(error: av.FFmpegError) -> str:
    """FFmpeg's message without its error number and the file's path."""
    return (error.strerror or str(error)).rstrip(".")


def render_frame(frame: av.VideoFrame, pixel_aspect: Fraction | None) -> np.ndarray:
    """Convert a decoded frame to uint8 RGB [H, W, 3].

    Transparent pixels are shown on black, and high dynamic range is converted (``standard_range``). The width
    is scaled if pixels are not square (``pixel_aspect``, width / height), and the rotation is applied.

    Raises:
        ValueError: the rotation is not by quarter turns, or pixels are stretched beyond 16:1.
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
    """Convert a BT.2020 frame in PQ, HLG (both ITU-R BT.2100) or BT.1886 to uint8 RGB in BT.709."""
    # FFmpeg converts limited range to 16 bits with white at 255 * 256.
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
    """Rotate and mirror an image [H, W, 3] by the display matrix of ``frame``. Raises ValueError."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return image
    # A pixel at (x, y) is shown at (a x + c y, b x + d y).
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    if (a or d) and (b or c):
        raise ValueError(f"the header turns it by {frame.rotation} degrees; only quarter turns can be read")
    if b or c:
        image, a, d = image.swapaxes(0, 1), c, b
    return image[:: -1 if d < 0 else 1, :: -1 if a < 0 else 1]
