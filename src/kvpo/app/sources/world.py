"""The embedded world: its generator and codec, its prompts, its rewards and its independent judge."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpo.app.judges import build_judges
from kvpo.app.prompt_sets import (
    Sets,
    TextLimits,
    longest_of_file,
    reading_of,
    split_prompts,
    updates_prompts,
)
from kvpo.app.sources.common import (
    FinalSet,
    Guide,
    Recall,
    Source,
    as_final,
    frozen_dtype,
    streaming_generator,
)
from kvpo.config import Config, PromptsConfig
from kvpo.config_checks import ConfigurationError
from kvpo.engine.noise import keyed_generator
from kvpo.files import local_path, named_list
from kvpo.models.adapters import add_adapter
from kvpo.models.causal_wan import CausalWan
from kvpo.models.settings import Deployment
from kvpo.models.tensor_files import FETCH_AGAIN, read_tensor_file
from kvpo.plan.phases import Surroundings
from kvpo.prompts import ClipPrompt, VideoPrompt, cut_notice
from kvpo.rewards.cache import score_cache
from kvpo.training.backbone import Backbone, Weights
from kvpo.training.diversity import ReadOff
from kvpo.training.setup import Setup
from kvpo.world.codec import PixelCodec, load_codec
from kvpo.world.detector import BROKEN_BELOW, attributes, detect
from kvpo.world.exam import WorldExam
from kvpo.world.grammar import parse, words
from kvpo.world.pretrain import PretrainSettings, load_generator, training_loss
from kvpo.world.reward import WorldScorer
from kvpo.world.snippets import SnippetSettings, TrainingSnippets
from kvpo.world.stories import Split, distinct_prompts, open_prompts, sample_story, video_prompt
from kvpo.world.text import TEXT_LENGTH, LearnedTextEncoder, WordTokenizer
from kvpo.world.unseen import load_unseen

logger = logging.getLogger(__name__)

SHIPPED_GENERATOR = "generator.safetensors"
SHORT_FRAMES, LONG_FRAMES = 30, 60
"""Held-out videos: one prompt over 10 blocks, three prompts over 20."""
MOST_TESTED = 256
"""Most test prompts per kind in any results made before the final test."""
OPEN_FRAMES = 84
"""Frames of the stories that leave open who comes back."""
LIVE_FRAMES = 96
"""Frames of the stories that the live page tells."""
SHORTEST_ACT = 12
"""Frames of the shortest act of a story."""


@dataclass(frozen=True)
class UnseenComponent:
    """The unseen scorer wrapped as a scorer with one component."""

    scorer: object
    components: tuple[str, ...] = ("unseen",)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        return {"unseen": self.scorer(video_BTCHW, prompts)}  # type: ignore[operator]


def world_prompts(split: Split, count: int, seed: int, first_id: int) -> Sets:
    """Held-out prompt sets of the embedded world: short and long, all distinct."""
    return {
        "short": distinct_prompts(split, count, 1, SHORT_FRAMES, seed, first_id),
        "long": distinct_prompts(split, count, 3, LONG_FRAMES, seed + 1, first_id + count),
    }


@dataclass(frozen=True)
class WorldTrainingPrompts:
    """Training prompts of each update, a pure function of (seed, update): stories of one to three acts."""

    seed: int
    count: int

    def __call__(self, update: int) -> list[VideoPrompt]:
        generator = keyed_generator("training prompts", self.seed, update)
        prompts = []
        for index in range(self.count):
            acts = 1 + index % 3
            story = sample_story(generator, acts, LONG_FRAMES, split="train")
            prompts.append(video_prompt(story, update * self.count + index))
        return prompts


def base_path(config: Config) -> Path:
    """The base checkpoint of a configuration; by default the one that ships with the package."""
    shipped = str(files("kvpo.world").joinpath("assets", SHIPPED_GENERATOR))
    return local_path(config.backbone.checkpoint or shipped, "backbone.checkpoint")


def checked_base(config: Config) -> Path:
    """The base checkpoint of a configuration, after checking it.

    Raises:
        ConfigurationError: the file is missing or holds another kind of generator.
        ValueError: it is damaged, holds pickled code, or is of another geometry than ``config.model``.
    """
    path = base_path(config)
    if not path.is_file():
        raise ConfigurationError(
            f"backbone.checkpoint: {path} is not a file; `kvpo pretrain --out FILE` writes such a file"
        )
    try:
        read_tensor_file(path)
    except ValueError as error:
        reason = str(error).removesuffix(FETCH_AGAIN)
        raise ValueError(
            f"backbone.checkpoint: {reason}; `kvpo pretrain --out FILE` writes a good one"
        ) from error
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {})["generator"])["model"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"backbone.checkpoint: {path} is not an embedded generator as `kvpo pretrain` writes it"
        ) from error
    here = json.loads(json.dumps(asdict(config.model)))
    different = [f"{name} is {saved[name]} there, {here[name]} here" for name in here
                 if saved.get(name, here[name]) != here[name]]  # fmt: skip
    if different:
        raise ConfigurationError(
            f"backbone.checkpoint: {path} is not of backbone.geometry: {'; '.join(different)}"
        )
    return path


def check_pretraining(config: Config) -> None:
    """Raise ConfigurationError if no generator of the embedded world can have these settings."""
    own, usual = config.model, Config().model
    for name, here, needed in (
        ("backbone.kind", config.backbone.kind, "world"),
        ("stream.size", config.stream.size, (usual.latent_height, usual.latent_width)),
        ("backbone.geometry: channels", own.channels, usual.channels),
        ("backbone.geometry: text_dim", own.text_dim, usual.text_dim),
    ):
        if here != needed:
            raise ConfigurationError(f"{name}: kvpo pretrain needs {needed}, got {here}")


def load_base(config: Config) -> tuple[CausalWan, LearnedTextEncoder]:
    """Load the embedded generator of a configuration, frozen. Raises the errors of ``checked_base``."""
    path = checked_base(config)
    try:
        return load_generator(config.model, path)
    except RuntimeError as error:
        raise ValueError(
            f"backbone.checkpoint: the tensors of {path} do not fit the architecture that it names"
        ) from error


def embedded(config: Config) -> tuple[Weights, LearnedTextEncoder]:
    """The embedded generator with its trained parameters: a fresh adapter, or all its own."""
    transformer, text = load_base(config)
    transformer.to(frozen_dtype(config))
    transformer.checkpointing = config.optim.checkpointing
    if config.optim.lora_rank:
        add_adapter(
            transformer,
            config.optim.lora_rank,
            generator=keyed_generator("adapter", config.seed),
        )
    else:
        transformer.requires_grad_(True)
    transformer.to(config.device)
    if config.optim.compile:
        transformer.compile_blocks()
    digest = hashlib.sha256(base_path(config).read_bytes()).hexdigest()
    return Weights(config, transformer, digest), text


def build_backbone(config: Config, prompts: Sequence[VideoPrompt] = ()) -> Backbone:
    """The embedded world's generator, text encoder and codec; warns of words in prompts that it ignores."""
    say_what_is_not_read(prompts)
    weights, text = embedded(config)
    return Backbone(
        weights=weights,
        generator=streaming_generator(config, weights.model),
        text_encoder=text.to(config.device),
        codec=load_codec().to(config.device),
    )


