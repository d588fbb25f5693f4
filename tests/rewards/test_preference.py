"""A preference learned from votes: its likelihood in closed form, its fit to known tastes, its file."""

from itertools import permutations
from math import log

import pytest
import torch
from safetensors.torch import save_file

from kvpo.prompts import ClipPrompt
from kvpo.rewards.preference import (
    PIXELS,
    Preference,
    PreferenceScorer,
    ScorerFeatures,
    Task,
    fit,
    load_preference,
    pixel_features,
    plackett_luce,
    save_preference,
    stacked,
)
from tests.tiny_world import ToyScorer


def probability(scores: torch.Tensor, ranks: tuple[int, ...], videos: tuple[int, ...]) -> float:
    return float((-plackett_luce(scores, stacked([Task(videos, ranks, "p")]))).exp())


def test_a_pair_is_bradley_terry_and_rankings_of_all_orders_add_up_to_one():
    scores = torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    assert probability(scores, (0, 1), (0, 1)) == pytest.approx(1 / (1 + torch.exp(torch.tensor(-1.3))))
    whole = {order: probability(scores, (0, 1, 2), order) for order in permutations(range(3))}
    assert sum(whole.values()) == pytest.approx(1)
    chosen = probability(scores, (0, 1, 1), (2, 0, 1))
    assert chosen == pytest.approx(sum(p for order, p in whole.items() if order[0] == 2))
    mixed = [Task((0, 1), (0, 1), "p"), Task((2, 0, 1), (0, 1, 2), "p", 0.5)]
    expected = -(log(probability(scores, (0, 1), (0, 1))) + 0.5 * log(whole[2, 0, 1])) / 1.5
    assert float(plackett_luce(scores, stacked(mixed))) == pytest.approx(expected)


def test_the_fit_finds_the_taste_that_ranked_and_half_votes_for_both_sides_find_none():
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(400, 6, generator=generator) * torch.tensor([1.0, 5, 1, 1, 1, 0.1])
    taste = torch.tensor([0.0, 0.3, 0, -1.0, 0, 5.0], dtype=torch.float64)
    utility = features.double() @ taste
    noise = torch.rand(400, generator=generator, dtype=torch.float64).log().neg().log().neg()
    tasks = []
    for n in range(0, 400, 4):
        order = (utility + noise)[n : n + 4].argsort(descending=True) + n
        tasks.append(Task(tuple(order.tolist()), (0, 1, 2, 3), f"prompt {n}"))
    learned = fit(features, tasks, 1e-3)
    expected = taste * features.double().std(0, correction=0)
    assert (
        learned.weight_D == pytest.approx(expected, abs=0.4)
        and torch.corrcoef(torch.stack([learned(features), utility]))[0, 1] > 0.97
    )
    halves = [Task(pair, (0, 1), "p", 0.5) for n in range(0, 400, 2) for pair in ((n, n + 1), (n + 1, n))]
    assert fit(features, halves, 1e-3).weight_D.abs().max() < 1e-6
    assert fit(features, tasks, 10.0).weight_D.norm() < learned.weight_D.norm() / 4


def test_pixel_features_are_what_they_are_called_at_any_size():
    generator = torch.Generator().manual_seed(1)
    video = torch.rand(2, 5, 3, 32, 32, generator=generator)
    large = video.repeat_interleave(8, -1).repeat_interleave(8, -2)
    prompts = [ClipPrompt("")] * 2
    found = pixel_features(video, prompts)
    assert found.shape == (2, len(PIXELS)) and torch.allclose(
        found, pixel_features(large, prompts), atol=1e-5
    )
    named = dict(zip(PIXELS, found[0].tolist(), strict=True))
    assert named["green"] == pytest.approx(float(video[0, :, 1].mean()), abs=1e-5)
    still = video[:, :1].expand(-1, 4, -1, -1, -1)
    calm = dict(zip(PIXELS, pixel_features(still, prompts)[0].tolist(), strict=True))
    assert calm["flicker"] == calm["shake"] == calm["motion"] == 0
    blinking = still * torch.tensor([1.0, 0.5, 1.0, 0.5])[None, :, None, None, None]
    assert pixel_features(blinking, prompts)[0, PIXELS.index("flicker")] > 0.1
    assert pixel_features(video[:, :1], prompts).isfinite().all()


def test_the_score_of_a_clip_does_not_depend_on_the_others_and_other_rewards_serve_as_features():
    ones = torch.ones(2, dtype=torch.float64)
    preference = Preference(0 * ones, ones, torch.tensor([2.0, -1.0], dtype=torch.float64))
    scorer = PreferenceScorer(("liked",), ScorerFeatures((ToyScorer(),)), preference)
    video = torch.rand(3, 4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    prompts = [ClipPrompt("a")] * 3
    found = scorer(video, prompts)["liked"]
    own = ToyScorer()(video, prompts)
    assert torch.allclose(found, 2 * own["redness"] - own["calm"])
    assert torch.equal(found[1:2], scorer(video[1:2], prompts[:1])["liked"])


def test_a_preference_is_read_as_it_was_written_and_other_files_are_refused(tmp_path):
    ones = torch.ones(3, dtype=torch.float64)
    path = tmp_path / "mine.safetensors"
    save_preference(path, Preference(ones, 2 * ones, 3 * ones), {"features": [], "sources": {}})
    preference, record = load_preference(path)
    assert torch.equal(preference.weight_D, 3 * ones) and record == {"features": [], "sources": {}}
    other = tmp_path / "other.safetensors"
    save_file({"weight": ones}, other)
    (tmp_path / "text.safetensors").write_text("no tensors")
    bare = tmp_path / "bare.safetensors"
    save_preference(bare, preference, {"sources": {}})
    for wrong in (bare, other, tmp_path / "text.safetensors", tmp_path / "none.safetensors"):
        with pytest.raises(ValueError, match="not a learned preference|no such file"):
            load_preference(wrong)
