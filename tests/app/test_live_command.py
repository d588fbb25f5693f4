"""`kvpo live` as a command, and the embedded generator behind it."""

from functools import partial

import httpx
import pytest

from kvpo.app.build import load_backbone
from kvpo.app.cli import main
from kvpo.app.configuration import preset
from kvpo.app.live import theatre_of
from kvpo.app.sources.world import live_story, shows_rather
from kvpo.engine.generator import pixels_of
from kvpo.engine.stream import stream_latents
from kvpo.live.scheduler import SessionLimits
from kvpo.live.script import Cue
from kvpo.live.session import Session
from kvpo.prompts import VideoPrompt
from tests.http_servers import visited
from tests.live.live_server import Client
from tests.live.stage import unpacked

REFUSED = {
    "--host 0.0.0.0": "--host: 0.0.0.0 is open to other machines, which needs a token: set KVPO_LIVE_TOKEN",
    "--port 70000": "--port: must be 0 to 65535, got 70000",
    "--sessions 0": "--sessions: must be 1 or more, got 0",
    "--rows -1": "--rows: must be 0 or more, got -1",
    "--checkpoint best": "--checkpoint: needs --run, the run that it is a checkpoint of; weights of a public "
    "model go to --backbone.checkpoint",
    "--weights raw": "--weights: raw needs --run",
}


@pytest.mark.parametrize("arguments", REFUSED)
def test_what_is_refused(arguments, tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("KVPO_LIVE_TOKEN", raising=False)
    assert main(["live", "--out", str(tmp_path / "live"), *arguments.split()]) == 2
    assert REFUSED[arguments] in capsys.readouterr().err


def test_the_command_prints_its_address_streams_and_stops_at_a_signal(tmp_path, caplog):
    def visit(url: str) -> None:
        assert httpx.get(url).text.startswith("<!doctype html>")
        with Client(f"ws{url.removeprefix('http')}v1/realtime/video", max_size=None) as client:
            assert client.start("A red circle drifts right by the sea.")["arms"] == ["base"]
            client.until("video.block")

    assert visited(["live", "--port", "0", "--out", str(tmp_path / "live")], visit, caplog) == 0


def test_the_embedded_generator_streams(tmp_path):
    limits = SessionLimits(sessions=1, frames=30)
    theatre = theatre_of(
        preset("demo"), tmp_path, run=None, checkpoint=None, weights="average", limits=limits
    )
    own, sent = theatre.scheduler, []
    (cue, *rest) = theatre.story(3)
    assert theatre.notice("A red dragon.") == "unknown words have no effect: dragon"
    assert theatre.notice("A dragon eats a dragon.") == "unknown words have no effect: dragon, eats"
    assert not theatre.notice(cue.prompt)
    assert theatre.notice("red " * 33) == "33 words, 32 are read: 1 are cut"
    begun = Cue(cue.prompt, 12)
    session = partial(Session, own.stage, own.cache, ["base"], begun, 1)
    show = own.open("one", session, sent.append, own.clock(), 0.0)
    show.session.line_up(rest)
    while own.shows:
        own.generate([show])
    *blocks, done = sent
    headers = [unpacked(block)[0] for block in blocks]
    assert [header["start"] for header in headers] == list(range(0, 30, 3))
    assert headers[-1]["prompt"] == rest[0].prompt
    assert done == {"type": "session.done", "session": "one", "reason": "length"}
    assert own.cache.pages_in_use == 0


def test_the_scorer_sees_a_switch():
    assert len(live_story(1)) == 4 and live_story(1) == live_story(1) != live_story(2)
    backbone = load_backbone(preset("demo"))
    red, blue = "A red circle drifts right by the sea.", "A blue square drifts left in the desert."
    prompts = [VideoPrompt(n, (text,), (), 12) for n, text in enumerate((red, blue))]
    latents = stream_latents(
        backbone.generator, prompts, backbone.texts(prompts), backbone.tape("generation")
    )
    first, second = pixels_of(backbone.codec, latents)
    assert shows_rather(first, red, blue) and not shows_rather(first[-3:], blue, red)
    assert shows_rather(second, blue, red)
    assert not shows_rather(first, "Whatever you like", red)
