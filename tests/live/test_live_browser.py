"""The live page in a real headless Chromium, with the real server behind it."""

import time

import numpy as np
import pytest

from kvpo.arena.store import Study
from kvpo.engine.generator import as_bytes
from kvpo.live.script import Cue
from tests.headless_chromium import chromium, find_chromium
from tests.live.live_server import serving, theatre_of
from tests.live.stage import scheduler, stage

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
HOSTILE = "<img src=x onerror=document.title='owned'>"


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


def theatre(out):
    """Both arms of a tiny generator, which differs by prompt, and what its page has to know."""
    own = scheduler(stage(), arms=("base", "aligned"))
    theatre = theatre_of(out, own)
    facts = {"frames_per_latent": 1, "routed_slots": 3, "story": True, "model": HOSTILE}
    theatre.info = {**theatre.info, **facts}
    theatre.story = lambda seed: [Cue("once upon a time", 6), Cue("the end")]
    return theatre


def colour(page, arm: str) -> str:
    """The pixels that a screen shows, RGBA in rows."""
    return page.run(
        f"""(() => {{ const canvas = document.getElementById('screen-{arm}');
        return canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data.join(); }})()"""
    )


def say(page, prompt: str) -> None:
    """Type a prompt and press Enter."""
    page.run(f"document.getElementById('prompt').value = {prompt!r}")
    page.run(
        "document.getElementById('prompt').dispatchEvent("
        "new KeyboardEvent('keydown', {key: 'Enter', cancelable: true}))"
    )


def wait_until(condition) -> None:
    """Poll until ``condition()`` is true."""
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def press(page, key: str) -> None:
    page.run(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}, bubbles: true}}))")


def ordered_by_hand(page) -> None:
    """Drag the fifth branch of a fork to the first place, then move the next one on by a key."""
    order = "[...document.querySelectorAll('.branch')].map((b) => Number(b.dataset.branch))"
    branch = "document.querySelectorAll('.branch')"
    page.run(f"{branch}[4].dispatchEvent(new DragEvent('dragstart'))")
    page.run(f"{branch}[0].dispatchEvent(new DragEvent('dragover'))")
    assert page.run(order) == [4, 0, 1, 2, 3, 5]
    page.run(f"{branch}[1].dispatchEvent(new KeyboardEvent('keydown', {{key: 'ArrowRight', bubbles: true}}))")
    assert page.run(order) == [4, 1, 0, 2, 3, 5]


def compare_with(page, session, pixels: str) -> None:
    """Compare the page's pixels and the states in its strip with those of the session, which is paused."""
    frame = int(page.run("document.getElementById('clock').textContent").removeprefix("frame "))
    latent = session.arms["aligned"].spool.read(frame, frame + 1)
    (expected,) = as_bytes(session.stage.codec.decode(latent[None])[0]).numpy()
    found = np.array(pixels.split(","), int).reshape(*expected.shape[:2], 4)
    assert np.array_equal(found[..., :3], expected)
    frames = "[...frames].filter(([, one]) => one.node.classList.contains({!r})).map(([frame]) => frame)"
    marked = {kind: set(page.run(frames.format(kind))) for kind in ("sink", "local", "routed", "freed")}
    seen, resident = page.run("[sees, numbers.resident]")
    assert {kind: set(seen[kind]) for kind in seen} == {kind: marked[kind] for kind in seen}
    assert not marked["freed"] & {*resident, *seen["sink"], *seen["local"], *seen["routed"]}


def test_a_stream_is_directed_on_the_page(browser, tmp_path):
    with serving(tmp_path, theatre=theatre(tmp_path)) as served:
        browser.errors.clear()
        browser.resize(1280, 900)
        browser.open(served.url)
        browser.wait_for("document.getElementById('prompt').value === 'once upon a time'")
        say(browser, "a red square")
        browser.wait_for("document.querySelectorAll('.frame').length >= 24")
        assert browser.run("document.querySelectorAll('#screens .screen').length") == 2
        (show,) = served.scheduler.shows.values()

        browser.run("document.getElementById('blend').value = '2'")
        say(browser, HOSTILE)  # the caption follows, as text
        browser.wait_for(f"document.getElementById('caption').textContent === {HOSTILE!r}")
        frame = show.session.script.switches[0]
        assert frame % 3 == 0 and show.session.script.segments == ("a red square", HOSTILE)
        assert show.session.script.transitions == (2,)
        assert browser.run("document.title") == "kvpo live"

        browser.run("document.getElementById('speed').value = '1'")
        browser.run("document.getElementById('speed').dispatchEvent(new Event('change'))")
        browser.run("[...document.querySelectorAll('.frame.resident')].at(-1).click()")
        press(browser, "b")
        browser.wait_for("document.querySelectorAll('.frame.routed').length === 1")
        assert show.session.script.routes

        browser.run("[...document.querySelectorAll('.frame.resident')].at(-1).click()")
        press(browser, "p")
        browser.wait_for("document.querySelectorAll('.frame.pinned').length === 1")
        assert len(show.session.pins) == 1

        times = browser.run("shownFrames")
        assert len(times) == len(set(times)), "a frame counts once, however many arms show it"

        press(browser, "f")
        browser.wait_for("document.querySelectorAll('.branch').length === 6")
        assert show.session.fork is not None
        ordered_by_hand(browser)
        press(browser, "3")  # the third is the best after all
        browser.wait_for("!document.getElementById('branches').open")
        browser.wait_for(f"[...frames.keys()].at(-1) > {show.session.start}")
        press(browser, " ")
        browser.wait_for("document.body.classList.contains('paused')")
        held = "new KeyboardEvent('keydown', {key: ' ', repeat: true, bubbles: true})"
        browser.run(f"for (let n = 0; n < 3; n++) document.body.dispatchEvent({held})")
        time.sleep(0.2)
        assert show.paused, "a key that is held acts once"
        shown = colour(browser, "aligned")
        assert colour(browser, "base") == shown, "one script, one model"
        compare_with(browser, show.session, shown)
        assert browser.run("document.querySelectorAll('#tiles dt').length") == 12
        (ranking,) = Study(tmp_path / "choices").rankings()
        assert ranking.ranks == (0, 1, 2, 3, 4, 5)
        assert not browser.errors
        assert all(url.startswith((served.url, "blob:", "data:")) for url in browser.requests)


