"""Pretraining of the embedded generator: contexts as deployed, telling histories, falling loss, resuming."""

import json
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from kvpo.app.configuration import preset
from kvpo.app.sources.common import streaming_generator
from kvpo.config import StreamConfig
from kvpo.engine.noise import keyed_generator
from kvpo.engine.stream import give_frames, open_stream, switch_prompts, text_of
from kvpo.models.causal_wan import CausalWan
from kvpo.models.context import TeacherContext
from kvpo.models.deployment import deployment_context
from kvpo.models.finite import NonFiniteError
from kvpo.models.settings import WanShape
from kvpo.world.imperfect import CLEAN, imperfect_story, training_stories
from kvpo.world.pretrain import (
    PretrainSettings,
    learning_rate,
    load_generator,
    new_generator,
    noise_levels,
    pretrain,
    training_loss,
    unfinished,
)
from kvpo.world.snippets import (
    RECENT,
    Snippet,
    SnippetSettings,
    TrainingSnippets,
    context_frames,
    draw_snippet,
    lay_out,
    only_history_tells,
    reencoded_blocks,
    shown_stories,
    telling_acts,
    told_act,
)
from kvpo.world.stories import RECALLS, video_prompt
from kvpo.world.text import LearnedTextEncoder
from kvpo.world.vocabulary import Act, Actor, Story
from tests.method.test_routing import deployment_frames
from tests.tiny_world import SETTINGS

ASSETS = Path(__file__).parents[2] / "src" / "kvpo" / "world" / "assets"
SNIPPETS = SnippetSettings(videos=2, num_frames=48, run=4, copies=2)
TINY = PretrainSettings(SNIPPETS, steps=30, lr=1e-2, warmup=3, checkpoint_every=2)
RED, BLUE, PINK = (
    Actor(colour, shape, "small", "still")
    for colour, shape in (("red", "ring"), ("blue", "cross"), ("pink", "circle"))
)


def tiny() -> tuple[WanShape, StreamConfig]:
    config = preset("demo", {name: value for name, value in SETTINGS.items() if name == "backbone.geometry"})
    return config.model, config.stream


def test_the_shipped_base_is_of_the_demo_s_geometry() -> None:
    with safe_open(ASSETS / "generator.safetensors", "pt") as file:
        header = json.loads(file.metadata()["generator"])
    assert header["model"] == json.loads(json.dumps(asdict(preset("demo").model)))


def trained(out: Path, **changes: Any) -> list[float]:
    """The losses of a tiny run."""
    losses: list[float] = []
    pretrain(*tiny(), replace(TINY, **changes), out, lambda done, loss: losses.append(loss))
    return losses


@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
def test_the_loss_falls(tmp_path: Path, autocast: str) -> None:
    """On one batch that was not trained on, and one draw of noise."""
    model, stream = tiny()
    losses = trained(tmp_path / "base", steps=60, autocast=autocast)
    assert len(losses) == 60 and [path.name for path in tmp_path.iterdir()] == ["base"]
    batch = TrainingSnippets(stream.deployment, SNIPPETS, 0)[1999]

    def loss(transformer: CausalWan, text: LearnedTextEncoder) -> float:
        with torch.no_grad():
            return float(training_loss(transformer, text, batch, stream, TINY, keyed_generator("x", 0)))

    loaded = load_generator(model, tmp_path / "base")
    assert not any(p.requires_grad for part in loaded for p in part.parameters())
    assert loss(*loaded) < 0.9 * loss(*new_generator(model, 0))


