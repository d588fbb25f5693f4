import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kvpo.method.evidence import (
    Evidence,
    Tables,
    Trajectories,
    anchor_drift,
    drift_evidence,
    evidence_of,
    joined_evidence,
    no_credit,
    residual_table,
)
from kvpo.method.flow import STEPS, add_noise, clean_of
from kvpo.method.kvpo import evidence as kvpo_evidence
from kvpo.method.latent_distance import anchor_state_evidence
from kvpo.method.nft import evidence as nft_evidence
from kvpo.method.settings import KvpoSettings, MethodSettings, NftSettings
from tests.method.toy import (
    BLOCKS,
    BRANCHES,
    SIGMAS,
    credit,
    policies,
    replayed,
    sampled,
    seeded,
    table_of,
    taught,
)

KNOWN = policies()
FORK = sampled(KNOWN.old, STEPS["ode"], routed=True)
EVERY = credit(0, 1, 2, 3)
LEVELS = torch.tensor([1.0, 0.9375], dtype=torch.float64)
ONES = torch.ones(1, 1, 1)


def latents(seed: int, rows: int = 3) -> torch.Tensor:
    """[N, P=2, S=2, F=3, C=4, H=2, W=2]"""
    return torch.randn(rows, 2, 2, 3, 4, 2, 2, generator=seeded(seed), dtype=torch.float64)


def energies(targets, velocities, weights=1.0) -> torch.Tensor:
    """Sums of the table's rows, [N]."""
    evidence = evidence_of(
        latents(9, len(targets)), range(len(targets)), targets, range(len(targets)), weights=weights
    )
    return residual_table(evidence.weights_NPS, evidence.targets_NPSFCHW, velocities).sum((1, 2))


# ---- the table -------------------------------------------------------------------------------------------


def test_the_residual_of_a_constant_difference_is_its_square():
    velocity = latents(0)
    residual = residual_table(ONES, velocity, velocity + 0.5)
    assert residual.shape == (3, 2, 2)
    torch.testing.assert_close(residual, torch.full_like(residual, 0.25))


def test_energy_is_the_mean_over_elements_and_the_sum_over_blocks_and_steps():
    branch, policy = latents(0), latents(1)
    weights = torch.tensor([1.0, 0.25], dtype=torch.float64)
    expected = [
        sum(
            weights[s] * ((branch[g, b, s] - policy[g, b, s]) ** 2).mean() for b in range(2) for s in range(2)
        )
        for g in range(3)
    ]
    torch.testing.assert_close(energies(branch, policy, weights), torch.stack(expected))


def test_energy_accumulates_over_micro_batches_of_rows():
    branch, policy = latents(0), latents(1)
    weights = torch.tensor([1.0, 0.25], dtype=torch.float64)
    energy = torch.zeros(3, dtype=torch.float64)
    for b in range(2):
        for s in range(2):
            part = (slice(None), slice(b, b + 1), slice(s, s + 1))
            energy += residual_table(weights[s].expand(3, 1, 1), branch[part], policy[part]).sum((1, 2))
    torch.testing.assert_close(energy, energies(branch, policy, weights))


def test_a_replay_that_repeats_the_branch_has_energy_exactly_zero():
    branch = latents(0).float()
    assert torch.equal(residual_table(ONES, branch, branch.clone()).sum((1, 2)), torch.zeros(3))


def test_squared_noise_levels_give_the_clean_space_energy():
    state, branch, policy = latents(0), latents(1), latents(2)
    levels = LEVELS.expand(3, 2, 2)
    difference = clean_of(branch, state, levels) - clean_of(policy, state, levels)
    torch.testing.assert_close(
        energies(branch, policy, LEVELS.square()),
        difference.square().mean(dim=(3, 4, 5, 6)).sum(dim=(1, 2)),
    )


def test_half_precision_velocities_are_compared_in_float32():
    branch, policy = latents(0).bfloat16(), latents(1).bfloat16()
    residual = residual_table(ONES, branch, policy)
    assert residual.dtype == torch.float32
    torch.testing.assert_close(residual, residual_table(ONES, branch.double(), policy.double()).float())


def test_the_gradient_pulls_the_policy_towards_the_branch():
    branch, policy = latents(0), latents(1).requires_grad_()
    residual_table(ONES, branch, policy).sum().backward()
    elements = 3 * 4 * 2 * 2
    torch.testing.assert_close(policy.grad, 2 * (policy.detach() - branch) / elements)


