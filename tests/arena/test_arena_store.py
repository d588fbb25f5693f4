"""Votes are on the disk before they are acknowledged, attach to the pixels voted on, and survive kills."""

import hashlib
import json
import sqlite3
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from kvpo.arena import database
from kvpo.arena.database import DATABASE, MIGRATIONS, VoteRefused, transaction
from kvpo.arena.exchange import read_votes, write_votes
from kvpo.arena.intake import add_judgements, record_ranking
from kvpo.arena.judgements import NO_RATER, Judgement
from kvpo.arena.store import Study, Vote
from tests.arena.raters import answered, small_study, vote_all


@pytest.fixture
def study(tmp_path):
    return small_study(tmp_path / "study")


def rater_of(study, name="ann"):
    found = study.rater_of(study.invite(name))
    assert found is not None
    return found


def test_a_study_is_read_back_as_it_was_designed(study):
    again = Study(study.directory)
    assert again.design == study.design and again.design.arms == ("base", "aligned")
    assert again.design.scenes[3].segments == ("prompt 3",) and not again.closed
    again.check_videos()


def test_votes_are_kept_in_order_undone_ones_do_not_count_and_nothing_is_deleted(study):
    ann = rater_of(study)
    shown = study.ballots_of(ann)
    study.vote(ann, Vote(0, answered(study, shown[0], "left"), milliseconds=1500, finished=True))
    study.vote(ann, Vote(1, answered(study, shown[1], "same")))
    assert study.done(ann) == 2 and study.undo(ann) == 1 and study.done(ann) == 1
    study.vote(ann, Vote(1, answered(study, shown[1], "both_bad")))
    votes = [one for one in study.judgements() if one.question == "overall"]
    assert [one.winner for one in votes] == ["model_a", "both_bad"]
    arm_of = {video: arm for arm, video in study.design.scenes[shown[0].scene].videos.items()}
    assert (votes[0].model_a, votes[0].model_b) == tuple(arm_of[video] for video in shown[0].videos)
    assert (votes[0].video_a, votes[0].milliseconds) == (shown[0].videos[0], 1500)
    with transaction(study.path) as db:
        assert db.execute("SELECT count(*) FROM vote").fetchone() == (3,)
    assert study.undo(ann) == 1 and study.undo(ann) == 0 and study.undo(ann) is None


def test_only_the_ballot_that_is_due_is_voted_on_and_a_repeated_request_changes_nothing(study):
    ann = rater_of(study)
    first = Vote(0, answered(study, study.ballots_of(ann)[0]))
    study.vote(ann, first)
    study.vote(ann, first)
    assert study.done(ann) == 1
    for wrong, reason in (
        (Vote(0, answered(study, study.ballots_of(ann)[0], "right")), "ballot 1 is due"),
        (Vote(2, answered(study, study.ballots_of(ann)[2])), "ballot 1 is due"),
        (Vote(99, {}), "no ballot 99"),
        (Vote(1, {"overall": "left"}), "expected answers to overall, visual, motion, text"),
        (Vote(1, answered(study, study.ballots_of(ann)[1], "better")), "one of left, right, same, both_bad"),
        (Vote(1, {}, ranking=(0, 1)), "expected answers"),
    ):
        with pytest.raises(VoteRefused, match=reason):
            study.vote(ann, wrong)
    study.close()
    with pytest.raises(VoteRefused, match="closed"):
        study.vote(ann, Vote(1, answered(study, study.ballots_of(ann)[1])))
    with pytest.raises(VoteRefused, match="closed"):
        study.undo(ann)


def test_invitations_are_the_raters_own_and_forged_ones_open_nothing(study):
    ann, ben = study.invite("ann"), study.invite("ben")
    assert study.invite("ann") == ann != ben and study.rater_of(ann).name == "ann"
    number, _, signature = ann.partition(".")
    for forged in (
        "",
        "1",
        f"{number}.",
        f"2.{signature}",
        f"{ann}x",
        f"99.{signature}",
        "²." + signature,
        "ä.ö",
    ):
        assert study.rater_of(forged) is None, forged
    for name in ("", "  ", "a\nb", "x" * 81):
        with pytest.raises(ValueError, match="one line"):
            study.invite(name)


