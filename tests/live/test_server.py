"""The protocol over real sockets: what acts when, what is refused, what a reader or its absence does."""

import gc
import json
import re
import socket
import threading
import time

import httpx
import pytest
import torch
from websockets.exceptions import ConnectionClosed, InvalidStatus

from kvpo.arena.store import Study
from kvpo.live.outbox import BLOCKS
from kvpo.live.scheduler import SessionLimits
from kvpo.live.session import Session
from kvpo.prompt_files import read_prompts
from kvpo.report.video import read_video
from tests.live.live_server import serving
from tests.live.stage import scheduler, slow_stage, stage
from tests.reward_servers import eventually


def test_a_session_from_start_to_stop(tmp_path):
    with serving(tmp_path) as served, served.connect() as client:
        served.theatre.notice = lambda prompt: f"of {prompt}"
        started = client.start(seed=7, speed=0)
        assert started["notice"] == "of a red square"
        assert started["arms"] == ["base", "aligned"] and started["seed"] == 7 and started["directs"]
        first = client.until("video.block")
        assert first["start"] == 0 and first["block"] == 0 and first["prompt"] == "a red square"
        assert [len(sizes) for sizes in first["frames"].values()] == [3, 3]
        assert len(first["pictures"]) == sum(map(sum, first["frames"].values()))
        assert first["pictures"][:4] == b"RIFF" and first["pictures"][8:12] == b"WEBP"
        assert served.pages > 0
        client.send("session.stop")
        assert client.until("session.done")["reason"] == "stopped"
        assert [block["start"] for block in client.blocks] == [3 * n for n in range(len(client.blocks))]
        client.start()  # the connection may begin another
    eventually(lambda: served.pages == 0)


def test_a_prompt_sent_during_a_block_acts_at_the_next(tmp_path):
    with serving(tmp_path, scheduler(slow_stage(0.03))) as served, served.connect() as client:
        client.start(speed=0)
        client.until("video.block", block=2)
        time.sleep(0.05)  # the next block is being made
        accepted = client.ask("session.prompt_update", prompt="a blue disc")
        while (block := client.until("video.block"))["start"] < accepted["frame"]:
            assert block["prompt"] == "a red square"
        assert block["start"] == accepted["frame"] and block["prompt"] == "a blue disc"
        assert 0 < block["numbers"]["switch_shown_s"] < 1


def test_pause_speed_queue_and_reset(tmp_path):
    with serving(tmp_path) as served, served.connect() as client:
        client.start(speed=0, frames=6)
        client.ask("session.pause")
        held = served.scheduler.shows[client.blocks[0]["session"]].session.start
        time.sleep(0.1)
        assert served.scheduler.shows[client.blocks[0]["session"]].session.start == held
        client.ask("session.reset", seed=9)
        client.ask("session.queue", prompts=[{"prompt": "a blue disc"}])
        client.ask("session.speed", speed=4)
        client.blocks.clear()
        client.ask("session.pause", paused=False)
        assert client.until("video.block")["start"] == 0
        assert client.ask("session.prompt_update", prompt="a green ring", frames=3)["frame"] >= 3
        client.until("video.block", prompt="a blue disc")
        assert client.blocks[-2]["prompt"] == "a green ring"


