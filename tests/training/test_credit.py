"""Several rewards to one advantage per branch: fusion, noise floors, what is withheld."""

from dataclasses import replace
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from kvpo.config import Config, ObjectiveConfig, RewardConfig
from kvpo.config_checks import ConfigurationError
from kvpo.engine.scoring import Scores
from kvpo.method.advantage import group_relative
from kvpo.method.gibbs import calibrated_temperature
from kvpo.method.settings import KvpoSettings, NftSettings
from kvpo.training.credit import assign_credit, blend_of, collection_scale

OBJECTIVE = ObjectiveConfig(keep=(0, 0))
NO_FLOOR = RewardConfig(scorers=("any",), noise_floors={"total": 0.0})
LARGE = torch.tensor([40.0, 30.0, 20.0, 10.0, 25.0])
SMALL = torch.tensor([0.1, 0.2, 0.3, 0.5, 0.25])
"""Rewards of four branches and the anchor, of very different scale, that disagree."""


def scores_of(*components: Tensor) -> Scores:
    table = torch.stack(components)
    return Scores(tuple("abc"[: len(table)]), table, table)


def credit(
    scores: Scores,
    weights: list[float],
    config: ObjectiveConfig = OBJECTIVE,
    *,
    anchor_in_pool: bool = False,
    noise_floors: dict[str, float] | None = None,
    **rewards: Any,
) -> Any:
    settings = RewardConfig(scorers=("any",), noise_floors={"total": 0.0} | (noise_floors or {}), **rewards)
    own = KvpoSettings(anchor_share=0.1 if anchor_in_pool else 0.0)
    run = Config(objective=config, kvpo=own, rewards=settings)
    blend = blend_of(scores.components, torch.tensor(weights), run)
    return assign_credit(scores, blend, torch.Generator().manual_seed(0))


def normalised(members: Tensor) -> Tensor:
    return group_relative(members[:-1], None, 0.0)


def test_components_of_any_scale_count_by_their_weight_alone() -> None:
    found = credit(scores_of(LARGE, SMALL), [1.0, 3.0])
    expected = 1.5 * (0.25 * normalised(LARGE) + 0.75 * normalised(SMALL))
    torch.testing.assert_close(found.all_advantages_G, expected)
    again = credit(scores_of(1000 * LARGE, SMALL), [1.0, 3.0])
    torch.testing.assert_close(again.all_advantages_G, expected)


def test_raw_fusion_lets_the_largest_scale_decide() -> None:
    found = credit(scores_of(LARGE, SMALL), [1.0, 3.0], fusion="rewards")
    torch.testing.assert_close(found.all_advantages_G, 1.5 * normalised(LARGE + 3 * SMALL))
    assert found.all_advantages_G.argmax() == 0, "branch 0, although the weightier reward ranks it last"
    weighted = credit(scores_of(LARGE, SMALL), [1.0, 3.0])
    assert weighted.all_advantages_G.argmax() == 3