def test_many_raters_vote_at_once(tmp_path):
    study = small_study(tmp_path / "study", pairs=5)
    names = [f"rater {n}" for n in range(6)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda name: vote_all(Study(study.directory), name, lambda ballot: "left"), names))
    assert len({(one.rater, one.prompt) for one in study.judgements()}) == 6 * 5
    assert all(
        study.done(rater_of(study, name)) == len(study.ballots_of(rater_of(study, name))) for name in names
    )


def test_votes_never_attach_to_other_pixels(study):
    digest = study.design.scenes[0].videos["base"]
    study.video_path(digest).write_bytes(b"another video")
    with pytest.raises(ValueError, match="not the video that is voted on"):
        Study(study.directory).check_videos()
    study.video_path(digest).unlink()
    with pytest.raises(ValueError, match="is missing"):
        study.check_videos()


@pytest.mark.parametrize("suffix", [".csv", ".json", ".parquet"])
def test_votes_go_out_and_come_back_to_the_same_videos_only(tmp_path, study, suffix):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    say = {0: "left", 1: "right", 2: "same", 3: "both_bad"}
    vote_all(study, 'an "odd", name', lambda ballot: say[ballot.scene % 4])
    path = tmp_path / f"votes{suffix}"
    write_votes(path, study.judgements())
    votes = read_votes(path)
    assert set(votes) == set(study.judgements()) and len(votes) == len(study.judgements())
    assert add_judgements(study, votes) == 0
    elsewhere = small_study(tmp_path / "elsewhere")
    assert add_judgements(elsewhere, votes) == len(votes) and set(elsewhere.judgements()) == set(votes)
    other = small_study(tmp_path / "other", pairs=2)
    with pytest.raises(ValueError, match="very files that were voted on"):
        add_judgements(other, votes)
    assert other.judgements() == []


def test_every_vote_that_is_new_is_stored_whatever_its_file_says_of_prompt_and_arms(study):
    shown = tuple(study.design.scenes[0].videos.values())
    votes = [
        Judgement("ann", f"row {n}", "overall", "x", "y", winner, video_a=shown[0], video_b=shown[1])
        for n, winner in enumerate(("model_a", "model_a", "model_b", "tie"))
    ]
    assert add_judgements(study, votes) == len(study.judgements()) == 3
    assert add_judgements(study, votes) == 0 and len(study.judgements()) == 3
    with pytest.raises(ValueError, match=r"without a rater .*\(column rater"):
        add_judgements(study, [replace(votes[0], rater=NO_RATER)])


def test_choices_of_two_sessions_at_once_are_both_kept(tmp_path):
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: record_ranking(tmp_path / "live", ["p"], [b"1", b"2"], [n % 2], rater="r"),
                      range(8)))  # fmt: skip
    assert len(Study(tmp_path / "live").rankings()) == 8


def test_files_of_other_programs_are_read_and_bad_ones_refused(tmp_path):
    bare = tmp_path / "bare.csv"
    bare.write_text("model_a,model_b,winner\nx,y,model_a\ny,x,tie\n")
    assert [(one.model_a, one.winner) for one in read_votes(bare)] == [("x", "model_a"), ("y", "tie")]
    chosen = {"type": "pairwise", "from_name": "pw", "to_name": "v1,v2", "value": {"selected": "right"}}
    task = {
        "data": {"video1": "/data/a.mp4", "video2": "/data/b.mp4", "prompt": "p"},
        "annotations": [{"completed_by": 7, "lead_time": 2.5, "result": [chosen]}],
    }
    studio = tmp_path / "studio.json"
    studio.write_text(json.dumps([task]))
    (vote,) = read_votes(studio)
    assert (vote.rater, vote.winner, vote.milliseconds, vote.video_b) == ("7", "model_b", 2500, "b")
    for text, reason in (
        ("model_a,winner\nx,tie\n", "no column 'model_b'"),
        ("model_a,model_b,winner\nx,y,z\n", "row 1: winner is 'z'"),
        ("model_a,model_b,winner,milliseconds\nx,y,tie,soon\n", "milliseconds is 'soon'"),
        (f"model_a,model_b,winner,milliseconds\nx,y,tie,{10**20}\n", "row 1: milliseconds is .*2.63 - 1"),
        ("model_a,model_b,winner,kind\nx,y,tie,odd\n", "kind is 'odd'"),
        ('model_a,model_b,winner,rater\nx,y,tie,"ann\nx,y,tie,ben\n', "bare.csv, line 3: not CSV"),
        (f'model_a,model_b,winner\nx,y,"{"tie" * 50_000}\n', "bare.csv, line 2: not CSV"),
    ):
        bare.write_text(text)
        with pytest.raises(ValueError, match=reason):
            read_votes(bare)
    task["annotations"][0]["lead_time"] = float("inf")
    studio.write_text(json.dumps([task]))
    with pytest.raises(ValueError, match="studio.json, task 1: lead_time is inf"):
        read_votes(studio)
    for text in ("{}", '[{"data": 3}]', '[{"data": {"video1": "a"}}]'):
        studio.write_text(text)
        with pytest.raises(ValueError, match="studio.json"):
            read_votes(studio)
    with pytest.raises(ValueError, match=r"\.csv, \.parquet, \.json"):
        read_votes(tmp_path / "votes.txt")


