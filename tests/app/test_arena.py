"""`kvpo arena`: what becomes an arm, what is compared with what, and what its verbs print and refuse."""

import json
import re
import shutil
import socket
from pathlib import Path

import httpx
import numpy as np
import pytest
import yaml

from kvpo.app.arena import open_study, report
from kvpo.app.arena_sources import parse_source
from kvpo.arena.report import text_table
from kvpo.arena.store import Study
from kvpo.arena.study import QUESTIONS, read_questions
from kvpo.report.video import read_video, write_video
from kvpo.training.checkpoint import mark_best, saved_updates
from tests.app.finished import command
from tests.arena.raters import vote_all
from tests.http_servers import visited


def folder(path: Path, prompts: dict[str, str | list[str]], light: int, kind: str = "mp4") -> Path:
    """A folder of small videos, each of one grey, with their manifest."""
    path.mkdir()
    for n, name in enumerate(prompts):
        frames = np.full((4, 16, 16, 3), light + 3 * n, np.uint8)
        write_video(path / name, frames, 8, scale=2)
        if kind != "mp4":
            (path / name).rename(path / f"{Path(name).stem}.{kind}")
    names = {f"{Path(name).stem}.{kind}": prompt for name, prompt in prompts.items()}
    (path / "videos.json").write_text(json.dumps(names))
    return path


def test_a_run_is_its_base_against_its_aligned_model_on_one_tape(run, tmp_path):
    study = open_study([str(run)], tmp_path / "study", pairs=2)
    assert study.design.arms == ("base", "aligned") and len(study.design.scenes) == 2
    kinds = [len(scene.segments) for scene in study.design.scenes]
    assert kinds == [1, 3], "short and long test prompts in turn"
    assert study.design.scenes[1].starts == pytest.approx((0, 1 / 3, 2 / 3), abs=0.05)
    assert study.design.scenes[0].rate == 8
    assert {path.suffix for path in study.directory.iterdir() if "sqlite" not in path.name} == {".mp4"}
    again = open_study([str(run)], tmp_path / "study", pairs=2)
    assert again.key == study.key, "the study is continued, and nothing is generated again"
    assert open_study([str(study.directory)]).key == study.key
    with pytest.raises(ValueError, match="study of other sources"):
        open_study([str(run), str(run.parent)], tmp_path / "study")


def test_runs_and_checkpoints_meet_on_the_first_ones_prompts_and_seed(run, tmp_path):
    first, *_, last = sorted(path for path in (run / "checkpoints").iterdir() if path.is_dir())
    assert first != last
    study = open_study([f"{run}:base", f"end={last}"], tmp_path / "study", pairs=1)
    assert study.design.arms == (f"{run.name} base", "end") and len(study.design.scenes) == 1
    alone = open_study([str(run)], tmp_path / "alone", pairs=1).design.scenes[0].videos
    assert study.design.scenes[0].videos == {f"{run.name} base": alone["base"], "end": alone["aligned"]}
    assert parse_source(str(first)).run == run
    (run / "suite" / "base").mkdir(parents=True)
    assert parse_source(str(run / "suite" / "base")).run is None, "a folder of videos in a run is none"
    elsewhere = tmp_path / "checkpoints" / "mine"
    elsewhere.mkdir(parents=True)
    (elsewhere / "config.yaml").touch()
    assert parse_source(str(elsewhere)).run == elsewhere


def test_a_run_that_never_beat_its_base_is_refused_before_anything_is_generated(run, tmp_path, monkeypatch):
    first, *_, last = saved_updates(run / "checkpoints")
    mark_best(run / "checkpoints", first, 0.0)
    monkeypatch.setattr("kvpo.app.arena_sources.generate", None)
    way_out = f"is update 0, the base itself; give {last} {run}:base to compare it"
    for words in ([str(run)], [f"{run}:aligned", f"{run}:base"]):
        with pytest.raises(ValueError, match=re.escape(way_out)):
            open_study(words, tmp_path / "study")


