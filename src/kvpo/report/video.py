"""Video files and frame arrays: T frames, H rows, W columns, C = 3 colours, uint8 RGB."""

import io
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import av
import numpy as np

from kvpo.rewards.sampling import stated_rate


def as_frames(frames_THWC: Any, name: str = "frames") -> np.ndarray:
    """Return ``frames_THWC`` (numpy array or CPU tensor) as a uint8 [T, H, W, 3] array.

    Raises ValueError naming the shape and type found.
    """
    array = np.asarray(frames_THWC)
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[-1] != 3 or 0 in array.shape:
        raise ValueError(f"{name}: expected uint8 [T, H, W, 3] with T > 0, got {array.dtype} {array.shape}")
    return array


SHORTEST_SIDE = 256
"""Frames smaller than this are enlarged in video files."""


def enlargement(size: Sequence[int]) -> int:
    """The integer factor by which frames of this height and width are enlarged in video files."""
    return max(1, -(-SHORTEST_SIDE // min(size)))


def enlarge(frame_HWC: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel ``scale`` times in both directions; odd sizes grow by one repeated row or column."""
    large = frame_HWC.repeat(scale, axis=0).repeat(scale, axis=1)
    return np.pad(large, ((0, large.shape[0] % 2), (0, large.shape[1] % 2), (0, 0)), mode="edge")


def shrink(frame_HWC: np.ndarray, factor: int) -> np.ndarray:
    """Average ``factor`` x ``factor`` pixels; rows and columns that do not fill a square are dropped."""
    rows, columns = frame_HWC.shape[0] // factor, frame_HWC.shape[1] // factor
    squares = frame_HWC[: rows * factor, : columns * factor].reshape(rows, factor, columns, factor, 3)
    return squares.mean(axis=(1, 3)).round().astype(np.uint8)


def _encode(
    file: str | BinaryIO, frames_HWC: Iterable[np.ndarray], fps: float, quality: int, fragmented: bool = False
) -> None:
    """Write frames of one even size, holding one at a time in memory. Equal frames give equal bytes."""
    # With AVX-512, the macroblock tree of x264 reads uninitialised memory. Files are larger without it.
    codec, options = "libx264", {"crf": str(quality), "preset": "veryfast", "mbtree": "0"}
    if codec not in av.codecs_available:
        codec, options = "mpeg4", {"qscale": str(max(1, quality // 3))}
    # Moving the index to the front, for web players, reopens the file by name.
    flags = "+frag_keyframe+empty_moov+default_base_moof" if fragmented else "+faststart"
    muxer = {"movflags": flags} if isinstance(file, str) else {}
    with av.open(file, "w", format="mp4", options=muxer) as container:
        stream = container.add_stream(codec, rate=Fraction(fps).limit_denominator(1001), options=options)
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1  # the number of threads changes the slices of a frame
        for index, frame in enumerate(frames_HWC):
            if index == 0:
                stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def write_video(path: Path, frames_THWC: Any, fps: float, *, scale: int = 1, quality: int = 18) -> None:
    """Write an mp4 that browsers play: h264 where PyAV carries it, mpeg4 otherwise.

    ``fps`` is frames per second; ``scale`` repeats pixels (colours are stored at half resolution, so tiny
    frames need it to stay sharp); ``quality`` is h264's constant rate factor, lower is better. Odd sizes grow
    by one repeated row or column. Equal frames give equal files. Raises ValueError for wrong frames, ``fps``
    or ``scale``.
    """
    frames_THWC = as_frames(frames_THWC)
    if not 0.1 <= fps <= 1000:
        raise ValueError(f"fps must be between 0.1 and 1000 frames per second, got {fps}")
    if scale < 1:
        raise ValueError(f"scale must be a whole number of at least 1, got {scale}")
    _encode(str(path), (enlarge(frame, scale) for frame in frames_THWC), fps, quality)


def write_frames(path: Path, frames_HWC: Iterable[np.ndarray], fps: float, *, scale: int = 1) -> None:
    """Write a fragmented mp4 from any number of uint8 frames [H, W, 3] of one size.

    Players can start before the file is complete, and a truncated file plays up to its end.
    """
    _encode(str(path), (enlarge(frame, scale) for frame in frames_HWC), fps, 18, fragmented=True)


def mp4_bytes(frames_THWC: np.ndarray, fps: float, *, scale: int = 1) -> bytes:
    """Encode frames as ``write_video`` does, in memory."""
    buffer = io.BytesIO()
    _encode(buffer, (enlarge(frame, scale) for frame in as_frames(frames_THWC)), fps, 18)
    return buffer.getvalue()


def video_bytes(frames_THWC: np.ndarray, fps: float, max_bytes: int) -> bytes:
    """Encode an mp4 of at most ``max_bytes``, if need be with stronger compression, then at a smaller size.

    If nothing fits, returns the smallest attempt, which is larger.
    """
    content = b""
    for quality, factor in ((24, 1), (30, 1), (30, 2), (36, 2), (36, 4)):
        buffer = io.BytesIO()
        _encode(buffer, (enlarge(shrink(frame, factor), 1) for frame in frames_THWC), fps, quality)
        content = buffer.getvalue()
        if len(content) <= max_bytes:
            break
    return content


def read_video(path: Path) -> tuple[np.ndarray, float]:
    """Decode a video file to uint8 frames [T, H, W, 3] and its frames per second, 16 if it states none.

    Raises ValueError if the file is not a video or holds no frame.
    """
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError(f"{path} has no video stream")
            rate = stated_rate(container.streams.video[0])
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except av.FFmpegError as error:
        raise ValueError(f"{path} cannot be read as a video: {error}") from error
    if not frames:
        raise ValueError(f"{path} holds no video frame")
    return np.stack(frames), rate


def side_by_side(videos: Sequence[Any], *, gap: int = 2) -> np.ndarray:
    """Join videos of one height from left to right, ``gap`` grey columns apart.

    A shorter video holds its last frame. Returns uint8 [T, H, sum of widths and gaps, 3]. Raises ValueError
    if there are no videos or their heights differ.
    """
    clips = [as_frames(video, f"videos[{i}]") for i, video in enumerate(videos)]
    heights = sorted({clip.shape[1] for clip in clips})
    if len(heights) != 1:
        raise ValueError(f"videos side by side need one common height, got {heights}")
    length = max(len(clip) for clip in clips)
    parts: list[np.ndarray] = []
    for clip in clips:
        if parts and gap:
            parts.append(np.full((length, heights[0], gap, 3), 128, np.uint8))
        parts.append(np.pad(clip, ((0, length - len(clip)), (0, 0), (0, 0), (0, 0)), mode="edge"))
    return np.concatenate(parts, axis=2)
