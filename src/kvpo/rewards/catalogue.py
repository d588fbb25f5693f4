"""Catalogue of rewards by id: their properties, the locations of their parts, and their loaders.

Importing this module is cheap: a reward's own module is imported only when the reward is loaded.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import import_module
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpo.rewards.protocol import Declaration, Sampling

if TYPE_CHECKING:
    from kvpo.rewards.reward import Reward

HD = 1088 * 1920
SD = 640 * 1152
FLOW_PIXELS = 256 * 448
"""Frame area at which motion is measured; larger frames are shrunk to it."""

HPSV3_SAMPLING = Sampling(rate=2.0, least=1, most=32)
VIDEOALIGN_SAMPLING = Sampling(rate=2.0, least=4, most=768, multiple=2)
"""VideoAlign's own rule (``vision_process.py``)."""
VIDEOALIGN = {
    "videoalign_vq": (3.6757, 2.2476),
    "videoalign_mq": (1.1646, 1.3811),
    "videoalign_ta": (2.8105, 2.5121),
}
"""Components with mean and std: score = (logit - mean) / std (``model_config.json``, inference_config)."""
COMPARED = "only differences mean something"
"""Unit of scores that were learned from comparisons."""
EIGHT_FRAMES = Sampling(rate=0.5, least=8, most=8)
SUBJECT_SAMPLING = Sampling(rate=2.0, least=4, most=32, seconds=None)

EVERY_FRAME = Sampling(rate=1000.0, least=2**31, most=2**31, seconds=None)
EIGHT_A_SECOND = Sampling(rate=8.0, least=1, most=2**31, seconds=None, strides=True)


def _vbench(name: str, min_frames: int, sampling: Sampling = EVERY_FRAME) -> Declaration:
    return Declaration(f"vbench_{name}", 0.0, 1.0, False, min_frames, HD, sampling, eight_bit=True)


def _videoalign(name: str) -> Declaration:
    mean, std = VIDEOALIGN[name]
    unit = "in standard deviations from the mean of VideoAlign's data, so that negative is usual; "
    unit += f"its network's output is score * {std} + {mean}"
    return Declaration(name, -inf, inf, True, 2, HD, VIDEOALIGN_SAMPLING, eight_bit=True, unit=unit)


def _frames(name: str, low: float, high: float, reads_prompt: bool = True, unit: str = "") -> Declaration:
    return Declaration(name, low, high, reads_prompt, 1, SD, EIGHT_FRAMES, unit=unit)


_ALL = (
    Declaration("hpsv3", -inf, inf, True, 1, HD, HPSV3_SAMPLING, eight_bit=True, unit=COMPARED),
    *map(_videoalign, VIDEOALIGN),
    _frames("hpsv2", -1.0, 1.0),
    _frames("pickscore", -100.0, 100.0),
    _frames("clip_score", -1.0, 1.0),
    _frames("aesthetic", -inf, inf, reads_prompt=False, unit="a rating, about 1 to 10"),
    _frames("image_reward", -inf, inf, unit=COMPARED),
    _frames("transition_follow", -4.0, 4.0),
    _frames("transition_keep", -1.0, 1.0),
    Declaration("motion_smoothness", 0.0, 1.0, False, 3, FLOW_PIXELS),
    Declaration("dynamic_degree", 0.0, 1.0, False, 2, FLOW_PIXELS),
    Declaration("subject_consistency", -1.0, 1.0, False, 2, SD, SUBJECT_SAMPLING),
    Declaration("flicker", 0.0, 1.0, False, 3, FLOW_PIXELS),
    _vbench("dynamic_degree", 2, EIGHT_A_SECOND),
    _vbench("motion_smoothness", 3),
    _vbench("subject_consistency", 2),
    _vbench("temporal_flickering", 2),
    replace(_vbench("imaging_quality", 1), low=-inf, high=inf, unit="a rating, about 0 to 1"),
)
DECLARATIONS = {declaration.name: declaration for declaration in _ALL}
"""Declarations by reward id, in listing order."""
REWARD_IDS = tuple(DECLARATIONS)


