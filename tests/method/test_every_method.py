"""What holds of every method, whatever its loss."""

from dataclasses import replace

import pytest
import torch

from kvpo.app.configuration import preset
from kvpo.method.advantage import ADVANTAGE_LIMIT
from kvpo.method.evidence import Tables
from kvpo.method.methods import METHODS
from kvpo.method.settings import MethodSettings, NftSettings
from tests.method.cases import CASES, FORKS, KNOWN, evidence_for
from tests.method.toy import (
    credit,
    seeded,
    table_of,
)


def tables_for(name, seed):
    settings, explorer = CASES[name]
    earned = credit(0, 1, 3)
    evidence = evidence_for(name, settings, FORKS[explorer], earned)
    shape = evidence.weights_NPS.shape
    table = 1 + 0.05 * torch.rand(shape, generator=seeded(seed), dtype=torch.float64)
    return settings, earned, evidence, table


@pytest.mark.parametrize("name", CASES)
def test_a_method_reports_what_it_explains(name):
    settings, earned, evidence, table = tables_for(name, 0)
    _, metrics = METHODS[name].loss(Tables(table, table, table, evidence.branch_N), earned, settings)
    assert metrics.keys() == METHODS[name].metrics.keys()
    assert all(type(value) is float for value in metrics.values())


@pytest.mark.parametrize("name", [name for name in CASES if "ratio_mean" in METHODS[name].metrics])
def test_the_ratio_is_exactly_one_before_the_first_step(name):
    settings, earned, evidence, table = tables_for(name, 0)
    table.requires_grad_()
    loss, metrics = METHODS[name].loss(
        Tables(table, table.detach().clone(), 2 * table.detach(), evidence.branch_N), earned, settings
    )
    (coefficients,) = torch.autograd.grad(loss, table)
    assert metrics["ratio_deviation"] == 0.0 and metrics["ratio_max"] == 1.0 == metrics["ratio_mean"]
    assert metrics["clip_fraction"] == 0.0 and float(coefficients.abs().max()) > 0


def test_an_update_reports_the_extreme_ratios_of_its_groups():
    for method in METHODS.values():
        extreme = {name for name, metric in method.metrics.items() if metric.largest}
        assert extreme == {"ratio_max", "ratio_deviation"} & method.metrics.keys()


def test_every_method_with_a_policy_has_a_ratio():
    assert {name for name in METHODS if "ratio_deviation" in METHODS[name].metrics} == {
        "kvpo", "latent-distance", "flow-grpo", "cm-grpo"
    }  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_only_linear_methods_have_coefficients_that_no_table_changes(name):
    found = []
    for seed in (0, 1):
        settings, earned, evidence, now = tables_for(name, seed)
        old, reference = tables_for(name, 2 + seed)[-1], tables_for(name, 4 + seed)[-1]
        now.requires_grad_()
        loss, _ = METHODS[name].loss(Tables(now, old, reference, evidence.branch_N), earned, settings)
        found.append(torch.autograd.grad(loss, now)[0])
    assert torch.equal(*found) == METHODS[name].linear


@pytest.mark.parametrize("name", CASES)
def test_only_the_current_policys_table_gets_gradients(name):
    settings, earned, evidence, table = tables_for(name, 0)
    tables = Tables(*(table.clone().requires_grad_() for _ in range(3)), evidence.branch_N)
    loss, _ = METHODS[name].loss(tables, earned, settings)
    loss.backward()
    assert tables.now.grad is not None and tables.old.grad is None and tables.reference.grad is None


