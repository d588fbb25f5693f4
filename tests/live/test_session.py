"""A directed stream: its script decides every latent, and it can be left and taken up again."""

import gc
import json
import os
import random
import resource
from collections import deque
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kvpo.engine.stream import advance, open_stream, switch_prompts
from kvpo.live.protocol import Refusal
from kvpo.live.scheduler import SessionLimits
from kvpo.live.script import Cue
from kvpo.live.session import Session, Stage
from kvpo.live.snapshots import restored, snapshot_of
from tests.live.stage import scheduler, session, slow_stage, stage

SMALL = SessionLimits(sessions=1, frames=9)


def resident_bytes() -> int:
    """Memory that the process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def play(one: Session, blocks: int = 1) -> None:
    """Generate blocks of every arm, as the scheduler does."""
    own = scheduler(one.stage, SMALL)
    for _ in range(blocks):
        one.begin_block()
        with torch.no_grad():
            for name in one.arms:
                own._advance(name, [one])
        one.end_block()


def shown(one: Session, arm: str = "base") -> Tensor:
    return one.arms[arm].spool.read(0, one.start)


def by_script(own: Stage, one: Session) -> Tensor:
    """The latents that a session's script gives when the engine streams it from the first frame."""
    prompt = one.script.shown(one.start)
    stream = open_stream(
        own.generator, own.generator.new_cache(600), prompt, own.embed(prompt.segments), one.tape
    )
    while stream.start < one.start:
        switch_prompts(own.generator, [stream])  # before pages are named: it writes new ones
        route = one.script.routes.get(stream.start // own.generator.block)
        pages = None if route is None else stream.history.page_ids(route)
        advance(own.generator, [stream], routes=[pages], recent=own.exploration.recent)
    return torch.cat(stream.latents)


def test_a_session_is_what_its_script_says():
    own = stage()
    one = session(own)
    play(one, 3)
    one.show(Cue("a blue disc"))
    play(one, 3)
    one.route([4, 5], 2)
    play(one, 4)
    assert one.script.switches == (9,) and set(one.script.routes) == {6, 7}
    assert torch.equal(shown(one), by_script(own, one))
    alone = session(own)
    play(alone, 10)
    assert not torch.equal(shown(one)[9:], shown(alone)[9:])


@pytest.mark.parametrize(("deployed", "asked"), [(2, None), (0, 2)])
def test_transitions_of_a_session_outlive_a_snapshot_and_forks(deployed, asked):
    """Texts of earlier prompts are there for as long as blocks are told of them, and no longer."""
    own = stage(transition_blocks=deployed)
    one = session(own)
    play(one, 4)
    one.show(Cue("a blue disc", transition_blocks=asked))
    play(one)
    again = restored(own, own.generator.new_cache(600), *snapshot_of(one))
    one.open_fork("base", one.start, 2, 2)
    one.choose(None)
    for session_of in (one, again):
        play(session_of, 4)
        assert torch.equal(shown(session_of), by_script(own, session_of))
    assert one.script.transitions == again.script.transitions == (asked,)
    one.show(Cue("a green ring", transition_blocks=asked))
    play(one)
    assert set(one.texts) == {"a blue disc", "a green ring"}
    one.show(Cue("a white square", transition_blocks=0))
    play(one)
    assert set(one.texts) == {"a white square"}
    assert torch.equal(shown(one), by_script(own, one))


@pytest.mark.parametrize("frame", [24, 21, 15, 12, 9, 6, 3, 0])
@pytest.mark.parametrize(
    "deployed",
    [{"keep_sink_at_switch": True}, {"keep_sink_at_switch": False}, {"transition_blocks": 2}],
    ids=["kept sink", "moved sink", "transition"],
)
def test_going_back_leaves_what_its_script_says(frame, deployed):
    own = stage(**deployed)
    one = session(own)
    play(one, 4)
    one.show(Cue("a blue disc"))  # at frame 12
    play(one, 2)
    one.show(Cue("a green ring"))  # at frame 18
    play(one, 2)
    before = shown(one)
    one.back_to(frame)
    assert one.start == frame and torch.equal(shown(one), before[:frame])
    play(one, 5)
    assert one.prompt == "a green ring"
    assert torch.equal(shown(one), by_script(own, one))


def test_a_prompt_right_after_going_back_to_a_switch():
    own = stage()
    one = session(own)
    play(one, 4)
    one.show(Cue("a blue disc"))
    play(one, 2)
    one.back_to(12)
    one.show(Cue("a green ring"))
    play(one, 2)
    assert one.script.segments == ("a red square", "a green ring") and one.script.switches == (12,)
    assert torch.equal(shown(one), by_script(own, one))


def test_a_moment_whose_pages_are_gone_is_encoded_again_from_its_latents():
    own = stage()
    one = session(own)
    play(one, 20)
    assert 20 not in one.history.pages
    one.back_to(24)
    play(one, 3)
    assert one.script.switches == (24,)  # under the same prompt
    assert torch.equal(shown(one), by_script(own, one))


def test_branches_differ_by_their_routes_and_the_chosen_one_is_what_follows():
    own = stage()
    one = session(own, arms=("base", "aligned"))
    play(one, 8)
    used = one.history.cache.pages_in_use
    fork = one.open_fork("base", 18, 3, 2)
    assert one.history.cache.pages_in_use == used and one.start == 24
    assert fork.routes[0] is None and len({route for route in fork.routes}) == 4
    assert len({tuple(pixels.flatten().tolist()) for pixels in fork.pixels}) == 4
    one.choose(2)
    assert one.start == 18 and one.script.routes == {6: fork.routes[2], 7: fork.routes[2]}
    play(one, 2)
    assert torch.allclose(own.codec.decode(shown(one)[None])[0, 18:], fork.pixels[2], atol=1e-5)
    assert torch.equal(shown(one), shown(one, "aligned"))
    assert torch.equal(shown(one), by_script(own, one))


def test_a_fork_that_is_not_used_changes_nothing():
    own = stage()
    one, other = session(own), session(own)
    play(one, 8)
    play(other, 8)
    one.open_fork("base", 12, 3, 2)
    one.choose(None)
    play(one, 2)
    play(other, 2)
    assert torch.equal(shown(one), shown(other))
    with pytest.raises(Refusal, match="no open fork"):
        one.choose(None)


def test_a_fork_under_a_prompt_that_came_later():
    own = stage()
    one = session(own)
    play(one, 4)
    one.show(Cue("a blue disc"))
    play(one, 4)
    fork = one.open_fork("base", 9, 2, 1)
    one.choose(1)
    play(one, 1)
    assert one.script.switches == (9,) and one.prompt == "a blue disc"
    assert torch.allclose(own.codec.decode(shown(one)[None])[0, 9:], fork.pixels[1], atol=1e-5)


@pytest.mark.parametrize("bank", [0, 3])
def test_a_snapshot_continues_bit_for_bit(bank):
    own = stage(bank_size=bank)
    one = session(own, arms=("base", "aligned"))
    play(one, 6)
    one.pin([3], True, 8)
    one.show(Cue("a blue disc", frames=6))
    one.line_up([Cue("a green ring")])
    play(one, 6)
    one.route([3, 20], 5)
    play(one, 1)
    tensors, record = snapshot_of(one)
    cache = own.generator.new_cache(one.history.cache.num_pages)
    other = restored(own, cache, tensors, record)
    assert cache.pages_in_use == one.history.cache.pages_in_use
    assert torch.equal(shown(one), shown(other)) and other.script == one.script
    play(one, 6)
    play(other, 6)
    assert torch.equal(shown(one), shown(other))
    other.release()
    assert cache.pages_in_use == 0
    with pytest.raises(Refusal, match="other weights"):
        restored(replace(own, identity="else"), cache, tensors, record)


def damaged():
    """What may be wrong with the record or the tensors of a snapshot, by name."""
    for key in ("identity", "script", "start", "arms", "cue", "cue_start", "coming", "queue", "pins"):
        yield f"no {key}", lambda record, _, key=key: record.pop(key)
    for key in ("segments", "switches", "transitions", "routes", "seed"):
        yield f"a script without {key}", lambda record, _, key=key: record["script"].pop(key)
    for key in ("pages", "sink", "bank", "latest", "segment", "fresh_prompt"):
        yield f"an arm without {key}", lambda record, _, key=key: record["arms"]["base"].pop(key)
    yield "arms of another kind", lambda record, _: record.update(arms=["base"])
    yield "pages that are not there", lambda record, _: record["arms"]["base"].update(pages=[[0, 4000]])
    for key in ("base.keys", "base.latents"):
        yield f"no {key}", lambda _, tensors, key=key: tensors.pop(key)
    yield "keys of another shape", lambda _, tensors: tensors.update({"base.keys": torch.zeros(1, 2, 3)})
    yield "an earlier format", lambda record, _: record.update(format=0)
    yield "no format", lambda record, _: record.pop("format")


def test_damaged_and_earlier_snapshots_are_refused_in_one_line_and_hold_no_page():
    own = stage()
    one = session(own)
    play(one, 4)
    one.show(Cue("a blue disc"))
    cache = own.generator.new_cache(one.history.cache.num_pages)
    for name, change in damaged():
        tensors, record = snapshot_of(one)
        record = json.loads(json.dumps(record))
        change(record, tensors)
        with pytest.raises(Refusal, match="^snapshot: ") as refusal:
            restored(own, cache, tensors, record)
        assert "\n" not in str(refusal.value) and refusal.value.code == "not_found", name
        assert cache.pages_in_use == 0, name


def test_prompts_that_are_never_shown_leave_nothing():
    one = session(stage())
    play(one, 2)
    for n in range(50):
        one.show(Cue(f"a prompt {n}"))
        one.line_up([Cue(f"a queued prompt {n}")])
    assert len(one.texts) <= 4
    play(one)
    assert one.prompt == "a prompt 49" and one.texts.keys() == {"a prompt 49", "a queued prompt 49"}


def test_queued_prompts_follow_one_another_by_their_lengths():
    own = stage()
    one = session(own)
    one.show(Cue("one", frames=6))
    one.line_up([Cue("two", frames=4), Cue("three"), Cue("never")])
    play(one, 8)
    assert one.script.segments == ("one", "two", "three") and one.script.switches == (6, 12)
    one.show(Cue("now"))
    one.show(Cue("rather this"))
    play(one, 1)
    assert one.script.segments[3:] == ("rather this",) and one.script.switches == (6, 12, 24)
    assert one.texts.keys() == {"rather this", "never"}


@pytest.mark.parametrize(("rows", "together"), [(0, 2), (1, 1)])
def test_sessions_share_forward_passes_and_see_what_they_see_alone(rows, together, monkeypatch):
    limits = SessionLimits(sessions=2, frames=30, rows=rows)
    own = scheduler(stage(), limits)
    passes: list[int] = []
    model = type(own.stage.generator.transformer)
    forward = model.forward
    monkeypatch.setattr(
        model,
        "forward",
        lambda self, x, *rest, **more: passes.append(len(x)) or forward(self, x, *rest, **more),
    )
    shows = [
        own.open(name, partial(Session, own.stage, own.cache, ["base"], Cue(text), seed), list, 0.0, 0.0)
        for name, text, seed in (("one", "a red square", 1), ("two", "a blue disc", 2))
    ]
    for _ in range(3):
        own.generate(shows)
    assert set(passes) == {together}
    for show in shows:
        alone = session(own.stage, show.session.prompt, show.session.script.seed)
        play(alone, 3)
        assert torch.allclose(shown(show.session), shown(alone), atol=1e-4)


def test_what_stays_resident():
    own = stage()
    one = session(own)
    play(one, 4)
    one.pin([4, 5], True, 3)
    with pytest.raises(Refusal, match="at most 3"):
        one.pin([7, 8], True, 3)
    play(one, 12)
    assert {4, 5} <= one.history.pages.keys() and 6 not in one.history.pages
    with pytest.raises(Refusal, match="frame 6 is not resident"):
        one.route([4, 6], 1)
    with pytest.raises(Refusal, match="3 routed slots"):
        one.route([4, 5, 40, 41], 1)
    one.route([4, 5], 3)
    one.pin([4, 5], False, 3)
    play(one, 1)
    assert one.sees() == {"sink": [0, 1, 2], "routed": [4, 5], "local": [48, 49, 50]}
    play(one, 1)
    one.route([], 1)
    play(one, 1)
    assert one.sees()["routed"] == [] and 4 not in one.history.pages


@pytest.mark.parametrize("seed", range(2))
def test_no_commands_need_more_pages_than_a_session_is_given(seed):
    own = stage(keep_sink_at_switch=bool(seed % 2))
    one = session(own, arms=("base", "aligned"))
    draws = random.Random(seed)
    for _ in range(40):
        do = draws.randrange(7)
        held = sorted(one.history.pages)
        try:
            if do == 0:
                one.show(Cue(draws.choice(["a", "b", "c"])))
            elif do == 1 and held:
                one.pin(draws.sample(held, min(len(held), 4)), draws.random() < 0.8, 24)
            elif do == 2 and held:
                one.route(draws.sample(held, min(len(held), 3)), draws.randrange(1, 5))
            elif do == 3 and one.start:
                one.open_fork("base", 3 * draws.randrange(one.start // 3) + 3, 8, 4)
                one.choose(draws.choice([None, 0, 3]))
        except Refusal:
            pass
        play(one, 1)
    one.release()
    assert one.history.cache.pages_in_use == 0


def test_a_memory_bank_cannot_go_back():
    one = session(stage(bank_size=3))
    play(one, 8)
    with pytest.raises(Refusal, match="memory bank"):
        one.open_fork("base", 12, 2, 1)
    assert len(one.open_fork("base", 24, 2, 1).pixels) == 3


@pytest.mark.parametrize("blocks", [200, pytest.param(9600, marks=pytest.mark.slow)])
def test_a_long_stream_stays_flat(blocks):
    """9,600 blocks of three frames play for an hour at eight a second; only the temporary file grows."""
    # Held, so that what other tests have left counts alike throughout.
    before = [item for item in gc.get_objects() if issubclass(type(item), Tensor)]
    own = scheduler(slow_stage(), arms=("base", "aligned"))
    sent: deque[object] = deque(maxlen=1)
    begin = partial(Session, own.stage, own.cache, ["base", "aligned"], Cue("a red square"), 1)
    show = own.open("one", begin, sent.append, own.clock(), 0.0)
    one = show.session
    measured = []
    for block in range(blocks):
        if block % 50 == 49:
            own.switch(show, Cue(["a blue disc", "a green ring"][block // 50 % 2]), own.clock())
            one.route(sorted(one.history.pages)[:3], 2)
            one.pin([one.start - 1], True, 1)
            one.pin([one.start - 1], False, 1)
        own.generate([show])
        if (block + 1) % (blocks // 4) == 0:
            gc.collect()
            tensors = sum(issubclass(type(item), Tensor) for item in gc.get_objects())
            latents = [len(arm.stream.latents) for arm in one.arms.values()]
            held = tensors - len(before), latents, own.cache.pages_in_use
            measured.append((held, resident_bytes()))
            for arm in one.arms.values():
                size = arm.spool._file.seek(0, os.SEEK_END)
                assert size == 3 * (block + 1) * 4 * torch.Size(own.stage.generator.block_shape[1:]).numel()
    (_, first), *_, (_, last) = measured
    assert len({str(held) for held, _ in measured}) == 1, measured
    assert last - first < 16 * 2**20, measured
