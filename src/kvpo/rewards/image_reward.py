"""ImageReward (Xu et al. 2023): human preference for single frames, from BLIP and a rating head."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.models.blip.configuration_blip import BlipTextConfig, BlipVisionConfig
from transformers.models.blip.modeling_blip import BlipVisionModel
from transformers.models.blip.modeling_blip_text import BlipTextModel

from kvpo.models.pretrained import read_tokenizer
from kvpo.models.tensor_files import read_tensors
from kvpo.rewards.clip_family import rating_head, spread_frames
from kvpo.rewards.images import CLIP_MEAN, CLIP_STD, fit_and_crop, standardised
from kvpo.rewards.pretrained import load_strict, rename_keys, warn_if_cut, without_weights
from kvpo.rewards.sampling import checked_batch, pooled_frames, present_frames

TEXT_TOKENS = 35
MEAN, STD = 0.16717362830052426, 1.0333394966054072
"""Score = (rating - mean) / std (``ImageReward/ImageReward.py``)."""

VISION = BlipVisionConfig(
    hidden_size=1024,
    intermediate_size=4096,
    num_hidden_layers=24,
    num_attention_heads=16,
    image_size=224,
    patch_size=16,
    layer_norm_eps=1e-6,
)
"""BLIP's large vision tower (a timm ViT-L/16)."""
TEXT = BlipTextConfig(
    vocab_size=30_524,
    hidden_size=768,
    encoder_hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=12,
    num_attention_heads=12,
    is_decoder=True,
)
"""BERT-base with cross-attention to the image, which transformers adds only to decoders."""


class BlipRating(nn.Module):
    """BLIP's vision and text towers, with a rating head on the first text token."""

    def __init__(self, vision: BlipVisionConfig, text: BlipTextConfig) -> None:
        super().__init__()
        self.vision = BlipVisionModel(vision)
        self.text = BlipTextModel(text, add_pooling_layer=False)
        self.head = rating_head(text.hidden_size, device="cpu")

    def forward(self, pixels_NCHW: Tensor, ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
        """Normalised frames and their text -> rating [N] in float32."""
        image_NPD = self.vision(pixel_values=pixels_NCHW).last_hidden_state
        hidden_NLD = self.text(
            input_ids=ids_NL,
            attention_mask=mask_NL,
            encoder_hidden_states=image_NPD,
            encoder_attention_mask=torch.ones(image_NPD.shape[:2], dtype=torch.long, device=ids_NL.device),
        ).last_hidden_state
        return self.head(hidden_NLD[:, 0])[:, 0]


@dataclass(frozen=True)
class ImageRewardScorer:
    """Preference for up to eight frames spread over the clip, averaged over the best ``top_share``."""

    model: BlipRating
    tokenizer: PreTrainedTokenizerBase
    components: tuple[str, ...] = ("image_reward",)
    top_share: float = 1.0

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]."""
        checked_batch(video_BTCHW, prompts, 1)
        # One clip at a time: its score cannot depend on the other clips.
        scores = [self._score(v, prompt) for v, prompt in zip(video_BTCHW, prompts, strict=True)]
        return {"image_reward": torch.stack(scores)}

    def _score(self, video_TCHW: Tensor, prompt: str) -> Tensor:
        device = self.model.vision.embeddings.patch_embedding.weight.device
        frames = spread_frames(present_frames(video_TCHW, prompt)).to(device)
        fitted = fit_and_crop(frames, self.model.vision.config.image_size)
        warn_if_cut(self.tokenizer, str(prompt), TEXT_TOKENS, self.components[0])
        text = self.tokenizer(
            str(prompt), padding="max_length", truncation=True, max_length=TEXT_TOKENS, return_tensors="pt"
        ).to(device)
        ids_NL, mask_NL = (text[key].expand(len(frames), -1) for key in ("input_ids", "attention_mask"))
        rating_N = self.model(standardised(fitted, CLIP_MEAN, CLIP_STD), ids_NL, mask_NL)
        return (pooled_frames(rating_N, self.top_share) - MEAN) / STD


_VISION = (
    (r"^blip\.visual_encoder\.cls_token$", "vision.embeddings.class_embedding"),
    (r"^blip\.visual_encoder\.pos_embed$", "vision.embeddings.position_embedding"),
    (r"^blip\.visual_encoder\.patch_embed\.proj\.", "vision.embeddings.patch_embedding."),
    (r"^blip\.visual_encoder\.norm\.", "vision.post_layernorm."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.norm([12])\.", r"vision.encoder.layers.\1.layer_norm\2."),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.qkv\.", r"vision.encoder.layers.\1.self_attn.qkv."),
    (
        r"^blip\.visual_encoder\.blocks\.(\d+)\.attn\.proj\.",
        r"vision.encoder.layers.\1.self_attn.projection.",
    ),
    (r"^blip\.visual_encoder\.blocks\.(\d+)\.mlp\.", r"vision.encoder.layers.\1.mlp."),
    (r"^blip\.text_encoder\.", "text."),
    (r"^mlp\.layers\.", "head."),
)
"""Names in ``ImageReward.pt`` -> names in ``BlipRating``."""


def released_to_ours(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a released checkpoint's keys and drop position indices, which the model computes itself."""
    return rename_keys(weights, _VISION, left_out=r"position_ids$")


def load_image_reward(
    checkpoint: Path,
    base: Path,
    *,
    device: str = "cpu",
    vision: BlipVisionConfig = VISION,
    text: BlipTextConfig = TEXT,
) -> ImageRewardScorer:
    """Load the released ``ImageReward.pt``; ``base`` holds the tokenizer (bert-base-uncased).

    Raises:
        ValueError: there is no tokenizer, or keys (named) are missing, unexpected or misshapen.
    """
    model = without_weights(lambda: BlipRating(vision, text))
    weights = released_to_ours(read_tensors(checkpoint))
    load_strict(model, weights, str(checkpoint), device)
    return ImageRewardScorer(model, read_tokenizer(base))