def test_routes_pins_and_forks(tmp_path):
    with serving(tmp_path, scheduler(stage())) as served, served.connect() as client:
        client.start(speed=0)
        client.until("video.block", block=6)
        client.ask("session.pause")  # a stream at full speed may forget a frame before it is asked for
        here = served.scheduler.shows[client.blocks[0]["session"]].session.start
        past, origin = [here - 6, here - 5], here - 9
        accepted = client.ask("session.route", frames=past, blocks=2)
        assert client.ask("session.pin", frames=past[:1])["pinned"] == past[:1]
        client.ask("session.pause", paused=False)
        routed = client.until("video.block", start=accepted["frame"])
        assert routed["sees"]["routed"] == past and routed["numbers"]["pinned"] == past[:1]
        client.send("session.fork", branches=3, blocks=2, frame=origin)
        fork = client.until("session.fork.accepted")
        assert fork["frame"] == origin and [len(sizes) for sizes in fork["frames"]] == [6] * 4
        assert fork["routes"][0] == [] and len(fork["pictures"]) == sum(map(sum, fork["frames"]))
        client.ask("session.prompt_update", prompt="a blue disc")
        assert client.refused("session.choose", branch=-2) == "out_of_range"
        for wrong in ([0, 1, 2, 3], [2], [2, 2, 0, 1], [2, 0, 1, 4]):
            assert client.refused("session.choose", branch=2, ranking=wrong) == "out_of_range"
        client.ask("session.choose", branch=2, ranking=[2, 0, 3, 1])
        block = client.until("video.block", start=origin)
        assert block["sees"]["routed"] == fork["routes"][2]
        client.send("session.fork", branches=1, blocks=1)
        client.until("session.fork.accepted")
        client.ask("session.choose", branch=1)
        client.ask("session.pause")  # messages are carried out one after another
    ranking, choice = Study(tmp_path / "choices").rankings()
    assert choice.ranks == (0, 1)
    assert ranking.prompt == "a red square", "not the one that waited for the choice"
    assert ranking.ranks == (0, 1, 2, 3)
    frames, _ = read_video(Study(tmp_path / "choices").video_path(ranking.videos[0]))
    assert len(frames) == 6


def test_a_snapshot_outlives_its_server(tmp_path):
    def latents(served):
        (show,) = served.scheduler.shows.values()
        return served.scheduler.ask(lambda: show.session.arms["base"].spool.read(0, 30)).result()

    with serving(tmp_path, scheduler(stage())) as served, served.connect() as client:
        client.start(speed=0, seed=4)
        client.until("video.block", block=4)
        name = client.ask("session.snapshot")["snapshot"]
        client.until("video.block", block=10)
        whole = latents(served)
    with serving(tmp_path, scheduler(stage())) as served, served.connect() as client:
        assert client.refused("session.start", snapshot="../../etc/passwd") == "not_found"
        started = client.start("", snapshot=name, speed=0)
        assert started["seed"] == 4 and started["frame"] == int(name.rpartition("-")[2])
        client.until("video.block", block=10)
        assert torch.equal(latents(served), whole)


def test_exports(tmp_path):
    with serving(tmp_path) as served, served.connect() as client:
        assert client.refused("session.export", what="mp4") == "out_of_order"
        client.start(speed=4)
        client.until("video.block", block=3)
        client.ask("session.prompt_update", prompt="a blue disc", transition_blocks=2)
        client.until("video.block", prompt="a blue disc")
        client.ask("session.pause")
        files = {what: client.ask("session.export", what=what) for what in ("mp4", "prompts", "training")}
        for type, name, values in (("export", "file", {"what": "mp4"}), ("snapshot", "snapshot", {})):
            twice = {client.ask(f"session.{type}", **values)[name] for _ in range(2)}
            assert len(twice) == 2, "neither replaces the other"
        video = httpx.get(served.url + files["mp4"]["url"])
        assert video.status_code == 200 and video.headers["content-type"] == "video/mp4"
        assert httpx.get(served.url + "/v1/files/..%2Fchoices.jsonl").status_code == 404
    assert b"moof" in (tmp_path / "exports" / files["mp4"]["file"]).read_bytes(), "it is fragmented"
    frames, rate = read_video(tmp_path / "exports" / files["mp4"]["file"])
    (prompt,) = read_prompts(tmp_path / "exports" / files["prompts"]["file"], num_frames=30, block=3)
    assert prompt.segments == ("a red square", "a blue disc") and prompt.transitions == (2,)
    assert len(frames) == prompt.num_frames and rate == 8
    (same,) = read_prompts(tmp_path / "exports" / "training-prompts.jsonl", num_frames=30, block=3)
    assert same == prompt


