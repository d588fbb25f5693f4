"""The parts of public Wan generators (LongLive, MemFlow, Self-Forcing), read from their files."""

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from kvpo.app.origin import warn_of_other_values
from kvpo.app.sources.common import first_block, frozen_dtype
from kvpo.config import Config
from kvpo.config_checks import ConfigurationError
from kvpo.engine.noise import keyed_generator
from kvpo.files import cache_directory, local_path
from kvpo.models.adapter_files import PEFT_CONFIG, AdapterState, load_adapter_state
from kvpo.models.adapters import add_adapter, check_adapter, joined_adapters, load_adapter, merge_adapter
from kvpo.models.causal_wan import CausalWan
from kvpo.models.checkpoints import (
    TransformerState,
    assign_state,
    check_state,
    load_transformer_state,
)
from kvpo.models.hub import resolve_location, split_entry
from kvpo.models.offload import on_device
from kvpo.models.tensor_files import digest_of, fingerprint
from kvpo.models.umt5 import (
    PromptCache,
    UMT5Encoder,
    encoder_fingerprint,
    load_text_encoder,
    text_encoder_files,
)
from kvpo.models.wan_vae import DecodeState, WanVAE, load_wan_vae
from kvpo.prompts import VideoPrompt, cut_notice
from kvpo.training.backbone import Weights

logger = logging.getLogger(__name__)

WAYS_OUT = {
    "checkpoint": "--checkpoint FILE, the transformer weights that belong to the preset (longlive_base.pt)",
    "encoders": "--backbone.encoders PATH, such as Wan-AI/Wan2.1-T2V-1.3B: UMT5, its tokenizer and the VAE",
}
TRANSFORMER_FILES = ("diffusion_pytorch_model*", "transformer/*", "model.*", "pytorch_model*")
ADAPTER_FILES = ("adapter_*", "pytorch_lora_weights*")
ENCODER_FILES = (
    "models_t5*", "google/*", "text_encoder/*", "tokenizer/*", "vae/*", "Wan2.1_VAE.pth"
)  # fmt: skip
"""Files fetched from a hub repository that is named as a whole."""
FRAMES_PER_SECOND = 16.0


@dataclass(frozen=True)
class WanCodec:
    """The Wan VAE as a codec; videos are decoded one by one, a latent frame at a time.

    A VAE kept in host memory is moved to the device for every call. Pixels go to host memory, since those of
    a group take gigabytes at 480 x 832; rewards move them to their own device.
    """

    vae: WanVAE
    device: torch.device | str
    frames_per_latent: int = 4
    frames_per_second: float = FRAMES_PER_SECOND

    def decode(self, latents_BTCHW: Tensor, before_TCHW: Tensor | None = None) -> Tensor:
        """RGB ``[B, T', 3, H', W']`` in [0, 1] of latents ``[B, T, C, H, W]``; see the codec protocol."""
        state = self.vae.start()
        with on_device([self.vae.model], self.device):
            if before_TCHW is not None:
                for frame in before_TCHW.to(self.device)[:, None, None]:
                    _, state = self.vae.decode_stream(frame, state)
            return torch.cat([self.vae.decode_stream(row[None], state)[0]
                              for row in latents_BTCHW.to(self.device)])  # fmt: skip

    def encode(self, video_BTCHW: Tensor) -> Tensor:
        """Latents ``[B, F, C, H, W]`` of whole videos of 1 + 4 (F - 1) frames; see the codec protocol."""
        with on_device([self.vae.model], self.device):
            return self.vae.encode(video_BTCHW.to(self.device))

    def decode_next(self, latents_FCHW: Tensor, state: object | None) -> tuple[Tensor, object | None]:
        """RGB ``[T', 3, H', W']`` of the next latent frames of a video; see the codec protocol."""
        assert state is None or isinstance(state, DecodeState)
        with on_device([self.vae.model], self.device):
            latents = latents_FCHW[None].to(self.device)
            pixels, after = self.vae.decode_stream(latents, state or self.vae.start())
        return pixels[0], after