def test_a_run_repeats_to_the_bit(tmp_path: Path) -> None:
    first, second = (trained(tmp_path / name, steps=4) for name in ("one", "two"))
    with safe_open(tmp_path / "one", "pt") as file:
        assert json.loads(file.metadata()["generator"]).keys() == {"model", "settings"}, "as shipped"
    assert first == second and (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert trained(tmp_path / "other", steps=4, seed=1)[0] != first[0]


def test_a_training_goes_on_where_it_was_stopped_and_ends_in_the_same_file(tmp_path: Path) -> None:
    """Stopped at a step that is no checkpoint's; begun for more steps than it then gets."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = trained(whole, steps=7)
    losses: list[float] = []

    def part(steps: int, until: int, resume: bool) -> bool:
        return pretrain(
            *tiny(), replace(TINY, steps=steps), parts, lambda done, loss: losses.append(loss),
            resume=resume, interrupted=lambda: len(losses) >= until - 1,
        )  # fmt: skip

    assert not part(30, 3, resume=False) and len(losses) == 3 and unfinished(parts).exists()
    with pytest.raises(ValueError, match="is an unfinished training: --resume goes on with it"):
        part(7, 99, resume=False)
    assert not part(7, 6, resume=True)
    # The rate has begun to fall: now the length is fixed.
    with pytest.raises(ValueError, match="settings.steps was 7, is 30"):
        part(30, 99, resume=True)
    assert part(7, 99, resume=True)
    assert losses == expected and not unfinished(parts).exists()
    assert parts.read_bytes() == whole.read_bytes()


def test_a_finished_training_is_neither_repeated_nor_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "base"
    trained(out, steps=4)
    content, steps = out.read_bytes(), []
    given = {"report": lambda done, loss: steps.append(done), "resume": True}
    assert pretrain(*tiny(), replace(TINY, steps=4), out, **given) and not steps
    with pytest.raises(ValueError, match="base is there already; delete it"):
        pretrain(*tiny(), replace(TINY, steps=5), out, **given)
    with pytest.raises(ValueError, match="base is there already; delete it"):
        trained(out, steps=4)
    assert out.read_bytes() == content and not steps


def test_a_loss_that_is_not_finite_ends_a_training_and_spoils_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third step's, after the checkpoint of the second."""
    losses: list[torch.Tensor] = []

    def spoilt(*given: Any) -> torch.Tensor:
        losses.append(training_loss(*given))
        return losses[-1] * (float("nan") if len(losses) == 3 else 1)

    monkeypatch.setattr("kvpo.world.pretrain.training_loss", spoilt)
    with pytest.raises(NonFiniteError, match="step 3 of the pretraining: the loss is nan"):
        trained(tmp_path / "base", steps=4)
    assert load_generator(tiny()[0], tmp_path / "base") and unfinished(tmp_path / "base").exists()


def test_a_training_that_was_killed_goes_on(tmp_path: Path) -> None:
    out = tmp_path / "base"
    command = [sys.executable, "-c", KILLED, str(out)]
    process = subprocess.Popen(command, cwd=Path(__file__).parents[2])
    try:
        while not unfinished(out).exists():
            assert process.poll() is None
            time.sleep(0.01)
    finally:
        process.kill()
        process.wait()
    assert pretrain(*tiny(), replace(TINY, steps=12), out, lambda done, loss: None, resume=True)
    trained(tmp_path / "whole", steps=12)
    assert out.read_bytes() == (tmp_path / "whole").read_bytes()


KILLED = """
import sys
from dataclasses import replace
from pathlib import Path
import torch
from kvpo.world.pretrain import pretrain
from tests.world.test_pretrain import TINY, tiny

torch.set_num_threads(1)
pretrain(*tiny(), replace(TINY, steps=12), Path(sys.argv[1]), lambda done, loss: None)
"""


def test_a_training_begins_with_the_weights_of_a_base(tmp_path: Path) -> None:
    """And goes on only with the base that it was begun with; also where it is finished."""
    base, other, out = tmp_path / "base", tmp_path / "other", tmp_path / "out"
    trained(base, steps=4)
    trained(other, steps=4, seed=1)
    same = tmp_path / "same"
    assert pretrain(*tiny(), replace(TINY, steps=0), same, lambda done, loss: None, start=base)
    before, after = load_file(base), load_file(same)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    model, stream = tiny()
    for start, own, finished in (
        (base, stream, True),
        (other, stream, False),
        (base, replace(stream, shift=1.0), False),
    ):
        refused = pytest.raises(ValueError, match="same is there already; delete it to train it anew")
        with nullcontext() if finished else refused:
            settings = replace(TINY, steps=0)
            assert pretrain(model, own, settings, same, lambda *_: None, start=start, resume=True)
    losses: list[float] = []
    again = {"report": lambda done, loss: losses.append(loss), "interrupted": lambda: True}
    assert not pretrain(*tiny(), TINY, out, start=base, **again)
    with safe_open(unfinished(out), framework="pt") as file:
        assert json.loads(file.metadata()["training"])["settings"]["faults_from"] == 0, "faults at once"
    assert losses[0] < trained(tmp_path / "anew", steps=1)[0]
    with pytest.raises(ValueError, match="start.sha256 was .{64}, is"):
        pretrain(*tiny(), TINY, out, start=other, resume=True, **again)


@pytest.mark.parametrize("content", [b"", b"no tensors"])
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes) -> None:
    unfinished(tmp_path / "base").write_bytes(content)
    with pytest.raises(ValueError, match="base.unfinished"):
        pretrain(*tiny(), TINY, tmp_path / "base", lambda done, loss: None, resume=True)


