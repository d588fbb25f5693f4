"""The rating page in a real headless Chromium: a study is voted through by keyboard and reported."""

import json
import socket
import time

import numpy as np
import pytest

from kvpo.app.arena import open_study, report
from kvpo.arena.store import Study, Vote
from kvpo.report.video import write_video
from tests.arena.serving import child_server, served
from tests.headless_chromium import chromium, find_chromium

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)
HOSTILE = "<img src=x onerror=alert(1)><script>document.title='owned'</script>"
PAIRS = 20


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two arms of videos of 12 frames, 4 a second, told apart by their brightness; one prompt is a script."""
    root = tmp_path_factory.mktemp("arms")
    ramp = np.linspace(0, 90, 12)[:, None, None, None] * np.ones((12, 32, 32, 3))
    for arm, light in (("dim", 40), ("bright", 140)):
        (root / arm).mkdir()
        names = {}
        for n in range(PAIRS):
            frames = np.clip(ramp + light + 2 * n, 0, 255).astype(np.uint8)
            write_video(root / arm / f"{n}.mp4", frames, 4, scale=4)
            names[f"{n}.mp4"] = [HOSTILE] if n == 0 else [f"a light {n}", f"a brighter light {n}"]
        (root / arm / "videos.json").write_text(json.dumps(names))
    return [str(root / arm) for arm in ("dim", "bright")]


def press(page, *keys: str) -> None:
    for key in keys:
        page.run(f"document.dispatchEvent(new KeyboardEvent('keydown', {{key: {key!r}, cancelable: true}}))")


def type_key(page, key: str, code: int, text: str = "", *, held: bool = False) -> None:
    """Press a real key, which acts on what has the focus; ``held``: it repeats, as if never let go."""
    values = {"key": key, "windowsVirtualKeyCode": code}
    page.call("Input.dispatchKeyEvent", type="keyDown", text=text, autoRepeat=held, **values)
    page.call("Input.dispatchKeyEvent", type="keyUp", **values)


def brightness(page, place: int) -> float:
    """Mean grey of what a video shows."""
    return page.run(
        f"""(() => {{ const video = document.querySelectorAll('.shot video')[{place}];
        const copy = new OffscreenCanvas(8, 8).getContext('2d');
        copy.drawImage(video, 0, 0, 8, 8);
        const green = copy.getImageData(0, 0, 8, 8).data.filter((_, n) => n % 4 == 1);
        return green.reduce((a, b) => a + b) / 64; }})()"""
    )


READY = "[...document.querySelectorAll('.shot video')].every((v) => v.readyState >= 2 && !v.seeking)"


def at_ballot(page, done: int) -> None:
    page.wait_for(
        f"document.getElementById('count').textContent.startsWith('{done} of')"
        " && !document.getElementById('ballot').hidden"
    )
    page.wait_for(READY)


def test_a_study_of_twenty_pairs_is_voted_by_keyboard_and_reported(browser, folders, tmp_path):
    study = open_study(folders, tmp_path / "study")
    token = study.invite(HOSTILE[:60])
    browser.errors.clear()
    with served(study) as url:
        browser.resize(1280, 900)
        browser.open(f"{url}/#{token}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        press(browser, "?")
        for done in range(23):
            at_ballot(browser, done)
            lines = "[...document.querySelectorAll('.prompts li')].map((line) => line.dir)"
            assert set(browser.run(lines)) == {"auto"}, "a prompt in Arabic runs from the right"
            lights = [brightness(browser, place) for place in (0, 1)]
            difference = lights[1] - lights[0]
            key = "ArrowDown" if abs(difference) < 25 else "ArrowRight" if difference > 0 else "ArrowLeft"
            press(browser, *[key] * 5)
            if done == 3:
                press(browser, "Enter")
                at_ballot(browser, 4)
                press(browser, "u")
                at_ballot(browser, 3)
                assert browser.run("document.getElementById('next').disabled"), "answers are asked for again"
                press(browser, *[key] * 5)
            press(browser, "Enter")
        browser.wait_for("document.getElementById('headline').textContent.includes('last one')")
        assert browser.run("document.title") != "owned" and browser.errors == []
        assert browser.run("document.querySelectorAll('main img, main script').length") == 0
    votes = Study(study.directory).judgements()
    arms = {(one.model_a, one.model_b, one.winner) for one in votes if one.kind != "attention"}
    assert arms <= {("dim", "bright", "model_b"), ("bright", "dim", "model_a")}
    assert {one.winner for one in votes if one.kind == "attention"} == {"tie"}
    assert min(one.milliseconds for one in votes) > 0

    page, result = report(study.directory, close=True)
    found = result.questions[0].pairings[0].counted
    assert (found.good, found.same, found.bad) == (PAIRS, 0, 0) and result.closed
    browser.open(page.as_uri())
    said = browser.run("document.querySelector('.sentence').textContent")
    assert "bright is preferred to dim (20 votes for it, 0 against" in said
    assert browser.run("document.querySelectorAll('.decided video').length") == 16
    bars = "[...document.querySelectorAll('.interval')].map((bar) => bar.role + ' ' + bar.ariaLabel)"
    assert "img +1.000, +0.663 to +1.000" in browser.run(bars), "bars are told to who cannot see them"
    browser.resize(390, 844, phone=True)
    tables = "[...document.querySelectorAll('.scroll')].map((box) => box.scrollWidth - box.clientWidth)"
    assert browser.run("document.documentElement.scrollWidth") <= 390 and set(browser.run(tables)) == {0}
    browser.resize(1280, 900)
    assert browser.run("document.title") != "owned" and browser.errors == []


def test_videos_play_in_step_and_stop_frame_by_frame(browser, folders, tmp_path):
    study = open_study(folders, tmp_path / "study")
    with served(study) as url:
        browser.open(f"{url}/#{study.invite('ann')}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        browser.run("document.getElementById('begin').click()")
        at_ballot(browser, 0)
        browser.wait_for("document.querySelector('.shot video').currentTime > 0.3")
        times = "[...document.querySelectorAll('.shot video')].map((v) => v.currentTime)"
        one, other = browser.run(times)
        assert abs(one - other) < 0.1
        press(browser, " ")
        browser.run("document.querySelectorAll('.shot video').forEach((v) => { v.currentTime = 1; })")
        for key, expected in ((".", 1.25), (".", 1.5), (",", 1.25)):
            browser.wait_for(READY)
            press(browser, key)
            browser.wait_for(READY)
            assert browser.run(times) == pytest.approx([expected, expected], abs=0.02)
        press(browser, "s")
        assert browser.run("document.querySelector('.shot video').playbackRate") == 0.5
        press(browser, "r")
        browser.wait_for(f"Math.max(...{times}) < 1.2 && !document.querySelector('.shot video').paused")
        browser.run("document.querySelectorAll('.shot video')[1].currentTime = 2.5")
        browser.wait_for(f"(([a, b]) => Math.abs(a - b) < 0.1)({times})")


def test_controls_that_tab_reaches_keep_their_own_keys(browser, folders, tmp_path):
    study = open_study(folders, tmp_path / "study")
    token = study.invite("ann")
    rater = study.rater_of(token)
    with served(study) as url:
        browser.open(f"{url}/?tab#{token}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        browser.run("document.getElementById('begin').click()")
        at_ballot(browser, 0)
        answers = "[...document.querySelectorAll('.answers button')]"
        for question in range(5):
            browser.run(f"{answers}[{4 * question + 2}].focus()")
            type_key(browser, " ", 32, " ") if question % 2 else type_key(browser, "Enter", 13, "\r")
        assert set(browser.run("Object.values(state.answers)")) == {"right"}
        browser.run("setPlaying(false); state.answers = {}; mark(); document.getElementById('scrub').focus()")
        type_key(browser, "ArrowRight", 39)
        assert browser.run("state.answers") == {}, "an arrow moves the slider that has the focus"
        browser.run("document.activeElement.blur()")
        press(browser, *["ArrowLeft"] * 5, "Enter")
        at_ballot(browser, 1)
        press(browser, *["ArrowLeft"] * 5)
        browser.run("document.getElementById('undo').focus()")
        type_key(browser, "Enter", 13, "\r")
        at_ballot(browser, 0)
        assert study.done(rater) == 0, "Enter on Undo takes back, and does not vote"
        browser.run(f"{answers}[0].focus()")
        browser.run("document.dispatchEvent(new MouseEvent('click', {detail: 1, bubbles: true}))")
        press(browser, *["ArrowDown"] * 5, "Enter")
        at_ballot(browser, 1)
        assert study.done(rater) == 1, "after a click the keys are the page's again"


def test_a_held_key_and_a_double_click_act_once(browser, folders, tmp_path):
    study = open_study(folders, tmp_path / "pairs")
    with served(study) as url:
        browser.open(f"{url}/?held#{study.invite('ann')}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        browser.run("document.getElementById('begin').click()")
        at_ballot(browser, 0)
        for held in (False, True, True):
            type_key(browser, "ArrowLeft", 37, held=held)
        assert browser.run("Object.keys(state.answers).length") == 1, "one question, not all of them"
    ranked = open_study(folders, tmp_path / "ranked", ranked=True)
    token = ranked.invite("ann")
    rater = ranked.rater_of(token)
    with served(ranked) as url:
        browser.open(f"{url}/?held#{token}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        browser.run("document.getElementById('begin').click()")
        at_ballot(browser, 0)
        type_key(browser, "Enter", 13, "\r")
        at_ballot(browser, 1)
        type_key(browser, "Enter", 13, "\r", held=True)
        browser.run("document.getElementById('next').focus()")
        type_key(browser, "Enter", 13, "\r", held=True)
        for button in ("next", "undo"):
            second = "new MouseEvent('click', {detail: 2})"
            browser.run(f"document.getElementById('{button}').dispatchEvent({second})")
            time.sleep(0.2)
            assert ranked.done(rater) == 1, "one vote, and it is not taken back"


def test_the_page_fits_a_phone_and_says_what_a_wrong_link_lacks(browser, folders, tmp_path):
    study = open_study(folders, tmp_path / "study")
    with served(study) as url:
        browser.resize(390, 844, phone=True)
        browser.open(f"{url}/?phone#{study.invite('ann')}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        browser.run("document.getElementById('begin').click()")
        at_ballot(browser, 0)
        assert browser.run("document.documentElement.scrollWidth <= innerWidth")
        sizes = (
            "[...document.querySelectorAll('.answers button')].map((b) => b.getBoundingClientRect().height)"
        )
        assert min(browser.run(sizes)) >= 40, "fingers need room"
        browser.errors.clear()
        browser.open(f"{url}/?wrong#1.forged")
        browser.wait_for("document.getElementById('headline').textContent.includes('invitation')")
        browser.errors.clear()
        browser.resize(1280, 900)


def drag(page, start: str, end: str) -> None:
    """Move the pointer from the middle of one element to that of another."""
    places = [
        page.run(
            f"(() => {{ const b = document.querySelectorAll('.shot')[{n}].getBoundingClientRect();"
            " return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        for n in (start, end)
    ]
    (x, y), (to_x, to_y) = places
    mouse = {"button": "left", "buttons": 1, "clickCount": 1}
    page.call("Input.dispatchMouseEvent", type="mousePressed", x=x, y=y, **mouse)
    for share in (0.3, 0.7, 1.0):
        at = {"x": x + share * (to_x - x), "y": y + share * (to_y - y)}
        page.call("Input.dispatchMouseEvent", type="mouseMoved", **at, **mouse)
    page.call("Input.dispatchMouseEvent", type="mouseReleased", x=to_x, y=to_y, **mouse)


def test_videos_are_ranked_by_drag_and_drop_and_by_arrow_keys(browser, folders, tmp_path):
    study = open_study([*folders, f"again={folders[0]}"], tmp_path / "study", pairs=3, ranked=True)
    token = study.invite("ann")
    shown = study.ballots_of(study.rater_of(token))
    with served(study) as url:
        browser.open(f"{url}/?ranked#{token}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        told = browser.run("document.getElementById('welcome').innerText")
        assert "Drag them into order" in told and told.count("?") == 2, "the title, and one question"
        assert "move it" in told and "both bad" not in told
        browser.run("document.getElementById('begin').click()")
        at_ballot(browser, 0)
        places = "[...document.querySelectorAll('.shot')].map((s) => Number(s.dataset.place))"
        assert browser.run(places) == [0, 1]
        drag(browser, 1, 0)
        assert browser.run(places) == [1, 0]
        press(browser, "Enter")
        at_ballot(browser, 1)
        browser.run("document.querySelectorAll('.shot')[0].focus()")
        press(browser, "ArrowRight")
        assert browser.run(places) == [1, 0]
        press(browser, "ArrowLeft", "Enter")
        at_ballot(browser, 2)
    first, second = study.rankings()
    assert first.videos == shown[0].videos[::-1] and second.videos == shown[1].videos


def test_a_vote_that_the_server_did_not_take_says_so_and_is_sent_again(browser, folders, tmp_path):
    study = open_study(folders, tmp_path / "study")
    token = study.invite("ann")
    with served(study) as url:
        browser.open(f"{url}/?broken#{token}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        browser.run("document.getElementById('begin').click()")
        at_ballot(browser, 0)
        browser.run(
            "window.fetched = window.fetch; window.fetch = () => Promise.reject(new TypeError('gone'))"
        )
        press(browser, *["ArrowLeft"] * 5, "Enter")
        browser.wait_for("document.getElementById('note').textContent.includes('not stored yet')")
        assert study.done(study.rater_of(token)) == 0
        browser.run("window.fetch = window.fetched")
        time.sleep(0.1)
        press(browser, "Enter")
        at_ballot(browser, 1)
        assert study.done(study.rater_of(token)) == 1
        browser.run(
            "state.ahead = null; window.fetch = (path, options) => path === '/votes' ?"
            " window.fetched(path, options) : Promise.reject(new TypeError('gone'))"
        )
        press(browser, *["ArrowLeft"] * 5, "Enter")
        browser.wait_for("document.getElementById('detail').textContent.includes('you gave are stored')")
    assert study.done(study.rater_of(token)) == 2


def test_an_undo_without_a_connection_says_so(browser, folders, tmp_path):
    study = open_study(folders, tmp_path / "study", pairs=1)
    token = study.invite("ann")
    gone = "window.fetched = window.fetch; window.fetch = () => Promise.reject(new TypeError('gone'))"
    with served(study) as url:
        browser.open(f"{url}/?undo#{token}")
        browser.wait_for("!document.getElementById('welcome').hidden")
        browser.run("document.getElementById('begin').click()")
        at_ballot(browser, 0)
        press(browser, *["ArrowLeft"] * 5, "Enter")
        browser.wait_for("document.getElementById('headline').textContent.includes('last one')")
        browser.run(gone)
        browser.run("document.getElementById('undo-last').click()")
        browser.wait_for("document.getElementById('detail').textContent.includes('nothing was taken back')")
        browser.run("window.fetch = window.fetched")
        browser.run("document.getElementById('undo-last').click()")
        at_ballot(browser, 0)
        browser.run(f"{gone}; state.session.done = 1; undo()")
        browser.wait_for("document.getElementById('note').textContent.includes('nothing was taken back')")
    assert study.done(study.rater_of(token)) == 0


def test_clips_of_a_report_wait_where_motion_is_unwelcome(browser, folders, tmp_path):
    study = open_study(folders, tmp_path / "study", pairs=1)
    rater = study.rater_of(study.invite("ann"))
    study.vote(rater, Vote(0, dict.fromkeys([one.name for one in study.design.asked], "left"), (), 900, True))
    page, _ = report(study.directory, close=True)
    videos = "[...document.querySelectorAll('.decided video')]"
    for motion, playing in (("reduce", False), ("no-preference", True)):
        feature = {"name": "prefers-reduced-motion", "value": motion}
        browser.call("Emulation.setEmulatedMedia", features=[feature])
        browser.open(page.as_uri())
        browser.run(f"{videos}[0].scrollIntoView({{behavior: 'instant'}})")
        browser.wait_for(f"{videos}.every((v) => v.readyState >= 2)")
        time.sleep(0.3)
        assert browser.run(f"{videos}.map((v) => [!v.paused, v.controls])") == [[playing, not playing]] * 2


def test_kills_between_votes_on_the_page_lose_none(browser, folders, tmp_path):
    """Vote, kill the server once the page goes on, start another and come back: the vote must be there."""
    study = open_study(folders, tmp_path / "study", pairs=3)
    token = study.invite("ann")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/#{token}"
        server = child_server(study.directory, listener)
        try:
            browser.open(url)
            browser.wait_for("!document.getElementById('welcome').hidden")
            browser.run("document.getElementById('begin').click()")
            for done in range(2):
                at_ballot(browser, done)
                press(browser, *["ArrowLeft"] * 5, "Enter")
                browser.wait_for(f"state.session.done === {done + 1}")
                server.kill()
                server.wait(20)
                assert Study(study.directory).done(study.rater_of(token)) == done + 1
                server = child_server(study.directory, listener)
                browser.open("about:blank")
                browser.open(url)
            at_ballot(browser, 2)
        finally:
            server.kill()
            server.wait(20)
