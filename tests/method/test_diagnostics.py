import math

import pytest
import torch

from kvpo.method.diagnostics import (
    GROUP_METRICS,
    UPDATE_METRICS,
    advantage_metrics,
    group_metrics,
    mean_distance,
    mean_pairwise_distance,
    meanings,
    update_metrics,
)
from kvpo.method.evidence import Credit, Metric
from kvpo.method.methods import METHODS


def one_group(reward: float):
    latents = torch.zeros(3, 3, 4)
    latents[1], latents[2] = 2.0, 1.0
    return group_metrics(torch.tensor([reward, 3.0, 1.0]), latents)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_distances_in_closed_form(dtype):
    latents = torch.tensor([0.0, 1.0, 3.0], dtype=dtype)[:, None, None].repeat(1, 5, 2)
    assert mean_pairwise_distance(latents) == pytest.approx((1 + 3 + 2) / 3, rel=1e-6)
    assert mean_distance(latents, latents[0] - 1) == pytest.approx((1 + 2 + 4) / 3, rel=1e-6)


def test_distances_are_root_mean_squares_over_elements():
    latents = torch.tensor([[[0.0, 0.0]], [[3.0, 4.0]]])
    assert mean_pairwise_distance(latents) == pytest.approx(5 / 2**0.5)
    assert mean_distance(latents, torch.zeros(1, 2)) == pytest.approx(5 / 2**0.5 / 2)


def test_distances_of_half_precision_latents_are_taken_in_single():
    latents = torch.stack([torch.zeros(4099), torch.ones(4099)]).bfloat16()
    latents[1, 0] = 1.5
    expected = ((4098 + 1.5**2) / 4099) ** 0.5
    assert mean_pairwise_distance(latents) == pytest.approx(expected, rel=1e-6)
    assert mean_distance(latents[1:], latents[0]) == pytest.approx(expected, rel=1e-6)


def test_a_group_in_closed_form():
    group = one_group(0.0)
    assert (group["reward_mean"], group["anchor_reward"], group["above_anchor"]) == (1.5, 1.0, 0.5)
    assert group["reward_spread"] == pytest.approx(math.sqrt(7 / 3))
    assert group["branch_distance"] == pytest.approx(2.0) and group["anchor_distance"] == pytest.approx(1.0)
    assert group.keys() == GROUP_METRICS.keys()


def test_a_branch_that_ties_with_the_anchor_is_not_above_it():
    group = group_metrics(torch.tensor([1.0, 3.0, 1.0, 0.0, 1.0]), torch.zeros(5, 3))
    assert group["above_anchor"] == 0.25
    assert group["reward_spread"] == pytest.approx(1.2**0.5)  # ddof 1 over branches and anchor


def test_the_spread_of_a_group_leaves_the_anchor_out_where_it_is_no_baseline():
    rewards = torch.tensor([0.0, 3.0, 9.0])
    group = group_metrics(rewards, torch.zeros(3, 4), relative_to_anchor=False)
    assert group["reward_spread"] == pytest.approx(math.sqrt(4.5))


def test_an_update_averages_its_groups_and_keeps_the_extremes():
    of_method = {"entropy": Metric("Averaged."), "ratio_max": Metric("The largest.", largest=True)}
    trained = [{"entropy": 0.2, "ratio_max": 1.0}, {"entropy": 0.6, "ratio_max": 3.0}]
    groups = [one_group(0.0), one_group(2.0), one_group(2.0)]
    update = update_metrics(of_method, trained, groups)
    assert update["ratio_max"] == 3.0 and update["entropy"] == pytest.approx(0.4)
    assert update["reward_mean"] == pytest.approx((1.5 + 2.5 + 2.5) / 3)
    assert update["skipped_fraction"] == pytest.approx(1 / 3)
    assert update.keys() == {*GROUP_METRICS, *of_method, "skipped_fraction"}


def test_an_update_that_skipped_every_group_still_reports():
    of_method = {"entropy": Metric("Averaged."), "ratio_max": Metric("The largest.", largest=True)}
    update = update_metrics(of_method, [], [one_group(0.0)])
    assert update["skipped_fraction"] == 1.0 and update["reward_mean"] == 1.5
    assert math.isnan(update["entropy"]) and math.isnan(update["ratio_max"])


def test_advantages_are_averaged_over_groups():
    def credit(advantages, branches, withheld):
        selected = torch.tensor(advantages)
        return Credit(tuple(range(len(advantages))), selected, torch.zeros(branches), selected, withheld)

    found = advantage_metrics([credit([1.0, 3.0], 4, 1), credit([-2.0, 2.0, 0.0], 6, 2)])
    assert found["advantage_mean"] == pytest.approx((2 + 0) / 2)
    assert found["advantage_std"] == pytest.approx((1 + math.sqrt(8 / 3)) / 2)
    assert found["withheld_fraction"] == pytest.approx(3 / 10)
    none = advantage_metrics([])
    assert math.isnan(none["advantage_mean"]) and none["withheld_fraction"] == 0.0


@pytest.mark.parametrize("name", METHODS)
def test_every_reported_number_is_explained_the_methods_own_in_its_words(name):
    found = meanings(METHODS[name].metrics)
    assert [*found] == ["Groups", "Method", "Update"]
    every = [metric for under in found.values() for metric in under]
    assert set(every) == {*GROUP_METRICS, *UPDATE_METRICS, *METHODS[name].metrics}
    assert len(every) == len(set(every)), "no metric is explained twice"
    assert found["Method"] == {metric: own.meaning for metric, own in METHODS[name].metrics.items()}
