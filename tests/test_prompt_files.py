"""Prompt files: every format is read, and everything else gives one clear error with its line."""

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvpo.prompt_files import examine, extended, read_prompts, repeats, written
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
    "format": ("p.xml", "a", "prompt files are .txt"),
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
    "transitions": (
        "p.jsonl",
        '{"segments": ["a", "b"], "switches": [3], "transitions": [1, 2]}\n',
        "1 switches need as many transitions",
    ),
    "negative": (
        "p.jsonl",
        '{"segments": ["a", "b"], "switches": [3], "transitions": [-1]}\n',
        "blends over 0 blocks or more",
    ),
    "no blocks": (
        "p.jsonl",
        '{"segments": ["a", "b"], "switches": [3], "transitions": [1.5]}\n',
        "must be a list of numbers of blocks, got [1.5]",
    ),
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


def test_prompts_are_written_as_they_are_read(tmp_path):
    prompts = [
        VideoPrompt(0, ("a", "ä"), (6,), 12),
        VideoPrompt(1, ("c", "d", "e"), (6, 9), 12, (2, None)),
    ]
    path = write(tmp_path / "p.jsonl", written(prompts, tmp_path / "p.jsonl"))
    assert read_prompts(path, num_frames=21) == prompts
    assert path.read_text().count("transitions") == 1


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
    """The last block of 18 frames in blocks of 3 starts at 15; a switch acts at the next block start."""
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


TWO = [("a dog",), ("eine Ä ist kein A 🐈",)]
SAME = {
    "p.txt": "# of two\na dog\neine Ä ist kein A 🐈\n#\n",
    "p.jsonl": '{"prompt": "a dog"}\n{"segments": ["eine Ä ist kein A 🐈"]}\n',
    "q.jsonl": '{"segments": ["a dog"], "switches": []}\n"eine Ä ist kein A 🐈"\n',
    "p.json": '["a dog",\n "eine Ä ist kein A 🐈"]',
    "q.json": json.dumps([{"prompt": text, "seed": n} for n, (text,) in enumerate(TWO)]),
    "full_info.json": json.dumps(
        [{"prompt_en": text, "dimension": ["color"], "auxiliary_info": {}} for (text,) in TWO]
    ),
    "p.csv": '\ufeffid,Prompt\n1,a dog\n2,"eine Ä ist kein A 🐈"\n',
    "p.tsv": "prompt\tid\r\na dog\t1\r\neine Ä ist kein A 🐈\t2\r\n",
}


@pytest.mark.parametrize("name", SAME)
def test_every_form_of_the_same_prompts(tmp_path, name):
    found = examine(write(tmp_path / name, SAME[name]), num_frames=21)
    assert [p.segments for p in found.prompts] == TWO and not found.problems
    assert {p.switches for p in found.prompts} == {()} and {p.num_frames for p in found.prompts} == {21}