def test_the_anchor_state_target_leads_to_the_branch():
    evidence = anchor_state_evidence(FORK, [0, 2], 4, 1.0)
    anchor = FORK.states_MPSFCHW[-1]
    levels = torch.tensor(SIGMAS, dtype=torch.float64).expand(BLOCKS, 4)
    for row, branch in enumerate((0, 2)):
        led = clean_of(evidence.targets_NPSFCHW[row], anchor, levels)
        torch.testing.assert_close(led, FORK.clean_MPFCHW[branch][:, None].expand_as(led))

    clean, noise = latents(0)[:, :, 0], latents(1)[:, :, 0]
    states = torch.stack([add_noise(clean, noise, sigma) for sigma in (1.0, 0.9375)], 2)
    own = anchor_state_evidence(
        Trajectories(states, states, clean, (1.0, 0.9375)), [2], 2, 1.0
    ).targets_NPSFCHW
    torch.testing.assert_close(own[0], (noise - clean)[2][:, None].expand_as(own[0]))


@given(scale=st.floats(1e-3, 1e3), seed=st.integers(0, 1000))
def test_the_table_is_proportional_to_its_weights(scale, seed):
    targets, velocities = latents(seed), latents(seed + 1)
    weights = torch.rand(3, 2, 2, generator=seeded(seed), dtype=torch.float64)
    torch.testing.assert_close(
        residual_table(scale * weights, targets, velocities),
        scale * residual_table(weights, targets, velocities),
    )


@given(order=st.permutations(range(4)))
def test_rows_in_another_order_are_the_same_table_in_that_order(order):
    evidences = [
        kvpo_evidence(FORK, credit(*some), MethodSettings(KvpoSettings()), seeded(0))
        for some in ((0, 1, 2, 3), order)
    ]
    straight, mixed = (table_of(KNOWN.now, FORK, evidence).detach() for evidence in evidences)
    torch.testing.assert_close(mixed, straight[list(order)], rtol=1e-12, atol=0)
    tables = Tables(mixed, mixed, mixed, evidences[1].branch_N)
    for sums in tables.per_branch((0, 1, 2, 3)):
        torch.testing.assert_close(sums, straight.sum((1, 2)), rtol=1e-12, atol=0)


def test_cells_of_several_rows_of_a_branch_are_added_up():
    table = torch.arange(12, dtype=torch.float64).view(3, 2, 2)
    now, old, reference = Tables(table, 2 * table, 3 * table, (5, 2, 5)).per_branch((2, 5))
    assert now.tolist() == [4 + 5 + 6 + 7, 0 + 1 + 2 + 3 + 8 + 9 + 10 + 11]
    assert old.tolist() == (2 * now).tolist() and reference.tolist() == (3 * now).tolist()


# ---- joining ---------------------------------------------------------------------------------------------


def rows_at(fork, members: list[int], seed: int, branches: list[int] | None = None) -> Evidence:
    """Random targets and weights at the first two states of some members."""
    generator = seeded(seed)
    states = fork.states_MPSFCHW[members, :, :2]
    targets = torch.randn(states.shape, generator=generator, dtype=torch.float64)
    weights = torch.rand(states.shape[:3], generator=generator, dtype=torch.float64)
    return evidence_of(states, members, targets, members if branches is None else branches, weights=weights)


members = st.lists(st.integers(0, BRANCHES), min_size=1, max_size=4)


@given(first=members, second=members, seed=st.integers(0, 1000))
def test_joined_evidence_is_both_tables_and_replays_shared_trajectories_once(first, second, seed):
    parts = [rows_at(FORK, some, seed + n) for n, some in enumerate((first, second))]
    both = joined_evidence(*parts)
    tables = [table_of(KNOWN.now, FORK, part).detach() for part in parts]
    assert torch.equal(table_of(KNOWN.now, FORK, both).detach(), torch.cat(tables))
    assert both.branch_N == (*first, *second)
    assert both.past_Q == (*first, *(m for m in dict.fromkeys(second) if m not in first))
    assert len(both.states_QPSFCHW) == len(both.past_Q)


