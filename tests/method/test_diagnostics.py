import math
from dataclasses import fields

import pytest
import torch

from kvpo.method.diagnostics import (
    UpdateDiagnostics,
    group_diagnostics,
    mean_distance,
    mean_pairwise_distance,
    update_diagnostics,
)
from kvpo.method.objective import objective


def one_objective(shift: float):
    energy = torch.tensor([0.1, 0.2, 0.4], dtype=torch.float64)
    moved = energy + torch.tensor([shift, 0.0, 0.0], dtype=torch.float64)
    return objective(
        moved, energy, energy, torch.tensor([1.0, 0.0, -1.0]), temperature=0.1,
        clip_low=0.1, clip_high=0.2, simplex_kl_weight=0.0, anchor_in_pool=False,
    )[1]  # fmt: skip


def one_group(reward: float):
    latents = torch.zeros(2, 3, 4)
    latents[1] = 2.0
    return group_diagnostics(torch.tensor([reward, 3.0]), torch.tensor(1.0), latents, torch.full((3, 4), 1.0))


def test_distances_in_closed_form():
    latents = torch.tensor([0.0, 1.0, 3.0])[:, None].expand(3, 10).clone()
    assert mean_pairwise_distance(latents) == pytest.approx((1 + 3 + 2) / 3)
    assert mean_distance(latents, torch.full((10,), -1.0)) == pytest.approx((1 + 2 + 4) / 3)


def test_a_group_in_closed_form():
    group = one_group(0.0)
    assert (group.reward_mean, group.anchor_reward, group.above_anchor) == (1.5, 1.0, 0.5)
    assert group.reward_spread == pytest.approx(math.sqrt(7 / 3))
    assert group.branch_distance == pytest.approx(2.0) and group.anchor_distance == pytest.approx(1.0)


def test_a_branch_that_ties_with_the_anchor_is_not_above_it():
    latents = torch.zeros(4, 3)
    group = group_diagnostics(torch.tensor([1.0, 3.0, 1.0, 0.0]), torch.tensor(1.0), latents, latents[0])
    assert group.above_anchor == 0.25
    assert group.reward_spread == pytest.approx(1.2**0.5)  # ddof 1 over branches and anchor


def test_an_update_averages_its_groups_and_keeps_the_extreme_ratios():
    objectives, groups = (
        [one_objective(0.0), one_objective(0.3)],
        [one_group(0.0), one_group(2.0), one_group(2.0)],
    )
    update = update_diagnostics(objectives, groups, velocity_kl=0.25, gradient_norm=2.0)
    assert update.ratio_max == objectives[1].ratio_max > 1
    assert update.ratio_deviation == objectives[1].ratio_deviation > 0
    assert update.entropy == pytest.approx((objectives[0].entropy + objectives[1].entropy) / 2)
    assert update.reward_mean == pytest.approx((1.5 + 2.5 + 2.5) / 3)
    assert update.skipped_fraction == pytest.approx(1 / 3)
    assert (update.velocity_kl, update.gradient_norm) == (0.25, 2.0)


def test_an_update_that_skipped_every_group_still_reports():
    update = update_diagnostics([], [one_group(0.0)], velocity_kl=0.0, gradient_norm=0.0)
    assert update.skipped_fraction == 1.0 and math.isnan(update.entropy) and math.isnan(update.ratio_max)
    assert update.reward_mean == 1.5


def test_the_dictionary_is_flat_and_complete():
    update = update_diagnostics([one_objective(0.1)], [one_group(0.0)], velocity_kl=0.0, gradient_norm=1.0)
    values = update.to_dict()
    assert set(values) == {field.name for field in fields(UpdateDiagnostics)}
    assert all(type(value) is float for value in values.values())


def test_the_spread_of_a_group_leaves_the_anchor_out_where_it_is_no_baseline():
    latents = torch.zeros(2, 4)
    rewards, anchor = torch.tensor([0.0, 3.0]), torch.tensor(9.0)
    group = group_diagnostics(rewards, anchor, latents, latents[0], relative_to_anchor=False)
    assert group.reward_spread == pytest.approx(math.sqrt(4.5))
