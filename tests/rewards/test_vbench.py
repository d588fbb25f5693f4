"""VBench's dimensions against its formulas, computed here frame by frame, on tiny networks."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from tiny_rewards import gliding, random_weights, texture
from transformers import ViTConfig, ViTModel

from kvpo.prompts import ClipPrompt
from kvpo.rewards import raft
from kvpo.rewards.catalogue import DECLARATIONS, load_rewards
from kvpo.rewards.reward import Reward, networks_of
from kvpo.rewards.sampling import file_clips, spread_indices

AMT = """
import torch
from torch import nn
from vbench.third_party.amt.networks.blocks.ifrnet import half


class Model(nn.Module):
    def __init__(self, corr_radius=3):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(3))

    def forward(self, img0, img1, embt, scale_factor=1.0, eval=False):
        assert eval and scale_factor == 1.0 and float(embt) == 0.5
        assert img0.shape[-1] % 16 == img0.shape[-2] % 16 == 0
        return {"imgt_pred": (half * (img0 + img1) + self.bias[:, None, None]).clamp(0, 1)}
"""
MUSIQ = """
import torch
from torch import nn


class MUSIQ(nn.Module):
    def __init__(self, num_class=1, pretrained=True, pretrained_model_path=None):
        super().__init__()
        assert pretrained is False
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):
        assert not self.training and x.shape[0] == 1 and max(x.shape[-2:]) <= 512
        return self.weight * x.mean() * 100 + x.shape[-1]
"""


def loaded(name: str, **sources: Any) -> Reward:
    (reward,) = load_rewards([name], {f"{name}.{part}": str(path) for part, path in sources.items()})
    assert bool(list(networks_of(reward.scorer))) == bool(sources)  # found, so that offloading moves them
    return reward


def score(reward: Reward, video_TCHW: torch.Tensor) -> float:
    (values,) = reward(video_TCHW[None], [""]).values()
    return float(values[0])


def in_bytes(video_TCHW: torch.Tensor) -> np.ndarray:
    """Frames as a video file holds them, uint8 [T, H, W, 3]."""
    return (video_TCHW.permute(0, 2, 3, 1).numpy() * 255).round().astype(np.uint8)


@pytest.fixture
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Packages with networks under the names of vbench and pyiqa; vbench itself imports what is not here."""
    for path, text in (
        ("vbench/__init__.py", "import decord_that_is_not_here"),
        ("vbench/third_party/amt/networks/blocks/ifrnet.py", "half = 0.5"),
        ("vbench/third_party/amt/networks/AMT-S.py", AMT),
        ("pyiqa/__init__.py", ""),
        ("pyiqa/archs/musiq_arch.py", MUSIQ),
    ):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    for name in [name for name in sys.modules if name.split(".")[0] in ("vbench", "pyiqa")]:
        del sys.modules[name]


def test_files_are_taken_whole_and_motion_at_eight_frames_per_second() -> None:
    for name in ("motion_smoothness", "subject_consistency", "temporal_flickering", "imaging_quality"):
        assert file_clips(DECLARATIONS[f"vbench_{name}"], 333, 24.0) == [list(range(333))]
        assert spread_indices(81, 2.0, DECLARATIONS[f"vbench_{name}"].sampling) == list(range(81))
    motion = DECLARATIONS["vbench_dynamic_degree"]
    assert file_clips(motion, 81, 16.0) == [list(range(0, 81, 2))]
    assert file_clips(motion, 50, 30.0) == [list(range(0, 50, 4))]
    assert file_clips(motion, 50, 8.0) == file_clips(motion, 50, 5.0) == [list(range(50))]


def test_temporal_flickering_is_the_mean_absolute_difference() -> None:
    video = torch.rand(5, 3, 20, 24, generator=torch.Generator().manual_seed(0))
    frames = in_bytes(video).astype(np.float32)
    expected = (255 - np.mean([abs(a - b).mean() for a, b in zip(frames, frames[1:], strict=False)])) / 255
    assert score(loaded("vbench_temporal_flickering"), video) == pytest.approx(expected, abs=1e-6)
    assert score(loaded("vbench_temporal_flickering"), video[:1].expand(4, -1, -1, -1)) == 1