def test_every_problem_of_a_file_has_its_line(tmp_path):
    records = '[\n{"prompt": "a"},\n\n{"prompt": " "}, 3,\n{"prompt": "b", "switches": [3]},\n"c"\n]'
    found = examine(write(tmp_path / "p.json", records), num_frames=9)
    assert [p.segments for p in found.prompts] == [("a",), ("c",)] and found.lines == (2, 6)
    assert [problem.partition("p.json, ")[2].partition(":")[0] for problem in found.problems] == [
        "line 4",
        "line 4",
        "line 5",
    ]
    table = examine(write(tmp_path / "p.csv", 'n,prompt\n1,"a\nlong one"\n2,\n3\n4,b\n'), num_frames=9)
    assert [(p.segments[0], line) for p, line in zip(table.prompts, table.lines, strict=True)] == [
        ("a\nlong one", 2),
        ("b", 6),
    ]
    assert [problem.partition("p.csv, ")[2][:6] for problem in table.problems] == ["line 4", "line 5"]
    lines = examine(write(tmp_path / "p.txt", "a\n\nb\n\u200b\n"), num_frames=9)
    assert len(lines.prompts) == 2 and len(lines.problems) == 2 and "line 4: blank" in lines.problems[1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.json", '["a", ]', "line 1: not JSON"),
        ("p.json", '["a"\n "b"]', "line 2: not JSON (Expecting ',' delimiter)"),
        ("p.json", '["a"]\n["b"]', "line 2: not JSON (Extra data)"),
        ("p.json", '["a",\n', "line 1: not JSON"),
        ("p.json", "[]", "the file holds no prompts"),
        ("p.json", '[["a"]]', "line 1: not a prompt"),
        ("p.csv", "id,text\n1,a\n", "line 1: no column is called prompt; there are id, text"),
        ("p.csv", 'prompt\n"a\n', "line 2: not a table"),
        ("p.csv", "prompt\n", "the file holds no prompts"),
        (
            "t.json",
            '{"prompts": [{"startTime": 0, "prompts": []}]}',
            "entry 1 of the timeline needs startTime",
        ),
        (
            "t.json",
            '{"prompts": [{"startTime": 0, "endTime": Infinity, "text": "a"}]}',
            "lasts from 0.0 to inf",
        ),
        (
            "t.json",
            '{"prompts": [{"startTime": 0, "endTime": 1e308, "text": "a"}]}',
            "line 1: entry 1 of the timeline lasts from 0.0 to 1e+308; give seconds, fewer than 1e+09",
        ),
        (
            "t.json",
            '{"prompts": [{"startTime": 1%s, "endTime": 2, "text": "a"}]}' % ("0" * 400),
            "line 1: entry 1 of the timeline needs startTime and endTime, numbers of seconds",
        ),
        (
            "p.json",
            '["a",\n{"prompt": "b", "seed": 1%s}]' % ("0" * 5000),
            "line 2: not JSON that can be read",
        ),
        (
            "p.json",
            '["a",\n{"prompt": "b", "frames": "%s"}]' % ("iVBORw0KGgo" * 1000),
            "is not a file; give an image or a video, relative to p.json",
        ),
        ("t.json", '{"prompts": [{"startTime": 1, "endTime": 1, "text": "a"}]}', "shows nothing"),
    ],
)
def test_forms_that_are_damaged(tmp_path, name, content, message):
    with pytest.raises(ValueError) as error:
        read_prompts(write(tmp_path / name, content), num_frames=9)
    assert message in str(error.value) and str(error.value).startswith(str(tmp_path / name))


def test_a_timeline_is_one_video(tmp_path):
    """Seconds become latent frames, in whole blocks; a blend reads as Scope shows it."""
    entries = [
        {"startTime": 0, "endTime": 4.2, "prompts": [{"text": "a dog", "weight": 100}]},
        {"startTime": 4.2, "endTime": 4.2, "prompts": [{"text": "nothing", "weight": 100}]},
        {
            "startTime": 4.2,
            "endTime": 9,
            "prompts": [{"text": "a cat", "weight": 60}, {"text": "fog", "weight": 40}],
            "transitionSteps": 4,
        },
    ]
    path = write(tmp_path / "t.json", json.dumps({"prompts": entries, "settings": {}, "version": "2.1"}))
    (prompt,) = read_prompts(path, num_frames=21, block=3)
    assert prompt == VideoPrompt(0, ("a dog", "a cat, fog"), (17,), 36)
    (prompt,) = read_prompts(path, num_frames=21, block=3, latent_rate=8.0)
    assert prompt.switches == (34,) and prompt.num_frames == 72