def test_a_batch_is_a_function_of_its_number() -> None:
    stream = preset("demo").stream.deployment
    one, two, other = (TrainingSnippets(stream, SNIPPETS, 0)[n] for n in (7, 7, 8))
    assert all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(vars(one).values(), vars(two).values(), strict=True)
    )
    assert one.captions != other.captions
    assert len(one.source_N) == SNIPPETS.videos * SNIPPETS.copies * SNIPPETS.run


def test_videos_have_faults_from_a_share_of_the_steps_on() -> None:
    """Before it they are those of settings without faults, after it those of settings with them."""
    stream = preset("demo").stream.deployment
    late = TrainingSnippets(stream, SNIPPETS, 0, faulty_from=8)
    clean = TrainingSnippets(stream, replace(SNIPPETS, faults=CLEAN), 0)
    faulty = TrainingSnippets(stream, SNIPPETS, 0)
    assert torch.equal(late[7].clean_CFCHW, clean[7].clean_CFCHW)
    assert torch.equal(late[8].clean_CFCHW, faulty[8].clean_CFCHW)
    assert not torch.equal(late[7].clean_CFCHW, faulty[7].clean_CFCHW)


def test_when_faults_begin_the_length_is_fixed(tmp_path: Path) -> None:
    """Where they come before the learning rate falls."""
    settings = replace(TINY, steps=8, faults_from=0.25)
    done: list[int] = []

    def part(steps: int, until: int) -> bool:
        given = {"resume": True, "interrupted": lambda: done[-1:] == [until - 1]}
        return pretrain(
            *tiny(), replace(settings, steps=steps), tmp_path / "base", lambda n, _: done.append(n), **given
        )

    assert not part(8, 2) and not part(12, 3)
    with pytest.raises(ValueError, match="settings.steps was 12, is 8"):
        # Under 8 steps the third would have had faults.
        part(8, 99)


def test_in_a_good_share_of_the_videos_only_history_tells_who_returns() -> None:
    """Half of them, and half of those by what the sink has shown as well."""
    settings, lengths = SnippetSettings(videos=20), set()
    for batch in range(6):
        stories, showings = shown_stories(settings, keyed_generator("stories", batch))
        assert len(stories) == len(showings) == 20
        sink = []
        for story, showing in zip(stories[:10], showings[:10], strict=True):
            acts = [n for n in range(4) if only_history_tells(story, showing.story, n)]
            sink.append(any(0 in telling_acts(showing.story, n) for n in acts))
            assert acts
        assert sum(sink) == 5
        lengths |= {len(story.acts) for story in stories[10:]}
    assert lengths == {1, 2, 3, 4}
    stories, _ = shown_stories(replace(settings, untold_share=1.0), keyed_generator("stories", 0))
    assert len(stories) == 20


