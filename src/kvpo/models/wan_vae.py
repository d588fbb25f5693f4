"""Latents to pixels and back through the Wan 2.1 VAE, with a streaming decoder whose state is a value.

Besides a latent frame, the causal decoder needs the last features that its convolutions saw. Here, they are a
`DecodeState` that is passed in and returned, so a branch decodes only its own frames, from the fork's state.

Shape legend: B videos, F latent frames, C latent channels, T pixel frames, H/W latent rows and columns.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvpo.extras import extra
from kvpo.files import named_list
from kvpo.models.pretrained import strict_pretrained
from kvpo.models.tensor_files import assign_tensors, read_tensors, renamed

with extra("wan"):
    from diffusers import AutoencoderKLWan
    from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d

OFFICIAL_VAE = "Wan2.1_VAE.pth"

_RESIDUAL = {"residual.0": "norm1", "residual.2": "conv1", "residual.3": "norm2", "residual.6": "conv2"}
_RESIDUAL |= {"shortcut": "conv_shortcut"}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_ENDS = {"conv1": "conv_in", "head.0": "norm_out", "head.2": "conv_out"}
_DECODER_STAGE = 4  # layers of one resolution in the official list: three residual blocks and an upsampling
_POINTWISE = {"conv1": "quant_conv", "conv2": "post_quant_conv"}


@dataclass(frozen=True)
class DecodeState:
    """The decoder's state between latent frames; never changed in place, so it can be shared."""

    frames: int
    """Latent frames decoded so far."""
    features: tuple[Tensor | str | None, ...]
    """Last features before each causal convolution, ``[B, C', 1 or 2, H', W']``; at first None or a mark."""

    def rows(self, index: list[int]) -> "DecodeState":
        """The state of the given videos; an index may repeat, to continue one video in several branches."""
        picked = tuple(f[index] if isinstance(f, Tensor) else f for f in self.features)
        return DecodeState(self.frames, picked)