@pytest.mark.parametrize("in_pool", [False, True])
@pytest.mark.parametrize("advantages", ["group", "anchor", "random"])
def test_advantages_are_clamped_last(advantages: str, in_pool: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """After fusion, so that no sum leaves the range, and before the best and worst are chosen and centred."""
    config = replace(OBJECTIVE, advantages=advantages, keep=(2, 1))
    free = credit(scores_of(LARGE, SMALL), [3.0, 1.0], config, anchor_in_pool=in_pool).all_advantages_G
    monkeypatch.setattr("kvpo.training.credit.ADVANTAGE_LIMIT", 0.5)
    found = credit(scores_of(LARGE, SMALL), [3.0, 1.0], config, anchor_in_pool=in_pool)
    assert bool((free.abs() > 0.5).any() and (free.abs() < 0.5).any())
    torch.testing.assert_close(found.all_advantages_G, free.clamp(-0.5, 0.5))
    own = found.all_advantages_G[list(found.branches)]
    relative = advantages == "anchor" and in_pool
    torch.testing.assert_close(found.advantages_G, own if relative else own - own.mean())


def test_what_is_turned_round_is_clamped_too(monkeypatch: pytest.MonkeyPatch) -> None:
    hacked, honest = torch.tensor([9.0, 1.0, 0.0, 2.0, 1.0]), torch.tensor([0.0, 3.0, 2.0, 1.0, 1.0])
    monkeypatch.setattr("kvpo.training.credit.ADVANTAGE_LIMIT", 0.3)
    found = credit(scores_of(hacked, honest), [1.0, 0.2], fusion="reversing")
    assert found.withheld == 1
    assert found.all_advantages_G[0] == pytest.approx(-0.3)


def test_one_component_is_the_same_under_every_fusion_that_takes_it() -> None:
    one, raw = (credit(scores_of(LARGE), [1.0], fusion=fusion) for fusion in ("advantages", "rewards"))
    torch.testing.assert_close(one.all_advantages_G, raw.all_advantages_G)


def test_selective_fusion_withholds_what_only_the_primary_praises() -> None:
    hacked = torch.tensor([9.0, 1.0, 0.0, 2.0, 1.0])
    honest = [torch.tensor([0.0, 3.0, 2.0, 1.0, 1.0]), torch.tensor([0.1, 0.3, 0.2, 0.0, 0.1])]
    scores = scores_of(hacked, *honest)
    plain = credit(scores, [1.0, 0.2, 0.2])
    assert plain.all_advantages_G[0] > 0 and plain.withheld == 0
    chosen = credit(scores, [1.0, 0.2, 0.2], fusion="selective")
    assert chosen.all_advantages_G[0] == 0 and chosen.withheld == 1
    torch.testing.assert_close(chosen.all_advantages_G[1:], plain.all_advantages_G[1:])
    reversed_ = credit(scores, [1.0, 0.2, 0.2], fusion="reversing")
    torch.testing.assert_close(reversed_.all_advantages_G[0], -plain.all_advantages_G[0])
    turned = scores_of(honest[0], hacked, honest[1])
    other = credit(turned, [0.2, 1.0, 0.2], fusion="selective")
    torch.testing.assert_close(other.all_advantages_G, plain.all_advantages_G)


def test_selective_fusion_leaves_small_disagreement_alone_and_reversing_does_not() -> None:
    """Branch 0 ranks 1 under the first component and 0.8 under the second, a gap of 0.2."""
    first = torch.tensor([9.0, 5.0, 4.0, 3.0, 2.0, 1.0, 5.0])
    second = torch.tensor([5.0, 9.0, 4.0, 3.0, 2.0, 1.0, 5.0])
    scores = scores_of(first, second)
    assert credit(scores, [1.0, 0.2], fusion="selective").withheld == 0
    assert credit(scores, [1.0, 0.2], fusion="reversing").withheld == 1


def test_a_component_within_its_noise_has_no_vote() -> None:
    """The anchor does not vote: however far it is, branches that are told apart by noise alone stay noise."""
    hacked, dissent = torch.tensor([9.0, 1.0, 0.0, 2.0, 1.0]), torch.tensor([0.0, 3.0, 2.0, 1.0, 1000.0])
    scores = scores_of(hacked, dissent / 1000)
    assert credit(scores, [1.0, 0.2], fusion="selective").withheld == 1
    floors = {"b": 0.01}
    assert credit(scores, [1.0, 0.2], fusion="selective", noise_floors=floors).withheld == 0


@pytest.mark.parametrize("floor", [5.0, 20.0])  # below and above the spread of the other component
def test_a_measured_floor_tames_its_component_alone(floor: float) -> None:
    found = credit(scores_of(LARGE, SMALL), [1.0, 1.0], noise_floors={"b": floor})
    expected = 1.5 * 0.5 * (normalised(LARGE) + group_relative(SMALL[:-1], None, floor))
    torch.testing.assert_close(found.all_advantages_G, expected)


def test_groups_are_skipped_where_every_component_is_within_its_floor() -> None:
    scores = scores_of(LARGE, SMALL)
    assert credit(scores, [1.0, 1.0], noise_floors={"a": 20.0, "b": 0.5}) is None
    assert credit(scores, [1.0, 1.0], noise_floors={"a": 20.0, "b": 0.1}) is not None
    assert credit(scores, [1.0, 0.0], noise_floors={"a": 20.0, "b": 0.1}) is None, "weight 0 teaches nothing"
    # the default holds for what was not measured, and for nothing that was
    high = {"total": 20.0}
    assert credit(scores, [1.0, 1.0], noise_floors=high | {"b": 0.5}) is None
    assert credit(scores, [1.0, 1.0], noise_floors=high | {"b": 0.1}) is not None
    assert credit(scores, [1.0, 1.0], noise_floors=high) is None, "without measured floors the total decides"


def test_raw_fusion_is_skipped_by_the_floor_of_the_sum() -> None:
    scores = scores_of(LARGE, SMALL)
    spread = float((LARGE + SMALL)[:-1].std())  # the anchor is no baseline of a group
    for factor, skipped in ((1.01, True), (0.99, False)):
        floors = {"a": factor * spread, "b": 0.0}
        found = credit(scores, [1.0, 1.0], fusion="rewards", noise_floors=floors)
        assert (found is None) == skipped


@pytest.mark.parametrize(("advantages", "spread"), [("group", 10**0.5), ("anchor", 5**0.5)])
def test_a_collection_is_divided_by_the_spread_about_every_groups_own_mean(
    advantages: Any, spread: float
) -> None:
    """Anchors count where advantages are relative to them."""
    groups = [scores_of(torch.tensor(members)) for members in ([0.0, 2.0, 1.0], [0.0, 6.0, 3.0])]
    objective = replace(OBJECTIVE, advantages=advantages, scale="collection")
    config = Config(objective=objective, rewards=NO_FLOOR)
    blend = blend_of("a", torch.tensor([1.0]), config)
    scale = collection_scale(groups, blend)
    assert scale is not None
    alone = replace(config, objective=replace(objective, scale="group"))
    assert collection_scale(groups, replace(blend, config=alone)) is None
    draws = torch.Generator()
    for scores, size in zip(groups, (1.0, 3.0), strict=True):
        found = assign_credit(scores, blend, draws, scale)
        assert found is not None
        expected = 1.5 * torch.tensor([-size, size]) / spread
        torch.testing.assert_close(found.advantages_G, expected)
    noisy = replace(blend, default_floor=2 * spread)
    found = assign_credit(groups[1], noisy, draws, scale)
    assert found is not None, "no group is skipped, and a collection of noise is not brought to full size"
    torch.testing.assert_close(found.advantages_G, 1.5 * torch.tensor([-3.0, 3.0]) / (2 * spread))
    alike = scores_of(torch.full((3,), 4.0))
    found = assign_credit(alike, blend, draws, scale)
    assert found is not None and not found.advantages_G.any(), "small in a collection is small, and not noise"
    assert assign_credit(alike, blend, draws, collection_scale([alike], blend)) is None


def test_the_best_branch_alone_is_imitated_where_no_policy_over_branches_would_turn() -> None:
    """Best-of-n fine-tuning: a centred advantage of one branch would be 0."""
    group = scores_of(torch.tensor([0.0, 6.0, 3.0, 1.0]))
    config = Config(method="rvm", objective=replace(OBJECTIVE, keep=(1, 0)), rewards=NO_FLOOR)
    blend = blend_of("a", torch.tensor([1.0]), config)
    for method, scale in product(("rvm", "nft", "kvpo"), ("collection", "group")):
        objective = replace(config.objective, scale=scale)
        own = replace(blend, config=replace(config, method=method, objective=objective))
        found = assign_credit(group, own, torch.Generator(), collection_scale([group], own))
        assert found is not None and found.branches == (1,)
        assert float(found.advantages_G) == pytest.approx(1.5 * 3 / 3 if method == "rvm" else 0.0)


@pytest.mark.parametrize(
    ("members", "advantages", "best", "pushed"),
    [([1.0, 0, 0, 0, 0, 0, 0, 0, 0], "group", 4, [2.5, 0, 0, 0]),
     ([0.0, 6.0, 3.0, 9.0], "anchor", 1, [0.0])],
)  # fmt: skip
def test_nothing_is_pushed_from_where_the_best_branches_are_imitated(
    members: list[float], advantages: Any, best: int, pushed: list[float]
) -> None:
    """Kept branches may be below the mean of their group, and all of them worse than the anchor."""
    objective = replace(OBJECTIVE, advantages=advantages, keep=(best, 0), scale="group")
    blend = blend_of("a", torch.tensor([1.0]), Config(method="rvm", objective=objective, rewards=NO_FLOOR))
    found = assign_credit(scores_of(torch.tensor(members)), blend, torch.Generator())
    assert found is not None and found.advantages_G.tolist() == pytest.approx(pushed, abs=1e-6)


def test_names_are_checked_against_the_runs_components() -> None:
    scores = scores_of(LARGE, SMALL)
    with pytest.raises(ConfigurationError, match="rewards.noise_floors: 'z' is not a component .* a, b"):
        credit(scores, [1.0, 1.0], noise_floors={"z": 1.0})
    for weights, fusion in (([1.0, 0.0], "selective"), ([0.0, 1.0], "reversing")):
        with pytest.raises(ConfigurationError, match=f"rewards.fusion: {fusion} compares"):
            credit(scores, weights, fusion=fusion)
    with pytest.raises(ConfigurationError, match="rewards.fusion"):
        credit(scores_of(LARGE), [1.0], fusion="selective")
    nft = Config(method="nft", nft=NftSettings(selective_kl=0.5))
    blend_of("ab", torch.tensor([1.0, 1.0]), nft)
    with pytest.raises(ConfigurationError, match=r"nft.selective_kl: 0.5 compares the first component 'a'"):
        blend_of("ab", torch.tensor([1.0, 0.0]), nft)
    blend_of("ab", torch.tensor([1.0, 0.0]), replace(nft, method="kvpo"))


def test_the_null_control_trains_on_random_branches_with_the_same_advantages() -> None:
    """Permutation comes before the choice of the best and worst: which branches are kept is chance too."""
    members = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 1.0])
    config = Config(objective=replace(OBJECTIVE, keep=(2, 2)), rewards=NO_FLOOR)
    blend = blend_of("a", torch.tensor([1.0]), config)
    chance = replace(blend, config=replace(config, objective=replace(config.objective, advantages="random")))
    draws = torch.Generator().manual_seed(0)
    plain = assign_credit(scores_of(members), blend, draws)
    assert plain is not None and plain.branches == (0, 1, 4, 5)
    kept = []
    for _ in range(200):
        found = assign_credit(scores_of(members), chance, draws)
        assert found is not None
        torch.testing.assert_close(found.advantages_G.sort().values, plain.advantages_G.sort().values)
        own = found.all_advantages_G[list(found.branches)]
        torch.testing.assert_close(found.advantages_G, own - own.mean())
        kept += found.branches
    counts = torch.bincount(torch.tensor(kept), minlength=6).double()
    expected = 200 * 4 / 6
    assert bool(((counts - expected).abs() < 5 * (expected / 3) ** 0.5).all()), counts


