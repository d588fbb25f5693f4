"""A streaming generator as the engine sees it: a velocity model, its deployment context and its solver."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import astuple, dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvpo.method.flow import Step
from kvpo.models.adapted_linear import held_weights
from kvpo.models.cache import FrameCache, PageShape
from kvpo.models.context import Context
from kvpo.models.finite import NonFiniteError, first_non_finite_layer, magnitudes, require_finite
from kvpo.models.settings import Deployment


class Transformer(Protocol):
    """The velocity model; ``kvpo.models.causal_wan.CausalWan`` documents the shapes."""

    def __call__(
        self,
        x_RFCHW: Tensor,
        sigma_R: Tensor,
        text_ULD: Any,
        context: Context,
        *,
        text_rows: Tensor | None = None,
        encode: bool = False,
    ) -> Any: ...

    def text_of(self, text_ULD: Tensor, text_rows: Tensor | None) -> Any: ...

    def text_keys(self, text_RLD: Tensor, layer: int) -> Tensor: ...


class TextEncoder(Protocol):
    """Encodes prompts as fixed-length embeddings ``[n, text_len, text_dim]``; padding rows are zero."""

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


class Codec(Protocol):
    """Converts latents to pixels and back."""

    @property
    def frames_per_latent(self) -> int:
        """Pixel frames per latent frame, except the first, which always gives one."""

    @property
    def frames_per_second(self) -> float:
        """Playback rate of the pixel frames."""

    def decode(self, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
        """Decode latents ``[B, T, C, H, W]`` to RGB ``[B, T', 3, H', W']`` in [0, 1], in host memory.

        ``before_TCHW`` holds all earlier latent frames of the one video that every row continues; their
        pixels are not returned. None: the rows are whole videos.
        """
        ...

    def decode_next(self, latents_FCHW: Tensor, state: object | None) -> tuple[Tensor, object | None]:
        """Decode the next latent frames of one video to RGB ``[T', 3, H', W']``, as ``decode`` does.

        Also returns the state to pass with the following frames; ``state`` is None before the first.
        """
        ...

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Encode whole RGB videos ``[B, T, 3, H, W]`` in [0, 1] as latents ``[B, T', C, H', W']``."""
        ...


def pixels_of(codec: Codec, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
    """Decode latents with ``codec.decode``, without gradients.

    Raises NonFiniteError if a pixel is not finite.
    """
    with torch.no_grad():
        given = (latents_BTCHW,) if before_TCHW is None else (latents_BTCHW, before_TCHW)
        pixels_BTCHW = codec.decode(*given)
    named = {f"video {row + 1} of {len(pixels_BTCHW)}": p for row, p in enumerate(pixels_BTCHW)}
    require_finite(
        named, "decoded pixels", "the latents are finite: check the weights and precision of the VAE"
    )
    return pixels_BTCHW


def pixel_frame(latent_frame: int, frames_per_latent: int) -> int:
    """First pixel frame of a latent frame, or the number of pixel frames of that many latent frames."""
    return 0 if latent_frame == 0 else 1 + frames_per_latent * (latent_frame - 1)


@dataclass(frozen=True)
class TextRows:
    """Prompt embeddings of a batch of rows; rows with the same prompt share one embedding."""

    embeddings_ULD: Tensor
    rows_R: Tensor
    """Index of each row's embedding."""
    known: Any = None
    """Result of the transformer's ``text_of``; None: every call recomputes it."""

    @property
    def given(self) -> Any:
        """The text argument of the transformer."""
        return self.embeddings_ULD if self.known is None else self.known

    def select(self, index: Tensor) -> "TextRows":
        """The rows named by ``index`` (repeats allowed)."""
        return TextRows(self.embeddings_ULD, self.rows_R[index])


@dataclass(frozen=True)
class Trajectory:
    """The solver trajectory of one block, for R streams."""

    states_RSFCHW: Tensor
    """Solver states x_s; the first is pure noise."""
    velocities_RSFCHW: Tensor
    """The generator's velocity at each state."""
    clean_RFCHW: Tensor
    """The emitted clean latents."""


@dataclass(frozen=True)
class StreamingGenerator:
    """Everything needed to stream latents block by block."""

    transformer: Transformer
    deployment: Deployment
    sigmas: tuple[float, ...]
    """Noise levels of the solver, descending from 1; the last step lands on 0."""
    step: Step
    """Solver step: Euler on the velocity field, or re-noising from the tape (``kvpo.method.flow.STEPS``)."""
    latent_shape: tuple[int, int, int]
    """Channels, height, width of a latent frame."""
    pages: PageShape
    context_noise: float = 0.0
    """Noise level mixed into the input of the clean pass (its timestep stays 0)."""
    device: torch.device | str = "cpu"
    autocast: torch.dtype | None = None
    sigmas_first: tuple[float, ...] = ()
    """Noise levels of the solver in a video's first block; empty: ``sigmas``."""
    page_dtype: torch.dtype = torch.float32
    exploring: Callable[[], AbstractContextManager[None]] = nullcontext
    """Context manager that gives the transformer the precision of rollouts; weights must not change in it."""

    def __post_init__(self) -> None:
        self.deployment.check()

    @property
    def block(self) -> int:
        """Frames generated together."""
        return self.deployment.block

    @property
    def block_shape(self) -> tuple[int, int, int, int]:
        """Frames, channels, height and width of a block."""
        return (self.block, *self.latent_shape)

    def levels(self, start: int) -> tuple[float, ...]:
        """Noise levels of the solver in the block at frame ``start``."""
        return self.sigmas if start or not self.sigmas_first else self.sigmas_first

    @property
    def keeps_contexts(self) -> bool:
        """True if the pages that a block sees are gathered once instead of in every call.

        Only on the CPU: on a GPU, memory limits the batch size.
        """
        return str(self.device).partition(":")[0] == "cpu"  # a plan may name one unknown to torch

    @property
    def page_bytes(self) -> int:
        """Bytes of one frame's keys and values in all layers."""
        return 2 * math.prod(astuple(self.pages)) * self.page_dtype.itemsize

    def new_cache(self, num_pages: int) -> FrameCache:
        """An empty page pool for this generator."""
        return FrameCache(self.pages, num_pages, self.device, self.page_dtype)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Add adapters to the weights only once in this context; weights must not change. May be nested."""
        with ExitStack() as stack:
            with self._precision():
                if isinstance(self.transformer, nn.Module):
                    stack.enter_context(held_weights(self.transformer))
            yield

    def known(self, text: TextRows) -> TextRows:
        """The text with precomputed keys and values, for calls without gradients under the same weights."""
        with self._precision(), torch.no_grad():
            own = self.transformer.text_of(text.embeddings_ULD, text.rows_R)
        return replace(text, known=own)

    def velocity(self, x_RFCHW: Tensor, sigma_R: Tensor, text: TextRows, context: Context) -> Tensor:
        """Velocity of noisy blocks ``[R, F, C, H, W]``."""
        with self._precision():
            return self.transformer(x_RFCHW, sigma_R, text.given, context, text_rows=text.rows_R)

    def encode(self, clean_RFCHW: Tensor, text: TextRows, context: Context) -> tuple[Tensor, Tensor]:
        """Keys and values ``[L, R, F, T, N, D]`` of clean blocks: the clean pass at noise level 0."""
        with self._precision(), torch.no_grad():
            zero = torch.zeros(len(clean_RFCHW), device=clean_RFCHW.device)
            return self.transformer(
                clean_RFCHW, zero, text.given, context, text_rows=text.rows_R, encode=True
            )

    def require_finite(
        self, trajectory: Trajectory, levels: Sequence[float], text: TextRows, context: Context, place: str
    ) -> None:
        """Raise NonFiniteError if a block is not finite, before it is seen, stored or decoded.

        NaN and infinity persist until the last solver step, so one reduction of the clean latents finds them
        all. Only then are the first bad step and layer located.
        """
        if bool(magnitudes([trajectory.clean_RFCHW]).isfinite()):
            return
        steps = magnitudes(trajectory.velocities_RSFCHW.unbind(1)).isfinite().tolist()
        step = steps.index(False) if False in steps else len(steps) - 1
        layer = None
        if isinstance(self.transformer, nn.Module):
            x = trajectory.states_RSFCHW[:, step]
            level = torch.full((len(x),), levels[step], device=x.device)
            layer = first_non_finite_layer(self.transformer, lambda: self.velocity(x, level, text, context))
        raise NonFiniteError(
            f"{place}: the latents are not finite from solver step {step + 1} of {len(steps)} on"
            + (f", first behind layer {layer}" if layer else "")
            + "; check the weights, the adapter and the prompt embeddings, or try --optim.autocast none"
        )

    def _precision(self) -> AbstractContextManager[object]:
        if self.autocast is None:
            return nullcontext()
        return torch.autocast(torch.device(self.device).type, self.autocast)


def frame_size(generator: StreamingGenerator, codec: Codec) -> tuple[int, int]:
    """Height and width of a generator's decoded frames."""
    empty = torch.zeros(1, 1, *generator.latent_shape, device=generator.device)
    height, width = pixels_of(codec, empty).shape[-2:]
    return height, width


def as_bytes(video_TCHW: Tensor) -> Tensor:
    """Convert pixels ``[T, 3, H, W]`` in [0, 1] to uint8 ``[T, H, W, 3]`` on the CPU."""
    return (video_TCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()