@dataclass(frozen=True)
class CachedTexts:
    """Prompt embeddings from the disk cache; the encoder is loaded only for missing ones, then released."""

    cache: PromptCache
    load: Callable[[], UMT5Encoder]
    device: torch.device | str
    text_dim: int
    """Width that the transformer expects."""
    seen: set[str] = field(default_factory=set)
    """Texts that are in the cache; those that are cut have been reported."""

    def fill(self, prompts: Iterable[VideoPrompt]) -> None:
        """Compute the embeddings that the cache lacks, loading the encoder once; warn of texts that are cut.

        Raises ValueError if their width is not the transformer's.
        """
        texts = [text for prompt in prompts for text in prompt.segments]
        self._meet(texts)
        self(texts[:1])

    def _meet(self, texts: Iterable[str]) -> None:
        new = [text for text in dict.fromkeys(texts) if text not in self.seen]
        if new and (cut := self.cache.fill(new, self.load)):
            logger.warning("%s", cut_notice(cut, self.cache.text_len, len(new)))
        self.seen.update(new)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Embeddings ``[n, text_len, text_dim]`` float32, padding rows zero; warns of texts that are cut.

        Raises ValueError if their width is not the transformer's.
        """
        if not texts:
            return torch.empty(0, self.cache.text_len, self.text_dim, device=self.device)
        self._meet(texts)
        found = self.cache.embed(texts, self.load)
        embeddings = torch.stack([found[text] for text in texts])
        if embeddings.shape[-1] != self.text_dim:
            raise ValueError(
                f"backbone.encoders: embeddings of width {embeddings.shape[-1]}, "
                f"backbone.geometry has {self.text_dim}: the encoder belongs to another generator"
            )
        return embeddings.to(self.device, torch.float32)


def located(config: Config, name: str, *patterns: str, beside: Sequence[str] = (), among: str = "") -> Path:
    """Local path of a file or directory that the backbone needs, with the files ``beside`` it.

    ``among`` selects one if the setting names several.

    Raises:
        ConfigurationError: the setting is empty.
        ValueError: it names nothing that exists.
    """
    given = among or vars(config.backbone)[name]
    if not given:
        raise ConfigurationError(
            f"backbone.{name}: empty, but the generator of preset {config.preset!r} needs it; "
            f"give {WAYS_OUT[name]}"
        )
    try:
        location, _ = split_entry(given)
        return resolve_location(location, patterns=patterns, beside=beside)
    except ValueError as error:
        raise ValueError(f"backbone.{name}: {error}; if it has moved, --backbone.{name} PATH") from error


def text_encoder(config: Config) -> CachedTexts:
    """UMT5 behind its cache. Raises ValueError if its files are not found."""
    root = located(config, "encoders", *ENCODER_FILES)
    weights, tokenizer = text_encoder_files(root)
    dtype = torch.float32 if config.optim.autocast == "none" else torch.bfloat16
    length = config.model.text_len
    cache = PromptCache(
        cache_directory("embeddings"),
        encoder_fingerprint(weights, tokenizer, dtype),
        length,
    )
    load = partial(load_text_encoder, weights, tokenizer, text_len=length, device=config.device, dtype=dtype)
    return CachedTexts(cache, load, config.device, config.model.text_dim)


def codec(config: Config) -> WanCodec:
    """The VAE, checked against the generator's latents. Raises ValueError."""
    home = "cpu" if config.backbone.offload else config.device
    dtype = torch.bfloat16 if config.backbone.vae_precision == "bfloat16" else torch.float32
    vae = load_wan_vae(located(config, "encoders", *ENCODER_FILES), device=home, dtype=dtype)
    channels = vae.model.config.z_dim
    if channels != config.model.channels:
        raise ValueError(
            f"backbone.encoders: latents of {channels} channels, "
            f"backbone.geometry has {config.model.channels}"
        )
    return WanCodec(vae, config.device, vae.model.config.scale_factor_temporal)


@dataclass(frozen=True)
class WeightFiles:
    """A transformer that has no memory yet, and its files, mapped and checked against it."""

    model: CausalWan
    state: TransformerState
    adapter: AdapterState | None


