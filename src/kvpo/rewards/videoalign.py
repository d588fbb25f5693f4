"""VideoAlign / VideoReward (Liu et al. 2025): visual quality, motion quality and text alignment of a video.

Qwen2-VL-2B with LoRA; one scalar head without bias, read at three reward tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig

from kvpo.models.tensor_files import read_tensors
from kvpo.rewards.catalogue import VIDEOALIGN, VIDEOALIGN_SAMPLING
from kvpo.rewards.images import luminance, resized
from kvpo.rewards.pretrained import filled, read_template
from kvpo.rewards.qwen_reward import (
    VIDEO_PAD,
    Patches,
    QwenReward,
    empty_backbone,
    encode_chat,
    load_weights,
    patchify,
    smart_resize,
    tokenizer_with,
)
from kvpo.rewards.sampling import checked_batch, present_frames, spread_indices

TOKENS = ("<|VQ_reward|>", "<|MQ_reward|>", "<|TA_reward|>")
COMPONENTS = tuple(VIDEOALIGN)
MEAN, STD = zip(*VIDEOALIGN.values(), strict=True)
TEMPLATE_FILE = "prompt_template.py"
TEMPLATE_SHA256 = "fdb6309bac618dd0c8b1b589d3a0970a974f7856eecbb355a190b2dce54af700"
MIN_PIXELS, MAX_PIXELS = 100_352, 200_704
LORA_RANK, LORA_ALPHA = 64, 128
ADAPTED_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Every linear layer of the language model; the vision tower and the embedding carry no adapter."""


def prepared(video_TCHW: Tensor) -> Patches:
    """Sampled frames in [0, 1] -> patches: 8 bits, resized to at most 200,704 pixels, rounded again."""
    size = smart_resize(*video_TCHW.shape[-2:], min_pixels=MIN_PIXELS, max_pixels=MAX_PIXELS)
    return patchify(_bytes(resized(_bytes(video_TCHW.float()), *size)))


def _bytes(frames: Tensor) -> Tensor:
    return (frames.clamp(0, 1) * 255).round() / 255


def grey(video_TCHW: Tensor) -> Tensor:
    """Rec. 601 luminance in all three channels: motion quality is judged without colour."""
    return luminance(video_TCHW)[:, None].expand(-1, 3, -1, -1)


@dataclass(frozen=True)
class VideoAlignScorer:
    """The three scores, or some of them; VQ and TA see colour frames, MQ grey ones."""

    model: QwenReward
    tokenizer: PreTrainedTokenizerBase
    template: str
    components: tuple[str, ...] = COMPONENTS
    frame_rate: float = 16.0
    """Frames per second of the clips."""

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Component -> [B]; ValueError for clips of fewer than 2 frames or prompts with reserved tokens."""
        checked_batch(video_BTCHW, prompts, 2)
        rows = [self._score(video, prompt) for video, prompt in zip(video_BTCHW, prompts, strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in self.components}

    def _score(self, video_TCHW: Tensor, prompt: str) -> dict[str, Tensor]:
        """Score one clip alone, its colour and grey versions as a batch: other clips cannot affect it."""
        video_TCHW = present_frames(video_TCHW, prompt).float()
        sampled = spread_indices(len(video_TCHW), self.frame_rate, VIDEOALIGN_SAMPLING)
        video_TCHW = _bytes(video_TCHW[sampled])  # the release computes grey from 8-bit files
        versions = []
        if {COMPONENTS[0], COMPONENTS[2]} & set(self.components):
            versions.append(prepared(video_TCHW))
        if COMPONENTS[1] in self.components:
            versions.append(prepared(grey(video_TCHW)))
        text = filled(self.template, str(prompt))
        ids_L, places = encode_chat(self.tokenizer, text, VIDEO_PAD, versions[0].num_tokens, TOKENS)
        logits_V3 = self.model(ids_L.expand(len(versions), -1), versions, VIDEO_PAD, places)[..., 0]
        rows = (0, len(versions) - 1, 0)
        return {
            name: (logits_V3[row, i] - MEAN[i]) / STD[i]
            for i, (name, row) in enumerate(zip(COMPONENTS, rows, strict=True))
            if name in self.components
        }


def empty_model(
    config: Qwen2VLConfig, vocabulary: int, *, rank: int = LORA_RANK, alpha: int = LORA_ALPHA
) -> QwenReward:
    """Build VideoAlign's network with its adapter, without weights."""
    backbone = empty_backbone(config, vocabulary)
    adapter = LoraConfig(r=rank, lora_alpha=alpha, lora_dropout=0.0, target_modules=list(ADAPTED_LAYERS))
    inject_adapter_in_model(adapter, backbone.language_model, low_cpu_mem_usage=True)
    head = nn.Linear(config.text_config.hidden_size, 1, bias=False, device="meta")
    return QwenReward(backbone, head).eval().requires_grad_(False)


def load_videoalign(
    checkpoint: Path,
    base: Path,
    template: Path | None = None,
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> VideoAlignScorer:
    """Load the release: a directory with ``checkpoint-*/model.pth`` and ``checkpoint-*/tokenizer``.

    Args:
        base: directory with the configuration of Qwen2-VL-2B-Instruct (its weights are not needed).
        template: VideoAlign's ``prompt_template.py``; by default, the one in ``checkpoint``.

    Raises:
        ValueError: a part is missing, weights do not fit, or the template is not the one used in training.
    """
    found = sorted(checkpoint.glob("checkpoint-*/model.pth")) or sorted(checkpoint.glob("model.pth"))
    if not found:
        raise ValueError(
            f"{checkpoint}: no checkpoint-*/model.pth; give the directory of the VideoReward release "
            "(adapter files without model.pth are not supported)"
        )
    weights_file = found[-1]
    text = read_template(template or checkpoint / TEMPLATE_FILE, TEMPLATE_SHA256)
    tokenizer = tokenizer_with(weights_file.parent / "tokenizer", TOKENS)
    model = empty_model(Qwen2VLConfig.from_pretrained(base), len(tokenizer))
    load_weights(
        model,
        checkpoint_weights(weights_file),
        str(weights_file),
        device=device,
        dtype=dtype,
        head_dtype=dtype,
    )
    return VideoAlignScorer(model, tokenizer, text)


def checkpoint_weights(path: Path) -> dict[str, Tensor]:
    """Read the PEFT state dict of a ``model.pth``, without the ``base_model.model.`` prefix of its keys."""
    return {name.removeprefix("base_model.model."): value for name, value in read_tensors(path).items()}
