"""Training prompts of a file: passes over all kinds of them, and what a user is told about too few."""

import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpo.app.build import build_setup, load_backbone, source_of
from kvpo.app.configuration import assign
from kvpo.app.generate import _prompts as generated_prompts
from kvpo.app.presets import PRESETS
from kvpo.app.prompt_sets import FilePrompts, prompts_of_file, updates_prompts
from kvpo.app.report_data import measure_diversity
from kvpo.app.sources.wan_parts import text_encoder
from kvpo.config_checks import ConfigurationError
from kvpo.prompt_files import written
from kvpo.prompts import VideoPrompt
from kvpo.training.ranks import ALONE
from tests.tiny_wan import tiny_wan
from tests.tiny_world import tiny_config


def file_of(*kinds: int) -> tuple[VideoPrompt, ...]:
    """So many prompts of each kind: of one segment, of two, of two with another switch, and so on."""
    prompts = []
    for kind, count in enumerate(kinds):
        switches = (3 * kind,) if kind else ()
        for n in range(count):
            segments = tuple(f"{kind}-{n}-{part}" for part in range(len(switches) + 1))
            prompts.append(VideoPrompt(len(prompts), segments, switches, 30))
    return tuple(prompts)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=4).filter(any), st.integers(1, 5), st.integers(0, 3))
def test_every_prompt_is_used_once_before_any_is_used_again(kinds: list[int], count: int, seed: int) -> None:
    draw = FilePrompts(file_of(*kinds), seed, count)
    seen: Counter[tuple[str, ...]] = Counter()
    update = 0
    for turn in range(1, 4):
        while sum(seen.values()) < turn * sum(kinds):
            chosen = draw(update)
            assert 1 <= len(chosen) <= count and len({(p.switches, p.num_frames) for p in chosen}) == 1
            assert [p.id for p in chosen] == list(range(update * count, update * count + len(chosen)))
            seen.update(prompt.segments for prompt in chosen)
            update += 1
        assert set(seen.values()) == {turn} and len(seen) == sum(kinds)


def test_passes_differ_and_depend_on_seed_and_update_alone() -> None:
    draw = FilePrompts(file_of(6, 6), 1, 2)
    passes = [[[p.segments for p in draw(update)] for update in range(at, at + 6)] for at in (0, 6, 12)]
    assert passes[0] != passes[1] != passes[2] != passes[0]
    again = FilePrompts(file_of(6, 6), 1, 2)
    assert again(13) == draw(13), "a resumed run has not asked for the updates before"
    assert FilePrompts(file_of(6, 6), 2, 2)(13) != draw(13)


def configured(**settings: Any) -> Any:
    changes = {name.replace("__", "."): value for name, value in settings.items()}
    return assign(PRESETS["longlive-1.3b"](), {"prompts.file": "p.jsonl", **changes})


READINGS = [("demo", (), 30, 60), ("demo", (45,), 45, 60), ("longlive-1.3b", (), 147, 30)]


@pytest.mark.parametrize(("preset_name", "frames", "length", "timed"), READINGS)
def test_runs_read_a_file_as_generation_does(
    tmp_path: Path, preset_name: str, frames: tuple[int, ...], length: int, timed: int
) -> None:
    """Lengths that a file leaves out, and the seconds of a timeline, are those of the generator."""
    start = assign(PRESETS[preset_name](), {"prompts.frames": frames} if frames else {})
    cues = [{"startTime": 3.75 * n, "endTime": 3.75 * (n + 1), "prompts": [{"text": "x"}]} for n in (0, 1)]
    files = {
        "p.txt": ("a\nb\n", length),
        "p.csv": ("prompt\na\n", length),
        "p.tsv": ("prompt\na\n", length),
        "p.json": ('["a", "b"]', length),
        "p.jsonl": ('{"prompt": "a"}\n{"prompts": ["b"]}\n', length),
        "own.jsonl": ('{"segments": ["a", "b"], "switches": [6], "num_frames": 12}\n', 12),
        "timeline.json": (json.dumps({"prompts": cues}), timed),
    }
    for name, (text, expected) in files.items():
        (tmp_path / name).write_text(text)
        config = assign(start, {"prompts.file": str(tmp_path / name)})
        trained = prompts_of_file(config, source_of(config).reading(config))
        assert trained == generated_prompts(config, tmp_path / name, None), name
        assert {prompt.num_frames for prompt in trained} == {expected}, name


