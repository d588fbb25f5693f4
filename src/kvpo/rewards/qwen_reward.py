"""Common parts of the rewards built on Qwen2-VL: pixels to patches, chat to tokens, hidden states to scores.

Axes: N frames, P patches, L tokens, D hidden width.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase, Qwen2VLConfig, Qwen2VLModel

from kvpo.files import named_list
from kvpo.models.pretrained import read_tokenizer
from kvpo.models.tensor_files import assign_tensors, check_tensors, renamed, shapes_of
from kvpo.rewards.images import CLIP_MEAN, CLIP_STD, standardised
from kvpo.rewards.pretrained import without_weights

PATCH = 14
TEMPORAL_PATCH = 2
MERGE = 2
FACTOR = PATCH * MERGE
"""Sides of a frame are multiples of this: one token covers FACTOR x FACTOR pixels of two frames."""

IMAGE_PAD = "<|image_pad|>"
VIDEO_PAD = "<|video_pad|>"


def smart_resize(height: int, width: int, *, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """(height, width) in multiples of FACTOR with an area between the bounds, if the proportions allow it.

    Qwen2-VL's rule: round each side. If the area is too large, scale by sqrt(max / area) and round down; if
    too small, scale by sqrt(min / area) and round up.
    """
    rounded = [round(side / FACTOR) * FACTOR for side in (height, width)]
    if rounded[0] * rounded[1] > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rounded = [max(FACTOR, math.floor(side / shrink / FACTOR) * FACTOR) for side in (height, width)]
    elif rounded[0] * rounded[1] < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rounded = [math.ceil(side * grow / FACTOR) * FACTOR for side in (height, width)]
    return rounded[0], rounded[1]


@dataclass(frozen=True)
class Patches:
    """Pixels of one video or image as the vision tower reads them."""

    pixels_PD: Tensor
    grid: tuple[int, int, int]
    """Patches in time, height and width."""

    @property
    def num_tokens(self) -> int:
        frames, rows, columns = self.grid
        return frames * rows * columns // MERGE**2


def patchify(frames_NCHW: Tensor) -> Patches:
    """Split frames in [0, 1] into patches; sides must be multiples of FACTOR, an odd last frame is repeated.

    Order, as in transformers' Qwen2-VL image processor: pairs of frames, then 2 x 2 groups of patches row by
    row, then the patches of a group. Order within a patch: colour, frame, row, column.
    """
    frames = standardised(frames_NCHW.float(), CLIP_MEAN, CLIP_STD)
    if len(frames) % TEMPORAL_PATCH:
        frames = torch.cat([frames, frames[-1:]])
    count, colours, height, width = frames.shape
    grid = (count // TEMPORAL_PATCH, height // PATCH, width // PATCH)
    split = frames.reshape(
        grid[0], TEMPORAL_PATCH, colours, grid[1] // MERGE, MERGE, PATCH, grid[2] // MERGE, MERGE, PATCH
    )
    return Patches(split.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(math.prod(grid), -1), grid)


def chat(pad: str, num_tokens: int, text: str) -> str:
    """One user turn, the medium first, in Qwen2-VL's chat format with its default system message."""
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
        f"<|vision_start|>{pad * num_tokens}<|vision_end|>{text}<|im_end|>\n<|im_start|>assistant\n"
    )


class QwenReward(nn.Module):
    """Qwen2-VL with a reward head on its hidden states in place of the vocabulary head."""

    def __init__(self, backbone: Qwen2VLModel, head: nn.Module) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = head

    def forward(self, ids_BL: Tensor, media: Sequence[Patches], pad: str, read: Sequence[int]) -> Tensor:
        """Head outputs [B, len(read), outputs] in float32 at token positions ``read``, one medium per row.

        All rows have the same length, so nothing is padded and no row's result depends on the others.
        """
        tower = self.backbone.visual.patch_embed.proj.weight
        pixels_PD = torch.cat([m.pixels_PD for m in media]).to(tower.device, tower.dtype)
        grid_B3 = torch.tensor([m.grid for m in media], device=tower.device)
        names = (
            ("pixel_values", "image_grid_thw")
            if pad == IMAGE_PAD
            else ("pixel_values_videos", "video_grid_thw")
        )
        ids_BL = ids_BL.to(tower.device)
        # The rewards were trained with sequential positions in all three rows of M-RoPE; by default
        # transformers would place image tokens on a grid.
        positions_3BL = torch.arange(ids_BL.shape[1], device=tower.device).expand(3, *ids_BL.shape)
        hidden_BLD = self.backbone(
            input_ids=ids_BL,
            attention_mask=torch.ones_like(ids_BL),
            position_ids=positions_3BL,
            use_cache=False,
            **dict(zip(names, (pixels_PD, grid_B3), strict=True)),
        ).last_hidden_state
        chosen_BRD = hidden_BLD[:, list(read)]
        return self.head(chosen_BRD.to(next(self.head.parameters()).dtype)).float()