def test_extended_texts_pair_line_by_line(tmp_path):
    short = examine(write(tmp_path / "short.txt", "a dog\na cat\n"), num_frames=9)
    long = write(tmp_path / "long.txt", "A brown dog runs.\nA grey cat sleeps.\n")
    both = extended(short, long, num_frames=9)
    assert [p.segments for p in both.prompts] == [("A brown dog runs.",), ("A grey cat sleeps.",)]
    assert [p.id for p in both.prompts] == [0, 1] and both.lines == short.lines
    mapped = {"a cat": "A grey cat sleeps.", "a dog": "A brown dog runs."}
    assert extended(short, write(tmp_path / "m.json", json.dumps(mapped)), num_frames=9) == both
    for name, content, message in (
        ("broken.json", '{"a dog": ', r".*broken\.json: not JSON"),
        ("one.txt", "A brown dog runs.\n", "1 prompts, .*short.txt has 2: .*short.txt, line 2 has no"),
        ("three.txt", "aaaaaaa\nbbbbbbbb\nccc\n", "3 prompts, .*: .*three.txt, line 3 has no counterpart"),
        ("swapped.txt", "dog\ncat\n", "most texts are shorter .* swapped"),
        ("none.json", '{"a dog": "A brown dog runs."}', "no extended text for .*short.txt, line 2"),
        (
            "parts.jsonl",
            '{"segments": ["a", "b"], "switches": [3]}\n"c"\n',
            "line 1: 2 segments, .*line 1 has 1",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            extended(short, write(tmp_path / name, content), num_frames=9)


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv"])
def test_what_is_converted_is_read_again(tmp_path, suffix):
    prompts = [VideoPrompt(n, (text,), (), 9) for n, text in enumerate(['a "dog", running', "猫", "🐈"])]
    path = tmp_path / f"p{suffix}"
    write(path, written(prompts, path))
    assert read_prompts(path, num_frames=9) == prompts
    several = [VideoPrompt(0, ("a", "b"), (3,), 9)]
    if "json" in suffix:
        assert read_prompts(write(path, written(several, path)), num_frames=21) == several
    else:
        with pytest.raises(ValueError, match="holds one text per video, prompt 0 has 2"):
            written(several, path)
        with pytest.raises(ValueError, match="holds no lengths, prompt 0 has 9 latent frames and 21 are"):
            written(prompts, path, 21)


def test_a_record_may_name_the_frames_that_its_video_begins_with(tmp_path):
    """Paths are relative to the prompt file, and stay valid if it is rewritten elsewhere."""
    (still, clip) = tmp_path / "a dog.png", tmp_path / "in" / "clip.mp4"
    (tmp_path / "in").mkdir()
    still.touch(), clip.touch()
    records = [
        {"prompt": "a dog", "frames": "../a dog.png"},
        {"prompts": ["a", "b"], "frames": "clip.mp4"},
        {"segments": ["c"], "frames": "clip.mp4"},
        {"segments": ["c"], "frames": None},
        {"segments": ["C"], "frames": "clip.mp4"},
    ]
    found = read_prompts(write(tmp_path / "in" / "p.jsonl", jsonl(*records)), num_frames=9, switches=(3,))
    assert [p.frames and p.frames.resolve() for p in found] == [still, clip, clip, None, clip]
    assert [len(same) for same in repeats(found)] == [1, 1, 2, 1]
    for name in ("p.jsonl", "p.json", "p.csv", "p.tsv"):
        own = [p for p in found if len(p.segments) == 1 or "json" in name]
        again = read_prompts(write(tmp_path / name, written(own, tmp_path / name)), num_frames=9)
        assert [(p.segments, p.frames) for p in again] == [
            (p.segments, p.frames and tmp_path / os.path.relpath(p.frames, tmp_path)) for p in own
        ]
    assert (tmp_path / "p.csv").read_text().splitlines()[:2] == ["prompt,frames", "a dog,a dog.png"]
    with pytest.raises(ValueError, match="a .txt file holds texts alone, and prompts have frames"):
        written([found[0]], tmp_path / "p.txt")
    bad = write(
        tmp_path / "bad.jsonl", jsonl({"prompt": "a", "frames": 81}, {"prompts": ["a"], "frames": "no.png"})
    )
    problems = [problem.removeprefix(f"{bad}, ") for problem in examine(bad, num_frames=9).problems]
    assert problems[0] == "line 1: frames must name an image or a video, got 81"
    assert problems[1].startswith(
        f"line 2: frames: {tmp_path}/no.png is not a file; give an image or a video"
    )
    table = write(tmp_path / "bad.csv", "frames,prompt\nno.png,a\n,b\n")
    assert (
        examine(table, num_frames=9)
        .problems[0]
        .startswith(f"{table}, line 2: frames: {tmp_path}/no.png is not")
    )
