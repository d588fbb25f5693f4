"""Streaming: solver rules, prompt switches, batches, given frames, memory."""

from dataclasses import replace

import pytest
import torch

from kvpo.engine.generator import StreamingGenerator, TextRows, as_bytes
from kvpo.engine.pages import stream_pages
from kvpo.engine.stream import (
    advance,
    denoise_block,
    give_frames,
    lockstep_batches,
    open_stream,
    stream_latents,
    text_of,
)
from kvpo.models.cache import FrameCache
from kvpo.models.deployment import deployment_context
from tests.engine.tiny import FRAME, generator, grown, prompt, tape_of, texts

DEPLOYMENTS = {
    "window": dict(),
    "sink reset": dict(keep_sink_at_switch=False),
    "no sink": dict(sink=0),
    "everything": dict(window=-1, sink=0),
    "bank": dict(bank_size=3),
    "sparse bank": dict(bank_size=3, sparse_activation=True, bank_every_block=True),
    "published bank": dict(bank_size=3, bank_as_published=True),
}


class ConstantVelocity:
    """A transformer whose velocity is one number everywhere."""

    def __init__(self, velocity):
        self.velocity = velocity

    def __call__(self, x_RFCHW, sigma_R, text_ULD, context, *, text_rows=None):
        return torch.full_like(x_RFCHW, self.velocity)


def noise_of(*kinds):
    draws = torch.Generator().manual_seed(0)
    return {kind: torch.randn(2, 3, *FRAME, generator=draws, dtype=torch.float64) for kind in kinds}


def solved(renoise, noise, velocity=0.25):
    one = replace(generator(renoise=renoise), transformer=ConstantVelocity(velocity))
    text = TextRows(torch.zeros(1, 1, 1), torch.zeros(2, dtype=torch.long))
    return one, denoise_block(one, noise.__getitem__, text, None, one.step, one.sigmas)


def test_euler_is_exact_on_a_constant_velocity_field():
    noise = noise_of("initial")
    one, trajectory = solved(False, noise)
    assert torch.allclose(trajectory.clean_RFCHW, noise["initial"] - 0.25, atol=1e-14)
    for step, sigma in enumerate(one.sigmas):
        expected = noise["initial"] - (1 - sigma) * 0.25
        assert torch.allclose(trajectory.states_RSFCHW[:, step], expected, atol=1e-14)


def test_renoising_mixes_each_prediction_with_the_tape():
    noise = noise_of("initial", "renoise 1", "renoise 2")
    one, trajectory = solved(True, noise)
    x = noise["initial"]
    for step, sigma in enumerate(one.sigmas):
        assert torch.allclose(trajectory.states_RSFCHW[:, step], x, atol=1e-14)
        clean = x - sigma * 0.25
        if step < 2:
            level = one.sigmas[step + 1]
            x = (1 - level) * clean + level * noise[f"renoise {step + 1}"]
    assert torch.allclose(trajectory.clean_RFCHW, clean, atol=1e-14)


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
@pytest.mark.parametrize("rule", [dict(renoise=False), dict(renoise=True, context_noise=0.005)])
def test_streams_do_not_depend_on_their_batch(deployment, rule):
    """Also where only some of them switch prompts, at different blocks."""
    one = generator(**deployment, **rule)
    prompts = [prompt(0, 27), prompt(1, 27, (15,)), prompt(2, 27, (6, 15))]
    together = stream_latents(one, prompts, texts(), tape_of())
    for row, single in enumerate(prompts):
        alone = stream_latents(one, [single], texts(), tape_of())
        assert (together[row] - alone[0]).abs().max() <= 1e-10
    parts = [stream_latents(one, part, texts(), tape_of()) for part in (prompts[:2], prompts[2:])]
    assert (together - torch.cat(parts)).abs().max() <= 1e-10


def test_the_last_frames_depend_on_the_first_prompt_only_through_history():
    """A switch re-encodes history: what follows sees the new prompt in every key but the sink's."""
    one = generator()
    plain, switched = (
        stream_latents(one, [prompt(0, 30, switches)], texts(), tape_of()) for switches in ((), (15,))
    )
    assert torch.equal(plain[:, :15], switched[:, :15])
    assert (plain[:, 15:] - switched[:, 15:]).abs().max() > 0.1