def test_trajectories_with_one_past_but_other_states_are_not_merged():
    fork = sampled(KNOWN.old, STEPS["renoise"])
    visited = rows_at(fork, [0, 0], 0)
    moved = torch.cat([visited.states_QPSFCHW[:1], visited.states_QPSFCHW[:1] + 1])
    first = evidence_of(moved, [0, 0], visited.targets_NPSFCHW, [0, 0])
    second = rows_at(fork, [0], 1)
    assert joined_evidence(first, second).past_Q == (0, 0), (
        "the first of two trajectories behind one past is found"
    )
    assert joined_evidence(
        second, nft_evidence(fork, credit(0), MethodSettings(NftSettings()), seeded(0))
    ).past_Q == (0, 0)


def test_the_same_states_behind_another_past_are_not_merged():
    first = rows_at(FORK, [0], 0)
    assert joined_evidence(
        first, evidence_of(first.states_QPSFCHW, [1], first.targets_NPSFCHW, [1])
    ).past_Q == (0, 1)


def test_the_velocity_kl_of_anchor_states_needs_no_second_replay():
    evidence = kvpo_evidence(FORK, EVERY, MethodSettings(KvpoSettings(anchor_state_weight=0.5)), seeded(0))
    assert evidence.past_Q == (0, 1, 2, 3, 4) and evidence.query_N == (0, 1, 2, 3, 4, 4, 4, 4)
    both = joined_evidence(evidence, anchor_drift(FORK, EVERY, evidence, MethodSettings(KvpoSettings())))
    assert both.past_Q == evidence.past_Q and both.query_N[-1] == 4
    assert both.teachers == {"reference"} and both.branch_N[-1] == -1


# ---- teachers --------------------------------------------------------------------------------------------


def test_a_teacher_adds_its_share_to_its_own_rows_alone():
    base = rows_at(FORK, [0, 1], 0)
    plain = evidence_of(base.states_QPSFCHW, [0, 1], base.targets_NPSFCHW, [0, 1])
    old = evidence_of(
        base.states_QPSFCHW, [0, 1], base.targets_NPSFCHW, [0, 1], teacher="old", share_N=[0.25, -1.5]
    )
    drift = drift_evidence(base.states_QPSFCHW, [0, 1])
    evidence = joined_evidence(joined_evidence(plain, old), drift)
    velocity = torch.randn(evidence.targets_NPSFCHW.shape, generator=seeded(5), dtype=torch.float64)
    known = evidence.with_teacher("old", velocity)
    expected = evidence.targets_NPSFCHW.clone()
    expected[2] += 0.25 * velocity[2]
    expected[3] += -1.5 * velocity[3]
    torch.testing.assert_close(known.targets_NPSFCHW, expected, rtol=1e-15, atol=0)
    assert evidence.teachers == {"old", "reference"} and known.teachers == {"reference"}
    done = known.with_teacher("reference", velocity)
    assert done.teachers == set() and torch.equal(done.targets_NPSFCHW[4:], velocity[4:])
    assert torch.equal(done.with_teacher("old", velocity).targets_NPSFCHW, done.targets_NPSFCHW)


def test_shares_of_half_precision_velocities_are_not_rounded():
    states = torch.zeros(1, 1, 1, 1, 1, 1, 1, dtype=torch.bfloat16)
    evidence = evidence_of(states, [0], states, [0], teacher="old", share_N=[1 / 3])
    found = evidence.with_teacher("old", states + 3).targets_NPSFCHW
    assert found.dtype == torch.float32 and float(found) == pytest.approx(1.0, rel=1e-6)


def test_drift_rows_add_up_to_the_mean_squared_velocity_difference():
    states = FORK.states_MPSFCHW[[1, 4], :, :3]
    rows = taught(drift_evidence(states, [1, 4]), FORK, KNOWN)
    now, reference = (replayed(policy, FORK, rows) for policy in (KNOWN.now, KNOWN.reference))
    torch.testing.assert_close(
        table_of(KNOWN.now, FORK, rows).sum(), (now - reference).square().mean(), rtol=1e-12, atol=0
    )
    assert float(table_of(KNOWN.reference, FORK, rows).abs().sum()) == 0.0


# ---- credit ----------------------------------------------------------------------------------------------


def test_no_credit_trains_on_every_branch_alike():
    found = no_credit(3)
    assert found.branches == (0, 1, 2) and not found.advantages_G.any()


def test_rows_get_the_advantages_of_their_branches():
    found = credit(1, 3).advantages_N((3, 1, 3), torch.zeros((), dtype=torch.float64))
    assert found.tolist() == [-1.3, -0.7, -1.3]
