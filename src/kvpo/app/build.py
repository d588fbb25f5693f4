"""Builds what a configuration names: the only place that knows concrete models, codecs and rewards."""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.resources import files
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from kvpo.app.held_out import held_out_scorers
from kvpo.app.named_rewards import named_rewards
from kvpo.config import Config, ObjectiveConfig
from kvpo.config_checks import ConfigurationError
from kvpo.engine.generator import PageShape, StreamingGenerator
from kvpo.engine.noise import keyed_generator
from kvpo.engine.scoring import Scorer
from kvpo.files import local_path
from kvpo.method.flow import STEPS, few_step_sigmas
from kvpo.models.adapters import add_adapter, leave_casts_to_autocast
from kvpo.models.causal_wan import CausalWan
from kvpo.models.tensor_files import named_list, read_file
from kvpo.prompts import ClipPrompt, VideoPrompt, cut_notice
from kvpo.rewards.cache import ScoreCache, score_cache
from kvpo.rewards.combined import CombinedScorer
from kvpo.training.evaluation import Judges
from kvpo.training.setup import Backbone, Setup, Weights
from kvpo.world.grammar import words
from kvpo.world.text import TEXT_LENGTH, LearnedTextEncoder, WordTokenizer

logger = logging.getLogger(__name__)

BASE = "generator.safetensors"
SHORT_FRAMES, LONG_FRAMES = 30, 60
"""Held-out videos: one prompt over 10 blocks, three prompts over 20."""
SHORTEST_ACT = 12
"""Frames of the shortest act of a story."""


def streaming_generator(config: Config, transformer: CausalWan) -> StreamingGenerator:
    """The streaming generator of a configuration around a transformer."""
    stream, shape = config.stream, transformer.shape
    autocast = None if config.optim.autocast == "none" else torch.bfloat16
    if autocast is not None:
        leave_casts_to_autocast(transformer)
    return StreamingGenerator(
        transformer=transformer,
        deployment=stream,
        sigmas=tuple(few_step_sigmas(stream.schedule, stream.shift).tolist()),
        step=STEPS[stream.step_rule],
        latent_shape=(shape.channels, shape.latent_height, shape.latent_width),
        pages=PageShape(shape.num_layers, shape.tokens_per_frame, shape.num_heads, shape.head_dim),
        context_noise=stream.context_noise,
        device=config.device,
        autocast=autocast,
        page_dtype=autocast or torch.float32,
    )


def build_scorer(config: Config, frame_rate: float, cache: ScoreCache | None = None) -> tuple[Scorer, Tensor]:
    """The rewards a configuration names as one scorer, and the weights of its components.

    Raises:
        ConfigurationError: an unknown reward or component, weights that add up to nothing.
        ValueError: a part of a reward cannot be found or does not fit; two components of one name.
    """
    settings = config.rewards
    elsewhere = config.evaluation.held_out
    rewards = named_rewards(
        settings.scorers,
        {part: at for part, at in settings.sources.items() if part.rpartition(".")[0] not in elsewhere},
        field="rewards.scorers",
        frame_rate=frame_rate,
        top_share=settings.top_share,
        device=config.device,
        prompts=True,
    )
    scorers = tuple(reward.cached(cache) for reward in rewards)
    scorer = CombinedScorer(scorers) if len(scorers) > 1 else scorers[0]
    if unknown := sorted(set(settings.weights) - set(scorer.components)):
        raise ConfigurationError(
            f"rewards.weights: {unknown[0]!r} is not a component of {', '.join(settings.scorers)}; "
            f"there are {', '.join(scorer.components)}"
        )
    weights = {name: weight for reward in rewards for name, weight in reward.weights.items()}
    weights |= settings.weights
    if sum(weights.values()) <= 0:
        raise ConfigurationError(f"rewards.weights: must add up to more than 0, got {weights}")
    foreign = [own for own in rewards if own.name.partition("@")[0] != "world"]
    say_what_has_no_floor(config, [name for own in foreign for name in own.weights])
    return scorer, torch.tensor([weights[component] for component in scorer.components])