@pytest.mark.parametrize("order", [(3, 1, 0), (1, 0, 3)])
@pytest.mark.parametrize("name", CASES)
def test_the_order_of_the_branches_does_not_matter(name, order):
    settings, explorer = CASES[name]
    fork = FORKS[explorer]
    losses = []
    for branches in ((0, 1, 3), order):
        earned = credit(*branches)
        evidence = evidence_for(name, settings, fork, earned)
        three = (table_of(p, fork, evidence) for p in (KNOWN.now, KNOWN.old, KNOWN.reference))
        tables = Tables(*three, evidence.branch_N)
        losses.append(METHODS[name].loss(tables, earned, settings)[0])
    torch.testing.assert_close(*losses, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_evidence_in_half_precision_is_weighed_and_compared_in_single_or_wider(name):
    settings, explorer = CASES[name]
    exact = FORKS[explorer]
    half = replace(
        exact,
        states_MPSFCHW=exact.states_MPSFCHW.bfloat16(),
        velocities_MPSFCHW=exact.velocities_MPSFCHW.bfloat16(),
        clean_MPFCHW=exact.clean_MPFCHW.bfloat16(),
    )
    evidence = METHODS[name].evidence(half, credit(0, 1), settings, seeded(3))
    wide = METHODS[name].evidence(exact, credit(0, 1), settings, seeded(3))
    # The cells of a Gaussian policy are sums over a block's elements, whose differences float32 cannot tell.
    expected = torch.float64 if name in ("flow-grpo", "cm-grpo") else torch.float32
    assert evidence.weights_NPS.dtype == expected
    torch.testing.assert_close(evidence.weights_NPS.double(), wide.weights_NPS, rtol=1e-6, atol=0)
    torch.testing.assert_close(evidence.targets_NPSFCHW.double(), wide.targets_NPSFCHW, rtol=0.05, atol=0.2)


PUBLISHED = {
    "kvpo": {
        "temperature": None, "clip": (0.1, 0.2),
        "anchor_share": 0.0, "simplex_kl": 0.0, "anchor_state_weight": 0.0,
    },
    "latent-distance": {"temperature": None, "clip": (0.1, 0.2), "space": "latent"},
    "flow-grpo": {"clip": (0.2, 0.2)},
    "cm-grpo": {"clip": (0.2, 0.2)},
    "nft": {"beta": 1.0, "old": "rollout", "selective_kl": 0.0},
    "rvm": {},
    "self-distill": {},
}  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_settings_start_from_the_documented_values(name):
    settings = preset("demo", {"method": name}).method_settings
    shared = {key: vars(settings)[key] for key in ("temperature", "clip") if key in PUBLISHED[name]}
    assert vars(settings.own) | shared == PUBLISHED[name]
    assert ADVANTAGE_LIMIT == 2.5


def test_runs_start_from_what_their_method_needs():
    changed = {name: type(settings.own).STARTS_FROM for name, (settings, _) in CASES.items()}
    assert {name: start for name, start in changed.items() if start} == {
        "latent-distance": {"objective.temperature": None},
        "flow-grpo": {"exploration.noise": 0.7, "objective.clip": (0.2, 0.2)},
        "cm-grpo": {"stream.step_rule": "renoise", "objective.clip": (0.2, 0.2)},
        "nft": {"objective.velocity_kl": 0.1},
        "rvm": {"objective.velocity_kl": 0.1, "objective.scale": "collection"},
        "self-distill": {"exploration.donor": 0},
    }


def test_what_each_method_asks_of_its_rollout():
    asked = {
        name: {
            flag for flag in ("rewarded", "arrivals", "keep_pool", "imitates", "linear") if vars(method)[flag]
        }
        for name, method in METHODS.items()
    }
    assert asked == {
        "kvpo": {"rewarded"},
        "latent-distance": {"rewarded"},
        "flow-grpo": {"rewarded", "arrivals"},
        "cm-grpo": {"rewarded", "arrivals"},
        "nft": {"rewarded", "linear"},
        "rvm": {"rewarded", "imitates", "linear"},
        "self-distill": {"keep_pool", "linear"},
    }
    averaging = METHODS["nft"].averaged_old
    assert not averaging(MethodSettings(NftSettings()))
    assert averaging(MethodSettings(NftSettings(old="average")))
    assert not any(METHODS[name].averaged_old(settings) for name, (settings, _) in CASES.items())
    assert {name for name, method in METHODS.items() if method.probabilities} == {"kvpo", "latent-distance"}
