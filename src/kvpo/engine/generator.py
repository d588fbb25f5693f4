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

    def text_of(self, text_ULD: Tensor, text_rows: Tensor | None, rows: int) -> Any: ...

    def text_keys(self, text_RLD: Tensor, layer: int) -> Tensor: ...


class TextEncoder(Protocol):
    """Prompt texts to fixed-length embeddings ``[n, text_len, text_dim]``, padding rows zero."""

    def __call__(self, texts: Sequence[str]) -> Tensor: ...


class Codec(Protocol):
    """Latents to pixels and back."""

    @property
    def frames_per_latent(self) -> int:
        """Pixel frames of every latent frame but the first, which always gives one."""

    @property
    def frames_per_second(self) -> float:
        """Speed at which the pixel frames are shown."""

    def decode(self, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
        """Latents ``[B, T, C, H, W]`` to RGB ``[B, T', 3, H', W']`` in [0, 1], in host memory.

        ``before`` holds the latent frames of the one video that all rows continue, from its start; its pixels
        are not part of the result. None: the rows are whole videos.
        """
        ...

    def decode_next(self, latents_FCHW: Tensor, state: object | None) -> tuple[Tensor, object | None]:
        """RGB ``[T', 3, H', W']`` of the next latent frames of one video, as ``decode`` gives it, and the
        state that its following frames are decoded from; None: before the first frame."""
        ...

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Latents ``[B, T', C, H', W']`` of whole videos of RGB in [0, 1], of as many frames as they fill."""
        ...


def pixels_of(codec: Codec, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
    """Pixels that ``codec.decode`` makes of latents, without gradients.

    Raises NonFiniteError where a pixel is not finite.
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
    """Prompt embeddings of a batch of rows; rows with one prompt share one embedding."""

    embeddings_ULD: Tensor
    rows_R: Tensor
    """Index of each row's embedding."""
    known: Any = None
    """The transformer's ``text_of`` them; None: every call computes that itself."""

    @property
    def given(self) -> Any:
        """The texts as the transformer takes them."""
        return self.embeddings_ULD if self.known is None else self.known

    def select(self, index: Tensor) -> "TextRows":
        """The rows named by ``index`` (repeats allowed)."""
        return TextRows(self.embeddings_ULD, self.rows_R[index])


@dataclass(frozen=True)
class Trajectory:
    """The solver trajectory of one block, for R streams."""

    states_RSFCHW: Tensor
    """Solver states x_s, the first being pure noise."""
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
    """Inside it, where no weight may change, the transformer has the precision of training's rollouts."""

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
        """True where the pages that a block sees are gathered once and not in every call.

        On the CPU; a GPU's memory is what limits the rows of a batch.
        """
        return str(self.device).partition(":")[0] == "cpu"  # a plan may have one that torch does not know

    @property
    def page_bytes(self) -> int:
        """Keys and values of one frame in all layers."""
        return 2 * math.prod(astuple(self.pages)) * self.page_dtype.itemsize

    def new_cache(self, num_pages: int) -> FrameCache:
        """An empty page pool for this generator."""
        return FrameCache(self.pages, num_pages, self.device, self.page_dtype)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Inside, where no weight may change, adapters are added to weights only once; may be nested."""
        with ExitStack() as stack:
            with self._precision():
                if isinstance(self.transformer, nn.Module):
                    stack.enter_context(held_weights(self.transformer))
            yield

    def known(self, text: TextRows) -> TextRows:
        """The text with its keys and values, for calls without gradients under the same weights."""
        with self._precision(), torch.no_grad():
            own = self.transformer.text_of(text.embeddings_ULD, text.rows_R, len(text.rows_R))
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
        """Stop before a block that is not finite is seen, stored or decoded: one reduction of its latents.

        NaN and infinity stay in a state until the last solver step, so the clean latents show them all. Only
        then are the step and the first layer looked for. Raises NonFiniteError.
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
    """Height and width of the pixel frames that a generator's latents become."""
    empty = torch.zeros(1, 1, *generator.latent_shape, device=generator.device)
    height, width = pixels_of(codec, empty).shape[-2:]
    return height, width


def as_bytes(video_TCHW: Tensor) -> Tensor:
    """Pixels in [0, 1] as uint8 ``[T, H, W, 3]``."""
    return (video_TCHW.clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().contiguous()
