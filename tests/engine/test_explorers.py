"""Explorers: what their branches differ in, what they share with the anchor, and that keys decide it."""

from dataclasses import replace

import pytest
import torch

from kvpo.engine.explorers import (
    EXPLORERS,
    Member,
    Site,
    chosen_routes,
    fresh_noise,
    neighbour_noise,
    renoise,
    routes,
    sde,
)
from kvpo.engine.forks import Fork
from kvpo.engine.pages import PlannedRollout
from kvpo.engine.stream import advance, stream_latents
from tests.engine.tiny import (
    EXPLORATION,
    generator,
    grown_roots,
    prompt,
    rolled_out,
    route,
    tape_of,
    texts,
    visited,
)

NOISE = 0.6
OURS = replace(EXPLORATION, noise=NOISE, tail_blocks=2)
PROMPTS = [prompt(0, 36, (15,)), prompt(1, 36), prompt(2, 36, (24,))]
FORKS = [Fork(15, OURS), Fork(18, replace(OURS, blocks=1)), Fork(12, OURS)]
CHOSEN = [[route(*frames, group=n) for frames in ((3, 4, 5), (5, 6, 8), (4, 4, 7))] for n in range(3)]
NAMED = {**EXPLORERS, "chosen": chosen_routes(CHOSEN)}
CASES = {
    "routes": ("routes", False),
    "routes, re-noising": ("routes", True),
    "chosen": ("chosen", False),
    "fresh": ("fresh", False),
    "fresh, re-noising": ("fresh", True),
    "neighbour": ("neighbour", False),
    "sde": ("sde", False),
    "renoise": ("renoise", True),
}
every_case = pytest.mark.parametrize(("name", "renoising"), CASES.values(), ids=CASES)


def a_site(one, key=("k",), forks=FORKS, steps=3):
    return Site(one, PlannedRollout(PROMPTS, forks), tape_of(), key, steps)


def changed(**changes):
    """The forks with something else asked for."""
    return [replace(fork, exploration=replace(fork.exploration, **changes)) for fork in FORKS]


def explored(one, explorer, key=("k",), forks=FORKS, **options):
    return rolled_out(one, PROMPTS, forks, key, explorer=explorer, **options)


def largest(difference):
    return float(difference.abs().max())


def differences(some, others):
    """Largest differences of two rollouts' states, velocities and clean latents."""
    found = {"branches": 0.0, "anchors": 0.0}
    for a, b in zip(some.groups, others.groups, strict=True):
        assert a.fork == b.fork and a.clean_MTCHW.shape == b.clean_MTCHW.shape
        for x, y in (
            (a.clean_MTCHW, b.clean_MTCHW),
            (a.trajectories.states_MPSFCHW, b.trajectories.states_MPSFCHW),
            (a.trajectories.velocities_MPSFCHW, b.trajectories.velocities_MPSFCHW),
        ):
            found["branches"] = max(found["branches"], largest((x - y)[:-1]))
            found["anchors"] = max(found["anchors"], largest((x - y)[-1]))
    return found


def test_the_named_explorers():
    assert EXPLORERS == {
        "routes": routes, "fresh": fresh_noise, "neighbour": neighbour_noise, "sde": sde, "renoise": renoise,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "own_kinds"),
    [
        ("fresh", {"initial", "renoise 1", "renoise 2"}),
        ("neighbour", {"initial", "renoise 1", "renoise 2"}),
        ("renoise", {"renoise 1", "renoise 2"}),
        ("sde", {"renoise 1", "renoise 2"}),
    ],
)
def test_noise_branches_have_noise_of_their_own_in_the_window_alone(name, own_kinds):
    one, shared = generator(), tape_of()
    for group, fork in enumerate(FORKS):
        members = EXPLORERS[name](a_site(one), group)
        assert len(members) == 3 and {member.group for member in members} == {group}
        assert all(member.routes is None for member in members)
        first = fork.frame // 3
        window = range(first, first + fork.exploration.blocks)
        for block in range(12):
            for kind in ("initial", "renoise 1", "renoise 2", "context"):
                own = [member.tape(group, block, kind) for member in members]
                if block in window and kind in own_kinds:
                    tensors = [*own, shared(group, block, kind)]
                    for n, a in enumerate(tensors):
                        assert all(largest(a - b) > 0.1 for b in tensors[:n])
                else:
                    assert all(torch.equal(noise, shared(group, block, kind)) for noise in own)
    steps = {member.step for group in range(3) for member in EXPLORERS[name](a_site(one), group)}
    assert len(steps) == 1 and (steps == {None}) == (name != "sde"), "one step, so one batch"


@pytest.mark.parametrize("name", ["routes", "chosen"])
def test_routed_branches_differ_in_their_routes_alone(name):
    site = a_site(generator())
    for group, fork in enumerate(FORKS):
        members = NAMED[name](site, group)
        assert [(one.group, one.tape, one.step) for one in members] == [(group, None, None)] * 3
        assert {len(one.routes) for one in members} == {fork.exploration.blocks}
        if name == "chosen":
            assert [one.routes for one in members] == [
                (own,) * fork.exploration.blocks for own in CHOSEN[group]
            ]
        else:
            assert len({frozenset(one.routes[0]) for one in members}) == 3
            routed = {slot for one in members for block in one.routes for slot in block}
            assert {slot.group for slot in routed} == {group}
            assert {slot.frame for slot in routed} <= set(site.pools[group])


