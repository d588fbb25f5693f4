"""NFT, RVM and self-distillation against their equations, and the velocity KL of every method."""

import pytest
import torch

from kvpo.method.methods import METHODS
from kvpo.method.nft import goodness, overrated
from kvpo.method.settings import (
    MethodSettings,
    NftSettings,
    RvmSettings,
    SelfDistillSettings,
)
from tests.method.cases import CASES, EXACT, FORKS, KNOWN, agrees, at, evidence_for, matched
from tests.method.toy import (
    BLOCKS,
    ROUTED,
    credit,
    history_of,
    relative_difference,
    seeded,
    table_of,
    taught,
    velocity,
)


@pytest.mark.parametrize("beta", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("steps", [2, 4])
def test_nft_pulls_its_positive_and_pushes_its_negative_velocity(beta, steps, monkeypatch):
    """r || v+ - v* ||^2 + (1 - r) || v- - v* ||^2, v+ = beta v + (1 - beta) v_old and v- its mirror."""
    monkeypatch.setattr("kvpo.method.nft.ADVANTAGE_LIMIT", 1.2)  # so that one advantage lies beyond it
    settings, fork, earned = MethodSettings(NftSettings(beta=beta)), FORKS["renoise"], credit(0, 1, 3)
    rewarded = dict(zip(earned.branches, earned.advantages_G.tolist(), strict=True))

    def formula(now):
        terms = []
        for branch, x, toward, past in matched(fork, earned.branches, steps):
            r = 0.5 + 0.5 * max(-1.0, min(1.0, rewarded[branch] / 1.2))
            v, v_old = velocity(now, x, past), velocity(KNOWN.old, x, past)
            positive, negative = beta * v + (1 - beta) * v_old, (1 + beta) * v_old - beta * v
            terms.append(r * (positive - toward).square().mean())
            terms.append((1 - r) * (negative - toward).square().mean())
        return torch.stack(terms).sum() / (len(terms) / 2)

    metrics = agrees("nft", settings, fork, earned, formula, steps=steps, constant=True)
    assert metrics["target_distance"] == pytest.approx(metrics["loss"] / beta**2)
    assert metrics["good_share"] == pytest.approx((1.0 / 2.4 + 0.5 + 0.5 - 0.7 / 2.4 + 0.0) / 3)


def test_nft_tells_good_from_bad_and_stops_at_the_limit():
    advantages = torch.tensor([-9.0, -1.0, 0.0, 1.0, 9.0], dtype=torch.float64)
    assert goodness(advantages, 2.0).tolist() == [0.0, 0.25, 0.5, 0.75, 1.0]


@pytest.mark.parametrize("steps", [2, 4])
def test_rvm_weighs_matching_errors_by_advantages(steps):
    fork, earned = FORKS["renoise"], credit(0, 1, 2, 3)
    rewarded = dict(zip(earned.branches, earned.advantages_G.tolist(), strict=True))

    def formula(now):
        terms = [
            rewarded[branch] * (toward - velocity(now, x, past)).square().mean()
            for branch, x, toward, past in matched(fork, earned.branches, steps)
        ]
        return torch.stack(terms).mean()

    agrees("rvm", MethodSettings(RvmSettings()), fork, earned, formula, steps=steps)


def test_every_branch_is_noised_by_the_same_noise():
    fork = FORKS["renoise"]
    evidence = METHODS["rvm"].evidence(fork, credit(0, 3), MethodSettings(RvmSettings()), seeded(3))
    noise = evidence.targets_NPSFCHW + fork.clean_MPFCHW[[0, 3]][:, :, None]
    torch.testing.assert_close(noise[0], noise[1])
    assert torch.equal(
        evidence.states_QPSFCHW,
        METHODS["rvm"].evidence(fork, credit(0, 3), MethodSettings(RvmSettings()), seeded(3)).states_QPSFCHW,
    )


def test_the_noise_does_not_depend_on_the_default_type():
    fork = FORKS["renoise"]
    found = []
    for dtype in (torch.float32, torch.float64):
        torch.set_default_dtype(dtype)
        try:
            evidence = METHODS["rvm"].evidence(fork, credit(0), MethodSettings(RvmSettings()), seeded(3))
        finally:
            torch.set_default_dtype(torch.float32)
        found.append(evidence.states_QPSFCHW)
    assert torch.equal(*found)


def test_self_distillation_teaches_what_other_pages_say():
    fork, earned = FORKS["routes"], credit(0, 1, 2, 3)
    own = history_of(fork.clean_MPFCHW[-1])

    def formula(now):
        frozen = tuple(tensor.detach() for tensor in now)
        terms = []
        for branch in earned.branches:
            for b in range(BLOCKS):
                for s in range(2):
                    x = fork.states_MPSFCHW[-1, b, s]
                    taught_velocity = velocity(frozen, x, ROUTED[branch, b])
                    terms.append((taught_velocity - velocity(now, x, own[b])).square().mean())
        return torch.stack(terms).mean()

    agrees("self-distill", MethodSettings(SelfDistillSettings()), fork, earned, formula)
    assert not METHODS["self-distill"].rewarded and len(METHODS) == len(CASES)


def drift_of(method, settings, fork, earned, evidence):
    rows = method.drift(fork, earned, evidence, settings)
    return taught(rows, fork, KNOWN)


@pytest.mark.parametrize("name", CASES)
def test_the_drift_rows_add_up_to_the_velocity_kl_at_the_anchors_states(name):
    settings, explorer = CASES[name]
    fork, earned = FORKS[explorer], credit(0, 1, 3)
    rows = drift_of(METHODS[name], settings, fork, earned, evidence_for(name, settings, fork, earned))
    found = table_of(KNOWN.now, fork, rows).sum()
    expected = torch.stack(
        [
            (at(KNOWN.now, fork, 4, b, s) - at(KNOWN.reference, fork, 4, b, s)).square().mean()
            for b in range(BLOCKS)
            for s in range(2)
        ]
    ).mean()
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=0)
    gradients = [list(torch.autograd.grad(value, KNOWN.now)) for value in (found, expected)]
    assert relative_difference(*gradients) <= EXACT
    assert float(table_of(KNOWN.reference, fork, rows).abs().max()) == 0.0


