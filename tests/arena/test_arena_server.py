"""Raters see their ballots and no arm; forged and oversized requests are refused; kills lose nothing."""

import json
import signal
import socket
import sqlite3
from contextlib import closing

import pytest

from kvpo.arena.database import transaction
from kvpo.arena.intake import record_ranking
from kvpo.arena.store import Study
from tests.arena.raters import answered, small_study
from tests.arena.serving import ask, child_server, served


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return small_study(tmp_path_factory.mktemp("served") / "study", title="<script>alert(1)</script>")


@pytest.fixture(scope="module")
def url(study):
    with served(study) as address:
        yield address


def test_nothing_but_the_page_is_open_without_an_invitation(url, study):
    token = study.invite("ann")
    for path in ("/session", "/ballots/0", "/ballots/0/videos/0"):
        for shown in (None, "", "1.forged", token + "x"):
            status, body, _ = ask(url + path, shown)
            assert status == 401 and b"invitation" in body
    assert ask(f"{url}/votes", None, {"position": 0})[0] == ask(f"{url}/undo", None, {})[0] == 401
    for path in ("/", "/arena.js", "/arena.css"):
        status, body, headers = ask(url + path, None)
        assert status == 200 and body
        policy = headers["content-security-policy"]
        assert (
            "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
        )
        assert headers["x-content-type-options"] == "nosniff"


def test_no_answer_names_an_arm_or_a_kind_of_ballot(url, study):
    token = study.invite("ben")
    rater = study.rater_of(token)
    for position, ballot in enumerate(study.ballots_of(rater)):
        for path in ("/session", f"/ballots/{position}"):
            body = ask(url + path, token)[1].decode()
            assert not [
                word for word in ("aligned", '"base', "attention", "repeat", *ballot.videos) if word in body
            ]
        for place, digest in enumerate(ballot.videos):
            status, content, headers = ask(f"{url}/ballots/{position}/videos/{place}", token)
            assert status == 200 and content == study.video_path(digest).read_bytes()
            assert digest not in json.dumps(headers) and headers["content-type"] == "video/mp4"
        sent = {"position": position, "answers": answered(study, ballot), "milliseconds": 5, "finished": True}
        assert json.loads(ask(f"{url}/votes", token, sent)[1]) == {"done": position + 1}
    assert study.done(rater) == len(study.ballots_of(rater))


def test_ballots_ahead_other_places_and_paths_are_not_served(url, study):
    token = study.invite("cleo")
    assert ask(f"{url}/ballots/1", token)[0] == 200, "the next one is loaded ahead"
    for path in (
        "/ballots/3", "/ballots/-1", "/ballots/99", "/ballots/0/videos/2", "/ballots/0/videos/-1",
        "/study.sqlite", "/../study.sqlite", "/%2e%2e/study.sqlite",
        "/ballots/0/videos/..%2f..%2fstudy.sqlite", "/docs", "/openapi.json",
    ):  # fmt: skip
        assert ask(url + path, token)[0] in (404, 422), path


def test_bad_votes_are_refused_in_one_line_and_nothing_is_stored(url, study):
    token = study.invite("dora")
    names = answered(study, study.ballots_of(study.rater_of(token))[0])
    for body, status in (
        ({"position": 0, "answers": {}}, 409),
        ({"position": 0, "answers": names | {"overall": "best"}}, 409),
        ({"position": 1, "answers": names}, 409),
        ({"position": 0, "answers": names, "ranking": [0, 1]}, 409),
        ({"position": 0, "answers": names, "milliseconds": -1}, 422),
        ({"position": "0", "answers": names}, 422),
        ({"position": 0, "answers": names, "rater": "ann"}, 422),
        ({"position": 0, "answers": {"\ud800": "left"}}, 409),
        ({"position": 0, "answers": names | {"overall": "\ud800"}}, 409),
        ({"position": 0, "answers": names, "\ud800": 1}, 422),
        ({"position": float("nan"), "answers": names}, 422),
        ({"position": 0, "answers": names, "milliseconds": float("inf")}, 422),
        ([], 422),
    ):
        found, content, _ = ask(f"{url}/votes", token, body)
        detail = json.loads(content)["detail"]
        assert found == status and isinstance(detail, str) and "\n" not in detail, body
    assert ask(f"{url}/votes", token, raw=b"{" * 9000)[0] == 422
    assert study.done(study.rater_of(token)) == 0