def snippets(count: int, **changes: Any) -> list[tuple[Story, Story, Snippet]]:
    """Stories, what their videos show, and snippets of them."""
    stream, settings = preset("demo").stream.deployment, replace(SnippetSettings(), **changes)
    found = []
    for n in range(count):
        generator = keyed_generator("snippets", n)
        (story,) = training_stories(generator, 1, settings.num_frames, settings.telling)
        shown = imperfect_story(story, settings.faults, generator).story
        found.append((story, shown, draw_snippet(story, shown, stream, settings, generator)))
    return found


def test_snippets_lie_in_one_act_and_hold_what_its_first_block_sees() -> None:
    block, recalls, openings = preset("demo").stream.block, 0, set()
    for story, _, snippet in snippets(200, recall_weight=6.0):
        ends = [*(act.start for act in story.acts[1:]), story.num_frames]
        act = story.acts[snippet.act]
        assert act.start <= snippet.run[0] * block and snippet.run[-1] * block + block <= ends[snippet.act]
        assert list(snippet.lead) == list(range(max(0, snippet.run[0] - 2), snippet.run[0]))
        assert all(0 < b < snippet.lead[0] for b in snippet.memory)
        assert snippet.blocks[0] == 0 and set(snippet.run) <= set(snippet.blocks)
        recalls += act.event in RECALLS
        assert not snippet.untold or snippet.run[0] * block == act.start
        openings.add(snippet.run[0])
    assert recalls > 60 and 0 in openings and len(openings) > 15


def story_of(*acts: tuple[str, str, Actor, str]) -> Story:
    """Acts of seven blocks, (event, scene, actor, caption)."""
    return Story(
        tuple(
            Act(scene, (actor,), caption, 21 * n, event)
            for n, (event, scene, actor, caption) in enumerate(acts)
        ),
        21 * len(acts),
    )


RETURNING = story_of(
    ("open", "sea", RED, "A small red ring rests by the sea."),
    ("show", "cave", BLUE, "Then a small blue cross rests in a cave."),
    ("show", "night", PINK, "Then a small pink circle rests at night."),
    ("return", "night", BLUE, "Then one of them is back again."),
)


def test_the_memory_of_what_comes_back_is_mostly_of_the_acts_that_showed_it() -> None:
    assert telling_acts(RETURNING, 3) == [1] and telling_acts(RETURNING, 2) == []
    revisit = story_of(
        ("open", "sea", RED, ""), ("show", "cave", BLUE, ""), ("revisit", "sea", BLUE, "We are back.")
    )
    assert telling_acts(revisit, 2) == [0, 1]
    stream, settings = (
        preset("demo").stream.deployment,
        replace(SnippetSettings(), recall_weight=1e9, untold_weight=1e9, opening_share=1.0),
    )
    drawn = [
        draw_snippet(RETURNING, RETURNING, stream, settings, keyed_generator("memory", n)) for n in range(200)
    ]
    blocks = [b for snippet in drawn for b in snippet.memory]
    share = sum(7 <= b < 14 for b in blocks) / len(blocks)
    # Nine in ten, and seven of eighteen of the rest.
    assert share == pytest.approx(0.9 + 0.1 * 7 / 18, abs=0.06)
    assert all(snippet.untold and snippet.run == range(21, 23) for snippet in drawn)