def test_the_selective_velocity_kl_holds_the_overrated_branches_alone():
    settings, fork, earned = MethodSettings(NftSettings(selective_kl=0.5)), FORKS["renoise"], credit(1, 2, 0)
    evidence = evidence_for("nft", settings, fork, earned)
    rows = drift_of(METHODS["nft"], settings, fork, earned, evidence)
    assert rows.past_Q == (0,), "gaps 1 and 2 are positive; branch 0 is the upper half"
    expected = torch.stack(
        [
            (velocity(KNOWN.now, x, past) - velocity(KNOWN.reference, x, past)).square().mean()
            for _, x, _, past in matched(fork, [0], 2)
        ]
    ).mean()
    torch.testing.assert_close(table_of(KNOWN.now, fork, rows).sum(), expected, rtol=EXACT, atol=0)


def test_no_overrated_branch_means_no_drift_rows():
    settings, fork = MethodSettings(NftSettings(selective_kl=0.5)), FORKS["renoise"]
    earned = credit(1, 3)
    evidence = evidence_for("nft", settings, fork, earned)
    assert METHODS["nft"].drift(fork, earned, evidence, settings) is None


def test_the_overrated_are_the_upper_share_of_the_positive_gaps():
    gaps = torch.tensor([3.0, -5.0, 1.0, 0.0, 2.0, 4.0])
    assert overrated(gaps, 1.0) == [0, 2, 4, 5]
    assert overrated(gaps, 0.5) == [0, 5]
    assert overrated(gaps, 0.01) == [5]
    assert overrated(gaps, 0.0) == [] == overrated(-gaps.abs(), 0.5)