def test_branches_of_a_run_are_ranked(run, tmp_path):
    listing = run / "branches" / "branches.json"
    listing.write_text(json.dumps({"groups": json.loads(listing.read_text())["groups"][:1]}))
    study = open_study([f"{run}:branches"], tmp_path / "study", ranked=True)
    assert study.design.arms == ("anchor", "branch 1", "branch 2", "branch 3")
    (ballot,) = study.ballots_of(study.rater_of(study.invite("ann")))
    assert ballot.kind == "ranking" and len(ballot.videos) > 2


def test_folders_meet_by_prompt_and_what_only_one_shows_is_left_out(tmp_path, caplog):
    one = folder(tmp_path / "one", {"1.mp4": "a", "2.mp4": "b", "3.mp4": "a", "4.mp4": ["x", "y"]}, 20)
    other = folder(tmp_path / "other", {"1.mp4": "b", "2.mp4": "a", "3.mp4": ["x", "y"]}, 120)
    study = open_study([str(one), f"new={other}"], tmp_path / "study")
    assert study.design.arms == ("one", "new")
    assert [scene.segments for scene in study.design.scenes] == [("a",), ("b",), ("x", "y")]
    assert "1 of 4 prompts are shown by one arm alone" in caplog.text
    videos = study.design.scenes[1].videos
    light = [read_video(study.video_path(videos[arm]))[0].mean() for arm in ("one", "new")]
    assert light == [pytest.approx(23, abs=4), pytest.approx(120, abs=4)]


def test_other_kinds_of_files_are_encoded_for_browsers(tmp_path):
    one = folder(tmp_path / "one", {"1.mp4": "a"}, 20)
    other = folder(tmp_path / "other", {"1.mp4": "a"}, 120)
    from PIL import Image

    Image.new("RGB", (16, 16), (90, 0, 0)).save(
        other / "1.gif", save_all=True, append_images=[Image.new("RGB", (16, 16), (99, 0, 0))]
    )
    (other / "1.mp4").unlink()
    (other / "videos.json").write_text('{"1.gif": "a"}')
    study = open_study([str(one), str(other)], tmp_path / "study")
    (scene,) = study.design.scenes
    frames, _ = read_video(study.video_path(scene.videos["other"]))
    assert frames[0, ..., 0].mean() == pytest.approx(90, abs=12)


def test_what_cannot_be_compared_is_refused_in_one_line(tmp_path, capsys):
    one = folder(tmp_path / "one", {"1.mp4": "a"}, 20)
    same = shutil.copytree(one, tmp_path / "same")
    other = folder(tmp_path / "other", {"1.mp4": "b"}, 20)
    bare = folder(tmp_path / "bare", {"1.mp4": "b"}, 20)
    (bare / "videos.json").unlink()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    for words, reason in (
        ([one], "one arm alone"),
        ([one, same], "show the same videos"),
        ([one, other], "no prompt is shown by two"),
        ([one, bare], "nothing says which prompts"),
        ([one, f"one={other}"], "two arms are called 'one'"),
        ([one, tmp_path / "none"], "no such directory"),
        (["~nobody-of-this-name/x"], "SOURCE: ~nobody-of-this-name/x: "),
        (["report", "~nobody-of-this-name/x"], "STUDY|VOTES: ~nobody-of-this-name/x: "),
        (["invite", "~nobody-of-this-name/x", "a"], "STUDY: ~nobody-of-this-name/x: "),
        ([f"{one}:branches", other], "holds no branches"),
        ([one, other, "--pairs", 0], "--pairs: must be 1 or more"),
        ([one, other, "--port", 99999], "--port"),
        ([one, other, "--out", tmp_path / "full"], "not empty and holds no study"),
        (["report"], "takes STUDY"),
        (["report", one], "holds no study"),
        (["report", one, "--effect", 0], "--effect"),
        (["export", one], "takes STUDY FILE"),
        (["invite"], "takes STUDY"),
        (["invite", one], "takes STUDY NAME, got"),
    ):
        opens = words[0] not in ("report", "export", "invite")
        out = ["--out", tmp_path / "study"] if opens and "--out" not in words else []
        status = command("arena", *words, *out, *(["--port", 0] if opens and "--port" not in words else []))
        error = capsys.readouterr().err
        assert status in (1, 2) and reason in error and "Traceback" not in error, (words, error)
    assert not (tmp_path / "study").exists()


