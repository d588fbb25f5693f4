"""The causal Wan transformer: one class from the tiny embedded generator to the 1.3B and 14B checkpoints.

Parameter names and arithmetic follow the Wan 2.1 text-to-video transformer as the streaming generators use
it: attention is bidirectional among the frames of one call, and causality comes from calling block by block
with a context of earlier frames.

Shape legend: R rows, F frames of the call, C/H/W latent, T tokens per frame, N heads, D head width.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kvpo.models.context import Context
from kvpo.models.cpu import GELU, attention, rms_norm
from kvpo.models.linear import Linear, product
from kvpo.models.settings import WanShape

TIMESTEPS = 1000.0
"""Timestep at sigma = 1: timestep = 1000 sigma."""
KeysValues = tuple[Tensor, Tensor]
Modulation = tuple[Tensor, ...]
"""Shift, scale and gate of attention, then those of the feed-forward, each ``[R, 1, dim]``."""
GRAPHS = 64
"""Limit on compiled variants: with or without gradients, with or without adapter, one row or many."""


class PatchEmbedding(nn.Conv3d):
    """A convolution whose stride is its kernel size, computed as one matrix product over all patches."""

    def forward(self, input: Tensor) -> Tensor:
        """Latents ``[R, F, C, H, W]`` to tokens ``[R, F*T, dim]``."""
        frames, height, width = self.kernel_size
        x = input.unflatten(4, (-1, width)).unflatten(3, (-1, height)).unflatten(1, (-1, frames))
        x = x.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3)
        return product(x, self.weight.flatten(1), self.bias)


def timestep_sinusoid(timestep: Tensor, dim: int) -> Tensor:
    """``[cos | sin]`` features of timesteps, ``[...] -> [..., dim]`` in float64."""
    half, f64, device = dim // 2, torch.float64, timestep.device
    frequencies = torch.logspace(0, 4 / half - 4, half, dtype=f64, device=device)  # 10000^(-i / half)
    angle = timestep.to(f64)[..., None] * frequencies
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def rotary_angles(frames_RF: Tensor, grid: tuple[int, int], head_dim: int) -> Tensor:
    """Rotation angles ``[R, F*T, head_dim / 2]`` (float64) of tokens ordered (frame, row, column).

    The head width splits into a temporal part and two equal spatial parts, each rotated by its own coordinate
    with frequencies 10000^(-2i / width of the part).
    """
    spatial = 2 * (head_dim // 6)
    widths = (head_dim - 2 * spatial, spatial, spatial)
    device = frames_RF.device

    def part(position: Tensor, width: int) -> Tensor:
        exponent = torch.arange(0, width, 2, dtype=torch.float64, device=device) / width
        return position.to(torch.float64)[..., None] / torch.pow(10000.0, exponent)

    rows, columns = grid
    batch, frames = frames_RF.shape
    shape = (batch, frames, rows, columns, -1)
    angles = [
        part(frames_RF, widths[0])[:, :, None, None].expand(shape),
        part(torch.arange(rows, device=device), widths[1])[None, None, :, None].expand(shape),
        part(torch.arange(columns, device=device), widths[2])[None, None, None, :].expand(shape),
    ]
    return torch.cat(angles, dim=-1).flatten(1, 3)


def rotate(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate adjacent pairs of ``x [R, K, N, D]`` by angles in the form that ``cos_sin`` returns."""
    pairs = x.to(torch.promote_types(x.dtype, cos_sin.dtype)).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # inductor fuses real products and has no code for complex ones
        (even, odd), (cos, sin) = pairs.unbind(-1), cos_sin.unbind(-1)
        rotated = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    else:
        rotated = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(cos_sin))
    return rotated.flatten(-2).type_as(x)


def cos_sin(angles: Tensor) -> Tensor:
    """Cos and sin of float64 angles ``[R, K, D / 2]``, as float32 ``[R, K, 1, D / 2, 2]`` for all heads."""
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()[:, :, None]


