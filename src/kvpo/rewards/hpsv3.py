"""HPSv3 (Ma et al. 2025): human preference for single frames, from Qwen2-VL-7B and a ranking head."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig

from kvpo.rewards.pretrained import entry_tensors, filled, read_template
from kvpo.rewards.qwen_reward import (
    IMAGE_PAD,
    Patches,
    QwenReward,
    empty_backbone,
    encode_chat,
    load_weights,
    patchify,
    smart_resize,
    tokenizer_with,
)
from kvpo.rewards.sampling import checked_batch, pooled_frames, present_frames

TOKEN = "<|Reward|>"
TEMPLATE_FILE = "data_collator_qwen.py"
TEMPLATE_SHA256 = "f6ee57479d4e9eee76b49c00dc962e1e696a5a2b3cc32cebd9b1fa76fe27502c"
FRAME_PIXELS = 200_704
FRAMES_PER_PASS = 8
"""Frames of a clip per forward pass."""


def prepared(frame_CHW: Tensor) -> Patches:
    """One frame in [0, 1] -> patches: 8 bits, resized by Pillow's bicubic filter, repeated in time."""
    image = (
        (frame_CHW.detach().float().cpu().clamp(0, 1) * 255).round().to(torch.uint8).movedim(0, -1).numpy()
    )
    height, width = smart_resize(*frame_CHW.shape[-2:], min_pixels=FRAME_PIXELS, max_pixels=FRAME_PIXELS)
    pixels = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC))
    return patchify(torch.from_numpy(pixels.copy()).movedim(-1, 0)[None].float() / 255)


@dataclass(frozen=True)
class HPSv3Scorer:
    """Preference for each frame, averaged over the best ``top_share`` of them."""

    model: QwenReward
    tokenizer: PreTrainedTokenizerBase
    template: str
    top_share: float = 1.0
    components: tuple[str, ...] = ("hpsv3",)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]; ValueError for prompts with reserved tokens."""
        checked_batch(video_BTCHW, prompts, 1)
        scores = []
        for video, prompt in zip(video_BTCHW, prompts, strict=True):
            scores_T = self.frame_scores(present_frames(video, prompt), str(prompt))
            scores.append(pooled_frames(scores_T, self.top_share))
        return {"hpsv3": torch.stack(scores)}

    def frame_scores(self, video_TCHW: Tensor, prompt: str) -> Tensor:
        """Score each frame of one clip, [T]; the uncertainty that the head also predicts is not used."""
        text = filled(self.template, prompt)
        scores = []
        for frames in video_TCHW.split(FRAMES_PER_PASS):
            media = [prepared(frame) for frame in frames]
            ids_L, places = encode_chat(self.tokenizer, text, IMAGE_PAD, media[0].num_tokens, (TOKEN,))
            scores.append(self.model(ids_L.expand(len(media), -1), media, IMAGE_PAD, places)[:, 0, 0])
        return torch.cat(scores)


def empty_model(config: Qwen2VLConfig, vocabulary: int, hidden: tuple[int, int] = (1024, 16)) -> QwenReward:
    """Build HPSv3's network without weights; checkpoints number the head's layers 0, 3, 5."""
    backbone = empty_backbone(config, vocabulary)
    first, second = hidden
    head = nn.Sequential(
        nn.Linear(config.text_config.hidden_size, first, device="meta"),
        nn.ReLU(),
        nn.Dropout(0.05),
        nn.Linear(first, second, device="meta"),
        nn.ReLU(),
        nn.Linear(second, 2, device="meta"),
    )
    return QwenReward(backbone, head).eval().requires_grad_(False)


def load_hpsv3(
    checkpoint: Path,
    base: Path,
    template: Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> HPSv3Scorer:
    """Load the released ``HPSv3.safetensors``; the head stays in float32.

    Args:
        base: directory with Qwen2-VL-7B-Instruct's configuration and tokenizer (its weights are not needed).
        template: HPSv3's ``dataset/data_collator_qwen.py``; by default, the one next to ``checkpoint``.

    Raises:
        ValueError: a part is missing, weights do not fit, or the template is not the one used in training.
    """
    text = read_template(template or checkpoint.parent / TEMPLATE_FILE, TEMPLATE_SHA256, parts=2)
    tokenizer = tokenizer_with(base, (TOKEN,))
    model = empty_model(Qwen2VLConfig.from_pretrained(base), len(tokenizer))
    load_weights(
        model,
        entry_tensors(checkpoint, "model"),
        str(checkpoint),
        device=device,
        dtype=dtype,
        head_dtype=torch.float32,
    )
    return HPSv3Scorer(model, tokenizer, text)