def test_flipped_advantages_keep_the_same_branches_with_the_other_sign() -> None:
    members = torch.tensor([0.0, 1.0, 2.0, 4.0, 8.0, 16.0, 1.0])
    config = Config(objective=replace(OBJECTIVE, keep=(2, 2)), rewards=NO_FLOOR)
    blend = blend_of("a", torch.tensor([1.0]), config)
    wrong = replace(blend, config=replace(config, objective=replace(config.objective, advantages="flipped")))
    plain, flipped = (assign_credit(scores_of(members), one, torch.Generator()) for one in (blend, wrong))
    assert plain is not None and flipped is not None and plain.branches == flipped.branches
    torch.testing.assert_close(flipped.advantages_G, -plain.advantages_G)


@pytest.mark.parametrize("temperature", [None, 0.004])
def test_anchor_advantages_do_not_turn_the_gradient_of_a_policy_over_branches_alone(
    temperature: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every branch falls short of the anchor by much the same: only what they differ by may train.

    At ratio 1 the gradient is (A_k - pi_k sum A) / (G tau), which a constant c changes by
    c (1 - G pi_k) / (G tau); the policy here is far from uniform.
    """
    energies = torch.tensor([0.010, 0.012, 0.020, 0.024])
    members = torch.tensor([0.50, 0.54, 0.52, 0.49, 0.75])
    monkeypatch.setattr("kvpo.training.credit.ADVANTAGE_LIMIT", 10.0)
    config = replace(OBJECTIVE, advantages="anchor")

    def gradient(advantages: Tensor) -> Tensor:
        tau = calibrated_temperature(energies) if temperature is None else temperature
        policy = torch.softmax(-energies / tau, 0)
        return (advantages - policy * advantages.sum()) / (len(energies) * tau)

    found = credit(scores_of(members), [1.0], config)
    wanted = gradient(found.all_advantages_G - found.all_advantages_G.mean())
    assert torch.cosine_similarity(gradient(found.all_advantages_G), wanted, dim=0) < 0.7, "the trap"
    assert torch.cosine_similarity(gradient(found.advantages_G), wanted, dim=0) > 1 - 1e-6
    pooled = credit(scores_of(members), [1.0], config, anchor_in_pool=True)
    torch.testing.assert_close(pooled.advantages_G, pooled.all_advantages_G)


@pytest.mark.parametrize("floors", [{}, {"a": 0.1}])
@pytest.mark.parametrize(("advantages", "skipped"), [("anchor", False), ("group", True), ("random", True)])
def test_the_anchor_enters_the_noise_test_only_where_advantages_are_relative_to_it(
    floors: dict[str, float], advantages: Any, skipped: bool
) -> None:
    members = torch.tensor([0.50, 0.51, 0.50, 0.49, 5.0])
    config, floors = replace(OBJECTIVE, advantages=advantages), {"total": 0.1} | floors
    assert (credit(scores_of(members), [1.0], config, noise_floors=floors) is None) == skipped