def test_only_what_nothing_else_tells_is_always_routed() -> None:
    """Where the sink shows the actor, or the caption names it, a row may do without the memory."""
    stream, settings = (
        preset("demo").stream.deployment,
        replace(SnippetSettings(), recall_weight=1e9, untold_weight=1e9, routed_share=0.0, opening_share=1.0),
    )

    def routed(story: Story) -> bool:
        generator = keyed_generator("routed", 0)
        snippet = draw_snippet(story, story, stream, settings, generator)
        clean = torch.zeros(len(snippet.blocks), 3, 8, 8, 8)
        batch = lay_out([story], [snippet], clean, stream, settings, generator)
        deployed = lay_out([story], [replace(snippet, untold=False)], clean, stream, settings, generator)
        return not torch.equal(batch.frames_RP, deployed.frames_RP)

    assert routed(RETURNING)
    snippet = draw_snippet(RETURNING, RETURNING, stream, settings, keyed_generator("routed", 0))
    clean = torch.zeros(len(snippet.blocks), 3, 8, 8, 8)
    batch = lay_out([RETURNING], [snippet], clean, stream, settings, keyed_generator("routed", 1))
    shown = [b * 3 + n for b in snippet.blocks for n in range(3)]
    seen = [[shown[i] for i in row if i >= 0] for row in batch.frames_RP[len(clean) :].tolist()]
    recalled = {b * 3 + n for b in snippet.memory for n in range(3)}
    # Once the act has begun, its recent frames show who has returned, and it goes on as deployed.
    assert all(recalled & set(row) for row in seen[::2]) and not any(
        recalled & set(row) for row in seen[1::2]
    )
    acts = RETURNING.acts
    assert not routed(replace(RETURNING, acts=(*acts[:3], replace(acts[3], actors=(RED,)))))
    named = replace(acts[3], caption="Then the blue cross is back again.")
    assert not routed(replace(RETURNING, acts=(*acts[:3], named)))


def test_acts_that_only_history_tells_are_looked_at_often() -> None:
    drawn = snippets(300)
    assert sum(snippet.untold for _, _, snippet in drawn) / len(drawn) > 0.05


def test_rows_see_the_frames_and_texts_of_deployment() -> None:
    stream, settings = preset("demo").stream.deployment, replace(SnippetSettings(), routed_share=0.0)
    for story, _, snippet in snippets(30):
        snippet = replace(snippet, untold=False)
        clean = torch.zeros(len(snippet.blocks), stream.block, 8, 8, 8)
        batch = lay_out([story], [snippet], clean, stream, settings, keyed_generator("test", 0))
        places = [b * stream.block + f for b in snippet.blocks for f in range(stream.block)]
        rows = [*range(len(snippet.blocks)), *batch.source_N.tolist()]
        for row, source in enumerate(rows):
            block = snippet.blocks[source]
            frames = deployment_frames(
                block * stream.block, sink=stream.sink, window=stream.window, block=stream.block
            )
            found = [places[i] for i in batch.frames_RP[row].tolist() if i >= 0]
            if row < len(snippet.blocks) and block in snippet.reencoded:
                continue  # these see each other
            assert found == [frame for frame in frames if frame in places]
            # Trained rows lack nothing.
            assert row < len(snippet.blocks) or found == list(frames)
            assert batch.starts_R[row] == block * stream.block
        assert (batch.text_R[len(snippet.blocks) :] == snippet.act).all()
        assert batch.text_R[: len(snippet.blocks)].tolist() == [
            told_act(story, b, snippet, stream) for b in snippet.blocks
        ]