def test_a_switch_acts_at_the_first_block_at_or_after_it():
    one = generator()
    at = {
        frame: stream_latents(one, [prompt(0, 24, (frame,))], texts(), tape_of())
        for frame in (10, 11, 12, 13)
    }
    assert torch.equal(at[10], at[12]) and torch.equal(at[11], at[12])
    assert not torch.equal(at[13], at[12])


def test_reencoded_pages_are_those_of_one_clean_call_under_the_new_prompt():
    one = generator()
    plain, switched = (grown(one, 18, prompts=[prompt(0, 30, switches)])[0] for switches in ((), (18,)))
    before = dict(switched.history.pages)
    advance(one, [switched])
    changed = [frame for frame in range(18) if switched.history.pages[frame] != before[frame]]
    assert changed == list(range(6, 18))
    for frame in range(18):
        keys = [s.history.cache.keys_LQTND[:, s.history.pages[frame]] for s in (plain, switched)]
        assert torch.equal(*keys) == (frame < 6)
    # Layer 0 keys know position and clean latents only; the text enters the keys of later layers.
    first_layer = [s.history.cache.keys_LQTND[0, s.history.pages[10]] for s in (plain, switched)]
    assert torch.allclose(*first_layer, atol=1e-12)


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_given_frames_are_continued_as_if_they_had_been_generated(deployment):
    one = generator(**deployment)
    whole = stream_latents(one, [prompt(0, 27)], texts(), tape_of())
    cache = one.new_cache(200)
    stream = open_stream(one, cache, prompt(0, 27), texts(), tape_of())
    with torch.no_grad():
        give_frames(one, [stream], whole[:, :15])
    while stream.start < 27:
        advance(one, [stream])
    assert (torch.cat(stream.latents) - whole[0]).abs().max() <= 1e-12


@pytest.mark.parametrize("deployment", DEPLOYMENTS.values(), ids=DEPLOYMENTS)
def test_videos_that_begin_with_given_frames_keep_the_noise_of_the_others(deployment):
    """A video's own first blocks lead to its own last ones, also past a switch, beside one that has none."""
    one, prompts = generator(**deployment), [prompt(0, 27, (9,)), prompt(1, 27), prompt(2, 27)]
    whole = stream_latents(one, prompts, texts(), tape_of())
    begun = {0: whole[0, :15], 2: whole[2, :6]}
    assert (stream_latents(one, prompts, texts(), tape_of(), given=begun) - whole).abs().max() <= 1e-10
    other = stream_latents(one, prompts, texts(), tape_of(), given={2: 1 - whole[2, :6]})
    assert torch.equal(other[2, :6], 1 - whole[2, :6])
    assert (other[:2] - whole[:2]).abs().max() <= 1e-10 and not torch.allclose(other[2, 6:], whole[2, 6:])


@pytest.mark.parametrize("renoise", [False, True])
@pytest.mark.parametrize("first", [(1.0,), (1.0, 0.5), (1.0, 0.96, 0.9, 0.8, 0.4)])
def test_the_first_block_may_take_other_solver_steps(renoise, first):
    one = replace(generator(renoise=renoise), sigmas=(1.0, 0.6), sigmas_first=first)
    whole = stream_latents(one, [prompt(0, 12)], texts(), tape_of())[0]
    by_hand = open_stream(one, one.new_cache(50), prompt(0, 12), texts(), tape_of())
    for sigmas in (first, one.sigmas, one.sigmas, one.sigmas):
        trajectory = advance(replace(one, sigmas=sigmas, sigmas_first=()), [by_hand])
        assert trajectory.states_RSFCHW.shape[1] == len(sigmas)
    assert torch.equal(torch.cat(by_hand.latents), whole)
    same = stream_latents(replace(one, sigmas_first=()), [prompt(0, 12)], texts(), tape_of())[0]
    assert not torch.allclose(same[:3], whole[:3], atol=1e-3)


