"""The replay against a stream that is led along a member's stored latents by hand, one state at a time."""

from dataclasses import replace

import torch

from kvpo.engine.forks import Fork
from kvpo.engine.stream import commit_banks, text_of
from kvpo.models.deployment import deployment_context, record_block
from tests.engine.test_histories import every_history
from tests.engine.tiny import EXPLORATION, generator, prompt, replayed, rolled_out, routed_row

LONGER = replace(EXPLORATION, blocks=3)
FORK = 18


def by_hand(one, group, index):
    """Velocities ``[P, S, F, C, H, W]`` at a member's states; every block of its own leaves its pages."""
    stream, found = group.root.fork(), []
    for block in range(group.blocks):
        text = text_of([stream])
        commit_banks(one, [stream], text)
        context = deployment_context(one.deployment, [stream.history])
        for step, sigma in enumerate(one.sigmas):
            state = group.trajectories.states_MPSFCHW[index, block, step][None]
            found.append(one.velocity(state, torch.tensor([sigma]), text, context)[0])
        clean = group.clean_MTCHW[index, 3 * block : 3 * block + 3][None]
        stream.history.append(stream.history.cache.write(*one.encode(clean, text, context))[0])
        record_block(one.deployment, stream.history)
    stream.history.release()
    return torch.stack(found).unflatten(0, (group.blocks, -1))


@every_history
def test_a_replay_sees_each_members_own_blocks(history):
    """Branches and anchor of groups that fork apart."""
    one = generator(**history)
    prompts = [prompt(0, 39), prompt(1, 39, (15,)), prompt(2, 39)]
    forks = [Fork(frame, LONGER) for frame in (12, 15, 27)]
    rollout = rolled_out(one, prompts, forks, ("k",))
    for group in rollout.groups:
        members = [(group, index) for index in range(4)]
        for (group, index), velocities in zip(members, replayed(one, members), strict=True):
            with torch.no_grad():
                expected = by_hand(one, group, index)
            assert (velocities - expected).abs().max() <= 1e-10
            with torch.no_grad():
                others = by_hand(one, replace(group, clean_MTCHW=group.clean_MTCHW.roll(1, 0)), 0)
                own = by_hand(one, group, 0)
            assert (others - own)[1:].abs().max() > 1e-3
    rollout.release()
    assert rollout.cache.pages_in_use == 0


@every_history
def test_a_routed_replay_is_where_its_branch_was(history):
    """With the pool kept, every branch's own velocities come back, and not in the deployment context."""
    one = generator(**history, renoise=True, context_noise=0.005)
    prompts = [prompt(0, 39, (FORK,)), prompt(1, 39, (9,))]
    asked = [Fork(FORK, LONGER)] * 2
    rollout = rolled_out(one, prompts, asked, ("k",), keep_pool=True)
    branches = [(group, branch) for group in rollout.groups for branch in range(group.branches)]
    members = [[pair for pair in branches if pair[0] is group] for group in rollout.groups]
    routed = torch.cat([replayed(one, own, routed_row) for own in members])
    deployed = torch.cat([replayed(one, own) for own in members])
    own = torch.cat([group.trajectories.velocities_MPSFCHW[:-1] for group in rollout.groups])
    assert (routed - own).abs().max() <= 1e-10
    assert (deployed - own).abs().flatten(1).amax(1).min() > 1e-2
    for group, branch in branches:
        pages = group.root.history.pages
        frames = [[slot.frame for slot in block] for block in group.routes[branch]]
        assert group.routed_pages(branch) == tuple(tuple(pages[f] for f in block) for block in frames)
    rollout.release()
    assert rollout.cache.pages_in_use == 0
