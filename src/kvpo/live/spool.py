"""Keeps the latents of a long stream on disk, so memory stays flat however long it runs."""

import tempfile
from contextlib import suppress

import torch
from torch import Tensor


class Spool:
    """Latent frames ``[T, C, H, W]`` in a private temporary file that is deleted with the object."""

    def __init__(self) -> None:
        self._file = tempfile.TemporaryFile()
        self._shape: tuple[int, ...] = ()
        self._dtype = torch.float32
        self.frames = 0

    @property
    def _frame_bytes(self) -> int:
        return torch.Size(self._shape).numel() * self._dtype.itemsize

    def append(self, latents_FCHW: Tensor) -> None:
        """Add frames at the end. Raises OSError if the disk is full."""
        if not len(latents_FCHW):
            return
        self._shape, self._dtype = tuple(latents_FCHW.shape[1:]), latents_FCHW.dtype
        self._file.seek(self.frames * self._frame_bytes)
        self._file.write(latents_FCHW.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        self.frames += len(latents_FCHW)

    def read(self, first: int, stop: int) -> Tensor:
        """Read frames [``first``, ``stop``) into host memory."""
        if stop <= first:
            return torch.empty(0, *self._shape)
        self._file.seek(first * self._frame_bytes)
        content = bytearray(self._file.read((stop - first) * self._frame_bytes))
        return torch.frombuffer(content, dtype=self._dtype).view(stop - first, *self._shape)

    def cut(self, frames: int) -> None:
        """Keep only the first ``frames`` frames."""
        self._file.truncate(frames * self._frame_bytes)
        self.frames = frames

    def close(self) -> None:
        """Close the file, which frees its disk space."""
        with suppress(OSError):  # closing flushes what a full disk did not take; nobody needs it any more
            self._file.close()