def test_requests_of_other_pages_and_large_or_endless_bodies_are_refused(url, study):
    token = study.invite("emil")
    evil = [("Origin", "https://evil.example")]
    assert ask(f"{url}/undo", token, {}, headers=evil)[0] == 403
    for origin in ("null", "http://[", "http://", f"x{url}", f"{url}.evil.example"):
        assert ask(f"{url}/undo", token, {}, headers=[("Origin", origin)])[0] == 403, origin
    assert ask(f"{url}/undo", token, {}, headers=[("Origin", url)])[0] == 200
    assert ask(f"{url}/votes", token, raw=b" " * 20_000)[0] == 413
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), 20) as connection:
        connection.sendall(
            f"POST /votes HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {token}\r\n"
            "Transfer-Encoding: chunked\r\n\r\n".encode()
        )
        assert b" 411 " in connection.recv(200)


def test_a_study_that_was_closed_takes_no_votes(tmp_path):
    study = small_study(tmp_path / "study", pairs=2)
    token = study.invite("ann")
    ballot = study.ballots_of(study.rater_of(token))[0]
    study.close()
    with served(study) as url:
        assert json.loads(ask(f"{url}/session", token)[1])["closed"] is True
        status, body, _ = ask(f"{url}/votes", token, {"position": 0, "answers": answered(study, ballot)})
        assert status == 409 and b"closed" in body and ask(f"{url}/undo", token, {})[0] == 409


def test_a_database_that_cannot_be_written_is_said_in_one_line_and_nothing_is_lost(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr("kvpo.arena.database.BUSY_SECONDS", 0.1)
    study = small_study(tmp_path / "study", pairs=2)
    token = study.invite("ann")
    sent = {"position": 0, "answers": answered(study, study.ballots_of(study.rater_of(token))[0])}
    other = sqlite3.connect(study.path, isolation_level=None)
    with served(study) as url, closing(other):
        other.execute("BEGIN IMMEDIATE")
        status, body, _ = ask(f"{url}/votes", token, sent)
        assert status == 503 and b"Try again" in body
        (line,) = {record.getMessage() for record in caplog.records if record.levelname == "ERROR"}
        assert "study.sqlite: database is locked" in line and "\n" not in line
        other.execute("ROLLBACK")
        assert json.loads(ask(f"{url}/votes", token, sent)[1]) == {"done": 1}


def test_an_error_that_ends_the_transaction_is_the_one_that_is_raised(tmp_path):
    study = small_study(tmp_path / "study")
    with pytest.raises(sqlite3.IntegrityError, match="NOT NULL"), transaction(study.path) as db:
        db.execute("INSERT OR ROLLBACK INTO rater (name) VALUES (NULL)")


def kills(directory, times: int) -> None:
    """Vote, kill the server once it has acknowledged, start another: every such vote must be there."""
    study = small_study(directory, pairs=times)
    token = study.invite("ann")
    ballots = study.ballots_of(study.rater_of(token))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        for position in range(times):
            server = child_server(directory, listener)
            try:
                answer = ("left", "right", "same", "both_bad")[position % 4]
                sent = {"position": position, "answers": answered(study, ballots[position], answer)}
                status, body, _ = ask(f"{url}/votes", token, sent)
                assert status == 200 and json.loads(body) == {"done": position + 1}
            finally:
                server.send_signal(signal.SIGKILL)
                server.wait(20)
            votes = Study(directory).judgements()
            assert len({(one.video_a, one.video_b) for one in votes}) == position + 1
            assert votes[-1].winner == {"left": "model_a", "right": "model_b", "same": "tie"}.get(
                answer, answer
            )


def test_kills_between_votes_lose_no_acknowledged_vote(tmp_path):
    kills(tmp_path / "study", 3)


@pytest.mark.slow
def test_a_hundred_kills_between_votes_lose_no_acknowledged_vote(tmp_path):
    kills(tmp_path / "study", 100)


def test_choices_at_a_fork_can_be_served_beside_votes(tmp_path):
    record_ranking(tmp_path / "live", ["a red circle"], [b"one", b"two"], [1], rater="live")
    study = Study(tmp_path / "live")
    assert study.ballots_of(study.rater_of(study.invite("ann"))) == []