def say_what_has_no_floor(config: Config, components: Sequence[str]) -> None:
    """Warn where the noise floor that was measured for the embedded world stands in for that of a reward."""
    floor, measured = config.objective.noise_floor, config.rewards.noise_floors
    unmeasured = [name for name in components if name not in measured and config.rewards.weights.get(name, 1)]
    if unmeasured and floor == ObjectiveConfig().noise_floor:
        logger.warning(
            "no noise floor was measured for %s: objective.noise_floor = %g is that of the embedded world's "
            "rewards, on another scale; measure one with `kvpo calibrate` (rewards.noise_files) or set it",
            ", ".join(unmeasured),
            floor,
        )


@dataclass(frozen=True)
class UnseenComponent:
    """The unseen scorer in the shape of a scorer with one component."""

    scorer: object
    components: tuple[str, ...] = ("unseen",)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        return {"unseen": self.scorer(video_BTCHW, prompts)}  # type: ignore[operator]


def world_prompts(split: str, count: int, seed: int, first_id: int) -> dict[str, list[VideoPrompt]]:
    """Held-out prompt sets of the embedded world: short and long, all distinct."""
    from kvpo.world.stories import distinct_prompts

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
        from kvpo.world.stories import sample_story, video_prompt

        generator = keyed_generator("training prompts", self.seed, update)
        prompts = []
        for index in range(self.count):
            acts = 1 + index % 3
            story = sample_story(generator, acts, LONG_FRAMES, split="train")
            prompts.append(video_prompt(story, update * self.count + index))
        return prompts


def base_path(config: Config) -> Path:
    """The base checkpoint of a configuration; by default the one that ships with the package."""
    return local_path(config.base or str(files("kvpo.world").joinpath("assets", BASE)), "base")


def load_base(config: Config) -> tuple[CausalWan, LearnedTextEncoder]:
    """The embedded generator of a configuration, frozen.

    Raises:
        ConfigurationError: the file is missing or is no such generator.
        ValueError: it is damaged, holds pickled code, or is of another geometry than ``config.model``.
    """
    from kvpo.world.pretrain import load_generator

    path = base_path(config)
    if not path.is_file():
        raise ConfigurationError(f"base: {path} is no file; `kvpo pretrain --out FILE` writes such a file")
    try:
        read_file(path)
    except ValueError as error:
        raise ValueError(f"base: {error}; `kvpo pretrain --out FILE` writes a good one") from error
    try:
        with safe_open(path, framework="pt") as file:
            saved = json.loads((file.metadata() or {})["generator"])["model"]
    except (SafetensorError, KeyError, ValueError) as error:
        raise ConfigurationError(
            f"base: {path} is not an embedded generator as `kvpo pretrain` writes it"
        ) from error
    here = json.loads(json.dumps(asdict(config.model)))
    different = [f"model.{name} is {saved[name]} there, {here[name]} here" for name in here
                 if saved.get(name, here[name]) != here[name]]  # fmt: skip
    if different:
        raise ConfigurationError(f"base: {path} is of another architecture: {'; '.join(different)}")
    try:
        return load_generator(config.model, path)
    except RuntimeError as error:
        raise ValueError(f"base: the tensors of {path} do not fit the architecture that it names") from error


def build_backbone(config: Config) -> Backbone:
    """The embedded generator with what a configuration trains: a fresh adapter, or all its parameters."""
    from kvpo.world.codec import load_codec

    transformer, text = load_base(config)
    transformer.checkpointing = config.optim.checkpointing
    if config.optim.train == "lora":
        add_adapter(
            transformer,
            config.optim.lora_rank,
            config.optim.lora_alpha,
            config.optim.lora_targets,
            generator=keyed_generator("adapter", config.seed),
        )
    else:
        transformer.requires_grad_(True)
    transformer.to(config.device)
    if config.optim.compile:
        transformer.compile_blocks()
    return Backbone(
        config=config,
        model=transformer,
        base_sha256=hashlib.sha256(base_path(config).read_bytes()).hexdigest(),
        generator=streaming_generator(config, transformer),
        text_encoder=text.to(config.device),
        codec=load_codec().to(config.device),
    )