@pytest.fixture
def voted(tmp_path):
    """A study of six pairs on which two raters agree and a third always takes the left one."""
    prompts = {f"{n}.mp4": f"prompt {n}" for n in range(6)}
    one, other = folder(tmp_path / "old", prompts, 20), folder(tmp_path / "new", prompts, 120)
    study = open_study([str(one), str(other)], tmp_path / "study")
    newer = {scene.videos["new"] for scene in study.design.scenes}

    def better(ballot):
        if ballot.videos[0] == ballot.videos[1]:
            return "same"
        return "left" if ballot.videos[0] in newer else "right"

    for name in ("ann", "ben"):
        vote_all(study, name, better)
    return study


def test_names_stay_hidden_until_the_study_is_closed(voted, capsys, tmp_path):
    assert command("arena", "report", voted.directory) == 0
    said = capsys.readouterr().out
    assert "arm A" in said and "arm B" in said and "new" not in said.replace(str(voted.directory), "")
    page = (voted.directory / "report.html").read_text()
    assert "The study is open" in page and ">new<" not in page
    assert command("arena", "export", voted.directory, tmp_path / "votes.csv") == 1
    assert "hidden until the study is closed" in capsys.readouterr().err

    assert command("arena", "report", voted.directory, "--close") == 0
    said = capsys.readouterr().out
    assert "overall: new against old: 12 good, 0 same, 0 bad; +1.00 (+0.08 to +1.00)" in said
    numbers = json.loads((voted.directory / "report.json").read_text())
    assert numbers["closed"] and [one["rater"] for one in numbers["raters"]] == ["ann", "ben"]
    assert numbers["questions"][0]["agreement"] == 1.0
    assert numbers["questions"][0]["decided"][0]["votes"] == [2, 0, 0]


def test_a_study_keeps_its_questions_and_pairs_and_has_raters(voted, tmp_path, capsys):
    file = tmp_path / "questions.yaml"
    file.write_text("questions: [{name: calm, text: Which one}]\n")
    sources = (tmp_path / "old", tmp_path / "new", "--out", voted.directory)
    for words in ((voted.directory,), sources):
        assert command("arena", *words, "--raters", ",") == 2
        assert "--raters: name one at least, as in --raters ann,bob" in capsys.readouterr().err
        for flag, value, what in (("--questions", file, "questions"), ("--pairs", 7, "pairs")):
            assert command("arena", *words, "--port", 0, flag, value) == 2
            said = f"{flag}: {voted.directory} has its {what} already; leave it out, or choose another --out"
            assert said in capsys.readouterr().err
    words = [str(word) for word in sources[:2]]
    assert open_study(words, voted.directory, pairs=voted.design.pairs).design == voted.design


def test_votes_are_exported_imported_and_reported_from_a_file(voted, tmp_path, capsys):
    video = voted.video_path(voted.design.scenes[0].videos["new"])
    video.rename(tmp_path / "aside.mp4")
    assert command("arena", "report", voted.directory, "--close") == 1 and not voted.closed
    (tmp_path / "aside.mp4").rename(video)
    capsys.readouterr()
    voted.close()
    file = tmp_path / "votes.csv"
    assert command("arena", "export", voted.directory, file) == 0
    assert command("arena", "report", file) == 0
    assert "overall: new against old" in capsys.readouterr().out.replace("old against new", "new against old")
    assert (tmp_path / "votes.html").is_file() and (tmp_path / "votes.json").is_file()
    labels = tmp_path / "labels.json"
    assert command("arena", "export", voted.directory, labels) == 0
    exported = labels.read_bytes()
    assert command("arena", "report", labels) == 0
    assert labels.read_bytes() == exported and (tmp_path / "labels.report.json").is_file()
    copy = shutil.copytree(voted.directory, tmp_path / "copy")
    assert command("arena", "import", copy, file) == 1
    assert "closed" in capsys.readouterr().err
    again = open_study([str(tmp_path / "old"), str(tmp_path / "new")], tmp_path / "again")
    assert command("arena", "import", again.directory, file) == 0
    assert command("arena", "import", again.directory, file) == 0
    assert capsys.readouterr().out == f"{len(voted.judgements())} answers are new\n0 answers are new\n"
    assert set(again.judgements()) == set(voted.judgements())


