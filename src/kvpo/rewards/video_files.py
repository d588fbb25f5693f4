"""Reads chosen frames of video files: only what is asked for is decoded and held in memory."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from kvpo.extras import extra
from kvpo.files import refuse_pointers
from kvpo.rewards.shown import shown

with extra("rewards"):
    import cv2

NOMINAL_RATE = 16.0
"""Frames per second of a file that states none."""
SEE_THROUGH = {"vp8": "libvpx", "vp9": "libvpx-vp9"}
"""Codecs whose transparency only another decoder than the usual one reads."""
RATE_TOLERANCE = 0.01
"""Relative difference up to which the rate in a file's header is believed against its timestamps."""


@dataclass(frozen=True)
class VideoFile:
    """A video file's frames, known without decoding them."""

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
        ValueError: empty, damaged, no video in it, no frame in it.
    """
    if path.is_file() and path.stat().st_size == 0:
        raise ValueError("the file is empty")
    refuse_pointers(path)
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise ValueError("the file has no video in it")
            stream = container.streams.video[0]
            header, unit = stream.average_rate, stream.time_base
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
        return VideoFile(path, float(header or NOMINAL_RATE), tuple([None] * len(times)), ())
    times.sort()
    rate = float(header) if header else 0.0
    span = float((times[-1] - times[0]) * unit) if unit else 0.0
    if len(times) > 1 and span > 0:
        measured = (len(times) - 1) / span
        rate = rate if abs(rate / measured - 1) <= RATE_TOLERANCE else measured
    return VideoFile(path, rate or NOMINAL_RATE, tuple(times), tuple(sorted(t for t, key in packets if key)))


def read_frames(video: VideoFile, indices: Sequence[int], max_pixels: int) -> np.ndarray:
    """Decode frames ``indices`` (rising) to uint8 RGB [n, H, W, 3], shrunk to at most ``max_pixels`` each.

    Pixels are as a player shows them (``kvpo.rewards.shown``); frames whose size changes are brought to that
    of the first.

    Raises:
        ValueError: damaged data, a rotation or an aspect that cannot be shown.
    """
    try:
        frames = _images(video, indices, max_pixels, jump=True)
        if len(frames) < len(indices):  # some containers (MPEG program streams) cannot be entered everywhere
            frames = _images(video, indices, max_pixels, jump=False)
    except av.FFmpegError as error:
        raise ValueError(f"damaged video: {_reason(error)}") from error
    if len(frames) < len(indices):
        raise ValueError(
            f"damaged video: frame {indices[len(frames)] + 1} of {video.num_frames} cannot be decoded"
        )
    return np.stack(frames)


def _images(video: VideoFile, indices: Sequence[int], max_pixels: int, *, jump: bool) -> list[np.ndarray]:
    """The frames at ``indices``, or those before one that is not found."""
    images: list[np.ndarray] = []
    with av.open(str(video.path)) as container:
        aspect = container.streams.video[0].sample_aspect_ratio
        for frame in _decode(container, video, indices, jump):
            image = shown(frame, aspect)
            size = images[0].shape[:2] if images else _fitting(*image.shape[:2], max_pixels)
            if image.shape[:2] != size:
                image = cv2.resize(image, size[::-1], interpolation=cv2.INTER_AREA)
            images.append(image)
    return images


def _decode(
    container: av.container.InputContainer, video: VideoFile, indices: Sequence[int], jump: bool
) -> Iterator[av.VideoFrame]:
    """The frames at ``indices``; with ``jump``, forward to the last key frame before a distant one.

    Ends where a frame is not found or a jump went too far.
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
    """Frames from where the container is, their transparency included."""
    codec = stream.codec_context.name
    if stream.metadata.get("alpha_mode") != "1" or codec not in SEE_THROUGH:
        yield from container.decode(stream)
        return
    decoder = av.CodecContext.create(SEE_THROUGH[codec], "r")
    for packet in container.demux(stream):
        yield from decoder.decode(packet)


def _fitting(height: int, width: int, max_pixels: int) -> tuple[int, int]:
    """The size of at most ``max_pixels`` with the same proportions."""
    if height * width <= max_pixels:
        return height, width
    scale = (max_pixels / (height * width)) ** 0.5
    return max(1, int(height * scale)), max(1, int(width * scale))


def _reason(error: av.FFmpegError) -> str:
    """FFmpeg's message without its error number and the file's path."""
    return (error.strerror or str(error)).rstrip(".")