def text_limits(config: Config) -> TextLimits:
    """Limits in words: those in its vocabulary, up to the length of its text encoder."""
    tokenizer = WordTokenizer()
    return TextLimits(lambda text: len(words(text)), TEXT_LENGTH, "words", tokenizer.unknown)


def say_what_is_not_read(prompts: Sequence[VideoPrompt]) -> None:
    """Warn of words that the embedded generator does not know, and of those beyond its text length."""
    tokenizer = WordTokenizer()
    texts = list(dict.fromkeys(text for prompt in prompts for text in prompt.segments))
    if unknown := {text: found for text in texts if (found := tokenizer.unknown(text))}:
        names = named_list(list(dict.fromkeys(word for found in unknown.values() for word in found)))
        logger.warning(
            "%d of %d prompts have words that the embedded generator does not know and cannot show: %s; it "
            "knows the %d words of its stories (kvpo/world/assets/vocabulary.txt)",
            len(unknown),
            len(texts),
            names,
            len(tokenizer) - 2,  # without padding and the unknown word
        )
    if cut := {text: count for text in texts if (count := len(words(text))) > TEXT_LENGTH}:
        logger.warning("%s", cut_notice(cut, TEXT_LENGTH, len(texts), "words"))


def build_world(config: Config) -> Setup:
    """The embedded world: its generator with a fresh adapter, its codec, prompts and judges."""
    block = config.stream.block
    if SHORT_FRAMES % block or LONG_FRAMES % block or block > SHORTEST_ACT:
        raise ConfigurationError(
            f"stream.block: must divide the {SHORT_FRAMES} and {LONG_FRAMES} frames of the embedded world's "
            f"videos and be no longer than their shortest act of {SHORTEST_ACT}, got {block}"
        )
    training, validation, test = split(config)
    backbone = build_backbone(config, training)
    frame_rate, cache = backbone.codec.frames_per_second, score_cache(config.rewards.cache)
    return Setup(
        backbone=backbone,
        judges=build_judges(config, frame_rate, cache, UnseenComponent(load_unseen()), WorldExam()),
        training_prompts=updates_prompts(config, training)
        if config.prompts.file
        else WorldTrainingPrompts(config.seed, config.optim.prompts_per_update),
        validation=validation,
        test=test,
        scored=cache.counts,
    )


def split(config: Config) -> tuple[list[VideoPrompt], Sets, Sets]:
    """The prompts of the file; without one, training prompts are drawn (``WorldTrainingPrompts``)."""
    if config.prompts.file:
        return split_prompts(config, world_reading(config))
    evaluation = config.evaluation
    validation = world_prompts("validation", evaluation.validation_prompts, 101, 10_000_000)
    return [], validation, world_prompts("test", evaluation.test_prompts, 202, 20_000_000)