def empty_backbone(config: Qwen2VLConfig, vocabulary: int) -> Qwen2VLModel:
    """Build Qwen2-VL from a configuration, with ``vocabulary`` embedding rows and without weights."""
    config.text_config.vocab_size = vocabulary
    return without_weights(lambda: Qwen2VLModel(config))


def backbone_keys(names: Iterable[str], source: str) -> dict[str, str]:
    """Names in a checkpoint of transformers < 4.52 -> names in ``QwenReward``.

    ``visual.*`` -> ``backbone.visual.*``, ``model.*`` -> ``backbone.language_model.*``,
    ``rm_head.*`` -> ``head.*``; the vocabulary head ``lm_head.weight`` is not used.

    Raises:
        ValueError: keys (named) have another prefix.
    """
    parts = {"visual": "backbone.visual", "model": "backbone.language_model", "rm_head": "head"}
    found = {name: renamed(name, parts) for name in names if name != "lm_head.weight"}
    if strange := [name for name, new in found.items() if new == name]:
        raise ValueError(f"{source}: keys that belong to no part of the model: {named_list(strange)}")
    return found


def load_weights(
    model: QwenReward,
    weights: Mapping[str, Tensor],
    source: str,
    *,
    device: str,
    dtype: torch.dtype,
    head_dtype: torch.dtype,
) -> None:
    """Load a released checkpoint's weights into ``model``, renamed by ``backbone_keys``.

    Raises:
        ValueError: keys (named) are missing, unexpected or misshapen.
    """
    named = {new: weights[old] for old, new in backbone_keys(weights, source).items()}
    check_tensors(named, shapes_of(model.state_dict()), source)
    for part, kind in (("backbone", dtype), ("head", head_dtype)):
        own = {n.removeprefix(f"{part}."): v for n, v in named.items() if n.startswith(f"{part}.")}
        assign_tensors(model.get_submodule(part), own, source, device=device, dtype=kind)
    model.to(device).requires_grad_(False)


def tokenizer_with(directory: Path, tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """Read the tokenizer in ``directory`` and add each of ``tokens`` that it lacks as a special token.

    Raises:
        ValueError: there is no tokenizer, or one of another family.
    """
    tokenizer = read_tokenizer(directory)
    vocabulary = tokenizer.get_vocab()
    if absent := [token for token in (IMAGE_PAD, VIDEO_PAD, "<|im_start|>") if token not in vocabulary]:
        raise ValueError(f"{directory}: not a Qwen2-VL tokenizer, it lacks {', '.join(absent)}")
    if new := [token for token in tokens if token not in vocabulary]:
        tokenizer.add_tokens(new, special_tokens=True)
    return tokenizer


def encode_chat(
    tokenizer: PreTrainedTokenizerBase, text: str, pad: str, num_tokens: int, tokens: Sequence[str]
) -> tuple[Tensor, list[int]]:
    """Token ids [L] of a chat turn, and the position of each of ``tokens``.

    Raises:
        ValueError: a reward token or a media token occurs too often or too rarely, for example because the
            prompt contains one; this would shift the position at which the score is read.
    """
    ids = tokenizer(chat(pad, num_tokens, text), add_special_tokens=False)["input_ids"]
    places = []
    for token in tokens:
        found = [i for i, id in enumerate(ids) if id == tokenizer.convert_tokens_to_ids(token)]
        if len(found) != 1:
            raise ValueError(
                f"the text holds {token} {len(found)} times, it must be there once: {text[:80]!r}"
            )
        places.append(found[0])
    for medium in (IMAGE_PAD, VIDEO_PAD):
        if ids.count(tokenizer.convert_tokens_to_ids(medium)) != num_tokens * (medium == pad):
            raise ValueError(f"the prompt contains the token {medium}: remove it")
    return torch.tensor(ids), places
