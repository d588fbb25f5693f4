"""Rewards based on CLIP: text similarity (CLIP score, PickScore, HPSv2) and the LAION aesthetic head.

Each scores up to eight frames spread over the clip and averages the best ``top_share`` of the scores.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerBase

from kvpo.models.pretrained import read_tokenizer, strict_pretrained
from kvpo.models.tensor_files import read_tensors, renamed
from kvpo.rewards.catalogue import EIGHT_FRAMES
from kvpo.rewards.images import CLIP_MEAN, CLIP_STD, fit_and_crop, fit_and_pad, standardised
from kvpo.rewards.pretrained import (
    entry_tensors,
    load_strict,
    warn_if_cut,
    without_weights,
)
from kvpo.rewards.sampling import checked_batch, pooled_frames, present_frames, spread_indices

TEXT_TOKENS = 77


def spread_frames(video_TCHW: Tensor) -> Tensor:
    """Pick up to eight frames, evenly spaced from the first to the last."""
    return video_TCHW[spread_indices(len(video_TCHW), 1.0, EIGHT_FRAMES)]


def image_features(model: CLIPModel, frames_NCHW: Tensor, fit: Callable[[Tensor, int], Tensor]) -> Tensor:
    """Unit image features [N, D] in float32."""
    device = model.visual_projection.weight.device
    fitted = fit(frames_NCHW.to(device), model.config.vision_config.image_size)
    pooled = model.vision_model(pixel_values=standardised(fitted, CLIP_MEAN, CLIP_STD)).pooler_output
    return F.normalize(model.visual_projection(pooled), dim=-1)


def text_features(model: CLIPModel, tokenizer: PreTrainedTokenizerBase, text: str, reward: str) -> Tensor:
    """Unit text features [D] in float32; texts beyond CLIP's 77 tokens are cut with a warning."""
    warn_if_cut(tokenizer, text, TEXT_TOKENS, reward)
    ids = tokenizer(text, truncation=True, max_length=TEXT_TOKENS, return_tensors="pt")["input_ids"]
    pooled = model.text_model(input_ids=ids.to(model.text_projection.weight.device)).pooler_output
    return F.normalize(model.text_projection(pooled), dim=-1)[0]


@dataclass(frozen=True)
class SimilarityScorer:
    """Cosine similarity of frames and prompt, times ``scale``."""

    model: CLIPModel
    tokenizer: PreTrainedTokenizerBase
    components: tuple[str, ...]
    fit: Callable[[Tensor, int], Tensor] = fit_and_crop
    scale: float = 1.0
    top_share: float = 1.0

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]."""
        checked_batch(video_BTCHW, prompts, 1)
        # One clip at a time: its score cannot depend on the other clips.
        scores = []
        for video, prompt in zip(video_BTCHW, prompts, strict=True):
            frames = spread_frames(present_frames(video, prompt))
            similarity_N = image_features(self.model, frames, self.fit) @ text_features(
                self.model, self.tokenizer, str(prompt), self.components[0]
            )
            scores.append(self.scale * pooled_frames(similarity_N, self.top_share))
        return {self.components[0]: torch.stack(scores)}

    def features(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Elementwise product of each clip's mean image features and its text features, [B, D].

        The products sum to the mean cosine similarity, so a linear reward on them is a weighted cosine.
        """
        rows = []
        for video, prompt in zip(video_BTCHW, prompts, strict=True):
            frames = spread_frames(present_frames(video, prompt))
            text_D = text_features(self.model, self.tokenizer, str(prompt), self.components[0])
            rows.append(image_features(self.model, frames, self.fit).mean(0) * text_D)
        return torch.stack(rows)


def rating_head(width: int, *, device: str = "meta") -> nn.Sequential:
    """The head of LAION aesthetic and of ImageReward: five linear layers without activations between them."""
    return nn.Sequential(
        nn.Linear(width, 1024, device=device),
        nn.Dropout(0.2),
        nn.Linear(1024, 128, device=device),
        nn.Dropout(0.2),
        nn.Linear(128, 64, device=device),
        nn.Dropout(0.1),
        nn.Linear(64, 16, device=device),
        nn.Linear(16, 1, device=device),
    ).eval()


