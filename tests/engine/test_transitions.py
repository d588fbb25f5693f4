"""Soft prompt transitions: the text moves over some blocks, in streams, branches and their replay."""

from dataclasses import replace

import pytest
import torch

from kvpo.engine.forks import Fork
from kvpo.engine.stream import advance, open_stream, shares_of, stream_latents
from kvpo.models.settings import Deployment
from tests.engine.test_replay import LONGER, by_hand
from tests.engine.tiny import (
    SEGMENTS,
    generator,
    members_of,
    prompt,
    replayed,
    residuals,
    rolled_out,
    tape_of,
    texts,
)

A, B, C = SEGMENTS[:3]


def test_the_share_of_the_new_prompt_rises_linearly() -> None:
    one, soft = prompt(0, 30, (8,)), Deployment(transition_blocks=3)
    shares = [shares_of(one, 1, start, soft) for start in (9, 12, 15, 18, 21)]
    assert [dict(own).get(B) for own in shares] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert all(sum(dict(own).values()) == 1 for own in shares)
    assert [dict(own).get(A) for own in shares] == [0.75, 0.5, 0.25, None, None]
    assert shares_of(one, 0, 6, soft) == ((A, 1.0),)
    assert all(shares_of(one, 1, at, Deployment()) == ((B, 1.0),) for at in (9, 12, 27))


def test_a_switch_in_a_transition_goes_on_from_what_was_told() -> None:
    """The third prompt comes one block after the second, of which a third has been told by then."""
    one, soft = prompt(0, 30, (9, 12)), Deployment(transition_blocks=2)
    told = [dict(shares_of(one, segment, at, soft)) for segment, at in ((1, 9), (2, 12), (2, 15), (2, 18))]
    expected = [
        {A: 2 / 3, B: 1 / 3},
        {A: 4 / 9, B: 2 / 9, C: 1 / 3},
        {A: 2 / 9, B: 1 / 9, C: 2 / 3},
        {C: 1.0},
    ]
    for found, wanted in zip(told, expected, strict=True):
        assert found == pytest.approx(wanted)


def test_a_prompt_may_say_over_how_many_blocks_each_switch_blends() -> None:
    one = replace(prompt(0, 30, (9, 18)), transitions=(1, None))
    at = ((1, 9), (1, 12), (2, 18), (2, 21))
    told = [dict(shares_of(one, segment, start, Deployment(transition_blocks=3))) for segment, start in at]
    assert told == [{A: 0.5, B: 0.5}, {B: 1.0}, {B: 0.75, C: 0.25}, {B: 0.5, C: 0.5}]
    abrupt = replace(one, transitions=(0, 0))
    assert shares_of(abrupt, 2, 18, Deployment(transition_blocks=3)) == ((C, 1.0),)


def test_each_block_is_told_its_mixture_and_history_is_encoded_anew_once() -> None:
    """Led by hand: a hard switch whose text is replaced before every block."""
    soft = generator(transition_blocks=2)
    whole = stream_latents(soft, [prompt(0, 27, (15,))], texts(), tape_of())[0]
    hard, table = generator(), dict(texts())
    stream = open_stream(hard, hard.new_cache(200), prompt(0, 27, (15,)), table, tape_of())
    for start in range(0, 27, 3):
        share = min(1.0, (start - 12) / 9)
        table[B] = (1 - share) * texts()[A] + share * texts()[B] if start >= 15 else texts()[B]
        advance(hard, [stream])
    assert (torch.cat(stream.latents) - whole).abs().max() <= 1e-10
    abrupt = stream_latents(hard, [prompt(0, 27, (15,))], texts(), tape_of())[0]
    assert torch.equal(abrupt[:15], whole[:15])
    assert (abrupt[15:18] - whole[15:18]).abs().max() > 1e-3


def test_streams_in_transition_do_not_depend_on_their_batch() -> None:
    one = generator(transition_blocks=2)
    prompts = [prompt(0, 27), prompt(1, 27, (15,)), prompt(2, 27, (6, 15))]
    together = stream_latents(one, prompts, texts(), tape_of())
    for row, single in enumerate(prompts):
        assert (together[row] - stream_latents(one, [single], texts(), tape_of())[0]).abs().max() <= 1e-10


@pytest.mark.parametrize("bank", [0, 3])
@pytest.mark.parametrize("fork", [15, 18, 21])
def test_branches_and_their_replay_are_told_what_their_blocks_are(fork: int, bank: int) -> None:
    """Windows that begin at the switch, within the transition, and where it ends."""
    one = generator(transition_blocks=3, bank_size=bank)
    rollout = rolled_out(one, [prompt(0, 39, (15,))], [Fork(fork, LONGER)])
    (group,) = rollout.groups
    for (_, index), velocities in zip(members_of(rollout), replayed(one, members_of(rollout)), strict=True):
        with torch.no_grad():
            assert (velocities - by_hand(one, group, index)).abs().max() <= 1e-10
    assert residuals(one, [(group, group.branches)]).max() <= 1e-20
    streamed = stream_latents(one, [prompt(0, 39, (15,))], texts(), tape_of())[0]
    anchor = group.clean_MTCHW[group.branches]
    assert (anchor - streamed[fork : fork + len(anchor)]).abs().max() <= 1e-10
    soft = replayed(one, [(group, group.branches)])
    group.root.deployment = generator().deployment
    at_once = replayed(one, [(group, group.branches)])
    assert (at_once - soft).abs().max() > 1e-3
    rollout.release()