@pytest.mark.parametrize(("act", "starts"), [(1, (0, 12, 33, 60)), (3, (0, 15, 33, 60))])
def test_the_opening_of_an_act_sees_what_a_stream_sees_after_a_switch(
    act: int, starts: tuple[int, ...]
) -> None:
    """Frames before it are encoded anew in one call; where they reach back to the start, with the sink."""
    model, stream = tiny()
    transformer, text = new_generator(replace(model, num_layers=3), seed=1)
    draws = keyed_generator("opening", act)
    with torch.no_grad():
        head = transformer.head.head.weight
        head.copy_(0.3 * torch.randn(head.shape, generator=draws))
    generator = streaming_generator(preset("demo"), transformer)
    acts = tuple(replace(one, start=start) for one, start in zip(RETURNING.acts, starts, strict=True))
    story, first = replace(RETURNING, acts=acts), starts[act] // stream.block
    clean = torch.randn(28, 3, 8, 8, 8, generator=draws)
    noisy, sigma = torch.randn(1, 3, 8, 8, 8, generator=draws), torch.tensor([0.9])

    texts = {one.caption: text([one.caption])[0].detach() for one in acts}
    past = open_stream(generator, generator.new_cache(100), video_prompt(story, 0), texts, lambda *key: noisy)
    give_frames(generator, [past], clean[:first].flatten(0, 1)[None])
    switch_prompts(generator, [past])
    context = deployment_context(generator.deployment, [past.history])
    expected = generator.velocity(noisy, sigma, text_of([past]), context)

    snippet = Snippet(
        act,
        range(first, first + 1),
        range(first - 2, first),
        (1,) if first > 4 else (),
        untold=False,
        reencoded=reencoded_blocks(first, generator.deployment),
    )
    settings = SnippetSettings(copies=1, routed_share=0.0)
    own = clean[snippet.blocks]
    batch = lay_out([story], [snippet], own, generator.deployment, settings, draws)
    found = transformer(
        torch.cat([own, noisy]),
        torch.cat([torch.zeros(len(own)), sigma]),
        text(batch.captions),
        TeacherContext(batch.starts_R, batch.frames_RP, stream.block),
        text_rows=batch.text_R,
    )
    assert (found[-1:] - expected).abs().max() < 1e-5 * expected.abs().max()


def test_keys_are_held_under_the_captions_of_deployment() -> None:
    """The twelve frames before a switch are encoded anew, the sink and older pages are not."""
    stream = preset("demo").stream.deployment
    snippet = Snippet(act=3, run=range(21, 25), lead=range(19, 21), memory=(8, 16), untold=True)
    told = [told_act(RETURNING, b, snippet, stream) for b in (0, 8, 16, 17, 18, 19, 20, 21, 24)]
    assert told == [0, 1, 2, 3, 3, 3, 3, 3, 3]


def test_routed_contexts_keep_sink_and_recent_frames() -> None:
    stream = preset("demo").stream.deployment
    snippet = Snippet(act=3, run=range(21, 25), lead=range(19, 21), memory=(8, 16), untold=True)
    lengths, distinct = set(), set()
    for draw in range(60):
        frames = context_frames(snippet, 21, True, stream, keyed_generator("test", draw))
        assert frames[: stream.sink] == [0, 1, 2] and frames[-RECENT:] == [60, 61, 62]
        route = frames[stream.sink : -RECENT]
        assert set(route) <= {24, 25, 26, 48, 49, 50} and route == sorted(route)
        lengths.add(len(route))
        distinct.add(len(set(route)))
    assert lengths == {3, 6} and distinct == {1, 2, 3, 6}


def test_noise_levels_are_mostly_those_of_the_solver() -> None:
    stream, settings = preset("demo").stream, PretrainSettings()
    levels = noise_levels(4000, stream, settings, keyed_generator("test", 0))
    solver = torch.tensor([1.0, 0.9, 0.75, 0.5])  # 3 u / (1 + 2 u)
    share = (levels[:, None] - solver).abs().lt(1e-6).any(1).float().mean()
    assert float(share) == pytest.approx(settings.solver_share, abs=0.03)
    assert float(levels.min()) >= 0 and float(levels.max()) <= 1


def test_the_learning_rate_rises_stays_and_falls_to_zero() -> None:
    settings = replace(PretrainSettings(), steps=1000, warmup=10, lr=1.0, decay_from=0.5)
    rates = [learning_rate(step, settings) for step in (0, 4, 10, 500, 750, 999)]
    assert rates == pytest.approx([0.1, 0.5, 1.0, 1.0, 0.5, 0.002])
