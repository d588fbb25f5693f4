"""Rewards by id: every one declared, the light ones built, sources and mistakes."""

import json
import subprocess
import sys
from dataclasses import dataclass

import pytest
import torch
from tiny_rewards import gliding

from kvpo.rewards import catalogue
from kvpo.rewards.catalogue import DECLARATIONS, FAMILIES, REWARD_IDS, load_rewards
from kvpo.rewards.motion import MotionScorer
from tests.rewards.tiny_rewards import build_rewards

IDS = (
    "hpsv3 videoalign_vq videoalign_mq videoalign_ta hpsv2 pickscore clip_score aesthetic image_reward "
    "transition_follow transition_keep motion_smoothness dynamic_degree subject_consistency flicker "
    "vbench_dynamic_degree vbench_motion_smoothness vbench_subject_consistency vbench_temporal_flickering "
    "vbench_imaging_quality"
).split()


def test_every_id_is_declared_and_built_by_one_family():
    assert list(REWARD_IDS) == IDS
    assert sorted(id for family in FAMILIES for id in family.ids) == sorted(IDS)
    assert all(name == declaration.name for name, declaration in DECLARATIONS.items())
    assert all(d.low < d.high and d.min_frames >= 1 for d in DECLARATIONS.values())


def test_rewards_without_weights_share_what_they_can():
    motion, flicker = build_rewards(["dynamic_degree", "flicker", "motion_smoothness"])
    assert isinstance(motion, MotionScorer)
    assert motion.components == ("dynamic_degree", "motion_smoothness") and flicker.components == ("flicker",)
    scores = motion(gliding(64, 64, 4, 2, 0)[None], [""]) | flicker(gliding(64, 64, 4, 2, 0)[None], [""])
    for name, value in scores.items():
        assert value.shape == (1,) and DECLARATIONS[name].low <= value.item() <= DECLARATIONS[name].high


def test_parts_are_resolved_and_given_to_the_builder(monkeypatch, tmp_path):
    asked, built = [], []

    def resolve(location, *, patterns):
        asked.append((str(location), patterns))
        return tmp_path

    monkeypatch.setattr("kvpo.models.hub.resolve_location", resolve)

    @dataclass(frozen=True)
    class Scorer:
        top_share: float = 1.0

    def load(*paths, **settings):
        built.append((paths, settings))
        return Scorer()

    monkeypatch.setattr("kvpo.rewards.hpsv3.load_hpsv3", load)
    monkeypatch.setattr("kvpo.models.tensor_files.fingerprint", lambda files, settings: settings)
    (reward,) = load_rewards(
        ["hpsv3"], {"hpsv3.base": "/my/base"}, device="cuda:1", frame_rate=8.0, top_share=0.3
    )
    assert asked == [
        ("MizzenAI/HPSv3/HPSv3.safetensors", ()),
        ("/my/base", catalogue.CONFIG_AND_TOKENIZER),
    ]
    assert built == [((tmp_path, tmp_path, None), {"device": "cuda:1"})] and reward.scorer.top_share == 0.3
    assert (reward.name, reward.declarations) == ("hpsv3", (DECLARATIONS["hpsv3"],))
    assert json.loads(reward.version) == [["hpsv3"], ["weights", "base"], 8.0, 0.3, "cuda"]


@pytest.mark.parametrize(
    ("ids", "sources", "message"),
    [
        (["hpsv4"], {}, "unknown reward 'hpsv4'; there are hpsv3, videoalign_vq"),
        (["flicker", "flicker"], {}, "named twice"),
        (["aesthetic"], {}, "aesthetic needs its weights: .*aesthetic.weights=PATH"),
        (["flicker"], {"hpsv3.base": "x"}, "'hpsv3.base' belongs to no reward that was asked for"),
        (["hpsv3"], {"hpsv3.wieghts": "x"}, "'hpsv3.wieghts' belongs to no reward that was asked for"),
        (["dynamic_degree"], {"dynamic_degree.rft": "x"}, "they have dynamic_degree.raft"),
        (["dynamic_degree"], {"dynamic_degree.raft": "no_such_file.pth"}, "no such file"),
    ],
)
def test_mistakes_are_named(ids, sources, message):
    with pytest.raises(ValueError, match=message):
        build_rewards(ids, sources)


def test_listing_rewards_imports_nothing_heavy():
    code = (
        "import sys, kvpo.rewards.catalogue\n"
        "heavy = {'torch', 'numpy', 'transformers', 'cv2', 'av'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_motion_needs_neither_downloads_nor_transformers():
    code = (
        "import sys\nfrom kvpo.rewards.catalogue import load_rewards\n"
        "load_rewards(['motion_smoothness', 'dynamic_degree', 'flicker'])\n"
        "heavy = {'transformers', 'accelerate', 'huggingface_hub', 'peft'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    assert torch.get_num_threads() == 1