@every_case
def test_the_anchor_is_plain_generation_whatever_explores(name, renoising):
    one = generator(renoise=renoising, context_noise=0.005)
    expected = stream_latents(one, PROMPTS, texts(), tape_of())
    rollout = explored(one, NAMED[name])
    for row, group in zip(expected, rollout.groups, strict=True):
        latents = torch.cat([*group.root.latents, group.clean_MTCHW[-1]])
        assert largest(latents - row[: len(latents)]) <= 1e-10
        window = group.trajectories.clean_MPFCHW.flatten(1)
        apart = torch.cdist(window, window) + 9 * torch.eye(4)
        assert apart.min() > 0.1, "every branch is told apart from the others and from the anchor"
    rollout.release()
    assert rollout.cache.pages_in_use == 0


def led(one, root, member, fork, *, own_step=None):
    """Clean latents of a stream that is led by hand, and takes ``own_step`` once the window is over."""
    stream = root.fork(member.tape, member.step)
    pages, blocks = root.history.pages, fork.exploration.blocks
    for block in range(blocks + fork.exploration.tail_blocks):
        routed = block < blocks and member.routes is not None
        if block == blocks:
            stream.tape, stream.step = tape_of(), own_step
        seen = [pages[slot.frame] for slot in member.routes[block]] if routed else None
        advance(one, [stream], routes=[seen], recent=OURS.recent)
    stream.history.release()
    return torch.cat(stream.latents[fork.frame // 3 :])


@every_case
def test_after_the_window_noise_and_step_are_the_generators_own(name, renoising):
    one = generator(renoise=renoising, context_noise=0.005)
    rollout = explored(one, NAMED[name], keep_pool=True)
    site = a_site(one)
    for group, fork in zip(rollout.groups, FORKS, strict=True):
        for found, member in zip(group.clean_MTCHW, NAMED[name](site, group.index), strict=False):
            assert largest(found - led(one, group.root, member, fork)) <= 1e-10
            if member.step is not None:
                assert largest(found - led(one, group.root, member, fork, own_step=member.step)) > 1e-2
    rollout.release()


def step_by_hand(name, x, v, sigma, sigma_next, noise):
    """x' of the explorers' solver steps, in the papers' own notation."""
    if name == "sde":  # Flow-GRPO: drift and diffusion in t = sigma
        t = sigma if sigma < 1 else sigma_next
        r2, dt = NOISE**2 * t / (1 - t), sigma_next - sigma
        return x + (v + r2 / (2 * sigma) * (x + (1 - sigma) * v)) * dt + (-r2 * dt) ** 0.5 * noise
    if name == "ode":
        return x + (sigma_next - sigma) * v
    clean = x - sigma * v
    return (1 - sigma_next) * clean + sigma_next * noise


@pytest.mark.parametrize("steps", [1, 2, 3])
@every_case
def test_branches_visit_what_their_noise_and_their_step_lead_to(name, renoising, steps):
    """Also beyond the steps that are learned from, where stochastic ones have ended."""
    one = generator(renoise=renoising)
    fork, own = FORKS[0], PROMPTS[:1]
    members = NAMED[name](Site(one, PlannedRollout(own, [fork]), tape_of(), ("k",), steps), 0)
    rollout = grown_roots(one, own, fork.frame, fork.exploration)
    found = visited(rollout, [*members, Member(0)])
    rollout.release()
    levels = (*one.sigmas, 0.0)
    for n, member in enumerate([*members, Member(0)]):
        tape = member.tape or tape_of()
        for p, block in enumerate((5, 6)):
            states, velocities = found.states_PSFCHW[n, p], found.velocities_PSFCHW[n, p]
            assert torch.equal(states[0], tape(0, block, "initial"))
            clean = found.clean_TCHW[n, 3 * p : 3 * p + 3]
            for s, after in enumerate((*states[1:], clean)):
                rule = "renoise" if renoising else "ode"
                rule = "sde" if name == "sde" and n < 3 and s < steps and s < 2 else rule
                expected = step_by_hand(
                    rule,
                    states[s],
                    velocities[s],
                    levels[s],
                    levels[s + 1],
                    tape(0, block, f"renoise {s + 1}"),
                )
                assert largest(after - expected) <= 1e-10


def test_stochastic_steps_without_noise_are_the_solvers_own():
    one = generator()
    still, moved = (explored(one, sde, forks=changed(noise=kappa)) for kappa in (1e-12, NOISE))
    for group, other in zip(still.groups, moved.groups, strict=True):
        assert largest(group.clean_MTCHW - group.clean_MTCHW[-1]) <= 1e-10
        assert largest(group.trajectories.states_MPSFCHW - group.trajectories.states_MPSFCHW[-1]) <= 1e-10
        assert (other.clean_MTCHW[:-1] - other.clean_MTCHW[-1]).abs().flatten(1).amax(1).min() > 0.1
    for rollout in (still, moved):
        rollout.release()


def test_branches_of_other_steps_share_the_initial_noise():
    for explorer, renoising in ((renoise, True), (sde, False), (routes, False)):
        rollout = explored(generator(renoise=renoising), explorer)
        for group in rollout.groups:
            first = group.trajectories.states_MPSFCHW[:, :, 0]
            assert torch.equal(first, first[-1:].expand_as(first))
            later = group.trajectories.states_MPSFCHW[:, 0, -1].flatten(1)
            assert (torch.cdist(later, later) + torch.eye(4)).min() > 1e-2
        rollout.release()


@pytest.mark.parametrize("strength", [0.3, 0.6, 1.0])
def test_neighbours_are_correlated_with_the_shared_noise_as_their_strength_says(strength):
    forks = [Fork(12, replace(OURS, branches=24, blocks=8, noise=strength))]
    members = neighbour_noise(Site(generator(), PlannedRollout(PROMPTS[:1], forks), tape_of(), ("k",)), 0)
    places = [(0, block, kind) for block in range(4, 12) for kind in ("initial", "renoise 1", "renoise 2")]
    shared = torch.stack([tape_of()(*place) for place in places]).flatten()
    found = torch.stack([torch.stack([one.tape(*place) for place in places]).flatten() for one in members])
    n = found.numel()
    added = (found - (1 - strength**2) ** 0.5 * shared) / strength
    assert abs(added.mean()) < 4 / n**0.5 and abs(added.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((added * shared).mean()) < 4 / n**0.5
    between = added.corrcoef() - torch.eye(24)
    assert between.abs().max() < 5 / shared.numel() ** 0.5, "each branch's own"
    correlation = torch.stack([found.flatten(), shared.repeat(24)]).corrcoef()[0, 1]
    assert abs(correlation - (1 - strength**2) ** 0.5) < 0.02
    if strength == 1:
        fresh = fresh_noise(Site(generator(), PlannedRollout(PROMPTS[:1], forks), tape_of(), ("k",)), 0)
        assert all(
            torch.equal(a.tape(*places[0]), b.tape(*places[0])) for a, b in zip(members, fresh, strict=True)
        )


@every_case
def test_a_row_limit_changes_nothing_whatever_explores(name, renoising):
    """Forks at different frames and windows of different lengths, in batches of every size."""
    one = generator(renoise=renoising, context_noise=0.005)
    free, *limited = (explored(one, NAMED[name], forks=changed(rows=rows)) for rows in (0, 1, 2))
    for other in limited:
        assert max(differences(free, other).values()) <= 1e-10
        assert [group.routes for group in free.groups] == [group.routes for group in other.groups]
    for rollout in (free, *limited):
        rollout.release()
        assert rollout.cache.pages_in_use == 0


@pytest.mark.parametrize("name", EXPLORERS)
def test_the_key_alone_decides(name):
    one = generator(renoise=name == "renoise")
    state = torch.get_rng_state()
    first, same, other = (explored(one, EXPLORERS[name], key) for key in (("k", 1), ("k", 1), ("k", 2)))
    assert torch.equal(state, torch.get_rng_state())
    assert differences(first, same) == {"branches": 0, "anchors": 0}
    apart = differences(first, other)
    assert apart["branches"] > 0.1 and apart["anchors"] <= 1e-10
    for rollout in (first, same, other):
        rollout.release()


@pytest.mark.parametrize("name", ["fresh", "neighbour", "renoise", "sde"])
def test_branches_of_noise_differ_between_groups(name):
    """Even of one video at one fork."""
    forks = [Fork(15, OURS)] * 2
    site = Site(generator(), PlannedRollout([PROMPTS[1]] * 2, forks), tape_of(), ("k",))
    a, b = (EXPLORERS[name](site, group) for group in range(2))
    for one, other in zip(a, b, strict=True):
        assert largest(one.tape(1, 5, "renoise 1") - other.tape(1, 5, "renoise 1")) > 0.1


def test_arrivals_are_kept_beside_the_states_that_are_learned_from():
    one = generator()
    (whole, kept, arrived) = (
        explored(one, sde, steps=steps, arrivals=arrivals)
        for steps, arrivals in ((None, False), (2, False), (2, True))
    )
    assert [r.groups[0].trajectories.states_MPSFCHW.shape[2] for r in (whole, kept, arrived)] == [3, 2, 3]
    for a, b, c in zip(kept.groups, arrived.groups, whole.groups, strict=True):
        assert torch.equal(a.trajectories.states_MPSFCHW, b.trajectories.states_MPSFCHW[:, :, :2])
        assert torch.equal(b.trajectories.states_MPSFCHW, c.trajectories.states_MPSFCHW)
        assert b.trajectories.noise == NOISE and b.trajectories.sigmas == one.sigmas
    for rollout in (whole, kept, arrived):
        rollout.release()