@dataclass(frozen=True)
class Part:
    """A part of a reward: a path or hub id, and the files needed from it."""

    location: str
    """Default location; empty if the user must (or, for an optional part, may) name it."""
    files: tuple[str, ...] = ()
    """File patterns to download from a hub repository; empty downloads everything."""
    required: bool = True


@dataclass(frozen=True)
class Family:
    """Rewards that share one model."""

    ids: tuple[str, ...]
    loader: str
    """``module:function`` below ``kvpo.rewards``. It takes the paths of the parts in order (None for an
    optional part that was not named) and, if there are parts, the device."""
    parts: Mapping[str, Part] = field(default_factory=dict)
    settings: tuple[str, ...] = ()
    """Scorer fields that are set per request: any of components, frame_rate and top_share."""


CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"
CONFIG_AND_TOKENIZER = ("*.json", "merges.txt", "vocab.txt")
TRANSFORMERS_FILES = ("*.json", "merges.txt", "vocab.txt", "*.safetensors")
OPTIONAL = Part("", required=False)
NAMED = Part("")
OF_FRAMES = ("top_share",)
"""Settings of rewards that score single frames and pool the scores over the clip."""

FAMILIES = (
    Family(
        ("hpsv3",),
        "hpsv3:load_hpsv3",
        {
            "weights": Part("MizzenAI/HPSv3/HPSv3.safetensors"),
            "base": Part("Qwen/Qwen2-VL-7B-Instruct", CONFIG_AND_TOKENIZER),
            "template": OPTIONAL,
        },
        OF_FRAMES,
    ),
    Family(
        ("videoalign_vq", "videoalign_mq", "videoalign_ta"),
        "videoalign:load_videoalign",
        {
            "weights": Part("KwaiVGI/VideoReward", ("*/model.pth", "*/tokenizer/*", "*.json")),
            "base": Part("Qwen/Qwen2-VL-2B-Instruct", CONFIG_AND_TOKENIZER),
            "template": OPTIONAL,
        },
        ("components", "frame_rate"),
    ),
    Family(
        ("hpsv2",),
        "clip_family:load_hpsv2",
        {"weights": Part("xswu/HPSv2/HPS_v2.1_compressed.pt"), "base": Part(CLIP_H, CONFIG_AND_TOKENIZER)},
        OF_FRAMES,
    ),
    Family(
        ("pickscore",),
        "clip_family:load_pickscore",
        {
            "weights": Part("yuvalkirstain/PickScore_v1", TRANSFORMERS_FILES),
            "base": Part(CLIP_H, CONFIG_AND_TOKENIZER),
        },
        OF_FRAMES,
    ),
    Family(
        ("clip_score",),
        "clip_family:load_clip_score",
        {"weights": Part(CLIP_L, TRANSFORMERS_FILES)},
        OF_FRAMES,
    ),
    Family(
        ("aesthetic",),
        "clip_family:load_aesthetic",
        {"weights": NAMED, "base": Part(CLIP_L, TRANSFORMERS_FILES)},
        OF_FRAMES,
    ),
    Family(
        ("image_reward",),
        "image_reward:load_image_reward",
        {
            "weights": Part("THUDM/ImageReward/ImageReward.pt"),
            "base": Part("google-bert/bert-base-uncased", CONFIG_AND_TOKENIZER),
        },
        OF_FRAMES,
    ),
    Family(
        ("transition_follow", "transition_keep"),
        "transition:load_transition",
        {"weights": Part(CLIP_L, TRANSFORMERS_FILES)},
        ("components",),
    ),
    Family(
        ("motion_smoothness", "dynamic_degree"),
        "motion:load_motion",
        {"raft": OPTIONAL},
        ("components",),
    ),
    Family(
        ("subject_consistency",),
        "consistency:load_subject_consistency",
        {"weights": Part("facebook/dinov2-base", TRANSFORMERS_FILES)},
        ("frame_rate",),
    ),
    Family(("flicker",), "consistency:FlickerScorer"),
    Family(("vbench_dynamic_degree",), "vbench:load_vbench_dynamic_degree", {"raft": NAMED}, ("frame_rate",)),
    Family(
        ("vbench_motion_smoothness",),
        "vbench:load_vbench_motion_smoothness",
        {"weights": Part("lalala125/AMT/amt-s.pth")},
    ),
    Family(
        ("vbench_subject_consistency",),
        "vbench:load_vbench_subject_consistency",
        {"weights": Part("facebook/dino-vitb16", ("*.json", "*.safetensors", "pytorch_model.bin"))},
    ),
    Family(("vbench_temporal_flickering",), "vbench:load_vbench_temporal_flickering"),
    Family(
        ("vbench_imaging_quality",),
        "vbench:load_vbench_imaging_quality",
        {"weights": Part("chaofengc/IQA-PyTorch-Weights/musiq_spaq_ckpt-358bb6af.pth")},
    ),
)
FRAME_REWARDS = tuple(id for family in FAMILIES if "top_share" in family.settings for id in family.ids)


