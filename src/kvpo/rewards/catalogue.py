"""Every reward by its id: what it is, where its parts come from, and how it is built.

Importing this module imports nothing heavy; each reward's own module is imported when it is built.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from kvpo.rewards.declarations import DECLARATIONS
from kvpo.rewards.protocol import Scorer

CLIP_H = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
CLIP_L = "openai/clip-vit-large-patch14"
CONFIG_AND_TOKENIZER = ("*.json", "merges.txt", "vocab.txt")
TRANSFORMERS_FILES = ("*.json", "merges.txt", "vocab.txt", "*.safetensors")


@dataclass(frozen=True)
class Part:
    """Something a reward is made of: a path or hub id, and which files of it are needed."""

    location: str
    """Default location; empty if the user must, or may, name it."""
    files: tuple[str, ...] = ()
    """File patterns to download of a hub repository; empty takes all."""
    required: bool = True


@dataclass(frozen=True)
class Family:
    """Rewards that come out of one model."""

    ids: tuple[str, ...]
    build: Callable[["Request"], Scorer]
    parts: Mapping[str, Part] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """A request to a family for some of its rewards."""

    ids: tuple[str, ...]
    paths: Mapping[str, Path | None]
    """Local path of every part; None for an optional one that was not named."""
    frame_rate: float
    """Frames per second of the clips that will be scored."""
    top_share: float
    """Share of a clip's frames, the best ones, that rewards of single frames average."""
    device: str

    def path(self, part: str) -> Path:
        """The path of a required part."""
        path = self.paths[part]
        assert path is not None, part
        return path

    def version(self) -> str:
        """Digest of what else than the code decides the scores: files (large ones sampled), settings."""
        from kvpo.models.tensor_files import fingerprint

        given = {part: path for part, path in self.paths.items() if path is not None}
        device = self.device.partition(":")[0]
        settings = [self.ids, list(given), self.frame_rate, self.top_share, device]
        return fingerprint(given.values(), json.dumps(settings))


def _hpsv3(request: Request) -> Scorer:
    from kvpo.rewards.hpsv3 import load_hpsv3

    scorer = load_hpsv3(
        request.path("weights"), request.path("base"), request.paths["template"], device=request.device
    )
    return replace(scorer, top_share=request.top_share)


def _videoalign(request: Request) -> Scorer:
    from kvpo.rewards.videoalign import load_videoalign

    return load_videoalign(
        request.path("weights"),
        request.path("base"),
        request.paths["template"],
        components=request.ids,
        frame_rate=request.frame_rate,
        device=request.device,
    )


def _hpsv2(request: Request) -> Scorer:
    from kvpo.rewards.clip_family import load_hpsv2

    scorer = load_hpsv2(request.path("weights"), request.path("base"), device=request.device)
    return replace(scorer, top_share=request.top_share)


def _pickscore(request: Request) -> Scorer:
    from kvpo.rewards.clip_family import load_pickscore

    scorer = load_pickscore(request.path("weights"), request.path("base"), device=request.device)
    return replace(scorer, top_share=request.top_share)


def _clip_score(request: Request) -> Scorer:
    from kvpo.rewards.clip_family import load_clip_score

    scorer = load_clip_score(request.path("weights"), device=request.device)
    return replace(scorer, top_share=request.top_share)


def _aesthetic(request: Request) -> Scorer:
    from kvpo.rewards.clip_family import load_aesthetic

    scorer = load_aesthetic(request.path("weights"), request.path("base"), device=request.device)
    return replace(scorer, top_share=request.top_share)


def _image_reward(request: Request) -> Scorer:
    from kvpo.rewards.image_reward import load_image_reward

    scorer = load_image_reward(request.path("weights"), request.path("base"), device=request.device)
    return replace(scorer, top_share=request.top_share)


def _motion(request: Request) -> Scorer:
    from kvpo.rewards.motion import MotionScorer, dis_flow

    if request.paths["raft"] is None:
        return MotionScorer(request.ids, dis_flow)
    from kvpo.rewards.raft import load_raft

    return MotionScorer(request.ids, load_raft(request.path("raft"), request.device))


def _subject_consistency(request: Request) -> Scorer:
    from kvpo.rewards.consistency import load_subject_consistency

    return load_subject_consistency(
        request.path("weights"), frame_rate=request.frame_rate, device=request.device
    )


def _flicker(request: Request) -> Scorer:
    from kvpo.rewards.consistency import FlickerScorer

    return FlickerScorer()


OPTIONAL = Part("", required=False)
NAMED = Part("")

