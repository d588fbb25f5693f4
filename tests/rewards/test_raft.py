"""RAFT: names of the authors' release; with torchvision, the value range and the strict load."""

import pytest
import torch
from tiny_rewards import gliding

from kvpo.rewards import raft


def test_the_authors_names_become_torchvisions():
    pairs = {
        "module.fnet.conv1.weight": "feature_encoder.convnormrelu.0.weight",
        "module.cnet.norm1.running_var": "context_encoder.convnormrelu.1.running_var",
        "cnet.conv2.bias": "context_encoder.conv.bias",
        "fnet.layer1.0.conv2.weight": "feature_encoder.layer1.0.convnormrelu2.0.weight",
        "cnet.layer2.0.norm1.bias": "context_encoder.layer2.0.convnormrelu1.1.bias",
        "cnet.layer3.0.downsample.1.weight": "context_encoder.layer3.0.downsample.1.weight",
        "update_block.encoder.convc1.weight": "update_block.motion_encoder.convcorr1.0.weight",
        "update_block.encoder.convf2.weight": "update_block.motion_encoder.convflow2.0.weight",
        "update_block.encoder.conv.bias": "update_block.motion_encoder.conv.0.bias",
        "update_block.gru.convq2.weight": "update_block.recurrent_block.convgru2.convq.weight",
        "update_block.flow_head.conv1.weight": "update_block.flow_head.conv1.weight",
        "update_block.mask.0.weight": "mask_predictor.convrelu.0.weight",
        "update_block.mask.2.bias": "mask_predictor.conv.bias",
    }
    weights = {name: torch.tensor(float(i)) for i, name in enumerate(pairs)}
    renamed = raft.official_to_torchvision(weights | {"cnet.layer2.0.norm3.weight": torch.zeros(1)})
    assert renamed == {new: weights[old] for old, new in pairs.items()}


class Recorder(torch.nn.Module):
    """Stands in for the network: flow of (1, 2) everywhere, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []

    def forward(self, first, second, num_flow_updates):
        self.seen.append(torch.stack([first, second]))
        flow = torch.tensor([1.0, 2.0])[None, :, None, None].expand(len(first), 2, *first.shape[-2:])
        return [torch.zeros_like(flow)] * (num_flow_updates - 1) + [flow]


def test_frames_go_in_as_minus_one_to_one_padded_to_eights_and_in_pairs():
    network = Recorder()
    video = gliding(45, 67, 12, 1, 0)
    flow = raft.RaftFlow(network)(video)
    assert flow.shape == (11, 2, 45, 67) and (flow[:, 1] == 2).all()
    assert [seen.shape[1] for seen in network.seen] == [raft.PAIRS, 3]
    seen = torch.cat(network.seen, 1)
    assert seen.shape[-2:] == (48, 72)
    assert torch.allclose(seen[0, :, :, :45, :67], video[:-1] * 2 - 1)
    assert torch.allclose(seen[1, :, :, :45, :67], video[1:] * 2 - 1)


def test_the_real_network_loads_strictly(tmp_path):
    try:
        from torchvision.models.optical_flow import raft_large
    except (ImportError, RuntimeError):
        with pytest.raises(ValueError, match="RAFT needs torchvision"):
            raft.load_raft(tmp_path / "weights.pth")
        return
    weights = raft_large(weights=None).state_dict()
    torch.save(weights, tmp_path / "weights.pth")
    flow = raft.load_raft(tmp_path / "weights.pth")
    assert flow(torch.rand(2, 3, 128, 128)).shape == (1, 2, 128, 128)
    weights.pop("mask_predictor.conv.bias")
    torch.save(weights, tmp_path / "cut.pth")
    with pytest.raises(ValueError, match=r"missing \(1\): mask_predictor.conv.bias"):
        raft.load_raft(tmp_path / "cut.pth")