BAD = {
    "not JSON": ("{", "malformed"),
    "a list": ("[]", "malformed"),
    "no type": ('{"prompt": "x"}', "malformed"),
    "another type": ('{"type": "session.dance"}', "unknown_type"),
    "another field": ('{"type": "session.start", "promt": "x"}', "malformed"),
    "a field of another type": ('{"type": "session.start", "prompt": 3}', "malformed"),
    "a field that is missing": ('{"type": "session.prompt_update"}', "malformed"),
    "a number that is none": ('{"type": "session.speed", "speed": NaN}', "malformed"),
    "a number that no float holds": (f'{{"type": "session.speed", "speed": {"9" * 400}}}', "malformed"),
    "a frame that is text": ('{"type": "session.route", "frames": ["1"]}', "malformed"),
    "a prompt that is no object": ('{"type": "session.queue", "prompts": ["x"]}', "malformed"),
    "half a character": ('{"type": "session.start", "prompt": "\\ud800"}', "malformed"),
    "a deep one": ("[" * 5000, "malformed"),
    "too large": (f'{{"type": "session.start", "prompt": "{"é" * 40_000}"}}', "too_large"),
    "too long a prompt": (json.dumps({"type": "session.start", "prompt": "x" * 2000}), "out_of_range"),
    "an empty prompt": ('{"type": "session.start", "prompt": " "}', "out_of_range"),
    "a prompt without an embedding": ('{"type": "session.start", "prompt": "unspeakable"}', "out_of_range"),
    "a negative seed": ('{"type": "session.start", "prompt": "x", "seed": -1}', "out_of_range"),
    "a speed": ('{"type": "session.start", "prompt": "x", "speed": 1000}', "out_of_range"),
    "before a session": ('{"type": "session.pause"}', "out_of_order"),
    "nobody's session": ('{"type": "session.watch", "session": "nobody"}', "not_found"),
}


def test_what_is_refused(tmp_path):
    with serving(tmp_path) as served, served.connect() as client:
        for name, (message, code) in BAD.items():
            client.socket.send(message)
            event = client.until("error")
            assert event["code"] == code, name
            assert event["retryable"] is False and "\n" not in event["message"], name
        client.socket.send(b"\0\1\2")
        assert client.until("error")["code"] == "malformed"
        client.start()
        assert client.refused("session.start", prompt="x") == "out_of_order"
        assert client.refused("session.route", frames=[400]) == "not_resident"
        assert client.refused("session.fork", branches=99) == "out_of_range"
        assert client.refused("session.fork", frame=4) == "out_of_range"
        assert client.refused("session.choose", branch=0) == "no_fork"
        for type, wrong in (("reset", {"seed": -2}), ("fork", {"frame": -2})):
            assert client.refused(f"session.{type}", **wrong) == "out_of_range"
        assert client.refused("session.reset", prompt="unspeakable") == "out_of_range"
        client.until("video.block")  # and the stream goes on
        with pytest.raises(ConnectionClosed):
            client.socket.send("x" * (1 << 21))
            while True:
                client.receive()
    eventually(lambda: served.pages == 0)


def test_what_cannot_be_stored_is_said_and_the_stream_goes_on(tmp_path):
    with serving(tmp_path, scheduler(stage())) as served, served.connect() as client:
        client.start(speed=0)
        client.until("video.block", block=4)
        for name in ("snapshots", "exports"):
            (tmp_path / name).write_text("a file where a directory should be")
        (tmp_path / "choices").mkdir()
        (tmp_path / "choices" / "diary").write_text("of somebody else")
        assert client.refused("session.snapshot") == "failed"
        assert client.refused("session.export", what="prompts") == "failed"
        client.send("session.fork", branches=1)
        client.until("session.fork.accepted")
        assert client.refused("session.choose", branch=1) == "out_of_range"
        assert (tmp_path / "choices" / "diary").read_text() == "of somebody else"
        assert client.until("video.block")


