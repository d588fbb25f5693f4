"""What `kvpo generate` leaves beside its videos, and that `kvpo score` goes by it."""

import json
import os
import re
import weakref
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from kvpo.app import generate as generate_module
from kvpo.app.cli import main
from kvpo.app.generate import Best, generate
from kvpo.app.taken import claimed
from kvpo.app.video_folder import find_videos, listed_videos, read_manifest
from kvpo.config import Config
from kvpo.files import TEMPORARY_PREFIX, StorageError
from kvpo.prompts import VideoPrompt
from kvpo.report.video import write_video
from kvpo.training.backbone import Backbone
from tests.tiny_world import SETTINGS, tiny_config

CAPTIONS = ["a small red circle drifts left at night", "a small blue square drifts left at night"]


def test_score_needs_no_prompts_beside_generated_videos(tiny_base: Path, tmp_path: Path) -> None:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**lists, "backbone.checkpoint": str(tiny_base)}))
    lines = [{"segments": [text], "num_frames": 9} for text in CAPTIONS]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    flags = ["--config", str(tmp_path / "run.yaml"), "--prompts", str(tmp_path / "p.jsonl")]
    out = tmp_path / "videos"
    assert main(["generate", *flags, "--out", str(out)]) == 0
    expected = {"000.mp4": CAPTIONS[:1], "001.mp4": CAPTIONS[1:]}
    assert json.loads((out / "videos.json").read_text()) == expected
    beside = ["latents.safetensors", "prompts.jsonl", "videos.json"]
    assert sorted(path.name for path in out.iterdir()) == [*expected, *beside]
    made = load_file(out / "latents.safetensors")
    assert sorted(made) == ["000", "001"] and {len(latents) for latents in made.values()} == {9}
    assert main(["score", str(out), "--reward", "world", "--out", str(tmp_path / "s.html")]) == 0
    rows = json.loads((tmp_path / "s.json").read_text())
    assert {row["file"]: [row["prompt"]] for row in rows} == expected


def test_names_keep_their_order_beyond_a_thousand_whose_latents_leave_memory(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[weakref.ref[np.ndarray]] = []

    def latents(backbone: Any, prompts: Sequence[VideoPrompt], tape: Any) -> torch.Tensor:
        memory = np.array([[prompt.id] for prompt in prompts], np.float32)
        batches.append(weakref.ref(memory))
        assert sum(batch() is not None for batch in batches) <= 2, "this batch and the one before it"
        return torch.from_numpy(memory)

    def write(path: Path, *content: Any, **settings: Any) -> None:
        path.touch()

    monkeypatch.setattr(Backbone, "latents", latents)
    monkeypatch.setattr(generate_module, "pixels_of", lambda *given: torch.zeros(1, 1, 3, 2, 2))
    monkeypatch.setattr(generate_module, "write_video", write)
    monkeypatch.setattr("kvpo.files.sync", lambda path: None)
    prompts = [VideoPrompt(n, (f"prompt {n}",), (), 9) for n in range(1001)]
    written = generate(tiny_config(tiny_base), tmp_path, prompts=prompts)
    assert [path.name for path in sorted(tmp_path.glob("*.mp4"))] == [path.name for path in written]
    assert find_videos(tmp_path) == written and written[-1].name == "1000.mp4"
    shows = json.loads((tmp_path / "videos.json").read_text())
    assert [shows[path.name] for path in written] == [[f"prompt {n}"] for n in range(1001)]
    made = load_file(tmp_path / "latents.safetensors")
    assert [float(made[path.stem]) for path in written] == list(range(1001))


def test_pictures_of_both_sides_are_left_out_where_a_manifest_lists_them(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"000-{side}.mp4" for side in ("aligned", "base", "side-by-side")]
    for name in names:
        (tmp_path / name).touch()
    assert [path.name for path in find_videos(tmp_path)] == names, "videos of someone else"
    (tmp_path / "videos.json").write_text(json.dumps(dict.fromkeys(names, "a dog")))
    with caplog.at_level("INFO"):
        assert [path.name for path in find_videos(tmp_path)] == names[:2]
    assert "left out: 1 of base and aligned side by side" in caplog.text


@pytest.mark.parametrize("name", ["000.mp4", "old.MP4", "clip.webm"])
def test_videos_of_whatever_kind_stay_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(StorageError, match=f"already holds 1 video, such as {name}"):
        generate(Config(), tmp_path)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        (
            ["A red circle drifts left."],
            "prompts: 'A red circle drifts left.' is a str; give a file",
        ),
        ([], "prompts: empty"),
    ],
)
def test_what_is_no_prompt_is_refused_before_the_generator_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, prompts: Any, said: str
) -> None:
    monkeypatch.delattr(generate_module, "load_backbone")
    with pytest.raises(ValueError, match=re.escape(said)):
        generate(Config(), tmp_path / "out", prompts=prompts)
    assert not (tmp_path / "out").exists()


