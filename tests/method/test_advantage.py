import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.method.advantage import (
    best_and_worst,
    centred,
    clamp,
    fuse_components,
    fuse_signals,
    group_relative,
    is_noise,
    permuted,
    pooled_spread,
    rank_gap,
    ranks,
    reward_spread,
    selective,
    total_floor,
)

REWARDS = torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
ANCHOR = torch.tensor(2.0, dtype=torch.float64)
rewards_lists = st.lists(st.floats(-5, 5), min_size=2, max_size=8).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


def test_the_anchor_relative_advantage_in_closed_form():
    spread = (2 / 3) ** 0.5
    assert float(reward_spread(REWARDS, ANCHOR)) == pytest.approx(spread)
    expected = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64) / spread
    torch.testing.assert_close(group_relative(REWARDS, ANCHOR, 0.0), expected)


def test_the_group_advantage_in_closed_form():
    torch.testing.assert_close(group_relative(REWARDS, None, 0.0), REWARDS - 2)
    torch.testing.assert_close(group_relative(REWARDS, None, 4.0), (REWARDS - 2) / 4)


def test_the_spread_of_a_collection_is_about_each_groups_own_mean():
    groups = [torch.tensor([[0.0, 2.0], [0.0, 6.0]]), torch.tensor([[10.0, 11.0, 12.0], [5.0, 5.0, 5.0]])]
    torch.testing.assert_close(pooled_spread(groups), torch.tensor([4 / 3, 6.0]).sqrt())
    assert float(pooled_spread([REWARDS])) == pytest.approx(float(REWARDS.std()))


def test_a_given_spread_replaces_the_groups_own():
    torch.testing.assert_close(group_relative(REWARDS, None, 0.5, torch.tensor(4.0)), (REWARDS - 2) / 4)
    anchor = torch.tensor(1.0, dtype=torch.float64)
    torch.testing.assert_close(group_relative(REWARDS, anchor, 0.5, torch.tensor(4.0)), (REWARDS - 1) / 4)
    torch.testing.assert_close(group_relative(REWARDS, anchor, 8.0, torch.tensor(4.0)), (REWARDS - 1) / 8)


def test_every_branch_can_be_worse_than_the_anchor():
    advantages = group_relative(REWARDS, torch.tensor(4.0, dtype=torch.float64), 0.0)
    assert bool((advantages < 0).all())


@given(rewards=rewards_lists, shift=st.floats(-10, 10))
def test_a_constant_added_to_all_rewards_changes_nothing(rewards, shift):
    anchor = rewards.mean() + 0.1
    torch.testing.assert_close(
        group_relative(rewards + shift, anchor + shift, 0.01),
        group_relative(rewards, anchor, 0.01),
        rtol=1e-6,
        atol=1e-9,
    )
    torch.testing.assert_close(
        group_relative(rewards + shift, None, 0.01), group_relative(rewards, None, 0.01), rtol=1e-6, atol=1e-9
    )


@given(rewards=rewards_lists)
def test_group_advantages_sum_to_zero(rewards):
    assert float(group_relative(rewards, None, 0.01).sum()) == pytest.approx(0.0, abs=1e-9)


def test_a_spread_of_seven_millionths_does_not_become_an_advantage_of_three():
    rewards = 0.5 + 7e-6 * torch.tensor([-1.0, 1, -1, 1, -1, 1, -1, 3], dtype=torch.float64)
    anchor = torch.tensor(0.5 - 1.5e-5, dtype=torch.float64)
    assert float(group_relative(rewards, anchor, 0.0).max()) > 3
    assert float(group_relative(rewards, anchor, 0.002).abs().max()) < 0.02
    assert float(group_relative(rewards, None, 0.002).abs().max()) < 0.02
    assert is_noise(rewards, anchor, 0.002) and is_noise(rewards, None, 0.002)
    assert not is_noise(rewards, anchor, 1e-6)


