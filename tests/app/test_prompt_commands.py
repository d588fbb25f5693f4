"""`kvpo prompts`: problems and notes with their places, conversion, what is held out."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import yaml

from kvpo.app.build import source_of
from kvpo.app.cli import main
from kvpo.app.prompt_sets import held_out, prompts_of_file, short_notice, word_count
from kvpo.app.video_folder import file_prompts
from kvpo.config import Config
from kvpo.prompt_files import read_prompts
from kvpo.prompts import VideoPrompt
from tests.tiny_wan import tiny_flags


def test_notes_name_file_and_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The tiny encoder reads eight tokens, and counts those that are cut."""
    flags = tiny_flags("longlive-1.3b", tmp_path)
    (tmp_path / "one.txt").write_text("a dog\na red ball rolls left a red ball rolls left\n")
    (tmp_path / "two.csv").write_text("id,prompt\n1,the dog jumps\n2,A  Dog\n")
    assert main(["prompts", str(tmp_path / "one.txt"), str(tmp_path / "two.csv"), *flags]) == 0
    said = capsys.readouterr().out
    assert f"{tmp_path}/one.txt: 2 prompts, 2 distinct; 2 to 10 words, the median 10" in said
    assert f"{tmp_path}/one.txt, line 2: 11 tokens, 8 are read: 3 are cut" in said
    assert f"{tmp_path}/two.csv, line 3: repeats {tmp_path}/one.txt, line 1" in said
    assert "the median prompt has 3 words" in said and "--extended FILE" in said


def test_problems_stop_the_conversion(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text("a dog\n\na cat\n\nb\n")
    (tmp_path / "q.jsonl").write_text('{"prompt": ""}\n')
    files = [str(tmp_path / name) for name in ("p.txt", "q.jsonl", "absent.txt")]
    assert main(["prompts", *files, "--out", str(tmp_path / "out.txt")]) == 1
    said = capsys.readouterr().out
    for line in ("p.txt, line 2: blank", "p.txt, line 4: blank", "q.jsonl, line 1: segment 1 of 1 is blank",
                 "absent.txt: no such prompt file"):  # fmt: skip
        assert line in said
    assert not (tmp_path / "out.txt").exists()


def test_conversion_with_extended_texts_and_a_part_held_out(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("".join(f"dog {n}\n" for n in range(6)) + "Dog  2\n")
    (tmp_path / "long.json").write_text(json.dumps([f"a brown dog, number {n}" for n in (*range(6), 2)]))
    command = [
        "prompts",
        str(tmp_path / "p.txt"),
        "--extended",
        str(tmp_path / "long.json"),
        "--hold-out",
        "2",
    ]
    assert main([*command, "--out", str(tmp_path / "new.jsonl")]) == 0
    kept = read_prompts(tmp_path / "new.jsonl", num_frames=9)
    held = read_prompts(tmp_path / "new-held-out.jsonl", num_frames=9)
    texts = {prompt.segments[0] for prompt in kept}, {prompt.segments[0] for prompt in held}
    assert not texts[0] & texts[1] and texts[0] | texts[1] == {f"a brown dog, number {n}" for n in range(6)}
    assert len(held) == 2 and {prompt.num_frames for prompt in kept} == {30}
    assert main([*command, "--out", str(tmp_path / "again.jsonl")]) == 0
    assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / "new.jsonl").read_bytes()
    assert main(["prompts", str(tmp_path / "p.txt"), "--hold-out", "2"]) == 2


def test_held_out_prompts_have_no_repeats_left() -> None:
    texts = ["a", "b", "A", "c", " a", "d"]
    prompts = [VideoPrompt(n, (text,), (), 9) for n, text in enumerate(texts)]
    for count in range(4):
        kept, held = held_out(prompts, count)
        own = [{p.segments[0].strip().lower() for p in part} for part in (kept, held)]
        assert len(held) == count and not own[0] & own[1] and own[0] | own[1] == set("abcd")
    with pytest.raises(ValueError, match="4 of 4 distinct prompts"):
        held_out(prompts, 4)


def test_words_of_every_script_and_the_notice_of_short_ones() -> None:
    assert word_count("A dog runs - quickly.") == 4 and word_count("一只猫在跑步啊") == 3
    short = [VideoPrompt(0, ("A dog runs.",), (), 9)]
    assert short_notice(short, 0) is None and short_notice(short, 9) is None
    assert "3 words, the generator was made for extended ones of about 80" in str(short_notice(short, 80))


@pytest.mark.parametrize("name", ["p.csv", "p.json", "p.jsonl"])
def test_a_folder_of_videos_takes_prompts_of_every_form(tmp_path: Path, name: str) -> None:
    contents = {
        "p.csv": "prompt\na dog\na cat\n",
        "p.json": '["a dog", "a cat"]',
        "p.jsonl": '{"prompt": "a dog"}\n{"prompt": "a cat"}\n',
    }
    (tmp_path / name).write_text(contents[name])
    files = [tmp_path / "1.mp4", tmp_path / "2.mp4"]
    assert file_prompts(tmp_path / name, tmp_path, files) == ["a dog", "a cat"]


def lists(value: Any) -> Any:
    """Tuples as lists, as a saved configuration has them."""
    return json.loads(json.dumps(value))


def test_a_run_trains_on_extended_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its prompts, paired, lie beside its directory; what it has already cannot be paired again."""
    flags = tiny_flags("longlive-1.3b", tmp_path)
    short = (tmp_path / "prompts.txt").read_text().splitlines()
    (tmp_path / "long.txt").write_text("".join(f"{line}, and slowly so\n" for line in short))
    seen: list[Config] = []
    monkeypatch.setattr("kvpo.app.align.align", lambda config, out, **given: seen.append(config) or {})
    command = ["align", *flags, "--extended", str(tmp_path / "long.txt"), "--out", str(tmp_path / "run")]
    assert main(command) == 0
    found = prompts_of_file(seen[0], source_of(seen[0]).reading(seen[0]))
    assert [prompt.segments for prompt in found] == [(f"{line}, and slowly so",) for line in short]
    assert seen[0].prompts.file == str(tmp_path / "run-prompts.jsonl")
    run, kept = tmp_path / "run", (tmp_path / "run-prompts.jsonl").read_bytes()
    run.mkdir()
    (run / "config.yaml").write_text(yaml.safe_dump(lists(asdict(seen[0]))))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert main(command) == 0, "the same command, by a restart"
    assert seen[1].prompts == seen[0].prompts
    assert main(["align", "--resume", "--out", str(run), "--extended", str(tmp_path / "long.txt")]) == 2
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT")
    (tmp_path / "long.txt").write_text("".join(f"{line}, and fast\n" for line in short))
    capsys.readouterr()
    assert main(command) == 2
    assert "--extended: the run" in capsys.readouterr().err
    assert (tmp_path / "run-prompts.jsonl").read_bytes() == kept
    (tmp_path / "long.txt").write_text("one\n")
    assert main(command) == 1
    assert main(["align", "--preset", "demo", "--extended", "x.txt", "--out", str(tmp_path / "no")]) == 2