def test_a_message_to_a_session_that_ends_meanwhile_is_refused(tmp_path):
    with serving(tmp_path, scheduler(stage())) as served, served.connect() as client:
        client.start(speed=0)
        client.until("video.block", block=2)
        (show,) = served.scheduler.shows.values()
        gate = threading.Event()
        served.scheduler.ask(gate.wait)
        served.scheduler.ask(lambda: served.scheduler.close(show, "length"))
        client.send("session.export", what="prompts")
        eventually(lambda: served.scheduler._asked.qsize() == 2)
        gate.set()
        refusals = []
        while not refusals or served.theatre.rooms:
            event = client.receive()
            refusals += [event["code"]] if event["type"] == "error" else []
        assert refusals == ["out_of_order"]


def test_a_server_has_room_for_so_many(tmp_path):
    with serving(tmp_path, limits=SessionLimits(sessions=2, viewers=4)) as served:
        clients = [served.connect() for _ in range(4)]
        for client in clients[:2]:
            client.start()
        clients[2].send("session.start", prompt="x")
        event = clients[2].until("error")
        assert event["code"] == "busy" and event["retryable"] is True
        with served.connect() as fifth:
            assert fifth.until("error")["code"] == "busy"
            with pytest.raises(ConnectionClosed):
                fifth.receive()
        clients[0].send("session.stop")
        clients[0].until("session.done")
        clients[2].start()
        for client in clients:
            client.close()


def test_watchers_see_the_same_and_direct_nothing(tmp_path):
    with serving(tmp_path) as served, served.connect() as director, served.connect() as watcher:
        session = director.start(speed=8)["session"]
        assert httpx.get(served.url + "/v1/sessions").json() == {"sessions": [session]}
        watcher.send("session.watch", session=session)
        assert watcher.until("video.start")["directs"] is False
        # The block that is made as the watcher joins may have been counted before.
        eventually(lambda: watcher.until("video.block")["numbers"]["viewers"] == 2)
        seen = watcher.blocks[-1]
        block = director.until("video.block", block=seen["block"])
        assert block["pictures"] == seen["pictures"]
        assert watcher.refused("session.pause") == "out_of_order"
        director.close()
        assert watcher.until("session.done")["reason"] == "its director left"
        eventually(lambda: served.pages == 0)


def test_two_sessions_never_mix(tmp_path):
    alone = {}
    for prompt in ("a red square", "a blue disc"):
        with (
            serving(tmp_path, scheduler(stage(), SessionLimits(rows=1))) as served,
            served.connect() as client,
        ):
            client.start(prompt, speed=0)
            alone[prompt] = [client.until("video.block")["pictures"] for _ in range(4)]
    with serving(tmp_path, scheduler(stage(), SessionLimits(rows=1))) as served:
        with served.connect() as one, served.connect() as two:
            one.start("a red square", speed=0)
            two.start("a blue disc", speed=0)
            assert [one.until("video.block")["pictures"] for _ in range(4)] == alone["a red square"]
            assert [two.until("video.block")["pictures"] for _ in range(4)] == alone["a blue disc"]


def test_a_slow_reader_gets_the_latest_blocks_and_costs_no_memory(tmp_path):
    reader = socket.socket()
    reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
    with serving(tmp_path) as served:
        reader.connect(("127.0.0.1", served.port))
        client = served.connect(sock=reader)
        client.start(speed=0)
        (show,) = served.scheduler.shows.values()
        (connection,) = served.theatre.rooms[show.id]
        eventually(lambda: connection.outbox.dropped > 20, 60)  # the sockets' buffers are full
        assert len(connection.outbox._items) <= BLOCKS + 1
        client.ask("session.pause")
        newest = client.blocks[-1]["start"]
        assert newest >= show.session.start - 3
        assert "kvpo_live_dropped_blocks_total 0.0" not in httpx.get(served.url + "/metrics").text


def test_a_hundred_clients_that_come_and_go_leave_nothing(tmp_path):
    with serving(tmp_path) as served:
        with served.connect() as client:
            client.start()
            client.until("video.block")
        eventually(lambda: served.pages == 0)
        threads = threading.active_count()
        for n in range(100):
            with served.connect() as client:
                client.start(speed=0)
                if n % 2:
                    client.until("video.block")
        eventually(lambda: served.pages == 0 and served.theatre.connections == 0)
        assert not served.scheduler.shows and not served.theatre.rooms
        gc.collect()
        assert not [item for item in gc.get_objects() if isinstance(item, Session)]
        assert threading.active_count() <= threads + 1