def test_invitations_are_printed_as_links(voted, capsys):
    assert command("arena", "invite", voted.directory, "cleo", "dan", "--port", 9000) == 0
    cleo, dan = capsys.readouterr().out.splitlines()
    assert cleo.startswith("cleo: http://127.0.0.1:9000/#") and dan.startswith("dan: ")
    assert voted.rater_of(cleo.partition("#")[2]).name == "cleo"
    assert command("arena", "invite", voted.directory, "cleo", "--host", "0.0.0.0") == 0
    assert capsys.readouterr().out.startswith(f"cleo: http://{socket.gethostname()}:8789/#")


def test_the_command_serves_the_printed_link_and_stops_at_a_signal(tmp_path, caplog):
    arms = [folder(tmp_path / name, {"1.mp4": "a"}, light) for name, light in (("a", 20), ("b", 99))]

    def visit(link: str) -> None:
        url, _, token = link.partition("/#")
        assert httpx.get(url).text.startswith("<!doctype html>")
        shown = httpx.get(f"{url}/session", headers={"Authorization": f"Bearer {token}"}).json()
        assert shown["rater"] == "ann" and shown["ballots"] == 1
        assert httpx.get(f"{url}/session").status_code == 401

    words = ["arena", *map(str, arms), "--out", str(tmp_path / "study"), "--raters", "ann", "--port", "0"]
    assert visited(words, visit, caplog) == 0


def test_a_hostile_rater_and_prompt_are_text_in_the_report(tmp_path):
    hostile = "<script>alert(1)</script>"
    one, other = (
        folder(tmp_path / "a", {"1.mp4": hostile}, 20),
        folder(tmp_path / "b", {"1.mp4": hostile}, 99),
    )
    study = open_study([str(one), f"<b>={other}"], tmp_path / "study")
    vote_all(study, hostile, lambda ballot: "left")
    page, result = report(study.directory, close=True)
    text = page.read_text()
    assert hostile not in text and text.count("<script>") == 1 and "<b><b>" not in text
    assert "&lt;script&gt;alert(1)" in text and "&lt;b&gt;" in text
    assert "<b> against a" in text_table(result)


def test_questions_of_ones_own_and_mistakes_in_them(tmp_path):
    file = tmp_path / "questions.yaml"
    own = {
        "title": "Mine",
        "questions": [{"name": "calm", "text": "Which is calmer?", "hint": "Look at edges."}],
    }
    file.write_text(yaml.safe_dump(own))
    found = read_questions(file)
    assert found["title"] == "Mine" and found["questions"][0].name == "calm" and len(QUESTIONS) == 5
    one, other = (folder(tmp_path / name, {"1.mp4": "a"}, light) for name, light in (("a", 20), ("b", 99)))
    study = open_study([str(one), str(other)], tmp_path / "study", questions=file)
    assert Study(study.directory).design.questions == found["questions"]
    for text, reason in (
        ("- a", "expected some of the fields"),
        ("tilte: x", "expected some of the fields"),
        ("title: ''", "title: expected a text"),
        ("questions: []", "expected a list"),
        ("questions: [{name: a}]", "question 1: expected a name, a text"),
        ("questions: [{name: a, text: b}, {name: a, text: c}]", "two questions are called 'a'"),
        ("questions: [{name: a, text: b, stories: yes please}]", "stories: expected true or false"),
        ("questions: [{name: a, text: b, stories: true}]", "question 1 is asked about every pair"),
        ("questions: [", "not YAML"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_questions(file)


def test_sources_are_read_as_they_are_named(tmp_path):
    (tmp_path / "a=b:c").mkdir()
    plain = parse_source(str(tmp_path / "a=b:c"))
    assert (plain.name, plain.part) == ("a=b:c", "")
    named = parse_source(f"mine={tmp_path}:base")
    assert (named.name, named.path, named.part) == ("mine", tmp_path, "base")