def test_equal_rewards_give_zero_and_not_nan():
    rewards, anchor = torch.full((4,), 0.3), torch.tensor(0.3)
    assert torch.equal(group_relative(rewards, anchor, 0.0), torch.zeros(4))
    assert torch.equal(group_relative(rewards, None, 0.0), torch.zeros(4))
    assert is_noise(rewards, anchor, 0.0)


@pytest.mark.parametrize("branches", range(2, 17))
def test_rewards_are_equal_whatever_their_mean_is_rounded_to(branches):
    """In float32 the mean of eight times 0.7 is not 0.7."""
    equal_NG = torch.linspace(0.01, 0.99, 99)[:, None].expand(-1, branches)
    assert not reward_spread(equal_NG).any() and not reward_spread(equal_NG, equal_NG[:, 0]).any()
    assert not group_relative(equal_NG, None, 0.0).any()
    assert not pooled_spread([equal_NG, 1 - equal_NG]).any()
    assert is_noise(equal_NG, None, 0.0)


def test_the_anchor_alone_can_lift_a_group_above_the_noise():
    rewards = torch.zeros(4)
    assert is_noise(rewards, None, 0.1) and not is_noise(rewards, torch.tensor(1.0), 0.1)


def test_components_are_normalised_one_by_one_then_weighted():
    rewards_KG = torch.stack([REWARDS, 100 * REWARDS])
    anchor_K, floor_K = torch.stack([ANCHOR, 100 * ANCHOR]), torch.tensor([0.0, 1e4])
    advantages_KG = group_relative(rewards_KG, anchor_K, floor_K)
    torch.testing.assert_close(advantages_KG[0], group_relative(REWARDS, ANCHOR, 0.0))
    torch.testing.assert_close(advantages_KG[1], 100 * (REWARDS - 2) / 1e4)
    fused = fuse_components(advantages_KG, torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(fused, advantages_KG[0] + 0.5 * advantages_KG[1])
    assert not is_noise(rewards_KG, anchor_K, floor_K), "one component above its floor is enough"
    assert is_noise(rewards_KG, anchor_K, torch.tensor([1.0, 1e4]))


def test_local_and_global_signals_and_the_clamp():
    fused = fuse_signals(REWARDS, -2 * REWARDS, 0.5)
    assert torch.equal(fused, torch.zeros(3, dtype=torch.float64))
    assert clamp(10 * (REWARDS - 2), 2.5).tolist() == [-2.5, 0.0, 2.5]


def test_permuting_keeps_the_values_and_follows_the_generator():
    advantages = torch.arange(8.0)
    shuffled = permuted(advantages, torch.Generator().manual_seed(3))
    assert shuffled.sort().values.equal(advantages) and not shuffled.equal(advantages)
    assert shuffled.equal(permuted(advantages, torch.Generator().manual_seed(3)))
    means = torch.stack([permuted(advantages, torch.Generator().manual_seed(s)) for s in range(2000)]).mean(0)
    torch.testing.assert_close(means, torch.full((8,), 3.5), rtol=0, atol=0.25)


def test_the_best_and_the_worst_branches():
    advantages = torch.tensor([0.1, -2.0, 0.9, 0.0, 3.0, -0.5])
    assert best_and_worst(advantages, 2, 1).tolist() == [1, 2, 4]
    assert best_and_worst(advantages, 0, 2).tolist() == [1, 5]
    assert best_and_worst(advantages, 0, 0).tolist() == [0, 1, 2, 3, 4, 5]
    assert best_and_worst(advantages, 3, 3).tolist() == [0, 1, 2, 3, 4, 5]
    assert float(centred(advantages[best_and_worst(advantages, 2, 2)]).sum()) == pytest.approx(0.0, abs=1e-6)


def test_equal_advantages_never_select_a_branch_twice():
    assert len(set(best_and_worst(torch.zeros(8), 2, 2).tolist())) == 4


@pytest.mark.parametrize(("best", "worst"), [(5, 4), (-1, 2)])
def test_more_branches_than_there_are_is_refused(best, worst):
    with pytest.raises(ValueError, match="objective.keep = .* 8 branches"):
        best_and_worst(torch.zeros(8), best, worst)


def test_ranks_in_closed_form():
    assert ranks(torch.tensor([3.0, 1.0, 2.0])).tolist() == [1.0, 0.0, 0.5]
    assert ranks(torch.tensor([2.0, 1.0, 2.0, 0.0])).tolist() == pytest.approx([5 / 6, 1 / 3, 5 / 6, 0.0])
    assert ranks(torch.ones(2, 4)).tolist() == [[0.5] * 4] * 2


@given(rewards=rewards_lists)
def test_ranks_count_branches_beaten_and_know_nothing_of_scale(rewards):
    found = ranks(rewards)
    others = len(rewards) - 1
    for g, value in enumerate(rewards):
        beaten = sum(float(value > other) + 0.5 * float(value == other) for other in rewards) - 0.5
        assert float(found[g]) == pytest.approx(beaten / others)
    assert float(found.mean()) == pytest.approx(0.5)
    torch.testing.assert_close(ranks(4 * rewards), found)


def test_the_rank_gap_in_closed_form():
    rewards = torch.tensor([[3.0, 1.0, 2.0], [0.0, 1.0, 2.0], [10.0, 30.0, 20.0]])
    gap = rank_gap(rewards, torch.tensor([5.0, 1.0, 1.0]), 0)
    assert gap.tolist() == pytest.approx([1.0 - 0.0, 0.0 - 0.75, 0.5 - 0.75])
    gap = rank_gap(rewards, torch.tensor([1.0, 3.0, 1.0]), 0)
    assert gap.tolist() == pytest.approx([1.0, -0.625, 0.5 - 0.875])
    gap = rank_gap(rewards, torch.tensor([1.0, 0.0, 1.0]), 2)
    assert gap.tolist() == pytest.approx([-1.0, 1.0, 0.0]), "a component without a vote is not asked"
    assert rank_gap(rewards, torch.tensor([1.0, 0.0, 0.0]), 0).tolist() == [0.0, 0.0, 0.0]


@given(rewards=st.lists(rewards_lists, min_size=2, max_size=2).filter(lambda r: len(r[0]) == len(r[1])))
def test_rewards_that_agree_leave_no_gap(rewards):
    one, other = rewards
    votes = torch.ones(2)
    torch.testing.assert_close(rank_gap(torch.stack([one, 2 * one]), votes, 0), torch.zeros_like(one))
    gap = rank_gap(torch.stack([one, other]), votes, 0)
    torch.testing.assert_close(rank_gap(torch.stack([one, other]), votes, 1), -gap)
    assert float(gap.sum()) == pytest.approx(0.0, abs=1e-9) and float(gap.abs().max()) <= 1


def test_what_only_the_primary_praises_is_withheld_or_reversed():
    advantages = torch.tensor([2.0, 0.5, 1.0, -1.0, -2.0])
    gap = torch.tensor([0.9, 0.9, 0.25, 0.9, -0.9])
    assert selective(advantages, gap, 0.25, 0.0).tolist() == [0.0, 0.0, 1.0, -1.0, -2.0]
    assert selective(advantages, gap, 0.25, 0.5).tolist() == [-1.0, -0.25, 1.0, -1.0, -2.0]
    assert selective(advantages, gap, 1.0, 0.5).equal(advantages)


@given(rewards=rewards_lists, margin=st.floats(0, 1), penalty=st.floats(0, 2))
def test_selection_never_raises_an_advantage_nor_touches_a_negative_one(rewards, margin, penalty):
    gap = ranks(rewards) - ranks(-rewards)
    found = selective(rewards, gap, margin, penalty)
    assert bool((found <= rewards).all())
    assert torch.equal(found[rewards <= 0], rewards[rewards <= 0])


def test_the_floor_of_a_sum_adds_independent_jitters():
    assert float(total_floor(torch.tensor([3.0, 4.0, 9.0]), torch.tensor([1.0, 1.0, 0.0]))) == pytest.approx(
        5.0
    )
    assert float(total_floor(torch.tensor([0.2, 0.2]), torch.tensor([0.5, 0.0]))) == pytest.approx(0.1)