class WanVAE:
    """diffusers' AutoencoderKLWan on normalised latents ``[B, F, C, H, W]`` and pixels in [0, 1]."""

    def __init__(self, model: Any) -> None:
        """Wrap and freeze an AutoencoderKLWan.

        Raises:
            ValueError: not one latent mean and deviation per channel, or not the VAE of Wan 2.1.
        """
        config = model.config
        for name in ("latents_mean", "latents_std"):
            if len(config[name]) != config.z_dim:
                raise ValueError(
                    f"VAE {name}: {len(config[name])} values for z_dim = {config.z_dim} channels"
                )
        if config.patch_size is not None:
            raise ValueError(
                f"VAE patch_size = {config.patch_size}: only the Wan 2.1 VAE (none) is supported"
            )
        self.model = model.eval().requires_grad_(False)

    def _statistics(self, like: Tensor) -> tuple[Tensor, Tensor]:
        config = self.model.config
        mean, std = (torch.tensor(v, device=like.device) for v in (config.latents_mean, config.latents_std))
        return mean.view(-1, 1, 1, 1), std.view(-1, 1, 1, 1)

    @torch.no_grad()
    def encode(self, pixels_BTCHW: Tensor) -> Tensor:
        """Normalised latents ``[B, F, C, H, W]`` (the posterior mean) of ``T = 1 + 4 (F - 1)`` pixel frames.

        Raises:
            ValueError: a number of frames that is not 1 + a multiple of the temporal compression.
        """
        every = self.model.config.scale_factor_temporal
        if (pixels_BTCHW.shape[1] - 1) % every:
            raise ValueError(
                f"a video of {pixels_BTCHW.shape[1]} frames cannot be encoded: the VAE takes 1 + {every} n"
            )
        x = (2 * pixels_BTCHW - 1).transpose(1, 2).to(self.model.dtype)
        latents = self.model.encode(x).latent_dist.mode().float()
        mean, std = self._statistics(latents)
        return ((latents - mean) / std).transpose(1, 2)

    def start(self) -> DecodeState:
        """The state before the first frame."""
        convolutions = sum(isinstance(m, WanCausalConv3d) for m in self.model.decoder.modules())
        return DecodeState(0, (None,) * convolutions)

    @torch.no_grad()
    def decode_stream(self, latents_BFCHW: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        """Pixels of the next latent frames, ``[B, T, 3, H', W']`` float32 in [0, 1], and the next state.

        The very first latent frame gives one pixel frame, every other one four. Pixels go to host memory
        frame by frame, because the device may not hold those of a whole video.
        """
        mean, std = self._statistics(latents_BFCHW)
        z_BCFHW = latents_BFCHW.float().transpose(1, 2) * std + mean
        x = self.model.post_quant_conv(z_BCFHW.to(self.model.dtype))
        features = list(state.features)
        pixels = []
        for frame in range(x.shape[2]):
            # The decoder replaces entries of the list, but does not modify the tensors.
            first = state.frames + frame == 0
            decoded = self.model.decoder(
                x[:, :, frame : frame + 1], feat_cache=features, feat_idx=[0], first_chunk=first
            )
            pixels.append(((decoded.float().clamp(-1, 1).transpose(1, 2) + 1) / 2).cpu())
        return torch.cat(pixels, dim=1), DecodeState(state.frames + x.shape[2], tuple(features))

    def decode(self, latents_BFCHW: Tensor) -> Tensor:
        """Pixels ``[B, T, 3, H', W']`` float32 in [0, 1] of whole videos, in host memory."""
        return self.decode_stream(latents_BFCHW, self.start())[0]


def diffusers_name(name: str) -> str:
    """diffusers' name of a parameter in Wan's own VAE file."""
    part, _, rest = name.partition(".")
    if part in _POINTWISE:
        return f"{_POINTWISE[part]}.{rest}"
    if match := re.match(r"middle\.(\d)\.(.*)", rest):
        return f"{part}.mid_block.{_MIDDLE.get(match[1], match[1])}.{renamed(match[2], _RESIDUAL)}"
    if match := re.match(r"downsamples\.(\d+)\.(.*)", rest):
        return f"{part}.down_blocks.{match[1]}.{renamed(match[2], _RESIDUAL)}"
    if match := re.match(r"upsamples\.(\d+)\.(.*)", rest):
        stage, index = divmod(int(match[1]), _DECODER_STAGE)
        layer = "upsamplers.0" if index == _DECODER_STAGE - 1 else f"resnets.{index}"
        return f"{part}.up_blocks.{stage}.{layer}.{renamed(match[2], _RESIDUAL)}"
    return f"{part}.{renamed(rest, _ENDS)}"


def _load_official(path: Path, device: torch.device | str, dtype: torch.dtype) -> Any:
    """The VAE in Wan's own file; width and latent channels are inferred from the shapes."""
    official = read_tensors(path)
    try:
        base, latent = official["decoder.head.2.weight"].shape[1], official["conv2.weight"].shape[0]
    except KeyError as error:
        raise ValueError(
            f"{path}: not a VAE in Wan's layout ({OFFICIAL_VAE}): no {error}; "
            f"it holds {named_list(list(official)[:3])}"
        ) from error
    with torch.device("meta"):
        model: Any = AutoencoderKLWan(base_dim=base, z_dim=latent)
    tensors = {diffusers_name(name): tensor for name, tensor in official.items()}
    assign_tensors(model, tensors, str(path), device=device, dtype=dtype)
    return model


def vae_files(path: Path) -> Path:
    """The VAE's file or diffusers directory in a model directory of either layout, or ``path`` itself."""
    inside = [path / OFFICIAL_VAE, path / "vae"] if path.is_dir() else []
    return next((found for found in inside if found.exists()), path)


def load_wan_vae(
    path: Path, *, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> WanVAE:
    """Load the VAE from Wan's ``.pth`` file, a diffusers directory, or a model directory of either layout.

    Raises:
        ValueError: unreadable files, keys that are missing, unexpected or misshapen (each named).
    """
    path = vae_files(path)
    if not path.is_dir():
        return WanVAE(_load_official(path, device, dtype))
    return WanVAE(strict_pretrained(AutoencoderKLWan, path, torch_dtype=dtype).to(device))
