"""Prompt files: every format, and one clear error with its line for everything else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpo.prompt_files import read_prompts
from kvpo.prompts import VideoPrompt, check_shown


def write(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8"))
    return path


def jsonl(*records: object) -> str:
    return "".join(json.dumps(record) + "\n" for record in records)


def test_text_files(tmp_path):
    path = write(tmp_path / "p.txt", b"\xef\xbb\xbfA dog runs.\r\n  Ein B\xc3\xa4r schl\xc3\xa4ft  \n\n \n")
    assert read_prompts(path, num_frames=21, switches=(9,), first_id=4) == [
        VideoPrompt(4, ("A dog runs.",), (), 21),
        VideoPrompt(5, ("Ein Bär schläft",), (), 21),
    ]


@pytest.mark.parametrize("end", ["\r", "\r\n", "\n"])
def test_line_ends_of_every_system(tmp_path, end):
    path = write(tmp_path / "p.txt", end.join(["A dog runs.", "A cat sits.", ""]).encode())
    assert [prompt.segments for prompt in read_prompts(path, num_frames=9)] == [
        ("A dog runs.",),
        ("A cat sits.",),
    ]
    path = write(tmp_path / "p.jsonl", end.join(['{"segments": ["a"]}', '{"segments": ["b"]}']).encode())
    assert [prompt.segments for prompt in read_prompts(path, num_frames=9)] == [("a",), ("b",)]
    path = write(tmp_path / "p.txt", end.join(["a", "b", "", "c"]).encode())
    with pytest.raises(ValueError, match="line 3: blank"):
        read_prompts(path, num_frames=9)


def test_interactive_files_take_the_configured_switches(tmp_path):
    path = write(tmp_path / "p.jsonl", jsonl({"prompts": ["a", "b", "c"]}, {"prompts": ["d", "e", "f"]}))
    assert read_prompts(path, num_frames=240, switches=(40, 80)) == [
        VideoPrompt(0, ("a", "b", "c"), (40, 80), 240),
        VideoPrompt(1, ("d", "e", "f"), (40, 80), 240),
    ]


def test_lines_with_switches_of_their_own(tmp_path):
    own = {"segments": ["a", " b "], "switches": [6], "num_frames": 12}
    path = write(tmp_path / "p.jsonl", jsonl(own, {"segments": ["c"]}, {"prompts": ["d", "e"]}))
    assert read_prompts(path, num_frames=21, switches=(9,)) == [
        VideoPrompt(0, ("a", "b"), (6,), 12),
        VideoPrompt(1, ("c",), (), 21),
        VideoPrompt(2, ("d", "e"), (9,), 21),
    ]


BAD = {
    "empty file": ("p.txt", "", "p.txt: the file holds no prompts"),
    "only blanks": ("p.jsonl", "\n \n\n", "p.jsonl: the file holds no prompts"),
    "blank line": ("p.txt", "a\nb\n\nc\n", "p.txt, line 3: blank"),
    "nothing that can be seen": ("p.txt", "a\n\u200b\u2060\n", "p.txt, line 2: blank"),
    "no segment that can be seen": ("p.jsonl", '{"segments": ["\\u200d"]}\n', "segment 1 of 1 is blank"),
    "latin-1": ("p.txt", b"a\nb\xe4r\n", "line 2: not UTF-8 text (byte 0xe4 at position 2)"),
    "utf-16 without a mark": ("p.txt", "a\nb".encode("utf-16-le"), "line 1: holds a zero byte"),
    "utf-16": ("p.txt", "a".encode("utf-16"), "line 1: not UTF-8 text (byte 0xff at position 1)"),
    "format": ("p.csv", "a", "prompt files are .txt"),
    "not json": ("p.jsonl", '{"segments": ["a"]}\n{"prompts": [\n', "line 2: not JSON"),
    "no object": ("p.jsonl", '["a"]\n', "line 1: not a prompt"),
    "neither": ("p.jsonl", '{"text": "a"}\n', "line 1: not a prompt"),
    "both": ("p.jsonl", '{"prompts": ["a"], "segments": ["a"]}\n', "line 1: not a prompt"),
    "unknown": ("p.jsonl", '{"segments": ["a"], "swiches": []}\n', "unknown field swiches beside segments"),
    "misplaced": ("p.jsonl", '{"prompts": ["a"], "switches": []}\n', "unknown field switches beside prompts"),
    "no list": ("p.jsonl", '{"prompts": "a"}\n', "prompts must be a list of at least one text"),
    "no segments": ("p.jsonl", '{"segments": []}\n', "segments must be a list of at least one text"),
    "number": ("p.jsonl", '{"segments": ["a", 3]}\n', "segments must be a list of at least one text"),
    "blank segment": ("p.jsonl", '{"segments": ["a", " "], "switches": [3]}\n', "segment 2 of 2 is blank"),
    "text switch": ("p.jsonl", '{"segments": ["a", "b"], "switches": ["3"]}\n', 'got ["3"]'),
    "boolean": ("p.jsonl", '{"segments": ["a", "b"], "switches": [true]}\n', "got [true]"),
    "fraction": ("p.jsonl", '{"segments": ["a", "b"], "switches": [3.5]}\n', "got [3.5]"),
    "no number": ("p.jsonl", '{"segments": ["a", "b"], "switches": 3}\n', "must be a list of latent frames"),
    "frames": ("p.jsonl", '{"segments": ["a"], "num_frames": 0}\n', "num_frames must be a positive"),
    "own count": (
        "p.jsonl",
        '{"segments": ["a", "b"]}\n',
        "line 1: prompt 0: 2 segments need 1 switch frames",
    ),
    "order": ("p.jsonl", '{"segments": ["a", "b", "c"], "switches": [9, 6]}\n', "must increase strictly"),
    "beyond": ("p.jsonl", '{"segments": ["a", "b"], "switches": [21]}\n', "num_frames = 21"),
    "count": (
        "p.jsonl",
        jsonl({"prompts": ["a", "b"]}),
        "2 segments need 1 switch frames, the configuration has 2",
    ),
    "ragged": (
        "p.jsonl",
        jsonl({"prompts": ["a", "b", "c"]}, {"prompts": ["a", "b"]}),
        "line 2: 2 segments, but the lines before have 3",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_malformed_files_give_one_error_with_the_line(tmp_path, case):
    name, content, message = BAD[case]
    path = write(tmp_path / name, content)
    with pytest.raises(ValueError) as error:
        read_prompts(path, num_frames=21, switches=(9, 15))
    assert message in str(error.value) and str(error.value).startswith(str(path))


def test_a_missing_file(tmp_path):
    with pytest.raises(ValueError, match="no such prompt file"):
        read_prompts(tmp_path / "p.txt", num_frames=21)


@pytest.mark.parametrize(
    ("switches", "hidden"), [([16], 2), ([17], 2), ([4, 5], 2), ([1, 2, 3], 2), ([6, 7, 9], 3), ([6, 16], 3)]
)
def test_a_segment_without_a_block_is_named_with_its_line(tmp_path, switches, hidden):
    """Of 18 frames in blocks of 3 the last starts at 15; a switch acts at the first block from it on."""
    record = {"segments": ["a"] * (len(switches) + 1), "switches": switches}
    path = write(tmp_path / "p.jsonl", jsonl({"segments": ["a", "b"], "switches": [15]}, record))
    with pytest.raises(ValueError, match=rf"line 2: segment {hidden} of {len(switches) + 1} is never shown"):
        read_prompts(path, num_frames=18, block=3)
    assert len(read_prompts(path, num_frames=18)) == 2, "with blocks of one frame every segment has one"


@given(st.integers(1, 6), st.integers(1, 8), st.data())
def test_refused_is_what_no_block_shows(block, blocks, data):
    frames = block * blocks
    inside = st.sets(st.integers(1, frames - 1), max_size=3) if frames > 1 else st.just(set())
    switches = tuple(sorted(data.draw(inside)))
    prompt = VideoPrompt(0, ("a",) * (len(switches) + 1), switches, frames)
    shown = {prompt.segment_at(start) for start in range(0, frames, block)}
    if shown == set(range(len(prompt.segments))):
        check_shown(prompt, block)
    else:
        with pytest.raises(ValueError, match="is never shown"):
            check_shown(prompt, block)


text = st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)


@given(st.lists(st.lists(text, min_size=1, max_size=4), min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory, videos):
    path = tmp_path_factory.getbasetemp() / "written.jsonl"
    write(path, jsonl(*({"segments": v, "switches": [3 * i for i in range(1, len(v))]} for v in videos)))
    prompts = read_prompts(path, num_frames=12)
    assert [p.segments for p in prompts] == [tuple(s.strip() for s in v) for v in videos]
    assert [p.id for p in prompts] == list(range(len(videos)))