def test_first_blocks_and_later_ones_are_generated_side_by_side():
    one = replace(generator(renoise=True), sigmas_first=(1.0, 0.5))
    cache = one.new_cache(100)
    early, late = (open_stream(one, cache, prompt(n, 12), texts(), tape_of()) for n in (0, 1))
    advance(one, [early])
    trajectory = advance(one, [late, early])
    assert trajectory.states_RSFCHW.shape[:2] == (2, 2)
    advance(one, [early, late])
    for n, stream in enumerate((early, late)):
        alone = stream_latents(one, [prompt(n, 12)], texts(), tape_of())[0]
        assert (torch.cat(stream.latents) - alone[: stream.start]).abs().max() <= 1e-10


@pytest.mark.parametrize("sigmas", [(1.0,), (1.0, 0.6)])
@pytest.mark.parametrize("renoise", [False, True])
def test_models_of_one_and_two_steps_and_of_single_frames_stream(sigmas, renoise):
    """Frame-wise, one solver step from the tape: x0 = eps - v, seen by the next frame."""
    deployment = replace(generator().deployment, block=1, window=4, sink=1)
    one = replace(generator(renoise=renoise), deployment=deployment, sigmas=sigmas)

    def tape(video, block, kind):
        return tape_of()(video, block, kind)[:1]

    prompts = [prompt(0, 7), prompt(1, 7, (4,))]
    latents = stream_latents(one, prompts, texts(), tape)
    assert latents.shape[1] == 7
    stream = open_stream(one, one.new_cache(20), prompt(0, 7), texts(), tape)
    for frame in range(7):
        trajectory = advance(one, [stream])
        states, velocities = trajectory.states_RSFCHW[0], trajectory.velocities_RSFCHW[0]
        assert len(states) == len(sigmas) and torch.equal(states[0], tape(0, frame, "initial"))
        assert torch.allclose(trajectory.clean_RFCHW[0], states[-1] - sigmas[-1] * velocities[-1])
    assert (torch.cat(stream.latents) - latents[0]).abs().max() <= 1e-10


def test_given_frames_must_fill_blocks():
    one = generator()
    stream = open_stream(one, one.new_cache(9), prompt(), texts(), tape_of())
    with pytest.raises(ValueError, match="7 given latent frames do not fill blocks of 3"):
        give_frames(one, [stream], torch.zeros(1, 7, *FRAME, dtype=torch.float64))


def test_videos_generated_together_have_one_length():
    with pytest.raises(ValueError, match=r"\[27, 30\]"):
        stream_latents(generator(), [prompt(0, 27), prompt(1, 30)], texts(), tape_of())


def test_the_last_block_of_a_stream_is_not_encoded_and_its_pages_are_given_back(monkeypatch):
    one, encoded, encode = generator(), [], StreamingGenerator.encode
    monkeypatch.setattr(StreamingGenerator, "encode", lambda *a: encoded.append(len(a[1])) or encode(*a))
    cache = one.new_cache(60)
    streams = [
        replace(open_stream(one, cache, prompt(n, 27), texts(), tape_of()), end=end)
        for n, end in enumerate((9, 12, None))
    ]
    for _ in range(4):
        advance(one, [stream for stream in streams if stream.start != stream.end])
    short, long, open_ended = streams
    # The third block ends one of three streams, the fourth one of the two that are left.
    assert encoded == [3, 3, 2, 1] and (short.start, long.start) == (9, 12)
    assert not short.history.pages and not long.history.pages
    assert sorted(open_ended.history.pages) == [*range(12)] and cache.pages_in_use == 12
    for stream in streams:
        alone = stream_latents(one, [replace(stream.prompt, num_frames=stream.start)], texts(), tape_of())
        torch.testing.assert_close(torch.cat(stream.latents), alone[0], rtol=0, atol=1e-12)


def peak_pages(monkeypatch, one, num_frames, switches):
    """Most pages in use, and the capacity, while a video streams."""
    seen = []
    write = FrameCache.write

    def recording(cache, *pages):
        ids = write(cache, *pages)
        seen.append((cache.pages_in_use, cache.num_pages))
        return ids

    with monkeypatch.context() as patched:
        patched.setattr(FrameCache, "write", recording)
        stream_latents(one, [prompt(0, num_frames, switches)], texts(), tape_of())
    used, capacity = zip(*seen, strict=True)
    return max(used), max(capacity)


