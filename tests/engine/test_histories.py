"""Routed exploration and replay on every history: what is seen, what is exact, what is given back."""

from dataclasses import replace

import pytest
import torch

from kvpo.engine import stream as engine_stream
from kvpo.engine.explorers import Member
from kvpo.engine.forks import Fork, plan_forks
from kvpo.engine.stream import advance, give_frames, open_stream
from kvpo.method.gibbs import branch_log_probs, policy_ratio
from kvpo.models.deployment import routed_context
from tests.engine.tiny import (
    EXPLORATION,
    FRAME,
    generator,
    grown_roots,
    members_of,
    prompt,
    residuals,
    rolled_out,
    route,
    tape_of,
    texts,
    visited,
)

HISTORIES = {
    "LongLive": dict(),
    "LongLive, sink reset": dict(keep_sink_at_switch=False),
    "Self-Forcing, everything": dict(window=-1, sink=0),
    "Self-Forcing, rolling": dict(sink=0),
    "MemFlow": dict(bank_size=3),
    "MemFlow, sparse": dict(bank_size=3, sparse_activation=True),
    "MemFlow, every block": dict(bank_size=3, bank_every_block=True),
    "relative positions": dict(relative_positions=True),
}
GIVEN, FORK = 12, 18
every_history = pytest.mark.parametrize("history", HISTORIES.values(), ids=HISTORIES)
NEW_PROMPT = prompt(0, 30, (FORK,))


def collected(one, prompts, fork=FORK, exploration=EXPLORATION):
    return rolled_out(one, prompts, [Fork(fork, exploration)] * len(prompts), ("k",))


def extended(one, num_frames, switches):
    """A stream of given frames that was continued to the fork, a switch there acted on."""
    stream = open_stream(one, one.new_cache(120), prompt(0, num_frames, switches), texts(), tape_of())
    latents = torch.randn(1, GIVEN, *FRAME, generator=torch.Generator().manual_seed(4)).double()
    with torch.no_grad():
        give_frames(one, [stream], latents)
        while stream.start < FORK:
            advance(one, [stream])
        engine_stream.switch_prompts(one, [stream])
    return stream


def most_recent(one, history):
    past = one.deployment.local_past
    frames = [frame for frame in range(history.end) if frame not in history.sink]
    return frames if past is None else frames[-past:]


@every_history
def test_the_all_recent_route_is_deployment_bitwise_after_given_frames_and_a_switch(history):
    one = generator(**history)
    plain, routed = (extended(one, 60, (15, FORK)) for _ in range(2))
    for _ in range(4):
        recent = most_recent(one, routed.history)
        pages = [routed.history.page_ids(recent[:-3])]
        expected = advance(one, [plain])
        found = advance(one, [routed], routes=pages, recent=3)
        assert torch.equal(expected.velocities_RSFCHW, found.velocities_RSFCHW)
    for stream in (plain, routed):
        stream.history.release()
        assert stream.history.cache.pages_in_use == 0


@every_history
def test_a_branch_sees_sink_bank_routes_and_recent_frames(history, monkeypatch):
    one = generator(**history)
    seen = []

    def recording(deployment, histories, routes, recent):
        context = routed_context(deployment, histories, routes, recent)
        seen.append((context, [h.fork() for h in histories], routes))
        return context

    rollout = grown_roots(one, [NEW_PROMPT], FORK, EXPLORATION)
    root = rollout.roots[0].history
    monkeypatch.setattr(engine_stream, "routed_context", recording)
    visited(rollout, [Member(0, routes=(route(4, 7, 13),) * 2), Member(0)])
    sink = range(one.deployment.sink)
    if one.deployment.sink and not one.deployment.keep_sink_at_switch:
        sink = range(FORK - 12, FORK - 9)
    checked = 0
    for context, histories, routes in seen:
        for row, (own, pages) in enumerate(zip(histories, routes, strict=True)):
            local = most_recent(one, own)[-3:] if pages else most_recent(one, own)
            if pages:
                assert list(pages) == root.page_ids([4, 7, 13]) and local == [*range(own.end - 3, own.end)]
                checked += 1
            banks = own.bank or [[]]
            expected = [[*own.page_ids(sink), *bank, *(pages or ()), *own.page_ids(local)] for bank in banks]
            table = context.pages[:, row] if own.bank else context.pages[None, row]
            assert table.tolist() == expected
            own.release()
        sparse = one.deployment.sparse_activation
        assert context.sparse_pages == (len(sink) + len(banks[0]) if sparse else 0)
    assert checked == 2
    rollout.release()
    assert rollout.cache.pages_in_use == 0


@every_history
def test_the_anchor_has_no_energy_and_a_second_replay_is_the_first(history):
    """Before, at and after switches; so the first ratio of an update is exactly 1."""
    one = generator(**history, renoise=True, context_noise=0.005)
    rollout = collected(one, [prompt(0, 30, (9,)), prompt(1, 30, (FORK,)), prompt(2, 30, (24,))])
    members = members_of(rollout)
    first, second = (residuals(one, members) for _ in range(2))
    assert torch.equal(first, second)
    ratio = policy_ratio(*(branch_log_probs(energy.sum((1, 2)), 0.1) for energy in (first, second)))
    assert (ratio == 1).all()
    for group, energy in zip(rollout.groups, first.sum((1, 2)).view(3, -1), strict=True):
        assert energy[group.branches] < 1e-20
        assert energy[: group.branches].min() > 1e-4
    few = torch.cat([residuals(one, [member]) for member in members])
    assert (few - first).abs().max() < 1e-12
    rollout.release()
    assert rollout.cache.pages_in_use == 0


@every_history
def test_forks_anywhere_that_fits(history):
    one = generator(**history)
    exploration = replace(EXPLORATION, branches=2, tail_blocks=0)
    video = prompt(0, 30, (9, 24))
    forks = {fork.frame: fork.exploration for fork in plan_forks([video], exploration, one.deployment).forks}
    assert min(forks) <= 9 and max(forks) == 24
    for fork in (min(forks), 15, max(forks)):
        rollout = collected(one, [video], fork, forks[fork])
        (group,) = rollout.groups
        assert (group.clean_MTCHW[:-1] - group.clean_MTCHW[-1]).abs().flatten(1).amax(1).min() > 1e-3
        rollout.release()
        assert rollout.cache.pages_in_use == 0


@every_history
def test_the_replay_sees_the_new_prompt_after_a_switch_at_the_fork(history):
    """Text and re-encoded history; were either the old prompt's, the anchor would have an energy."""
    one = generator(**history)
    rollout = collected(one, [NEW_PROMPT])
    (group,) = rollout.groups
    anchor = group.branches
    assert group.root.segment == 1
    assert residuals(one, [(group, anchor)]).max() < 1e-20

    old_text = {**texts(), NEW_PROMPT.segments[1]: texts()[NEW_PROMPT.segments[0]]}
    misread = replace(group, root=replace(group.root, texts=old_text))
    assert residuals(one, [(misread, anchor)])[:, 0].min() > 1e-4

    stale = grown_roots(one, [prompt(0, 30)], FORK, EXPLORATION)
    root = stale.roots[0]
    root.prompt, root.segment = NEW_PROMPT, 1
    forgetful = replace(group, root=root)
    assert residuals(one, [(forgetful, anchor)])[:, 0].min() > 1e-7
    for each in (rollout, stale):
        each.release()
        assert each.cache.pages_in_use == 0