def world_test_prompts(config: Config) -> dict[str, list[VideoPrompt]]:
    """The embedded world's test prompts."""
    return world_prompts("test", config.evaluation.test_prompts, 202, 20_000_000)


def build_world(config: Config, base: Path | None = None) -> Setup:
    """The embedded world: its generator with a fresh adapter, its codec, prompts and judges."""
    from kvpo.world.unseen import load_unseen

    if base is not None:
        config = replace(config, base=str(base))
    block = config.stream.block
    if SHORT_FRAMES % block or LONG_FRAMES % block or block > SHORTEST_ACT:
        raise ConfigurationError(
            f"stream.block: must divide the {SHORT_FRAMES} and {LONG_FRAMES} frames of the embedded world's "
            f"videos and be no longer than their shortest act of {SHORTEST_ACT}, got {block}"
        )
    backbone = build_backbone(config)
    _, validation, test = split_of(config)
    frame_rate, cache = backbone.codec.frames_per_second, score_cache(config.rewards.cache)
    scorer, weights = build_scorer(config, frame_rate, cache)
    return Setup(
        **vars(backbone),
        judges=Judges(
            backbone.codec,
            scorer,
            weights,
            UnseenComponent(load_unseen()),
            held_out_scorers(config, frame_rate, cache),
        ),
        training_prompts=WorldTrainingPrompts(config.seed, config.optim.prompts_per_update),
        validation=validation,
        test=test,
        scored=cache.counts,
    )


def check_device(config: Config) -> None:
    """Raise ConfigurationError where the configuration's device cannot be used."""
    try:
        torch.empty(0, device=config.device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).splitlines()[0].removesuffix(".")
        raise ConfigurationError(
            f"device: {config.device!r} cannot be used here ({reason}); --device cpu always can"
        ) from error


def build_setup(config: Config) -> Setup:
    """What a configuration aligns: a public generator, or the embedded world."""
    check_device(config)
    if config.backbone.kind == "world":
        return build_world(config)
    from kvpo.app.backbones import build_wan  # its libraries take seconds to import

    return build_wan(config)


def load_backbone(config: Config, prompts: Sequence[VideoPrompt] = ()) -> Backbone:
    """What a configuration generates with, ready for some prompts."""
    check_device(config)
    if config.backbone.kind == "world":
        say_what_is_not_read(prompts)
        return build_backbone(config)
    from kvpo.app.backbones import wan_backbone

    return wan_backbone(config, prompts)


def say_what_is_not_read(prompts: Sequence[VideoPrompt]) -> None:
    """Warn of words that the embedded generator does not know, and of those beyond what it reads."""
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
            len(tokenizer) - 2,  # but padding and the unknown word
        )
    if cut := {text: count for text in texts if (count := len(words(text))) > TEXT_LENGTH}:
        logger.warning("%s", cut_notice(cut, TEXT_LENGTH, len(texts), "words"))


def load_weights(config: Config) -> Weights:
    """The transformer of a configuration with what is trained in it."""
    if config.backbone.kind == "world":
        return build_backbone(config)
    from kvpo.app.backbones import wan_weights

    return wan_weights(config)


Sets = dict[str, list[VideoPrompt]]


def split_of(config: Config) -> tuple[list[VideoPrompt], Sets, Sets]:
    """The training prompts that a file lists (the embedded world draws its own), validation and test sets."""
    if config.backbone.kind == "world":
        validation = config.evaluation.validation_prompts
        return [], world_prompts("validation", validation, 101, 10_000_000), world_test_prompts(config)
    from kvpo.app.backbones import split_prompts

    return split_prompts(config)


def prompt_file(config: Config, location: Path | str) -> Path:
    """Local path of a prompt file, which may also be a hub id. Raises ValueError where it is neither."""
    local = local_path(location, "prompts")
    if local.exists():
        return local
    from kvpo.models.hub import resolve

    try:
        return resolve(location, offline=config.backbone.offline)
    except ValueError as error:
        raise ValueError(f"{location}: no such prompt file ({error})") from error


def default_frames(config: Config) -> int:
    """Latent frames of a video whose length is not given."""
    return SHORT_FRAMES if config.backbone.kind == "world" else config.prompts.frames