def test_dynamic_degree_counts_steps_above_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest twentieth of the pixels against 6 pixels at 256, in a quarter of the frames."""
    speeds: list[float] = []
    asked = []

    class Network(torch.nn.Module):
        def forward(self, first, second, num_flow_updates):
            asked.append((first.shape[-2:], num_flow_updates))
            flow = torch.zeros(len(first), 2, *first.shape[-2:])
            fast = round(0.06 * flow[0, 0].numel())
            for row in flow:
                row.view(2, -1)[0, :fast] = speeds.pop(0)
            return [flow]

    def load(path: Path, device: str, updates: int) -> raft.RaftFlow:
        return raft.RaftFlow(Network(), device, updates)

    monkeypatch.setattr(raft, "load_raft", load)
    (tmp_path / "raft-things.pth").write_bytes(b"weights")
    reward = loaded("vbench_dynamic_degree", raft=tmp_path / "raft-things.pth")
    limit, video = 6 * 130 / 256, torch.rand(25, 3, 130, 140)  # 16 per second: 13 frames, 12 steps, 3 needed
    for moving, expected in ((3, 1), (2, 0)):
        speeds[:] = [limit + 0.1] * moving + [limit - 0.1] * (12 - moving)
        assert score(reward, video) == expected
    assert set(asked) == {(torch.Size([136, 144]), 20)}
    sources = {"vbench_dynamic_degree.raft": str(tmp_path / "raft-things.pth")}
    for file_rate, frame_rate, factor in ((4.0, 2.0, 2), (12.0, 2.0, 1), (0.0, 4.0, 2), (0.0, 8.0, 1)):
        (reward,) = load_rewards(["vbench_dynamic_degree"], sources, frame_rate=frame_rate)
        for share, expected in ((1.01, 1), (0.99, 0)):  # of 8 / rate times the limit, where a file is slower
            speeds[:] = [share * factor * limit] * 3 + [0.0] * 9
            prompt = ClipPrompt("", file_rate=file_rate)
            assert reward(video[None, :13], [prompt])["vbench_dynamic_degree"].tolist() == [expected]


def test_motion_smoothness_compares_every_second_frame(packages: Path) -> None:
    """On the network of the package, the package's own imports left aside; bytes are cut off, not rounded."""
    torch.save({"state_dict": {"bias": torch.tensor([0.101, 0.001, -0.101])}}, packages / "amt-s.pth")
    reward = loaded("vbench_motion_smoothness", weights=packages / "amt-s.pth")
    video = torch.rand(6, 3, 21, 40, generator=torch.Generator().manual_seed(1))
    frames = in_bytes(video)
    errors = []
    for n in (1, 3):
        mean = (frames[n - 1].astype(np.float32) + frames[n + 1]) / 2 / 255 + np.float32(
            [0.101, 0.001, -0.101]
        )
        made = (mean.clip(0, 1) * 255).astype(np.uint8)
        errors.append(np.abs(made.astype(int) - frames[n].astype(int)).mean())
    assert score(reward, video) == pytest.approx((255 - np.mean(errors)) / 255, abs=1e-4)
    assert "vbench" not in sys.modules
    torch.save({"state_dict": {"bias": torch.zeros(4)}}, packages / "other.pth")
    with pytest.raises(ValueError, match=r"(?s)other\.pth.*bias"):
        loaded("vbench_motion_smoothness", weights=packages / "other.pth")


def test_imaging_quality_is_musiq_on_at_most_512_pixels(packages: Path) -> None:
    torch.save({"params": {"weight": torch.tensor([0.5])}}, packages / "musiq.pth")
    reward = loaded("vbench_imaging_quality", weights=packages / "musiq.pth")
    small, large = torch.rand(3, 3, 40, 60), torch.rand(2, 3, 100, 1000)
    rounded = (small * 255).round() / 255
    assert score(reward, small) == pytest.approx(0.5 * float(rounded.mean()) + 0.6, abs=1e-5)
    shrunk = F.interpolate((large * 255).round() / 255, (51, 512), mode="bilinear")
    assert score(reward, large) == pytest.approx(0.5 * float(shrunk.mean()) + 5.12, abs=1e-5)


def test_subject_consistency_is_of_dinos_features(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, patch_size=56
    )
    model = ViTModel(config, add_pooling_layer=False).eval()
    model.load_state_dict(random_weights(model))
    model.save_pretrained(tmp_path)
    reward = loaded("vbench_subject_consistency", weights=tmp_path)
    video = torch.stack([texture(80, 120, seed=s) for s in (0, 1, 1, 2)])
    with torch.no_grad():
        frames = F.interpolate((video * 255).round() / 255, (224, 336), mode="bilinear")
        mean, std = (torch.tensor(v)[:, None, None] for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        seen = model(pixel_values=(frames - mean) / std, interpolate_pos_encoding=True).last_hidden_state[
            :, 0
        ]
    similar = [
        (max(0.0, float(F.cosine_similarity(seen[n], seen[n - 1], 0)))
         + max(0.0, float(F.cosine_similarity(seen[n], seen[0], 0)))) / 2
        for n in (1, 2, 3)
    ]  # fmt: skip
    assert score(reward, video) == pytest.approx(np.mean(similar), abs=1e-5)


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(ValueError, match="needs its raft: give --source vbench_dynamic_degree.raft"):
        loaded("vbench_dynamic_degree")
    for name, package in (("motion_smoothness", "vbench"), ("imaging_quality", "pyiqa")):
        with pytest.raises(ValueError, match=f"of {package} .*: pip install --no-deps {package}"):
            loaded(f"vbench_{name}", weights=tmp_path / "w.pth")


def test_real_motion_moves_and_stillness_does_not() -> None:
    from kvpo.rewards.motion import dis_flow
    from kvpo.rewards.vbench import enough_motion

    assert enough_motion(dis_flow, gliding(128, 160, 9, 5, 2)) == 1
    assert enough_motion(dis_flow, gliding(128, 160, 9, 5, 2)[:1].expand(9, -1, -1, -1)) == 0
