"""Stories: splits by construction, act lengths, events, distinct prompts."""

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvpo.world.stories import (
    EVENTS,
    MIN_ACT_BLOCKS,
    belongs,
    distinct_prompts,
    distinct_stories,
    named_split,
    sample_story,
    split_of,
    video_prompt,
)
from kvpo.world.vocabulary import COLOURS, MOTIONS, SCENES, SHAPES

SPLITS = ("train", "validation", "test")


def test_combination_shares_and_every_value_occurs_in_every_split():
    every = [(c, s, m, scene) for c in COLOURS for s in SHAPES for m in MOTIONS for scene in SCENES]
    members = {split: [x for x in every if split_of(*x) == split] for split in SPLITS}
    assert len(members["test"]) / len(every) == pytest.approx(0.20, abs=0.05)
    assert len(members["validation"]) / len(every) == pytest.approx(0.15, abs=0.05)
    for split in SPLITS:
        for position, values in enumerate((COLOURS, SHAPES, MOTIONS, SCENES)):
            assert {x[position] for x in members[split]} == set(values)


def test_split_membership_is_frozen():
    # A checkpoint trained on the training combinations is only honest while these stay put.
    every = [(c, s, m, scene) for c in COLOURS for s in SHAPES for m in MOTIONS for scene in SCENES]
    names = [split_of(*x) for x in every]
    assert [names.count(split) for split in SPLITS] == [442, 112, 146]
    digest = hashlib.sha256(" ".join(names).encode()).hexdigest()
    assert digest[:16] == "05dfe348ad709588"


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), num_acts=st.integers(1, 4), split=st.sampled_from(SPLITS))
def test_structure(seed, num_acts, split):
    story = sample_story(torch.Generator().manual_seed(seed), num_acts, 60, split=split)
    starts = [act.start for act in story.acts]
    ends = [*starts[1:], story.num_frames]
    assert len(story.acts) == num_acts and starts[0] == 0
    assert all(start % 3 == 0 for start in starts)
    assert all(end - start >= 3 * MIN_ACT_BLOCKS for start, end in zip(starts, ends, strict=True))
    assert all(belongs(act, split) for act in story.acts)
    for before, act in zip(story.acts, story.acts[1:], strict=False):
        assert (before.scene, before.actors) != (act.scene, act.actors), "a switch must be visible"
        if len(act.actors) == 2:
            first, second = act.actors
            assert first.colour != second.colour and first.shape != second.shape
    prompt = video_prompt(story, 7)
    assert prompt.id == 7 and prompt.switches == tuple(starts[1:]) and prompt.num_frames == 60


def test_events_mean_what_they_say():
    generator = torch.Generator().manual_seed(0)
    seen = set()
    for _ in range(300):
        acts = sample_story(generator, 4, 60).acts
        for k, act in enumerate(acts[1:], start=1):
            earlier = acts[: k - 1]
            now, before = set(act.actors), set(acts[k - 1].actors)
            seen.add(act.event)
            if act.event == "return":
                assert now <= {a for e in earlier for a in e.actors} and not now & before
            if act.event == "revisit":
                assert act.scene in {e.scene for e in earlier} and act.scene != acts[k - 1].scene
            if act.event == "show":
                assert not {a.shape for a in now} & {a.shape for a in before}
            if act.event == "leave":
                assert now < before
            if act.event == "join":
                assert now > before
            if act.event in ("turn", "recolour"):
                assert len(now - before) == 1 and act.scene == acts[k - 1].scene
    assert seen == set(EVENTS)


def test_splits_tell_the_same_kinds_of_story():
    def shares(split):
        generator = torch.Generator().manual_seed(1)
        acts = [act for _ in range(400) for act in sample_story(generator, 3, 60, split=split).acts[1:]]
        return {event: sum(a.event == event for a in acts) / len(acts) for event in EVENTS}

    train, test = shares("train"), shares("test")
    assert all(abs(train[event] - test[event]) < 0.06 for event in EVENTS), (train, test)


def test_same_seed_same_stories_and_distinct_captions_never_shared_between_splits():
    assert distinct_stories("test", 40, 3, 60, seed=3) == distinct_stories("test", 40, 3, 60, seed=3)
    prompts = {split: distinct_prompts(split, 150, 1, 30, seed=3, first_id=1000) for split in SPLITS}
    for split, some in prompts.items():
        assert len({p.segments for p in some}) == 150
        assert {named_split(caption) for p in some for caption in p.segments} == {split}
        assert [p.id for p in some] == list(range(1000, 1150))


def test_act_lengths_vary():
    starts = {tuple(a.start for a in s.acts) for s in distinct_stories("train", 60, 3, 60, seed=0)}
    assert len(starts) > 15


@pytest.mark.parametrize(("num_acts", "num_frames"), [(3, 33), (0, 30), (1, 31)])
def test_acts_that_do_not_fit_are_refused(num_acts, num_frames):
    with pytest.raises(ValueError, match=f"num_frames = {num_frames}"):
        sample_story(torch.Generator(), num_acts, num_frames)
