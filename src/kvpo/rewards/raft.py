"""Optical flow by RAFT (Teed and Deng 2020) through torchvision, an optional package."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kvpo.models.finite import require_finite_weights
from kvpo.models.tensor_files import check_tensors, read_tensors, shapes_of
from kvpo.rewards.pretrained import rename_keys

PAIRS = 8
"""Pairs of frames per forward pass."""
UPDATES = 12
"""Refinements of the flow, as in torchvision and in RAFT's training."""

_OFFICIAL = (
    (r"^module\.", ""),
    (r"^fnet\.", "feature_encoder."),
    (r"^cnet\.", "context_encoder."),
    (r"_encoder\.conv1\.", "_encoder.convnormrelu.0."),
    (r"_encoder\.norm1\.", "_encoder.convnormrelu.1."),
    (r"_encoder\.conv2\.", "_encoder.conv."),
    (r"(layer\d\.\d)\.conv(\d)\.", r"\1.convnormrelu\2.0."),
    (r"(layer\d\.\d)\.norm(\d)\.", r"\1.convnormrelu\2.1."),
    (r"update_block\.encoder\.convc(\d)\.", r"update_block.motion_encoder.convcorr\1.0."),
    (r"update_block\.encoder\.convf(\d)\.", r"update_block.motion_encoder.convflow\1.0."),
    (r"update_block\.encoder\.conv\.", "update_block.motion_encoder.conv.0."),
    (r"update_block\.gru\.conv([zrq])(\d)\.", r"update_block.recurrent_block.convgru\2.conv\1."),
    (r"update_block\.mask\.0\.", "mask_predictor.convrelu.0."),
    (r"update_block\.mask\.2\.", "mask_predictor.conv."),
)
"""Names in the authors' releases (raft-things.pth) -> torchvision's ``raft_large``."""


def official_to_torchvision(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename the authors' keys; ``norm3`` of a residual block is its ``downsample.1`` under a second name."""
    return rename_keys(weights, _OFFICIAL, left_out=r"layer\d\.\d\.norm3\.")


@dataclass(frozen=True)
class RaftFlow:
    """Frames [T, 3, H, W] in [0, 1] -> flow [T - 1, 2, H, W] in pixels, on the CPU."""

    network: nn.Module
    device: str = "cpu"
    updates: int = UPDATES

    def __call__(self, video_TCHW: Tensor) -> Tensor:
        height, width = video_TCHW.shape[-2:]
        # torchvision's RAFT takes [-1, 1]; the authors' scales 0..255 to that range by itself.
        frames = video_TCHW.to(self.device, torch.float32) * 2 - 1
        frames = F.pad(frames, (0, -width % 8, 0, -height % 8), mode="replicate")
        flows = []
        with torch.no_grad():
            for start in range(0, len(frames) - 1, PAIRS):
                stop = min(start + PAIRS, len(frames) - 1)
                refined = self.network(
                    frames[start:stop], frames[start + 1 : stop + 1], num_flow_updates=self.updates
                )
                flows.append(refined[-1].cpu())
        return torch.cat(flows)[..., :height, :width]


def load_raft(path: Path, device: str = "cpu", updates: int = UPDATES) -> RaftFlow:
    """Load RAFT from a file of weights, torchvision's or the authors'.

    Raises:
        ValueError: torchvision is missing or does not fit this torch, or the weights are another network's.
    """
    network = _optical_flow().raft_large(weights=None)
    weights = read_tensors(path)
    if any(name.removeprefix("module.").startswith("fnet.") for name in weights):
        weights = official_to_torchvision(weights)
    check_tensors(weights, shapes_of(network.state_dict()), str(path))
    require_finite_weights(weights, str(path))
    network.load_state_dict(weights, strict=True)
    return RaftFlow(network.eval().requires_grad_(False).to(device), device, updates)


def _optical_flow() -> ModuleType:
    try:
        from torchvision.models import optical_flow
    except (ImportError, RuntimeError) as error:  # RuntimeError: its operators belong to another torch
        raise ValueError(
            f"RAFT needs torchvision ({error}): install the release that fits torch {torch.__version__}, "
            "or leave the flow to OpenCV"
        ) from error
    return optical_flow
