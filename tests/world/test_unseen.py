"""The shipped unseen scorer knows held-out pairs, falls under tampering, shares no code with the rewards."""

import ast
from pathlib import Path

import pytest
import torch

import kvpo.world.unseen as unseen_module
from kvpo.world.codec import asset
from kvpo.world.unseen import (
    ASSET,
    clean_pairs,
    load_unseen,
    measure_unseen,
    save_unseen,
    train_unseen,
)
from kvpo.world.vocabulary import FRAME_SIZE


@pytest.fixture(scope="module")
def scorer():
    return load_unseen()


@pytest.fixture(scope="module")
def report(scorer):
    return measure_unseen(scorer, "test", groups=4, seed=3)


def test_held_out_clips_find_their_captions(report):
    assert report.recall_at_1_of_32 >= 0.75
    assert report.matched - report.mismatched > 0.5


def test_tampering_lowers_the_score(report):
    assert report.matched - report.brightened > 0.05
    assert report.moving - report.frozen_moving > 0.2
    assert report.matched - report.desaturated > 0.2


def test_scores_are_probabilities_per_clip_and_independent_of_the_batch(scorer):
    pairs = clean_pairs("test", 6, torch.Generator().manual_seed(0), None)
    video = pairs.video_NTCHW.float() / 255
    scores = scorer(video, pairs.captions)
    assert scores.shape == (6,) and scores.min() > 0 and scores.max() < 1
    for clip in range(6):
        alone = scorer(video[clip : clip + 1], pairs.captions[clip : clip + 1])
        assert float(alone) == pytest.approx(float(scores[clip]), abs=1e-5)
    assert scorer(video[:, :1], pairs.captions).isfinite().all()
    with pytest.raises(ValueError, match="5 entries for 6 clips"):
        scorer(video, pairs.captions[:5])


def test_any_text_has_a_score(scorer):
    video = torch.zeros(2, 3, 3, FRAME_SIZE, FRAME_SIZE)
    assert scorer(video, ["", "Seventeen zebras sing."]).isfinite().all()


def test_training_is_reproducible_and_survives_a_round_trip_through_a_file(tmp_path):
    trained = [train_unseen(steps=3, pool=24, batch=8, judged=80, seed=5) for _ in range(2)]
    (first, captions), (second, _) = trained
    for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert len(captions) == len(set(captions)) == 64
    save_unseen(first, captions, tmp_path / ASSET)
    loaded = load_unseen(tmp_path / ASSET)
    video = torch.rand(2, 4, 3, FRAME_SIZE, FRAME_SIZE, generator=torch.Generator().manual_seed(0))
    assert loaded(video, captions[:2]) == pytest.approx(first(video, captions[:2]), abs=0.02)


def test_the_shipped_file_is_small():
    assert asset(ASSET).stat().st_size < 1_500_000


def test_it_shares_no_code_with_the_rewards():
    tree = ast.parse(Path(unseen_module.__file__).read_text(encoding="utf-8"))
    imported = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    ours = {name for name in imported if name and name.startswith("kvpo")}
    tools = {"kvpo.files", "kvpo.progress", "kvpo.models.finite", "kvpo.models.tensor_files"}
    assert ours - tools == {"kvpo.world.codec", "kvpo.world.imperfect", "kvpo.world.stories"}
