"""Sessions that end when nobody expects it cost nobody else anything."""

import asyncio
import errno
import os

import pytest

from kvpo.files import StorageError
from kvpo.live.direct import Direction
from kvpo.live.keep import export_session
from kvpo.live.outbox import EVENTS_WAITING, Outbox
from kvpo.live.protocol import Start
from kvpo.live.scheduler import Show
from kvpo.live.script import Cue
from kvpo.live.session import Session
from kvpo.prompt_files import read_prompts
from kvpo.prompts import VideoPrompt
from tests.live.live_server import theatre_of
from tests.live.stage import scheduler, slow_stage


def test_a_full_disk_ends_its_sessions_and_not_the_server():
    own, told = scheduler(slow_stage()), []

    def opened(name: str) -> Show:
        return own.open(
            name, lambda: Session(own.stage, own.cache, ["base"], Cue("a"), 1), told.append, 0.0, 0.0
        )

    shows = [opened("one"), opened("two")]
    for show in shows:
        show.session.arms["base"].spool._file = open("/dev/full", "w+b")
    for _ in range(200):  # what is small waits in the file's buffer first
        if own.shows:
            own.generate(shows)
    assert own.cache.pages_in_use == 0
    events = [one["type"] for one in told if isinstance(one, dict)]
    assert events == ["error", "session.done"] * 2


def test_a_session_that_ends_before_its_connection_hears_of_it_leaves_the_connection_free(tmp_path):
    own = scheduler(slow_stage())

    async def begun_and_ended_at_once() -> None:
        theatre = theatre_of(tmp_path, own)
        theatre.loop = asyncio.get_running_loop()
        with theatre.connected() as connection:
            direction = Direction(theatre, connection)
            for _ in range(2):  # the second one is not refused
                starting = asyncio.create_task(direction.carry_out("session.start", Start("a red square")))
                await asyncio.sleep(0)
                own._carry_out()
                (show,) = own.shows.values()
                own.close(show, "failed")
                await starting
                assert connection.show is None and not connection.directs and not theatre.rooms

    asyncio.run(begun_and_ended_at_once())


def test_a_full_disk_leaves_no_half_line_among_the_training_prompts(tmp_path, monkeypatch):
    def export(text):
        return export_session(tmp_path, "x", "training", VideoPrompt(0, (text,), (), 15), {}, None)

    def half(path):
        os.truncate(path, path.stat().st_size - 9)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    export("a red circle rolls")
    with monkeypatch.context() as full:
        full.setattr("kvpo.live.keep.sync", half)
        with pytest.raises(StorageError, match="cannot save .*training-prompts.jsonl: the disk is full"):
            export("a blue square hops")
    read = read_prompts(export("a green star spins"), num_frames=15)
    assert [prompt.segments for prompt in read] == [("a red circle rolls",), ("a green star spins",)]


def test_a_reader_that_does_not_read_its_events_is_cut_off():
    outbox = Outbox()
    for n in range(EVENTS_WAITING):
        outbox.put({"n": n})
    assert not outbox.overrun
    outbox.put({"n": EVENTS_WAITING})
    held = len(outbox._items)
    for item in (b"a block", {"n": EVENTS_WAITING + 1}):  # while the writer waits for the connection
        outbox.put(item)
    assert len(outbox._items) == held
    assert outbox.overrun and asyncio.run(outbox.get()) is None