def test_too_few_prompts_for_an_update_are_said(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        updates_prompts(configured(optim__prompts_per_update=4), file_of(4, 3))
        assert not caplog.messages
        updates_prompts(configured(optim__prompts_per_update=4), file_of(2, 3))
    assert "prompts_per_update = 4, but p.jsonl has at most 3 training prompts of one length" in caplog.text


def test_a_prompt_without_a_donor_is_refused_at_the_start() -> None:
    config = configured(optim__prompts_per_update=2, exploration__donor=1)
    updates_prompts(config, file_of(4, 2))
    with pytest.raises(ConfigurationError, match=r"exploration\.donor: .*single prompt.*p\.jsonl"):
        updates_prompts(config, file_of(4, 3))


def test_prompts_that_the_encoder_cuts_are_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With the cache filled, too: who starts the second run may be someone else."""
    config = tiny_wan("longlive-1.3b", tmp_path)
    long = VideoPrompt(0, ("a red ball " * 5, "the dog jumps"), (9,), 18)
    for _ in range(2):
        caplog.clear()
        encoder = text_encoder(config)
        encoder.fill([long])
        (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        assert "1 of 2 prompts are longer than the 8 tokens that are read of each; the other 8 tokens" in said
        assert "longest prompt has 16" in said and "a red ball" in said
        encoder(long.segments)
        assert len([r for r in caplog.records if r.levelno == logging.WARNING]) == 1, "said once"
    caplog.clear()
    directed = text_encoder(config)
    directed(["a blue ball " * 5])  # typed while a stream runs
    directed(["a blue ball " * 5])
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "1 of 1 prompts are longer than the 8 tokens" in said


def test_words_that_the_embedded_generator_does_not_know_are_named(
    tiny_base: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tiny_base)
    known = VideoPrompt(0, ("A red circle drifts left in a meadow.",), (), 30)
    load_backbone(config, [known])
    assert not caplog.messages
    load_backbone(config, [known, VideoPrompt(1, ("A dog runs on the beach.",), (), 30)])
    (said,) = caplog.messages
    assert "1 of 2 prompts" in said and "does not know" in said and said.count("dog, runs, beach") == 1
    for text, named in (
        ("\u732b\u304c\u8d70\u308b", "\u732b\u304c\u8d70\u308b"),
        ("A red\u00e9 circle.", "red\u00e9"),
        ("A circle \U0001f600", "\U0001f600"),
        ("\u041a\u043e\u0442", "\u043a\u043e\u0442"),
    ):
        caplog.clear()
        load_backbone(config, [VideoPrompt(0, (text,), (), 30)])
        assert f"cannot show: {named};" in caplog.text
    caplog.clear()
    load_backbone(config, [VideoPrompt(0, ("\uff32\uff45\uff44 circle.",), (), 30)])
    assert not caplog.messages, "full-width letters are the same letters"
    caplog.clear()
    load_backbone(config, [VideoPrompt(0, ("red " * 40,), (), 30)])
    (said,) = caplog.messages
    assert "1 of 1 prompts are longer than the 32 words that are read of each; the other 8 words" in said


def test_the_embedded_world_takes_its_prompts_from_a_file_too(
    tiny_base: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    texts = [f"A {colour} {shape} drifts right." for colour in ("red", "blue") for shape in ("ring", "cross")]
    story = (*texts[:2], "Then one of them is back again.")
    short = [VideoPrompt(n, (f"{text} {n}",), (), 21) for n, text in enumerate(texts * 2)]
    long = [VideoPrompt(n, (f"{text} {n}", *story[1:]), (12, 18), 30) for n, text in enumerate(texts * 2)]
    for own, kinds in ((short + long, {"short", "long"}), (short, {"short"})):
        file = tmp_path / f"{len(own)}.jsonl"
        file.write_text(written(own, file))
        config = tiny_config(tiny_base, prompts__file=str(file))
        with caplog.at_level(logging.WARNING):
            setup, source = build_setup(config), source_of(config)
        assert "words that the embedded generator does not know" in caplog.text
        held = {p.segments for sets in (setup.validation, setup.test) for one in sets.values() for p in one}
        trained = {p.segments for update in range(9) for p in setup.training_prompts(update)}
        assert trained | held == {prompt.segments for prompt in own} and not trained & held
        assert setup.validation.keys() == setup.test.keys() == kinds
        assert {name: one.prompts for name, one in source.final(config).items()} == setup.test
        assert source.longest_prompt(config).num_frames == (30 if "long" in kinds else 21)
        assert bool(measure_diversity(setup, ALONE)) == ("long" in kinds)