class Rotary:
    """Rotations of tokens by frame, row and column; parts that do not depend on the frame are cached."""

    def __init__(self, head_dim: int) -> None:
        self.head_dim = head_dim
        self._fixed: dict[tuple[tuple[int, int], torch.device], tuple[Tensor, Tensor]] = {}

    def __call__(self, frames_RF: Tensor, grid: tuple[int, int]) -> Tensor:
        """``cos_sin(rotary_angles(...))`` of these frames, ``[R, F*T, 1, D / 2, 2]``."""
        frequencies, places = self._of(grid, frames_RF.device)
        over_time = cos_sin(frames_RF.to(torch.float64)[..., None] * frequencies)[:, :, None]
        shape = (*frames_RF.shape, len(places), 1, -1, 2)
        return torch.cat([over_time.expand(shape), places.expand(shape)], dim=-2).flatten(1, 2)

    def _of(self, grid: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Temporal frequencies (angles per frame), and spatial rotations ``[T, 1, S, 2]``."""
        if (grid, device) not in self._fixed:
            temporal = self.head_dim // 2 - 2 * (self.head_dim // 6)
            frame = torch.ones(1, 1, device=device)
            frequencies = rotary_angles(frame, (1, 1), self.head_dim)[0, 0, :temporal]
            places = cos_sin(rotary_angles(frame, grid, self.head_dim)[..., temporal:])
            self._fixed[grid, device] = frequencies, places[0]
        return self._fixed[grid, device]


class RMSNorm(nn.Module):
    """Root-mean-square normalisation over the last axis, computed in float32 or wider."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == self.weight.dtype:
            return rms_norm(x, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        return F.rms_norm(wide, self.weight.shape, eps=self.eps).type_as(x) * self.weight


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys."""

    def __init__(self, dim: int, num_heads: int, eps: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q = Linear(dim, dim)
        self.k = Linear(dim, dim)
        self.v = Linear(dim, dim)
        self.o = Linear(dim, dim)
        self.norm_q = RMSNorm(dim, eps)
        self.norm_k = RMSNorm(dim, eps)

    def heads(self, x: Tensor) -> Tensor:
        """Split ``[R, K, dim]`` into ``[R, K, N, D]``."""
        return x.unflatten(-1, (self.num_heads, -1))

    def keys_values(self, x: Tensor) -> KeysValues:
        """Keys and values ``[R, K, N, D]`` of ``x [R, K, dim]``, before any rotation."""
        return self.heads(self.norm_k(self.k(x))), self.heads(self.v(x))

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None = None) -> Tensor:
        """Softmax attention ``[R, K, N, D] -> [R, K, dim]``, projected; one row of keys serves all rows."""
        rows = len(q)
        if len(keys) < rows:
            q = q.flatten(0, 1)[None]
        out = attention(q.transpose(1, 2), keys.transpose(1, 2), values.transpose(1, 2), mask)
        return self.o(out.transpose(1, 2).reshape(rows, -1, self.o.in_features))


class WanBlock(nn.Module):
    """Self-attention over the context, cross-attention to the text, feed-forward; modulated by time."""

    def __init__(self, shape: WanShape, rotary: Rotary) -> None:
        super().__init__()
        self.shape = shape
        self.rotary = rotary
        dim = shape.dim
        self.self_attn = Attention(dim, shape.num_heads, shape.eps)
        self.cross_attn = Attention(dim, shape.num_heads, shape.eps)
        self.norm1 = nn.LayerNorm(dim, shape.eps, elementwise_affine=False)
        self.norm2 = nn.LayerNorm(dim, shape.eps, elementwise_affine=False)
        self.norm3 = nn.LayerNorm(dim, shape.eps)
        self.ffn = nn.Sequential(Linear(dim, shape.ffn_dim), GELU(), Linear(shape.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.randn(1, 6, dim) / math.sqrt(dim))

    def modulated(self, time_R6D: Tensor) -> Modulation:
        """Modulation of this layer for the call's time embedding ``[R, 6, dim]``."""
        return (self.modulation + time_R6D).split(1, dim=1)

    def own_keys_values(
        self, x: Tensor, modulation: Modulation, rotation: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Attention input, keys (rotated unless ``rotation`` is None) and values of the call's own frames."""
        shift, scale, *_ = modulation
        attention_in = torch.addcmul(shift, self.norm1(x), 1 + scale).type_as(x)
        k, v = self.self_attn.keys_values(attention_in)
        return attention_in, k if rotation is None else rotate(k, rotation), v

    def forward(
        self,
        x: Tensor,
        time_R6D: Tensor,
        text: Tensor | KeysValues,
        text_rows: Tensor | None,
        rotation: Tensor | None,
        context: Context,
        layer: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """One layer: ``x [R, F*T, dim]`` -> (x, own keys, own values).

        ``text`` is the output of ``text_embedding``, or each row's keys and values of it. ``context`` is an
        argument, not state, so that recomputation under activation checkpointing reads exactly what the first
        pass read.
        """
        modulation = self.modulated(time_R6D)
        q, k, v = self.project(x, modulation, rotation)
        keys, values, mask = context.read(layer, q, k, v)
        if rotation is None:
            q, keys = self._rotate_by_slot(q, keys)
        attended = self.self_attn.attend(q, keys, values, mask)
        if isinstance(text, Tensor):
            text = self.text_keys_values(text, text_rows)
        return self.update(x, attended, modulation, *text), k, v

    def text_keys_values(self, text: Tensor, text_rows: Tensor | None) -> KeysValues:
        """Keys and values ``[R, text_len, N, D]`` of each row's text, from embeddings ``[U, text_len, dim]``.

        For a single text they are ``[1, text_len, N, D]``.
        """
        k, v = self.cross_attn.keys_values(text)
        return (k, v) if text_rows is None or len(text) == 1 else (k[text_rows], v[text_rows])

    def project(
        self, x: Tensor, modulation: Modulation, rotation: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """First half, before attention to the context: queries, keys and values of the call's own frames."""
        attention_in, k, v = self.own_keys_values(x, modulation, rotation)
        q = self.self_attn.heads(self.self_attn.norm_q(self.self_attn.q(attention_in)))
        return q if rotation is None else rotate(q, rotation), k, v

    def update(
        self, x: Tensor, attended: Tensor, modulation: Modulation, text_k: Tensor, text_v: Tensor
    ) -> Tensor:
        """Second half, after that attention: residual, cross-attention to the text, feed-forward."""
        _, _, gate, shift_ffn, scale_ffn, gate_ffn = modulation
        x = torch.addcmul(x, gate, attended)
        text_in = self.norm3(x).type_as(x)
        text_q = self.cross_attn.heads(self.cross_attn.norm_q(self.cross_attn.q(text_in)))
        x = x + self.cross_attn.attend(text_q, text_k, text_v)
        ffn_in = torch.addcmul(shift_ffn, self.norm2(x), 1 + scale_ffn).type_as(x)
        return torch.addcmul(x, gate_ffn, self.ffn(ffn_in))

    def only_keys_values(self, x: Tensor, time_R6D: Tensor, rotation: Tensor | None) -> KeysValues:
        """Keys and values of the call's own frames, skipping the rest of the layer."""
        return self.own_keys_values(x, self.modulated(time_R6D), rotation)[1:]

    def text_of(self, text: Tensor, text_rows: Tensor | None) -> KeysValues:
        """``text_keys_values`` for callers outside ``forward``."""
        return self.text_keys_values(text, text_rows)

    def _rotate_by_slot(self, q: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Rotate keys by their slots and queries by the last slots, which are theirs (relative positions)."""
        tokens = self.shape.tokens_per_frame
        slots = torch.arange(keys.shape[1] // tokens, device=q.device)[None]
        rotation = self.rotary(slots, self.shape.grid)
        return rotate(q, rotation[:, -q.shape[1] :]), rotate(keys, rotation)


class Head(nn.Module):
    """Final modulation and projection to patches."""

    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(shape.dim, shape.eps, elementwise_affine=False)
        self.head = Linear(shape.dim, math.prod(shape.patch_size) * shape.channels)
        self.modulation = nn.Parameter(torch.randn(1, 2, shape.dim) / math.sqrt(shape.dim))

    def forward(self, x: Tensor, time_RD: Tensor) -> Tensor:
        shift, scale = (self.modulation + time_RD[:, None]).split(1, dim=1)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale))


def _stored(stored: KeysValues | None, layer: int, layers: int, k: Tensor, v: Tensor) -> KeysValues:
    """Write a layer's keys and values into those of all layers; stacking them would hold them twice."""
    if stored is None:
        stored = k.new_empty(layers, *k.shape), v.new_empty(layers, *v.shape)
    for whole, part in zip(stored, (k, v), strict=True):
        whole[layer] = part
    return stored


class CausalWan(nn.Module):
    """Velocity model of one block of frames given a context of clean frames."""

    def __init__(self, shape: WanShape) -> None:
        super().__init__()
        shape.check()
        self.shape = shape
        self.checkpointing = False
        dim = shape.dim
        self.patch_embedding = PatchEmbedding(shape.channels, dim, shape.patch_size, stride=shape.patch_size)
        self.text_embedding = nn.Sequential(Linear(shape.text_dim, dim), GELU(), Linear(dim, dim))
        self.time_embedding = nn.Sequential(Linear(shape.freq_dim, dim), nn.SiLU(), Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), Linear(dim, 6 * dim))
        self.rotary = Rotary(shape.head_dim)
        self.blocks = nn.ModuleList(WanBlock(shape, self.rotary) for _ in range(shape.num_layers))
        self.head = Head(shape)

    def text_of(self, text_ULD: Tensor, text_rows: Tensor | None) -> tuple[KeysValues, ...]:
        """Keys and values of texts in every layer, to reuse in calls with the same texts and weights."""
        text = self.text_embedding(text_ULD.to(self.patch_embedding.weight.dtype))
        layers = (cast(WanBlock, module) for module in self.blocks)
        return tuple(layer.text_of(text, text_rows) for layer in layers)

    def forward(
        self,
        x_RFCHW: Tensor,
        sigma_R: Tensor,
        text_ULD: Tensor | Sequence[KeysValues],
        context: Context,
        *,
        text_rows: Tensor | None = None,
        encode: bool = False,
    ) -> Tensor | KeysValues:
        """Velocity ``[R, F, C, H, W]`` of noisy blocks; keys and values ``[L, R, F, T, N, D]`` of clean ones.

        Args:
            sigma_R: noise level in [0, 1] of each row; 0 for a clean pass.
            text_ULD: zero-padded text embeddings ``[U, text_len, text_dim]`` (the padding is attended to), or
                the result of ``text_of`` for these rows.
            text_rows: index of each row's text, ``[R]``; None: U = R, one text per row.
            encode: return keys and values, and skip the work that only the velocity needs.
        """
        frames = x_RFCHW.shape[1]
        dtype = self.patch_embedding.weight.dtype
        x = self.patch_embedding(x_RFCHW.to(dtype))
        time = self.time_embedding(timestep_sinusoid(TIMESTEPS * sigma_R, self.shape.freq_dim).to(dtype))
        time_R6D = self.time_projection(time).unflatten(1, (6, -1))
        texts: Sequence[Tensor | KeysValues]
        if isinstance(text_ULD, Tensor):
            texts = [self.text_embedding(text_ULD.to(dtype))] * len(self.blocks)
        else:
            texts = text_ULD
        rotation = None
        if not self.shape.relative_positions:
            positions = context.start_R[:, None] + torch.arange(frames, device=x.device)
            rotation = self.rotary(positions, self.shape.grid)
        stored: KeysValues | None = None
        for layer, module in enumerate(self.blocks):
            block = cast(WanBlock, module)
            arguments = (x, time_R6D, texts[layer], text_rows, rotation, context, layer)
            if encode and layer == len(self.blocks) - 1:
                k, v = block.only_keys_values(x, time_R6D, rotation)
            elif self.checkpointing and torch.is_grad_enabled():
                x, k, v = checkpoint(block, *arguments, use_reentrant=False)
            else:
                x, k, v = block(*arguments)
            if encode:
                stored = _stored(stored, layer, len(self.blocks), k, v)
        if stored is not None:
            return stored[0].unflatten(2, (frames, -1)), stored[1].unflatten(2, (frames, -1))
        return self.unpatchify(self.head(x, time), frames).to(x_RFCHW.dtype)

    def unpatchify(self, x: Tensor, frames: int) -> Tensor:
        """Tokens ``[R, F*T, pt*ph*pw*C]`` (channel fastest) back to latents ``[R, F, C, H, W]``."""
        (rows, columns), (_, height, width) = self.shape.grid, self.shape.patch_size
        x = x.unflatten(2, (height, width, self.shape.channels)).unflatten(1, (frames, rows, columns))
        return x.permute(0, 1, 6, 2, 4, 3, 5).flatten(5, 6).flatten(3, 4)

    @contextmanager
    def smallest_latents(self) -> Iterator[None]:
        """Shrink latents to two by two tokens inside the block: enough to compare weights, at little cost."""
        own, (_, height, width) = self.shape, self.shape.patch_size
        shaped: list[CausalWan | WanBlock] = [self, *(cast(WanBlock, block) for block in self.blocks)]
        try:
            for module in shaped:
                module.shape = replace(own, latent_height=2 * height, latent_width=2 * width)
            yield
        finally:
            for module in shaped:
                module.shape = own

    def compile_blocks(self) -> None:
        """Compile every layer except its attention to the context, in place, for any number of rows.

        Reading a context and attending to it are not compiled: they are memory copies and one library kernel,
        and a compiled graph would depend on how many pages each context has.
        """
        import torch._dynamo.config as dynamo  # loads the compiler, so only on demand

        dynamo.recompile_limit = max(dynamo.recompile_limit, GRAPHS)
        # Compile epsilons and adapter scales as constants; as variables they would become CPU kernels.
        dynamo.specialize_float = True
        for module in self.blocks:
            block = cast(WanBlock, module)
            block.project = torch.compile(block.project, dynamic=True)  # type: ignore[method-assign]
            block.update = torch.compile(block.update, dynamic=True)  # type: ignore[method-assign]

    def text_keys(self, text_RLD: Tensor, layer: int) -> Tensor:
        """Keys of a layer's cross-attention, ``[R, text_len, N, D]``; a bank scores frames with them."""
        text = self.text_embedding(text_RLD.to(self.patch_embedding.weight.dtype))
        return cast(WanBlock, self.blocks[layer]).text_of(text, None)[0]