FAMILIES = (
    Family(
        ("hpsv3",),
        _hpsv3,
        {
            "weights": Part("MizzenAI/HPSv3/HPSv3.safetensors"),
            "base": Part("Qwen/Qwen2-VL-7B-Instruct", CONFIG_AND_TOKENIZER),
            "template": OPTIONAL,
        },
    ),
    Family(
        ("videoalign_vq", "videoalign_mq", "videoalign_ta"),
        _videoalign,
        {
            "weights": Part("KwaiVGI/VideoReward", ("*/model.pth", "*/tokenizer/*", "*.json")),
            "base": Part("Qwen/Qwen2-VL-2B-Instruct", CONFIG_AND_TOKENIZER),
            "template": OPTIONAL,
        },
    ),
    Family(
        ("hpsv2",),
        _hpsv2,
        {"weights": Part("xswu/HPSv2/HPS_v2.1_compressed.pt"), "base": Part(CLIP_H, CONFIG_AND_TOKENIZER)},
    ),
    Family(
        ("pickscore",),
        _pickscore,
        {
            "weights": Part("yuvalkirstain/PickScore_v1", TRANSFORMERS_FILES),
            "base": Part(CLIP_H, CONFIG_AND_TOKENIZER),
        },
    ),
    Family(("clip_score",), _clip_score, {"weights": Part(CLIP_L, TRANSFORMERS_FILES)}),
    Family(("aesthetic",), _aesthetic, {"weights": NAMED, "base": Part(CLIP_L, TRANSFORMERS_FILES)}),
    Family(
        ("image_reward",),
        _image_reward,
        {
            "weights": Part("THUDM/ImageReward/ImageReward.pt"),
            "base": Part("google-bert/bert-base-uncased", CONFIG_AND_TOKENIZER),
        },
    ),
    Family(("motion_smoothness", "dynamic_degree"), _motion, {"raft": OPTIONAL}),
    Family(
        ("subject_consistency",),
        _subject_consistency,
        {"weights": Part("facebook/dinov2-base", TRANSFORMERS_FILES)},
    ),
    Family(("flicker",), _flicker),
)
REWARD_IDS = tuple(DECLARATIONS)
FRAME_REWARDS = ("hpsv3", "hpsv2", "pickscore", "clip_score", "aesthetic", "image_reward")
"""Rewards of single frames, pooled over the clip."""


def requested(
    ids: Sequence[str],
    sources: Mapping[str, str] | None = None,
    *,
    frame_rate: float = 16.0,
    top_share: float = 1.0,
    device: str = "cpu",
) -> list[tuple[Family, Request]]:
    """Requests for the rewards ``ids``; those that share a model come out of one scorer.

    Args:
        sources: where parts are, by ``id.part``: ``{"hpsv3.template": "data_collator_qwen.py"}``.
        frame_rate: frames per second of the clips that will be scored.
        top_share: share of a clip's frames, the best ones, that rewards of single frames average.

    Raises:
        ValueError: unknown or repeated id, unknown part, a part that cannot be found or does not fit.
    """
    sources = dict(sources or {})
    if unknown := [id for id in ids if id not in REWARD_IDS]:
        raise ValueError(f"unknown reward {unknown[0]!r}; there are {', '.join(REWARD_IDS)}")
    if len(set(ids)) < len(ids):
        raise ValueError(f"rewards are named twice: {', '.join(ids)}")
    wanted: dict[int, list[str]] = {}
    for id in ids:
        wanted.setdefault(next(n for n, family in enumerate(FAMILIES) if id in family.ids), []).append(id)
    requests = []
    for n, chosen in wanted.items():
        paths = _paths(FAMILIES[n], chosen, sources)
        requests.append((FAMILIES[n], Request(tuple(chosen), paths, frame_rate, top_share, device)))
    if sources:
        known = [
            f"{id}.{part}" for family, request in requests for id in request.ids for part in family.parts
        ]
        raise ValueError(
            f"source {next(iter(sources))!r} belongs to no reward that was asked for; "
            f"they have {', '.join(known) or 'no parts'}"
        )
    return requests


def _paths(family: Family, ids: Sequence[str], sources: dict[str, str]) -> dict[str, Path | None]:
    """Local path of every part, downloaded if it is on the hub; takes what it uses out of ``sources``."""
    paths: dict[str, Path | None] = {}
    for name, part in family.parts.items():
        given = [sources.pop(key) for id in ids if (key := f"{id}.{name}") in sources]
        location = given[0] if given else part.location
        if not location and part.required:
            raise ValueError(
                f"reward {ids[0]} needs its {name}: say where they are with {ids[0]}.{name}=PATH"
            )
        if not location:
            paths[name] = None
            continue
        from kvpo.models.hub import resolve

        paths[name] = resolve(location, patterns=part.files)
    return paths
