"""Public Wan generators (LongLive, MemFlow, Self-Forcing) on the prompts of a file."""

import logging
from collections.abc import Iterable
from functools import partial
from itertools import chain
from typing import Any

from kvpo.app.judges import build_judges
from kvpo.app.named_rewards import reach_servers
from kvpo.app.prompt_sets import (
    Sets,
    TextLimits,
    longest_of_file,
    reading_of,
    short_notice,
    split_prompts,
    updates_prompts,
)
from kvpo.app.sources.common import Source, as_final, frozen_dtype, streaming_generator
from kvpo.app.sources.wan_parts import (
    ENCODER_FILES,
    FRAMES_PER_SECOND,
    codec,
    located,
    open_weights,
    text_encoder,
    wan_weights,
)
from kvpo.config import Config
from kvpo.models.pretrained import read_tokenizer
from kvpo.models.tensor_files import fingerprint
from kvpo.models.umt5 import OFFICIAL_TOKENIZER, token_count
from kvpo.models.wan_vae import vae_files
from kvpo.plan.phases import Surroundings
from kvpo.prompt_files import LATENT_RATE
from kvpo.prompts import VideoPrompt
from kvpo.rewards.cache import score_cache
from kvpo.training.backbone import Backbone
from kvpo.training.setup import Setup

logger = logging.getLogger(__name__)

EXTENDED_WORDS = 80
"""Words in the shortest usual extended prompts, which the public checkpoints were distilled on."""
UMT5_PARAMETERS = 5_680_910_336
VAE_PARAMETERS = 126_892_531
VAE_DECODE, VAE_FLOPS = 27_400, 33.8e6
"""Bytes and operations per pixel for decoding one latent frame with the Wan VAE in float32; the bytes hold
two sets of carried features and the largest layer's tensors."""
SCORING = 2e9
"""Allowance for a reward model's forward pass."""
REWARD_BYTES = {
    "hpsv3": 16.5e9, "videoalign": 5.0e9, "hpsv2": 3.9e9, "pickscore": 3.9e9, "clip_score": 1.7e9,
    "aesthetic": 1.7e9, "image_reward": 1.8e9, "subject_consistency": 0.35e9,
}  # fmt: skip
"""Memory of loaded reward models; one model gives the three scores of VideoAlign."""


def wan_backbone(config: Config, prompts: Iterable[VideoPrompt] = ()) -> Backbone:
    """A public generator from the files that ``config.backbone`` names.

    The embeddings of ``prompts`` are computed first, while nothing else is in memory.

    Raises:
        ConfigurationError: a file is not named.
        ValueError: a file is absent, damaged, refused, or does not fit the configuration.
    """
    texts, pixels, given = text_encoder(config), codec(config), open_weights(config)
    texts.fill(prompts)
    weights = wan_weights(config, given)
    return Backbone(
        weights=weights,
        generator=streaming_generator(config, weights.model),
        text_encoder=texts,
        codec=pixels,
    )


def build_wan(config: Config) -> Setup:
    """Set up a public generator to align with the configured rewards, on the prompts of a file."""
    reach_servers(config)
    training, validation, test = wan_split(config)
    if (notice := short_notice(training, EXTENDED_WORDS)) is not None:
        logger.warning("%s: %s", config.prompts.file, notice)
    prompts = updates_prompts(config, training)
    seen = [prompts(update) for update in range(config.optim.updates)]
    # Before the rewards, so that the device need not hold the text encoder and a large reward at once.
    backbone = wan_backbone(config, chain(*seen, *validation.values(), *test.values()))
    cache = score_cache(config.rewards.cache)
    judges = build_judges(config, FRAMES_PER_SECOND, cache)
    return Setup(
        backbone=backbone,
        judges=judges,
        training_prompts=prompts,
        validation=validation,
        test=test,
        scored=cache.counts,
    )


def wan_reading(config: Config) -> dict[str, Any]:
    """Arguments for reading prompt files: lengths of ``prompts.frames``, timelines at the VAE's rate."""
    return reading_of(config, config.prompts.num_frames, LATENT_RATE)


def wan_split(config: Config) -> tuple[list[VideoPrompt], Sets, Sets]:
    """Split the prompts of the file."""
    return split_prompts(config, wan_reading(config))


def text_limits(config: Config) -> TextLimits:
    """Limits in UMT5 tokens; they cannot be counted, with a warning, if its tokenizer is not found."""
    length = None
    try:
        root = located(config, "encoders", f"{OFFICIAL_TOKENIZER}/*", "tokenizer/*")
        own = next(root / name for name in (OFFICIAL_TOKENIZER, "tokenizer") if (root / name).is_dir())
        length = partial(token_count, read_tokenizer(own))
    except (ValueError, StopIteration) as error:
        logger.warning("no tokenizer: %s", error or f"{root} has none")
    return TextLimits(length, config.model.text_len, usual=EXTENDED_WORDS)


def file_digests(config: Config) -> dict[str, str]:
    """Digests of text encoder and VAE. Raises ValueError if they are not found."""
    return {
        "backbone.encoders": f"{text_encoder(config).cache.encoder} and "
        f"{fingerprint([vae_files(located(config, 'encoders', *ENCODER_FILES))])}",
    }


def longest_prompt(config: Config) -> VideoPrompt:
    """The longest video of the prompt file, or one of the configured length and switches."""
    settings = config.prompts
    if settings.file:
        return longest_of_file(config, wan_reading(config))
    return VideoPrompt(0, ("",) * (len(settings.switches) + 1), settings.switches, settings.num_frames)


def surroundings(config: Config) -> Surroundings:
    """Memory used by text encoder, VAE and reward models."""
    low = config.optim.autocast == "bfloat16"
    local = [name for name in config.rewards.scorers + config.evaluation.watchers if "@" not in name]
    families = {"videoalign" if name.startswith("videoalign") else name for name in local}
    size = 2 if config.backbone.vae_precision == "bfloat16" else 4
    pixels = 64 * config.model.latent_height * config.model.latent_width
    return Surroundings(
        frozen_size=frozen_dtype(config).itemsize,
        text_encoder=UMT5_PARAMETERS * (2 if low else 4),
        codec=size * VAE_PARAMETERS,
        decode=VAE_DECODE * pixels * size / 4,
        decode_flops=VAE_FLOPS * pixels,
        rewards={name: REWARD_BYTES[name] for name in sorted(families) if name in REWARD_BYTES},
        scoring=SCORING,
        frame=4 * 3 * 4 * pixels,
    )


SOURCE = Source(
    setup=build_wan,
    backbone=wan_backbone,
    weights=wan_weights,
    split=wan_split,
    final=lambda config: as_final(wan_split(config)[2]),
    frame_rate=FRAMES_PER_SECOND,
    reading=wan_reading,
    text_limits=text_limits,
    file_digests=file_digests,
    longest_prompt=longest_prompt,
    surroundings=surroundings,
)
