"""`kvpo score` on real files, as a new user would try it."""

import json
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "rewards"))
from tiny_rewards import gliding
from video_makers import encode

from kvpo.app.cli import main
from kvpo.app.score import preview
from kvpo.app.video_folder import file_prompts, find_videos
from kvpo.report.video import read_video

LONG_NAME = "a name that is far longer than the eighty columns of a narrow terminal window, " * 2 + "end.webm"
LIGHT = "motion_smoothness,dynamic_degree,flicker"


def pixels(video: torch.Tensor) -> np.ndarray:
    return (video * 255).round().to(torch.uint8).movedim(1, -1).numpy()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Videos in the usual containers, and files that are broken in the usual ways."""
    directory = tmp_path_factory.mktemp("videos")
    glide = pixels(gliding(64, 96, 12, 3, 1))
    order = [6, 0, 9, 3, 11, 1, 7, 4, 10, 2, 8, 5]
    encode(directory / "glide.mp4", glide)
    encode(directory / LONG_NAME, glide[order], "libvpx-vp9")
    encode(directory / "still.mov", np.repeat(glide[:1], 12, 0))
    encode(directory / "picture.gif", glide, "gif", "rgb8", 20)
    encode(
        directory / "deep colour.mkv", glide, "libx265", "yuv420p10le", **{"x265-params": "log-level=none"}
    )
    alpha = np.concatenate([glide, np.full((*glide.shape[:3], 1), 180, np.uint8)], -1)
    encode(directory / "alpha.mov", alpha, "qtrle", "argb")
    encode(directory / "uneven.mp4", glide, times=[0, 30, 60, 200, 230, 260, 500, 530, 560, 590, 620, 900])
    encode(directory / "odd.mkv", glide[:, :61, :93], "ffv1", "yuv444p")
    (directory / "below").mkdir()
    encode(directory / "below" / "one frame.mp4", glide[:1])
    encode(directory / "tiny.mp4", glide[:, :2, :2])
    (directory / "empty.mp4").write_bytes(b"")
    (directory / "corrupt.mp4").write_bytes(b"\x00\x00\x00\x20ftypisom" + bytes(3000))
    cut = (directory / "glide.mp4").read_bytes()
    (directory / "cut.mp4").write_bytes(cut[: len(cut) // 2])
    (directory / "notes.txt").write_text("not a video")
    (directory / ".hidden.mp4").write_bytes(cut)
    return directory


@pytest.fixture(scope="module")
def scored(folder, tmp_path_factory) -> tuple[subprocess.CompletedProcess, Path]:
    out = tmp_path_factory.mktemp("out") / "scores.html"
    command = [
        sys.executable,
        "-m",
        "kvpo.app.cli",
        "score",
        str(folder),
        "--reward",
        LIGHT,
        "--out",
        str(out),
    ]
    environment = os.environ | {"COLUMNS": "40", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return done, out


def test_the_table_names_every_file_in_full_and_says_what_is_wrong(scored, folder):
    done, out = scored
    lines = done.stdout.splitlines()
    assert lines[0].split() == ["motion_smoothness", "dynamic_degree", "flicker", "file"]
    assert lines[-1] == str(out)
    found = {
        str(p.relative_to(folder)): next(line for line in lines if f"  {p.relative_to(folder)}" in line)
        for p in find_videos(folder)
    }
    assert len(found) == 13 and len(lines) == 15
    assert found[LONG_NAME].endswith(LONG_NAME)
    assert "(not scored: the file is empty)" in found["empty.mp4"]
    assert "(not scored: not a readable video:" in found["corrupt.mp4"]
    assert "(not scored: not a readable video:" in found["cut.mp4"]
    assert "needs at least 3 frames, the file has 1" in found["below/one frame.mp4"]
    for name in ("deep colour.mkv", "alpha.mov", "uneven.mp4", "odd.mkv", "tiny.mp4", "picture.gif"):
        assert "not scored" not in found[name], found[name]
    assert "Traceback" not in done.stderr


def test_scores_are_ordered_and_sensible(scored):
    rows = json.loads(scored[1].with_suffix(".json").read_text())
    scores = {row["file"]: row["scores"] for row in rows}
    smooth = [row["scores"]["motion_smoothness"] for row in rows if row["scores"]]
    assert smooth == sorted(smooth, reverse=True)
    assert scores["still.mov"]["dynamic_degree"] < 0.01 < scores["glide.mp4"]["dynamic_degree"]
    assert scores["glide.mp4"]["motion_smoothness"] > 0.9 > 0.6 > scores[LONG_NAME]["motion_smoothness"]
    for name in ("deep colour.mkv", "uneven.mp4"):
        assert scores[name]["motion_smoothness"] == pytest.approx(
            scores["glide.mp4"]["motion_smoothness"], abs=0.1
        )
    assert scores["empty.mp4"] == {}


def test_the_page_holds_every_video_and_makes_no_request(scored):
    page = scored[1].read_text()
    assert page.count("<article") == 13 and page.count('src="data:video/mp4;base64,') == 9
    assert "http://" not in page and "https://" not in page
    assert (
        page.index("still.mov") < page.index("glide.mp4") < page.index("end.webm") < page.index("empty.mp4")
    )
    assert 'href="' in page and "the file is empty" in page


def test_previews_are_small_playable_and_large_enough_to_see(folder, tmp_path):
    (tmp_path / "p.mp4").write_bytes(preview(folder / "glide.mp4"))
    frames, rate = read_video(tmp_path / "p.mp4")
    assert frames.shape[0] == 12 and min(frames.shape[1:3]) >= 128 and rate == pytest.approx(16)


def test_a_long_video_needs_little_memory_and_time(tmp_path):
    """Ten minutes at 24 frames per second."""
    frame = pixels(gliding(48, 64, 60, 1, 0))
    path = tmp_path / "long.mp4"
    encode(path, np.concatenate([frame] * 240), rate=24, preset="ultrafast", g="48")
    code = (
        "import re, sys\nfrom pathlib import Path\nfrom kvpo.app.cli import main\n"
        f"page = {str(tmp_path / 's.html')!r}\n"
        f"status = main(['score', {str(path)!r}, '--reward', 'flicker', '--out', page])\n"
        # Not ru_maxrss: a child starts with its parent's.
        "print(int(re.search(r'VmHWM:\\s+(\\d+) kB', Path('/proc/self/status').read_text())[1]) // 1024)\n"
        "sys.exit(status)"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "not scored" not in done.stdout
    assert (
        int(done.stdout.split()[-1]) < 900
    )  # MB; all frames as floats would be 530 MB more than the libraries
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 20


def brightness(video_BTCHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    assert all(prompts), "a prompt for every clip"
    return video_BTCHW.mean((1, 2, 3, 4))


def fails_on_short(video_BTCHW: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    return 1 / torch.tensor([0.0 if video_BTCHW.shape[1] == 1 else 1.0])


def test_a_function_of_ones_own_and_prompts(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    names = [str(path.relative_to(folder)) for path in find_videos(folder)]
    (tmp_path / "prompts.txt").write_text("".join(f"prompt {i}\n" for i in range(len(names))))
    arguments = ["score", str(folder), "--reward", "test_score:brightness", "--out", str(tmp_path / "s.html")]
    assert main([*arguments, "--prompts", str(tmp_path / "prompts.txt")]) == 0
    rows = {row["file"]: row for row in json.loads((tmp_path / "s.json").read_text())}
    assert rows["glide.mp4"]["prompt"] == f"prompt {names.index('glide.mp4')}"
    assert 0.3 < rows["below/one frame.mp4"]["scores"]["brightness"] < 0.7
    assert main([*arguments]) == 1  # every prompt is empty, every file fails, and that is said
    error = capsys.readouterr().err
    assert "none of the 13 files could be scored" in error and error.count("\n") == 1


class Twice:
    """A reward of two components, one of which another reward here has, too."""

    components = ("brightness", "other")

    def __call__(self, video_BTCHW: torch.Tensor, prompts: list[str]) -> dict[str, torch.Tensor]:
        return dict.fromkeys(self.components, video_BTCHW.mean((1, 2, 3, 4)))


twice = Twice()


def test_two_rewards_with_a_component_of_one_name_are_refused(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    arguments = ["--reward", "test_score:brightness,test_score:twice", "--out", str(tmp_path / "s.html")]
    assert main(["score", str(folder), *arguments]) == 1
    assert "two rewards have a component called 'brightness'" in capsys.readouterr().err


def test_one_failing_file_does_not_end_the_batch(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    out = tmp_path / "s.html"
    assert main(["score", str(folder), "--reward", "test_score:fails_on_short", "--out", str(out)]) == 0
    rows = {row["file"]: row for row in json.loads(out.with_suffix(".json").read_text())}
    assert (
        "fails_on_short' is inf for clip 0"
        in rows["below/one frame.mp4"]["problems"]["test_score:fails_on_short"]
    )
    assert rows["glide.mp4"]["scores"] == {"fails_on_short": 1.0}
    assert "below/one frame.mp4  (not scored: reward component" in capsys.readouterr().out


def prompts_of(folder: Path, file: str | None, *names: str) -> list[str] | None:
    return file_prompts(folder / file if file else None, folder, [folder / name for name in names])


def test_prompts_by_name_or_in_order(tmp_path):
    (tmp_path / "p.json").write_text('{"a.mp4": "first", "below/b.mp4": "second", "other": "x"}')
    assert prompts_of(tmp_path, "p.json", "a.mp4", "below/b.mp4") == ["first", "second"]
    assert prompts_of(tmp_path, "p.json", "below/a.mp4") == ["first"]
    with pytest.raises(ValueError, match="no prompt for c.mp4 and 1 more"):
        prompts_of(tmp_path, "p.json", "c.mp4", "d.mp4")
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    assert prompts_of(tmp_path, "p.txt", "a", "b") == ["one", "two"]
    assert prompts_of(tmp_path, None, "a", "b") is None
    with pytest.raises(ValueError, match="2 prompts for 3 files"):
        prompts_of(tmp_path, "p.txt", "a", "b", "c")


def test_numbers_in_names_count_as_numbers(tmp_path):
    names = [f"{n}-{word}.mp4" for n, word in enumerate("abcdefghijkl", 1)] + ["999-m.mp4", "1000-n.mp4"]
    for name in names:
        (tmp_path / name).touch()
    found = find_videos(tmp_path)
    assert [path.name for path in found] == names
    (tmp_path / "p.txt").write_text("".join(f"prompt of {name}\n" for name in names))
    assert file_prompts(tmp_path / "p.txt", tmp_path, found) == [f"prompt of {name}" for name in names]


@pytest.mark.parametrize("names", [("1.mp4", "01.mp4"), ("a.mp4", "A.mp4"), ("x-1.9.mp4", "x-1.10.mp4")])
def test_an_order_that_is_not_plain_is_refused(tmp_path, names):
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / "p.txt").write_text("one\ntwo\n")
    with pytest.raises(ValueError, match="not plain whether .* comes first; give a .json"):
        file_prompts(tmp_path / "p.txt", tmp_path, find_videos(tmp_path))


def test_a_name_in_two_folders_and_a_name_given_twice_are_refused(tmp_path):
    (tmp_path / "p.json").write_text('{"a.mp4": "one", "x/a.mp4": "two"}')
    assert prompts_of(tmp_path, "p.json", "a.mp4", "x/a.mp4") == ["one", "two"]
    with pytest.raises(ValueError, match="'a.mp4' is the name of 2 files"):
        prompts_of(tmp_path, "p.json", "y/a.mp4", "z/a.mp4")
    (tmp_path / "p.json").write_text('{"a.mp4": "one", "a.mp4": "two"}')
    with pytest.raises(ValueError, match="'a.mp4' is given twice"):
        prompts_of(tmp_path, "p.json", "a.mp4")


def test_the_manifest_comes_first(tmp_path, caplog):
    (tmp_path / "videos.json").write_text('{"2.mp4": ["two"], "10.mp4": ["ten"]}')
    (tmp_path / "p.txt").write_text("ten\ntwo\n")
    for file in (None, "p.txt", "videos.json"):
        assert prompts_of(tmp_path, file, "2.mp4", "10.mp4") == ["two", "ten"]
    (tmp_path / "p.txt").write_text("ten\nthree\n")
    with pytest.raises(ValueError, match="2.mp4 shows 'two', which is not among these prompts"):
        prompts_of(tmp_path, "p.txt", "2.mp4", "10.mp4")
    with pytest.raises(ValueError, match="3.mp4 is not in the videos.json next to it"):
        prompts_of(tmp_path, "p.txt", "3.mp4", "10.mp4")
    assert prompts_of(tmp_path, None, "2.mp4", "3.mp4") is None
    (tmp_path / "videos.json").write_text('{"2.mp4": ["two", "then three"], "10.mp4": ["ten"]}')
    assert prompts_of(tmp_path, None, "2.mp4", "10.mp4") is None
    assert "2.mp4 shows several prompts" in caplog.text
    with pytest.raises(ValueError, match="2.mp4 shows several prompts"):
        prompts_of(tmp_path, "videos.json", "2.mp4", "10.mp4")


def test_the_table_does_not_overwrite_prompts(tmp_path, capsys):
    encode(tmp_path / "a.mp4", pixels(gliding(64, 96, 12, 3, 1)))
    for name in ("p.json", "videos.json"):
        (tmp_path / name).write_text('{"a.mp4": "one"}')
        out = (tmp_path / name).with_suffix(".html")
        flags = ["--reward", "flicker", "--prompts", str(tmp_path / name), "--out", str(out)]
        assert main(["score", str(tmp_path), *flags]) == 1
        said = f"{tmp_path / name}, which is written next to {out.name}, holds prompts"
        assert said in capsys.readouterr().err
        assert (tmp_path / name).read_text() == '{"a.mp4": "one"}'


def test_names_that_are_not_utf8_lose_no_score(tmp_path, capsys):
    encode(tmp_path / "plain.mp4", pixels(gliding(64, 96, 12, 3, 1)))
    for name in (b"caf\xe9.mp4", b"two\nlines.mp4"):
        os.link(tmp_path / "plain.mp4", os.fsencode(tmp_path) + b"/" + name)
    out = tmp_path / "s.html"
    assert main(["score", str(tmp_path), "--reward", "flicker", "--out", str(out)]) == 0
    rows = json.loads(out.with_suffix(".json").read_text())
    assert {row["file"] for row in rows} == {"plain.mp4", "caf\\udce9.mp4", "two\\nlines.mp4"}
    assert len({row["scores"]["flicker"] for row in rows}) == 1
    assert 'href="caf%E9.mp4"' in out.read_text()
    assert len(capsys.readouterr().out.splitlines()) == 5
    folder = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9")
    os.mkdir(folder)
    os.link(tmp_path / "plain.mp4", folder + "/a.mp4")
    assert main(["score", folder, "--reward", "flicker", "--out", folder + "/s.html"]) == 0
    assert main(["calibrate", "flicker", folder, "--out", folder + "/n.json"]) == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--reward", "hpsv4"], "unknown reward 'hpsv4'; there are hpsv3"),
        (["--reward", "hpsv3,flicker"], "hpsv3 reads the prompt: give --prompts FILE"),
        (["--reward", "world"], "world reads the prompt"),
        (["--reward", "flicker,flicker"], "name every reward once"),
        (["--reward", ","], "name every reward once"),
        (["--reward", "flicker", "--source", "x"], "expected PART=PATH, got 'x'"),
        (["--reward", "flicker", "--source", "hpsv3.base=y"], "belongs to no reward that was asked for"),
        (["--reward", "flicker", "--out", "nowhere/s.html"], "must be a .html file in a folder that exists"),
        (["--reward", "nothing:there"], "cannot import 'nothing'"),
        ([], "--reward"),
    ],
)
def test_mistakes_are_one_line(folder, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["score", str(folder), *arguments]) in (1, 2)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folders_with_nothing_to_score(tmp_path, capsys):
    (tmp_path / "notes.txt").write_text("x")
    for folder, message in ((tmp_path, "no video files in it"), (tmp_path / "absent", "no such folder")):
        assert main(["score", str(folder), "--reward", "flicker", "--out", str(tmp_path / "s.html")]) == 1
        assert message in capsys.readouterr().err


def test_explain_says_what_each_reward_would_see(tmp_path, capsys):
    for name in ("a", "b"):
        encode(tmp_path / f"{name}.mp4", pixels(gliding(64, 96, 33, 2, 1)), rate=16)
    (tmp_path / "p.json").write_text('["a fox", "a dog"]')
    command = ["score", str(tmp_path), "--reward", "videoalign_mq,flicker", "--explain"]
    assert main([*command, "--prompts", str(tmp_path / "p.json"), "--out", str(tmp_path / "s.html")]) == 0
    said = capsys.readouterr().out
    assert "a.mp4: 33 frames of 64 x 96, 16 per second" in said
    assert "videoalign_mq:\n  frames: 1 clips; the first takes 0, 11, 21, 32" in said
    assert (
        "prompt: 'a fox'" in said and "scale: 0 to 1, higher is better" in said and "prompt: not read" in said
    )
    assert (
        "scale: no bounds, higher is better (in standard deviations from the mean of VideoAlign's data, so "
        "that negative is usual; its network's output is score * 1.3811 + 1.1646); weight 1" in said
    )
    assert main(command) == 0 and "needed: give --prompts FILE" in capsys.readouterr().out
    names = "videoalign_mq,flicker,vbench_dynamic_degree,vbench_temporal_flickering"
    assert main(["score", str(tmp_path), "--reward", names, "--explain"]) == 0
    rates = [line.rpartition(" (")[2] for line in capsys.readouterr().out.splitlines() if "frames: " in line]
    assert rates == [
        "clips of 2 frames per second assumed)",
        "neighbouring frames)",
        "8 per second of the 16 that the file states)",
        "all of them)",
    ]
    assert not (tmp_path / "s.html").exists()
