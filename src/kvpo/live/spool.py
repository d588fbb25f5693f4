"""Latents of a long stream on disk: memory stays flat however long it runs."""

import tempfile
from contextlib import suppress

import torch
from torch import Tensor


class Spool:
    """Latent frames ``[T, C, H, W]`` in a temporary file that nobody else sees and that vanishes with it."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self.frames = 0

    @property
    def _frame_bytes(self) -> int:
        return torch.Size(self._shape).numel() * self._dtype.itemsize

    def append(self, latents_FCHW: Tensor) -> None:
        """Add frames at the end. Raises OSError where the disk is full."""
        if not len(latents_FCHW):
            return
        self._shape, self._dtype = tuple(latents_FCHW.shape[1:]), latents_FCHW.dtype
        self._file.seek(self.frames * self._frame_bytes)
        self._file.write(latents_FCHW.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.frames += len(latents_FCHW)

    def read(self, first: int, stop: int) -> Tensor:
        """Frames ``first`` to ``stop``, in host memory."""
        if stop <= first:
            return torch.empty(0, *self._shape)
        self._file.seek(first * self._frame_bytes)
        content = bytearray(self._file.read((stop - first) * self._frame_bytes))
        return torch.frombuffer(content, dtype=self._dtype).view(stop - first, *self._shape)

    def cut(self, frames: int) -> None:
        """Forget everything from frame ``frames`` on."""
        self._file.truncate(frames * self._frame_bytes)
        self.frames = frames

    def close(self) -> None:
        """Give the disk space back."""
        with suppress(OSError):  # closing writes what a full disk did not take, and nobody reads it any more
            self._file.close()