def test_two_prompts_for_one_name_are_refused(tmp_path: Path) -> None:
    """Two spellings of one accent are two names to a Linux disk and one to a Mac's."""
    (tmp_path / "names.json").write_text(json.dumps({"é.mp4": "one", "e\u0301.mp4": "two"}))
    with pytest.raises(ValueError, match="two prompts for 'é.mp4', whose accents are spelt in two ways"):
        read_manifest(tmp_path / "names.json")


@pytest.mark.parametrize("text", ["", "  ", "\u200b", ["a dog", "\u2060"], [], 3, {"prompt": "a dog"}])
def test_a_map_names_prompts_that_can_be_read(tmp_path: Path, text: object) -> None:
    (tmp_path / "names.json").write_text(json.dumps({"a.mp4": text}))
    with pytest.raises(
        ValueError, match="names.json: (the prompt for 'a.mp4' is blank|expected a prompt for 'a)"
    ):
        read_manifest(tmp_path / "names.json")


def test_half_a_character_is_no_prompt() -> None:
    with pytest.raises(ValueError, match="holds half of a character"):
        VideoPrompt(0, ("a \udce9 dog",), (), 8)


def test_weights_and_runs_where_a_name_is_not_utf8_are_refused_at_once(
    tiny_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9"))
    folder.mkdir()
    (folder / "base.safetensors").write_bytes(tiny_base.read_bytes())
    settings = tmp_path / "run.yaml"
    settings.write_text(yaml.safe_dump(lists))
    for base, out in ((tiny_base, folder / "run"), (folder / "base.safetensors", tmp_path / "run")):
        assert (
            main(["align", "--config", str(settings), "--backbone.checkpoint", str(base), "--out", str(out)])
            == 1
        )
        line = capsys.readouterr().err
        assert "udce9" in line and "weights cannot be read or written where a name is not UTF-8" in line
        assert not out.exists()
    assert main(["generate", "--config", str(settings), "--out", str(folder / "videos")]) == 1
    assert "where a name is not UTF-8" in capsys.readouterr().err


def test_a_video_that_is_not_whole_is_not_there(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped while it writes, `kvpo generate` leaves whole videos, their prompts and their latents."""
    config = tiny_config(tiny_base)
    prompts = [VideoPrompt(n, (text,), (), 9) for n, text in enumerate(CAPTIONS[:2])]
    wrote = []

    def stopping(path: Path, *content: Any, **settings: Any) -> None:
        write_video(path, *content, **settings)
        wrote.append(path)
        if len(wrote) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kvpo.app.generate.write_video", stopping)
        generate(config, tmp_path / "out", prompts=prompts)
    beside = ["latents.parts", "prompts.jsonl", "videos.json"]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["000.mp4", *beside]
    assert listed_videos(tmp_path / "out", None)[1:] == (["000.mp4"], CAPTIONS[:1])
    assert len(load_file(tmp_path / "out" / "latents.parts" / "000.safetensors")["000"]) == 9


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("chosen", [False, True])
def test_a_stopped_call_continues_with_the_videos_that_it_lacks(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool
) -> None:
    config = tiny_config(tiny_base)
    best = Best(2, ("flicker",), explorer="fresh") if chosen else None
    prompts = [VideoPrompt(n, (CAPTIONS[n % 2],), (), 9) for n in range(5)]
    monkeypatch.setattr(generate_module, "VIDEOS_TOGETHER", 2)
    generate(config, tmp_path / "whole", prompts=prompts, best=best)
    wrote: list[str] = []

    def recording(path: Path, *content: Any, **settings: Any) -> None:
        wrote.append(path.name)
        if len(wrote) == 4:
            raise OSError(28, "No space left on device")
        write_video(path, *content, **settings)

    with monkeypatch.context() as patch:
        patch.setattr("kvpo.app.generate.write_video", recording)
        with pytest.raises(StorageError, match="the disk is full"):
            generate(config, tmp_path / "out", prompts=prompts, best=best)
        assert len(list((tmp_path / "out").glob("*.mp4"))) == 3
        (tmp_path / "out" / f"{TEMPORARY_PREFIX}left").touch()
        generate(config, tmp_path / "out", prompts=prompts, best=best)
    assert len(wrote) == 4 + 3, "the batch that was begun, and the one that was not"
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    with pytest.raises(StorageError, match="already holds 5 videos"):
        generate(config, tmp_path / "out", prompts=prompts, best=best)


def test_a_stopped_call_is_not_continued_by_another_one(
    tiny_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, out = tiny_config(tiny_base), tmp_path / "out"
    prompts = [VideoPrompt(0, CAPTIONS[:1], (), 9)]
    best = Best(2, ("flicker",), explorer="fresh")

    def failing(*content: Any, **settings: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("kvpo.app.generate.write_video", failing)
        generate(config, out, prompts=prompts)
    with (
        claimed(out),
        pytest.raises(StorageError, match=f"another process is writing to {out}; wait for it"),
    ):
        generate(config, out, prompts=prompts)
    before = contents(out / "latents.parts")
    other_prompts = [VideoPrompt(0, CAPTIONS[1:], (), 9)]
    shifted = replace(config, stream=replace(config.stream, shift=2.0))
    for changed, other, given, choice in (
        ("seed", replace(config, seed=1), prompts, None),
        ("stream.shift", shifted, prompts, None),
        ("prompts", config, other_prompts, None),
        ("best-of", config, prompts, best),
    ):
        message = f"holds unfinished videos of a call with other {changed}.*; repeat that call"
        with pytest.raises(StorageError, match=message):
            generate(other, out, prompts=given, best=choice)
    assert contents(out / "latents.parts") == before


def test_the_best_of_several_on_the_command_line(tiny_base: Path, tmp_path: Path) -> None:
    lists = {name: list(value) if isinstance(value, tuple) else value for name, value in SETTINGS.items()}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({**lists, "backbone.checkpoint": str(tiny_base)}))
    (tmp_path / "p.jsonl").write_text(json.dumps({"segments": CAPTIONS[:1], "num_frames": 9}) + "\n")
    command = ["generate", "--config", str(tmp_path / "run.yaml"), "--prompts", str(tmp_path / "p.jsonl")]
    choosing = [*command, "--best-of", "3", "--by", "flicker", "--branches", "fresh"]
    assert main([*choosing, "--out", str(tmp_path / "best")]) == 0
    scores = json.loads((tmp_path / "best" / "best-of.json").read_text())["0"]["base"]
    assert [len(own) for own in scores] == [3, 3, 3]
    assert main([*choosing, "--per", "video", "--out", str(tmp_path / "whole")]) == 0
    scores = json.loads((tmp_path / "whole" / "best-of.json").read_text())["0"]["base"]
    assert [len(own) for own in scores] == [3]
    two = ["--best-of", "2", "--branches"]
    for wrong in (
        ["--best-of", "1"], ["--by", "flicker"], [*two, "no"], [*two, "renoise"],
        [*two, "neighbour", "--exploration.noise", "1.5"],
    ):  # fmt: skip
        assert main([*command, *wrong, "--out", str(tmp_path / "no")]) == 2