def test_a_block_that_fails_ends_its_session_and_no_other_later(tmp_path):
    own = scheduler(stage(), SessionLimits(rows=1))
    with serving(tmp_path, own) as served, served.connect() as client:
        client.start(speed=0)
        (show,) = own.shows.values()
        own.ask(lambda: show.session.arms["base"].stream.history.pages.clear()).result()
        event = client.until("error")
        assert event["code"] == "failed" and event["retryable"] is True
        assert client.until("session.done")["reason"] == "failed"
        client.start()
        client.until("video.block")


def test_deadlines_and_stalls(tmp_path):
    with serving(tmp_path, scheduler(slow_stage(0.02))) as served, served.connect() as client:
        client.start(speed=1)  # a block of 80 ms every 375
        numbers = [client.until("video.block")["numbers"] for _ in range(4)][-1]
        assert numbers["deadlines_met"] == 1 and numbers["stalls"] == 0
        assert 0.3 < numbers["block_p50_s"] < 0.45 and 0.06 < numbers["first_frame_s"] < 1
        client.ask("session.speed", speed=16)  # a block every 23: it cannot be done
        stalled = [client.until("video.block")["numbers"] for _ in range(4)][-1]
        assert stalled["stalls"] >= 2 and stalled["deadlines_met"] < 1 and stalled["stalled_s"] > 0.05
        text = httpx.get(served.url + "/metrics").text
    assert re.search(r'kvpo_live_deadlines_total\{met="no"\} [1-9]', text)
    assert re.search(r"kvpo_live_first_frame_seconds_count 1", text)
    assert "kvpo_live_sessions 1.0" in text and "kvpo_live_viewers 1.0" in text


def test_the_first_block_that_a_scorer_sees_is_timed(tmp_path):
    asked = []

    def observer(pixels, prompt, before):
        asked.append((prompt, before, tuple(pixels.shape)))
        return len(asked) == 3

    with serving(tmp_path, scheduler(slow_stage(), observer=observer)) as served, served.connect() as client:
        client.start(speed=4)
        client.until("video.block")
        client.ask("session.prompt_update", prompt="a blue disc")
        while (numbers := client.until("video.block")["numbers"])["switch_seen_s"] is None:
            assert len(asked) <= 3
        assert asked == [("a blue disc", "a red square", (3, 3, 4, 4))] * 3
        assert numbers["switch_shown_s"] < numbers["switch_seen_s"]


def test_who_may_connect(tmp_path):
    with serving(tmp_path, token="secret/+word") as served:
        page = httpx.get(served.url)
        assert page.status_code == 200 and "default-src 'none'" in page.headers["content-security-policy"]
        assert page.headers["cross-origin-resource-policy"] == "same-origin"
        assert httpx.get(served.url + "/metrics").status_code == 401
        bearer = {"Authorization": "Bearer secret/+word"}
        assert httpx.get(served.url + "/metrics", headers=bearer).status_code == 200
        for wrong in ({}, {"Authorization": "Bearer secret"}):
            with pytest.raises(InvalidStatus):
                served.connect(additional_headers=wrong)
        for query in ("?token=secret%2F%2Bword",):
            served.connect(query).close()
        served.connect(additional_headers=bearer, origin=served.url).close()
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1", "http://["):
            with pytest.raises(InvalidStatus):
                served.connect(additional_headers=bearer, origin=origin)
        for host in (f"evil.example:{served.port}", "[::1", "a]b", ""):
            assert httpx.get(served.url, headers={**bearer, "Host": host}).status_code == 403, host
        for origin in ("https://evil.example", "http://[", "http://"):
            assert httpx.get(served.url, headers={"Origin": origin}).status_code == 403, origin
