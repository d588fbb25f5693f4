"""The live page in a real headless Chromium, with the real server behind it."""

import pytest

from kvpo.arena.store import Study
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
    """The pixels that a screen shows."""
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


def press(page, key: str) -> None:
    page.run(f"document.body.dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}, bubbles: true}}))")


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

        press(browser, "f")
        browser.wait_for("document.querySelectorAll('.branch').length === 6")
        assert show.session.fork is not None
        press(browser, "3")
        browser.wait_for("!document.getElementById('branches').open")
        browser.wait_for("document.getElementById('state').textContent === 'live'")
        press(browser, " ")
        browser.wait_for("document.body.classList.contains('paused')")
        shown = colour(browser, "aligned")
        assert set(shown.split(",")) != {"0"} and colour(browser, "base") == shown  # one script, one model
        assert len(Study(tmp_path / "choices").rankings()) == 1
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
        assert not browser.errors