def open_weights(config: Config) -> WeightFiles:
    """Map the files that a configuration names and refuse those that do not fit; nothing large is read yet.

    Raises:
        ConfigurationError: no checkpoint is named, or the adapter is not the one that is configured.
        ValueError: a file is absent, damaged, refused, or does not fit the configuration.
    """
    backbone = config.backbone
    with torch.device("meta"):
        model = CausalWan(config.model)
    path = located(config, "checkpoint", *TRANSFORMER_FILES)
    state = load_transformer_state(path, entry=split_entry(backbone.checkpoint)[1])
    check_state(model, state)
    if state.adapted and not backbone.lora:
        raise ConfigurationError(
            f"backbone.lora: empty, but {state.source} holds weights and their adapter; give the file as "
            f"both: --backbone.lora {backbone.checkpoint}"
        )
    warn_of_other_values(state.files[0], config)
    adapter = None
    if backbone.lora:
        given = [_adapter(config, name) for name in adapters_of(backbone.lora)]
        adapter = given[0] if len(given) == 1 else joined_adapters(given)
        check_adapter(model, adapter)
        logger.info("adapter bound to %s", adapter.described())
        for one in given:
            warn_of_other_values(one.files[0], config, digest_of(state.tensors), alone=len(given) == 1)
        if backbone.lora_start == "continue":
            _demand_same_adapter(config, adapter)
    return WeightFiles(model, state, adapter)


def adapters_of(lora: str) -> list[str]:
    """Split ``backbone.lora`` into the adapters to add up; a path that exists is a single one."""
    return [lora] if not lora or local_path(lora, "backbone.lora").exists() else lora.split(",")


def _adapter(config: Config, location: str) -> AdapterState:
    path = located(config, "lora", *ADAPTER_FILES, beside=(PEFT_CONFIG,), among=location)
    return load_adapter_state(path, entry=split_entry(location)[1])


def wan_weights(config: Config, given: WeightFiles | None = None) -> Weights:
    """The transformer with its trained parameters; ``given`` are its files if already mapped.

    The starting policy is the checkpoint with its given adapter, continued or merged.
    Frozen weights are kept in the precision of the forward pass, trained ones in float32.

    Raises:
        ValueError: see `open_weights`.
    """
    optim, backbone = config.optim, config.backbone
    given = given or open_weights(config)
    model, state, adapter = given.model, given.state, given.adapter
    assign_state(model, state, device=config.device, dtype=frozen_dtype(config))
    model.requires_grad_(False)
    model.checkpointing = optim.checkpointing
    bare = None if adapter is None else first_block(config, model)
    if adapter is not None and backbone.lora_start == "merge":
        merge_adapter(model, adapter, state.tensors)
    if not optim.lora_rank:
        model.requires_grad_(True)
    elif adapter is not None and backbone.lora_start == "continue":
        load_adapter(model, adapter)
    else:
        draws = keyed_generator("adapter", config.seed)
        add_adapter(model, optim.lora_rank, generator=draws)
    if adapter is not None and bare is not None and torch.equal(first_block(config, model), bare):
        raise ValueError(
            f"{adapter.source}: bound to {len(adapter.modules)} layers, but the generator makes the same "
            f"latents with and without it at optim.autocast {optim.autocast}; is it of this checkpoint?"
        )
    if optim.compile:
        model.compile_blocks()
    entries = [split_entry(location)[1] or "" for location in (backbone.checkpoint, backbone.lora)]
    how = [entries[0], *([backbone.lora_start, entries[1]] if adapter else [])]
    how += [str(sorted(set(map(adapter.scale, adapter.modules))))] if adapter and adapter.stated else []
    files = (*state.files, *(adapter.files if adapter else ()))
    return Weights(config, model.to(config.device), fingerprint(files, "/".join(how)))


def _demand_same_adapter(config: Config, given: AdapterState) -> None:
    """Raise ConfigurationError unless a continued adapter has the configured rank; its scale is its own."""
    if config.optim.lora_rank != given.rank:
        raise ConfigurationError(
            f"optim.lora_rank: {config.optim.lora_rank}, but the adapter {config.backbone.lora} that is "
            f"continued has rank {given.rank}; set it to {given.rank}, or backbone.lora_start to merge"
        )