def test_a_story_on_a_phone(browser, tmp_path):
    with serving(tmp_path, theatre=theatre(tmp_path)) as served:
        browser.errors.clear()
        browser.resize(390, 844, dark=True, phone=True)
        browser.open(served.url)
        browser.wait_for("document.getElementById('state').textContent === 'ready'")
        browser.run("document.getElementById('story').click()")
        browser.wait_for("document.getElementById('caption').textContent === 'the end'")
        assert browser.run("document.documentElement.scrollWidth") <= 390
        browser.run("document.getElementById('strip').scrollLeft = 0")
        seen = browser.run("frames.size")
        browser.wait_for(f"frames.size > {seen + 6}")
        assert browser.run("document.getElementById('strip').scrollLeft") == 0, "it stays where one looks"
        browser.run("choose(3, false); fork()")  # too early: nothing to branch on
        browser.wait_for("document.getElementById('toast').textContent.startsWith('branches:')")
        assert browser.run("document.getElementById('state').textContent") == "live"
        browser.run("chosen.clear(); fork()")
        browser.wait_for("document.querySelectorAll('.branch').length === 6")
        assert browser.run("document.getElementById('branches').scrollWidth") <= 390
        press(browser, "1")
        say(browser, "\u0645\u0631\u0628\u0639 \u0623\u062d\u0645\u0631 (1)!")
        browser.wait_for("document.getElementById('caption').textContent.endsWith('!')")
        found = "['caption', 'prompt'].map((id) => getComputedStyle(document.getElementById(id)).direction)"
        assert browser.run(found) == ["rtl", "rtl"], "Arabic runs from the right"
        assert not browser.errors


def test_prompts_in_the_queue_follow_whatever_began_the_session(browser, tmp_path):
    with serving(tmp_path, theatre=theatre(tmp_path)) as served:
        browser.errors.clear()
        browser.resize(1280, 900)
        browser.open(served.url)
        browser.wait_for("document.getElementById('prompt').value === 'once upon a time'")
        browser.run("document.getElementById('prompt').value = 'the end'")
        browser.run("document.getElementById('enqueue').click()")
        say(browser, "a red square")

        def lined_up() -> list[str]:
            return [cue.prompt for show in served.scheduler.shows.values() for cue in show.session.queue]

        def own_session():
            return next((show.session for show in served.scheduler.shows.values()), None)

        before = None
        show_base = "$('arms').value = 'base'; $('arms').onchange()"
        for again in ("1", "document.getElementById('reset').click()", show_base):
            browser.run(f"{again}; 0")
            wait_until(lambda own=before: own_session() is not own and lined_up() == ["the end"])
            assert browser.run("queue.map((one) => one.prompt)") == ["the end"]
            before = own_session()
        browser.run("document.getElementById('snapshot').click()")
        browser.wait_for("document.querySelector('#saved a') !== null")
        browser.run("queue = []; listQueue(true); document.querySelector('#saved a').click()")
        wait_until(lambda: own_session() is not before and lined_up() == ["the end"])
        assert browser.run("queue.map((one) => one.prompt)") == ["the end"] and not browser.errors


def test_a_lost_connection_closes_the_fork_and_the_page_starts_again(browser, tmp_path):
    with serving(tmp_path, theatre=theatre(tmp_path)) as served:
        browser.errors.clear()
        browser.resize(1280, 900)
        browser.open(served.url)
        browser.wait_for("document.getElementById('state').textContent === 'ready'")
        say(browser, "a red square")
        browser.wait_for("document.querySelectorAll('.frame').length >= 12")
        press(browser, "f")
        browser.wait_for("document.querySelectorAll('.branch').length === 6")
        browser.run("socket.close()")
        browser.wait_for("document.getElementById('state').textContent === 'disconnected'")
        assert browser.run("document.getElementById('branches').open") is False
        say(browser, "a blue square")  # too early
        assert "no connection" in browser.run("document.getElementById('toast').textContent")
        browser.wait_for("document.getElementById('state').textContent === 'ready'")
        say(browser, "a blue square")
        browser.wait_for("document.getElementById('caption').textContent === 'a blue square'")
        assert browser.run("document.getElementById('state').textContent") == "live" and not browser.errors