def test_old_databases_are_migrated_with_their_votes_and_newer_ones_refused(study, monkeypatch):
    vote_all(study, "ann", lambda ballot: "left")
    votes = study.judgements()
    monkeypatch.setattr(database, "MIGRATIONS", (*MIGRATIONS, "ALTER TABLE rater ADD COLUMN email TEXT"))
    assert Study(study.directory).judgements() == votes
    with transaction(study.path) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        assert [row[1] for row in db.execute("PRAGMA table_info(rater)")] == ["id", "name", "email"]
    monkeypatch.undo()
    with pytest.raises(ValueError, match="version 2 of the schema.*update kvpo"):
        Study(study.directory)


def test_a_migration_that_fails_changes_nothing(study, monkeypatch):
    monkeypatch.setattr(
        database, "MIGRATIONS", (*MIGRATIONS, "ALTER TABLE rater ADD COLUMN email TEXT; SELECT nonsense")
    )
    with pytest.raises(ValueError, match="cannot be used as a study"):
        Study(study.directory)
    monkeypatch.undo()
    assert Study(study.directory).design.title == "A study"


def test_what_is_no_study_is_refused(tmp_path):
    with pytest.raises(ValueError, match="holds no study"):
        Study(tmp_path)
    (tmp_path / DATABASE).write_text("not a database, " * 100)
    with pytest.raises(ValueError, match="cannot be used as a study"):
        Study(tmp_path)


def test_settings_of_every_connection_make_votes_durable(study):
    with transaction(study.path) as db:
        asked = {
            name: db.execute(f"PRAGMA {name}").fetchone()[0]
            for name in ("journal_mode", "synchronous", "foreign_keys")
        }
        assert asked == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1}
    with pytest.raises(sqlite3.IntegrityError), transaction(study.path) as db:
        db.execute("INSERT INTO answer VALUES (99, 'overall', 'left')")


def test_rankings_of_a_study_and_choices_at_a_fork(tmp_path):
    study = small_study(tmp_path / "study", ranked=True)
    ann = rater_of(study)
    shown = study.ballots_of(ann)
    study.vote(ann, Vote(0, {}, ranking=(1, 0)))
    (found,) = study.rankings()
    assert found.videos == shown[0].videos[::-1] and found.prompt == f"prompt {shown[0].scene}"
    assert set(found.arms) == {"base", "aligned"} and found.ranks == (0, 1)
    with pytest.raises(VoteRefused, match="each of the 2 videos once"):
        study.vote(ann, Vote(1, {}, ranking=(1, 1)))
    live = tmp_path / "live"
    videos = [b"one", b"two", b"three"]
    for best in ([1], [2, 0]):
        record_ranking(live, ["a red circle"], videos, best, rater="live")
    chosen, both = Study(live).rankings()
    digests = [hashlib.sha256(video).hexdigest() for video in videos]
    assert chosen.videos[0] == digests[1] and chosen.ranks == (0, 1, 1) and chosen.prompt == "a red circle"
    assert both.videos == (digests[2], digests[0], digests[1]) and set(both.arms) == {None}
    Study(live).check_videos()
    for wrong in ([], [3], [0, 0]):
        with pytest.raises(ValueError, match="best_first"):
            record_ranking(live, ["a red circle"], videos, wrong, rater="live")
