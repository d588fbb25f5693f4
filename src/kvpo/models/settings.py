"""Geometry and deployment of a generator. Importing this module imports nothing heavy."""

from dataclasses import dataclass
from typing import ClassVar


def require(holds: bool, path: str, value: object, what: str) -> None:
    """Raise ValueError with one line that names a setting and its value, unless ``holds`` is true."""
    if not holds:
        raise ValueError(f"{path}: must be {what}, got {value}")


@dataclass(frozen=True)
class WanShape:
    """Geometry of the causal Wan transformer; sizes that follow from others are properties."""

    dim: int = 160
    """Width of the transformer."""
    num_heads: int = 4
    """Attention heads; dim / num_heads is the head width."""
    num_layers: int = 4
    """Transformer blocks."""
    ffn_dim: int = 640
    """Hidden width of the feed-forward layers."""
    freq_dim: int = 256
    """Width of the sinusoidal timestep embedding."""
    text_len: int = 32
    """Text tokens per prompt (padded)."""
    text_dim: int = 64
    """Width of the text encoder's output."""
    channels: int = 8
    """Latent channels, in and out."""
    patch_size: tuple[int, int, int] = (1, 2, 4)
    """Latent (frames, height, width) per token."""
    latent_height: int = 8
    """Latent rows."""
    latent_width: int = 8
    """Latent columns."""
    eps: float = 1e-6
    """Epsilon of every normalisation layer."""
    relative_positions: bool = False
    """Cache keys without rotation and rotate by cache slot when reading (LongLive's infinite variant)."""

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.dim // self.num_heads

    @property
    def grid(self) -> tuple[int, int]:
        """Token rows and columns of one frame."""
        return self.latent_height // self.patch_size[1], self.latent_width // self.patch_size[2]

    @property
    def tokens_per_frame(self) -> int:
        """Tokens of one frame."""
        return self.grid[0] * self.grid[1]

    def check(self) -> None:
        """Raise ValueError for the first size that is out of range or contradicts another."""
        sizes = ("dim", "num_heads", "num_layers", "ffn_dim", "freq_dim", "text_len", "text_dim", "channels")
        for name in sizes:
            require(vars(self)[name] >= 1, f"backbone.geometry: {name}", vars(self)[name], "at least 1")
        pair = 2 * self.num_heads
        even = f"a multiple of 2 * num_heads = {pair}"
        require(self.dim % pair == 0, "backbone.geometry: dim", self.dim, even)
        require(self.freq_dim % 2 == 0, "backbone.geometry: freq_dim", self.freq_dim, "even")
        frames, height, width = self.patch_size
        patch = list(self.patch_size)
        require(frames == 1, "backbone.geometry: patch_size", patch, "1 frame deep: pages hold single frames")
        require(height >= 1 and width >= 1, "backbone.geometry: patch_size", patch, "positive")
        size = [self.latent_height, self.latent_width]
        fits = height <= size[0] and width <= size[1] and not (size[0] % height or size[1] % width)
        require(fits, "stream.size", size, f"multiples of the patch size {height} x {width}")
        require(self.eps > 0, "backbone.geometry: eps", self.eps, "positive")


@dataclass(frozen=True)
class Deployment:
    """The context that a stream is deployed with."""

    block: int = 3
    """Latent frames generated together."""
    window: int = 12
    """Frames a block attends to, counting the sink and itself; -1 means all earlier frames."""
    sink: int = 3
    """First frames that are always attended to."""
    keep_sink_at_switch: bool = True
    """At a prompt switch keep the sink's old keys (True) or replace the sink by re-encoded recent frames."""
    bank_size: int = 0
    """MemFlow memory bank frames; 0 means no bank."""
    sparse_activation: bool = False
    """MemFlow sparse memory activation (top 3 of sink and bank per head)."""
    bank_every_block: bool = False
    """Record every block in the bank (single-prompt pipeline) instead of every third."""
    transition_blocks: int = 0
    """Blocks after a prompt switch that are conditioned on a mixture of both prompts; 0 switches at once."""

    bank_as_published: ClassVar[bool] = False
    """Set to True in a subclass to reproduce two quirks of the published bank: it may take the same frame up
    to three times, and it scores with empty text keys right after a prompt switch."""

    @property
    def local_past(self) -> int | None:
        """Past frames of the local window: window - sink - block; None: unlimited."""
        return None if self.window == -1 else self.window - self.sink - self.block

    @property
    def resident(self) -> int:
        """History frames that a stream without routes keeps: the window's, but at least 1, as 0 means all."""
        return max(1, self.window - self.block)

    def reencoded(self, start: int) -> int:
        """Frames re-encoded when the prompt switches before the block at ``start``."""
        return start if self.window == -1 else min(self.window, start)

    def check(self) -> None:
        """Raise ValueError for the first number that is out of range or contradicts another."""
        require(self.block >= 1, "stream.block", self.block, "at least 1")
        require(self.sink >= 0, "stream.sink", self.sink, "0 or more")
        transition = self.transition_blocks
        require(transition >= 0, "stream.transition_blocks", transition, "0 or more")
        least = self.sink + self.block
        require(
            self.window == -1 or self.window >= least,
            "stream.window", self.window, f"-1 (everything) or at least stream.sink + stream.block = {least}",
        )  # fmt: skip