@cache
def final_prompts(count: int) -> dict[str, FinalSet]:
    """Test stories that no run's test set holds, drawn once, and longer ones scored beyond training lengths.

    There are ``count`` of each kind, and a quarter as many of the longer ones.
    """
    tested = max(count, MOST_TESTED)
    used = {story.segments for own in world_prompts("test", tested, 202, 0).values() for story in own}
    drawn = world_prompts("test", count + tested, 3_141_592, 30_000_000)
    fresh = {name: [p for p in own if p.segments not in used][:count] for name, own in drawn.items()}
    beyond = distinct_prompts("test", max(2, count // 4), 5, 2 * LONG_FRAMES, 2_718_281, 40_000_000)
    return as_final(fresh) | {"beyond": FinalSet(beyond, LONG_FRAMES)}


@cache
def pretraining_batches(stream: Deployment, seed: int) -> TrainingSnippets:
    """The data of the base's pretraining, drawn with another seed."""
    return TrainingSnippets(stream, SnippetSettings(), seed)


def pretraining(setup: Setup, step: int) -> Tensor:
    """Loss of one batch of the base's own pretraining."""
    config, text = setup.config, setup.backbone.text_encoder
    assert isinstance(text, LearnedTextEncoder)
    settings = PretrainSettings(seed=1 + config.seed)
    draws = keyed_generator("pretraining noise", settings.seed, step)
    batch = pretraining_batches(config.stream.deployment, settings.seed)[step]
    return training_loss(setup.model, text, batch, config.stream, settings, draws)


def longest_prompt(config: Config) -> VideoPrompt:
    """The longest video of the prompt file; without one, a long story."""
    if config.prompts.file:
        return longest_of_file(config, world_reading(config))
    third = LONG_FRAMES // 3 // config.stream.block * config.stream.block
    return VideoPrompt(0, ("", "", ""), (third, 2 * third), LONG_FRAMES)


def world_reading(config: Config) -> dict[str, Any]:
    """Arguments for reading prompt files; ``prompts.frames`` counts only if it differs from its default."""
    given = config.prompts.frames != PromptsConfig().frames
    frames = config.prompts.num_frames if given else SHORT_FRAMES
    return reading_of(config, frames, PixelCodec.frames_per_second)


def read_off() -> ReadOff:
    """Attributes that the detector reads off the last frames."""

    def observe(video_BTCHW: Tensor) -> tuple[list[tuple[Any, ...]], Tensor]:
        seen = detect(video_BTCHW)
        return attributes(seen), seen.confidence / BROKEN_BELOW

    return ReadOff(observe, 1.0)


def open_ended(block: int) -> Iterator[VideoPrompt]:
    """Stories that leave open who comes back, with three actors that differ in colour and shape."""

    def unlike(prompt: VideoPrompt) -> bool:
        told = [actor for text in prompt.segments[:3] for actor in parse(text).actors]
        looks = {look for actor in told for look in (actor.colour, actor.shape)}
        return len(told) == 3 and len(looks - {None}) == 6

    return filter(unlike, open_prompts(OPEN_FRAMES, block))


def first_actor(video_BTCHW: Tensor) -> list[str]:
    """Colour and shape of each video's first actor, as the detector reads them."""
    return [" ".join(first[:2]) for _, first, *_ in attributes(detect(video_BTCHW))]


def live_story(seed: int) -> list[tuple[str, int]]:
    """A story of four acts with their lengths in frames."""
    story = sample_story(keyed_generator("live story", seed), 4, LIVE_FRAMES)
    ends = [act.start for act in story.acts[1:]] + [story.num_frames]
    return [(act.caption, end - act.start) for act, end in zip(story.acts, ends, strict=True)]


def shows_rather(video_TCHW: Tensor, prompt: str, before: str) -> bool:
    """True if some frame follows ``prompt`` better than ``before``; False if a prompt cannot be parsed."""

    def following(text: str) -> Tensor:
        scores = WorldScorer()(video_TCHW[:, None], [ClipPrompt(text)] * len(video_TCHW))
        return torch.stack([scores[name] for name in ("colour", "shape", "scene", "count")]).sum(0)

    try:
        return bool((following(prompt) > following(before)).any())
    except ValueError:
        return False


SOURCE = Source(
    guide=Guide(live_story, shows_rather),
    setup=build_world,
    backbone=build_backbone,
    weights=lambda config: embedded(config)[0],
    split=split,
    final=lambda config: (
        as_final(split(config)[2]) if config.prompts.file else final_prompts(config.evaluation.test_prompts)
    ),
    pretraining=pretraining,
    frame_rate=PixelCodec.frames_per_second,
    reading=world_reading,
    text_limits=text_limits,
    file_digests=lambda config: {},
    longest_prompt=longest_prompt,
    surroundings=lambda config: Surroundings(frozen_size=frozen_dtype(config).itemsize),
    read_off=read_off,
    recall=Recall(open_ended, first_actor),
)