@pytest.mark.parametrize("switches", [(), (9, 24), (12, 15, 27)])
@pytest.mark.parametrize("name", ["window", "sink reset", "no sink"])
def test_memory_does_not_grow_with_the_length_of_the_video(monkeypatch, name, switches):
    one = generator(**DEPLOYMENTS[name])
    used = {frames: peak_pages(monkeypatch, one, frames, switches) for frames in (36, 54)}
    assert used[36] == used[54]
    assert used[36][1] == stream_pages(one, 54, switches=bool(switches)) < 36


def test_videos_with_and_without_switches_share_a_cache():
    prompts = [prompt(0, 54, (27,)), prompt(1, 54)]
    together = stream_latents(generator(), prompts, texts(), tape_of())
    for own, latents in zip(prompts, together, strict=True):
        alone = stream_latents(generator(), [own], texts(), tape_of())
        torch.testing.assert_close(latents[None], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["bank", "sparse bank"])
def test_a_bank_adds_at_most_its_own_pages(monkeypatch, name):
    one = generator(**DEPLOYMENTS[name])
    used, capacity = peak_pages(monkeypatch, one, 60, (27,))
    without, _ = peak_pages(monkeypatch, generator(), 60, (27,))
    assert without <= used <= without + 3 * one.pages.num_layers + 1
    assert capacity < 60


def test_streaming_leaves_the_global_generator_alone():
    one = generator(renoise=True, context_noise=0.005)
    state = torch.get_rng_state()
    stream_latents(one, [prompt(0, 12)], texts(), tape_of())
    assert torch.equal(state, torch.get_rng_state())


def test_batches_hold_every_stream_once_with_its_like():
    assert list(lockstep_batches("aabaab", 0)) == [[0, 1, 3, 4], [2, 5]]
    assert list(lockstep_batches("aabaab", 3)) == [[0, 1, 3], [4], [2, 5]]
    assert list(lockstep_batches("aabaab", 1)) == [[0], [1], [3], [4], [2], [5]]


def test_bytes_of_pixels_are_rounded_and_clamped():
    pixels_TCHW = torch.tensor([-0.5, 0.0, 0.4, 0.5, 1.0, 1.5]).expand(2, 3, 1, 6)
    found = as_bytes(pixels_TCHW)
    assert found.shape == (2, 1, 6, 3) and found.dtype == torch.uint8
    assert found[1, 0, :, 2].tolist() == [0, 0, 102, 128, 255, 255]


def test_a_block_embeds_its_text_once_and_gives_the_bits_of_single_calls():
    one = generator()
    stream = open_stream(one, one.new_cache(3), prompt(3), texts(), tape_of())
    embedded = []
    hook = one.transformer.text_embedding.register_forward_hook(lambda *_: embedded.append(1))
    text, context = text_of([stream]), deployment_context(one.deployment, [stream.history])
    trajectory = advance(one, [stream])
    hook.remove()
    assert len(embedded) == 1
    for step, sigma in enumerate(one.sigmas):
        with torch.no_grad():
            alone = one.velocity(trajectory.states_RSFCHW[:, step], torch.tensor([sigma]), text, context)
        assert torch.equal(alone, trajectory.velocities_RSFCHW[:, step])


def test_a_block_gathers_its_pages_once_where_memory_allows_and_gives_the_same_bits(monkeypatch):
    asked, gather = [], FrameCache.gather
    monkeypatch.setattr(FrameCache, "gather", lambda *args: asked.append(args[1]) or gather(*args))
    latents, calls = [], []
    for keeps in (True, False):
        monkeypatch.setattr(StreamingGenerator, "keeps_contexts", keeps)
        asked.clear()
        one = generator()
        latents.append(stream_latents(one, [prompt(num_frames=12)], texts(), tape_of()))
        calls.append(len(asked))
    assert torch.equal(*latents)
    layers, steps = one.pages.num_layers, len(one.sigmas)
    blocks = 12 // one.block - 1  # the first one has no past, the last one no clean pass
    # A clean pass needs no attention in its last layer.
    assert calls == [blocks * layers, blocks * layers * steps + (blocks - 1) * (layers - 1)]