def load_rewards(
    ids: Sequence[str],
    sources: Mapping[str, str] | None = None,
    *,
    frame_rate: float = 16.0,
    top_share: float = 1.0,
    device: str = "cpu",
) -> "list[Reward]":
    """Load the rewards ``ids``; those that share a model become components of one, named after the first.

    Args:
        sources: locations of parts by ``id.part``: ``{"hpsv3.template": "data_collator_qwen.py"}``.
        frame_rate: frames per second of the clips that will be scored.
        top_share: rewards of single frames average this share of a clip's frames, the best ones.

    Raises:
        ValueError: an id is unknown or repeated, or a part is unknown, cannot be found or does not fit.
    """
    sources = sources or {}
    if unknown := [id for id in ids if id not in REWARD_IDS]:
        raise ValueError(f"unknown reward {unknown[0]!r}; there are {', '.join(REWARD_IDS)}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"rewards are named twice: {', '.join(ids)}")
    wanted: dict[int, list[str]] = {}
    for id in ids:
        wanted.setdefault(next(n for n, family in enumerate(FAMILIES) if id in family.ids), []).append(id)
    parts = [f"{id}.{part}" for n, chosen in wanted.items() for id in chosen for part in FAMILIES[n].parts]
    if strangers := [source for source in sources if source not in parts]:  # before anything is downloaded
        raise ValueError(
            f"source {strangers[0]!r} belongs to no reward that was asked for; "
            f"they have {', '.join(parts) or 'no parts'}"
        )
    located = [(FAMILIES[n], chosen, _paths(FAMILIES[n], chosen, sources)) for n, chosen in wanted.items()]
    given = {"frame_rate": frame_rate, "top_share": top_share}
    return [
        _loaded(family, paths, {"components": tuple(chosen), **given}, device)
        for family, chosen, paths in located
    ]


def _loaded(
    family: Family, paths: Mapping[str, Path | None], given: Mapping[str, Any], device: str
) -> "Reward":
    """Load a family's reward; its version is a digest of its files (large ones sampled) and its settings."""
    from kvpo.models.tensor_files import fingerprint
    from kvpo.rewards.reward import Reward

    module, _, name = family.loader.partition(":")
    load = vars(import_module(f"kvpo.rewards.{module}"))[name]
    scorer = load(*paths.values(), **({"device": device} if family.parts else {}))
    scorer = replace(scorer, **{setting: given[setting] for setting in family.settings})
    ids, found = given["components"], {part: path for part, path in paths.items() if path is not None}
    kind = device.partition(":")[0]
    decisive = [ids, list(found), given["frame_rate"], given["top_share"], kind]
    version = fingerprint(found.values(), json.dumps(decisive))
    return Reward(ids[0], scorer, tuple(DECLARATIONS[id] for id in ids), version)


def _paths(family: Family, ids: Sequence[str], sources: Mapping[str, str]) -> dict[str, Path | None]:
    """Local path of every part, downloaded from the hub if needed."""
    paths: dict[str, Path | None] = {}
    for name, part in family.parts.items():
        given = [sources[key] for id in ids if (key := f"{id}.{name}") in sources]
        location = given[0] if given else part.location
        if not location and part.required:
            raise ValueError(
                f"reward {ids[0]} needs its {name}: give --source {ids[0]}.{name}=PATH "
                f"(in a run: --rewards.sources {ids[0]}.{name}=PATH)"
            )
        if not location:
            paths[name] = None
            continue
        from kvpo.models.hub import resolve_location

        paths[name] = resolve_location(location, patterns=part.files)
    return paths