@dataclass(frozen=True)
class AestheticScorer:
    """LAION aesthetic rating of frames, about 1 to 10; the prompt is ignored."""

    model: CLIPModel
    head: nn.Sequential
    components: tuple[str, ...] = ("aesthetic",)
    top_share: float = 1.0

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]."""
        checked_batch(video_BTCHW, prompts, 1)
        scores = [
            pooled_frames(
                self.head(image_features(self.model, spread_frames(video), fit_and_crop))[:, 0],
                self.top_share,
            )
            for video in video_BTCHW
        ]
        return {"aesthetic": torch.stack(scores)}

    def features(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> Tensor:
        """Mean image feature of each clip's frames, [B, D]."""
        means = [image_features(self.model, spread_frames(v), fit_and_crop).mean(0) for v in video_BTCHW]
        return torch.stack(means)


def _clip(directory: Path, device: str) -> CLIPModel:
    return strict_pretrained(CLIPModel, directory, dtype=torch.float32).to(device)


def load_clip_score(directory: Path, *, device: str = "cpu") -> SimilarityScorer:
    """Load the scorer with the CLIP model in ``directory``. Raises ValueError if weights do not fit."""
    model = _clip(directory, device)
    return SimilarityScorer(model, read_tokenizer(directory), ("clip_score",))


def load_pickscore(directory: Path, base: Path, *, device: str = "cpu") -> SimilarityScorer:
    """Load PickScore (Kirstain et al. 2023): exp(logit_scale) times the cosine, as its authors report it.

    ``base`` holds the tokenizer (laion/CLIP-ViT-H-14-laion2B-s32B-b79K).
    """
    model = _clip(directory, device)
    scale = float(model.logit_scale.exp())
    return SimilarityScorer(model, read_tokenizer(base), ("pickscore",), scale=scale)


def load_hpsv2(checkpoint: Path, base: Path, *, device: str = "cpu") -> SimilarityScorer:
    """Load HPSv2 (Wu et al. 2023): an OpenCLIP ViT-H/14 checkpoint with its weights under "state_dict".

    ``base`` holds the configuration and tokenizer (laion/CLIP-ViT-H-14-laion2B-s32B-b79K).
    """
    weights = entry_tensors(checkpoint, "state_dict")
    model = without_weights(lambda: CLIPModel(CLIPConfig.from_pretrained(base, local_files_only=True)))
    load_strict(model, open_clip_to_transformers(weights), str(checkpoint), device)
    return SimilarityScorer(model, read_tokenizer(base), ("hpsv2",), fit=fit_and_pad)


def load_aesthetic(checkpoint: Path, base: Path, *, device: str = "cpu") -> AestheticScorer:
    """The LAION head (``sac+logos+ava1-l14-linearMSE.pth``, keys ``layers.*``) on CLIP-L/14 in ``base``."""
    model = _clip(base, device)
    head = rating_head(model.config.projection_dim)
    weights = {name.removeprefix("layers."): value for name, value in read_tensors(checkpoint).items()}
    load_strict(head, weights, str(checkpoint), device)
    return AestheticScorer(model, head)


_OUTSIDE = {
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "token_embedding": "text_model.embeddings.token_embedding",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1": "vision_model.embeddings.patch_embedding",
    "ln_final": "text_model.final_layer_norm",
    "visual.ln_pre": "vision_model.pre_layrnorm",
    "visual.ln_post": "vision_model.post_layernorm",
}
_TRANSPOSED = {"text_projection": "text_projection.weight", "visual.proj": "visual_projection.weight"}
_LAYER = re.compile(r"(visual\.)?transformer\.resblocks\.(\d+)\.(.+)")
_IN_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}


def open_clip_to_transformers(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename OpenCLIP weights (``open_clip/transformer.py``) for ``CLIPModel`` and split the joint q, k, v.

    Names without a counterpart are kept, so that the strict check reports them.
    """
    found: dict[str, Tensor] = {}
    for name, value in weights.items():
        layer = _LAYER.fullmatch(name)
        if layer is not None:
            tower = "vision_model" if layer[1] else "text_model"
            prefix = f"{tower}.encoder.layers.{layer[2]}."
            if layer[3] in ("attn.in_proj_weight", "attn.in_proj_bias"):
                kind = layer[3].removeprefix("attn.in_proj_")
                for part, third in zip("qkv", value.chunk(3), strict=True):
                    found[f"{prefix}self_attn.{part}_proj.{kind}"] = third
            else:
                found[prefix + renamed(layer[3], _IN_LAYER)] = value
        elif name in _TRANSPOSED:
            found[_TRANSPOSED[name]] = value.t()
        else:
            found[renamed(name, _OUTSIDE)] = value
    return found
