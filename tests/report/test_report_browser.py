"""The page in a real headless Chromium: it plays in step, sorts, fits a phone and logs no error."""

import base64
import json
import shutil
import time

import numpy as np
import pytest
from edits import HOSTILE, copy_of, edit_json, edit_metrics, enlarge, lines_of
from safetensors.numpy import load_file

from kvpo.report.formatting import compact
from kvpo.report.page import write_report
from kvpo.world.vocabulary import FRAME_SIZE
from tests.headless_chromium import chromium, find_chromium

pytestmark = pytest.mark.skipif(
    find_chromium() is None, reason="no Chromium is installed (Debian: apt-get install chromium)"
)

READ = """(picture) => {
  const copy = new OffscreenCanvas(picture.width, picture.height);
  const context = copy.getContext('2d', {willReadFrequently: true});
  context.drawImage(picture, 0, 0, copy.width, copy.height);
  return context.getImageData(0, 0, copy.width, copy.height).data;
}"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with chromium(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture(scope="module")
def hostile_run(finished_run, tmp_path_factory):
    """The finished run, but a prompt that would be a script, and its report."""
    run = copy_of(finished_run, tmp_path_factory.mktemp("browser") / "finished")
    edit_json(run / "gallery" / "gallery.json", lambda entries: entries[0].update(title=HOSTILE))
    write_report(run)
    return run


@pytest.fixture
def page(browser, hostile_run):
    """The run's page at desktop size, paused at the first frame, with nothing logged so far."""
    browser.errors.clear()
    browser.requests.clear()
    browser.resize(1280, 900)
    browser.open((hostile_run / "report.html").as_uri())
    pause(browser)
    yield browser
    assert browser.errors == []


def pause(page) -> None:
    if page.run("document.getElementById('play').classList.contains('playing')"):
        page.run("document.getElementById('play').click()")
    seek(page, 0.0)


def seek(page, share: float) -> None:
    """Move every video to ``share`` of the longest one's length."""
    page.run(
        f"(() => {{ const s = document.getElementById('scrub'); s.value = {1000 * share};"
        " s.dispatchEvent(new Event('input')); })()"
    )


def pixels(page, name: str, shown: str) -> np.ndarray:
    """Pixels of the screen of clip ``name`` once it says that it shows ``shown``."""
    screen = f"[...document.querySelectorAll('canvas.screen')].find((c) => c.dataset.clip === {name!r})"
    page.run(f"{screen}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
    page.wait_for(f"{screen}.dataset.shown === {shown!r}")
    data = base64.b64decode(page.run(f"btoa(String.fromCharCode(...({READ})({screen})))"))
    side = int((len(data) / 4) ** 0.5)
    return np.frombuffer(data, np.uint8).reshape(side, side, 4)[..., :3]


def test_nothing_is_requested_and_hostile_prompts_do_not_run(page):
    assert [url for url in page.requests if not url.startswith(("file:", "data:"))] == []
    assert page.run("document.title") == "finished \u00b7 kvpo \u00b7 kvpo report"
    assert page.run("document.querySelectorAll('script').length") == 2
    prompts = "[...document.querySelectorAll('.captions p, #gallery-cards h3')].map((line) => line.dir)"
    assert set(page.run(prompts)) == {"auto"}, "a prompt in Arabic runs from the right"


def test_canvases_show_the_saved_frames_to_the_bit(page, finished_run):
    gallery = load_file(finished_run / "gallery" / "videos.safetensors")
    branches = load_file(finished_run / "branches" / "branches.safetensors")
    long = max(gallery, key=lambda key: len(gallery[key]))
    frames = len(gallery[long])
    for frame in (0, 17, frames - 1):
        seek(page, (frame + 0.5) / frames)
        for folder, videos, key in (("gallery", gallery, long), ("branches", branches, "group-0-3")):
            shown = frame % len(videos[key])  # shorter videos begin again
            assert np.array_equal(pixels(page, f"{folder}/{key}", str(shown)), videos[key][shown])


def test_every_screen_and_still_is_drawn(page):
    blank = page.run(
        """(async () => {
          document.querySelectorAll('[role=tab]')[1].click();
          document.querySelectorAll('.group-panel').forEach((panel) => { panel.hidden = false; });
          const blank = [];
          for (const canvas of document.querySelectorAll('canvas')) {
            canvas.scrollIntoView({block: 'center', behavior: 'instant'});
            let tries = 0;
            while (new Set(READ(canvas)).size < 8 && tries++ < 200) {
              await new Promise((done) => setTimeout(done, 10));
            }
            if (tries > 200) blank.push(canvas.dataset.clip);
          }
          return blank;
        })()""".replace("READ", f"({READ})")
    )
    assert blank == []


def test_captions_and_segments_follow_the_frame(page, hostile_run):
    entries = json.loads((hostile_run / "gallery" / "gallery.json").read_text())
    place = next(n for n, entry in enumerate(entries) if len(entry["prompt_segments"]) == 3)
    entry, card = entries[place], f"document.querySelectorAll('#gallery-cards .film')[{place}]"
    edges = [0, *entry["switches"], entry["num_frames"]]
    for segment, text in enumerate(entry["prompt_segments"]):
        seek(page, (edges[segment] + 1.5) / entry["num_frames"])
        page.wait_for(f"{card}.querySelectorAll('.part')[{segment}].classList.contains('now')")
        assert text in page.run(f"{card}.querySelector('.captions .now').textContent")
        assert page.run(f"{card}.querySelectorAll('.captions .now').length") == 1


def test_playing_moves_time_and_pausing_stops_it(page):
    page.run("document.getElementById('videos').scrollIntoView({behavior: 'instant'})")
    page.run("document.getElementById('play').click()")
    before = page.run("Number(document.getElementById('scrub').value)")
    page.wait_for(f"Number(document.getElementById('scrub').value) > {before} + 20")
    page.run("document.getElementById('play').click()")
    stopped = page.run("Number(document.getElementById('scrub').value)")
    time.sleep(0.2)
    assert page.run("Number(document.getElementById('scrub').value)") == stopped
    assert page.run("getComputedStyle(document.querySelector('.transport')).visibility") == "visible"


def test_space_scrolls_where_no_video_is_in_sight(page):
    pressed = "new KeyboardEvent('keydown', {key: ' ', bubbles: true, cancelable: true})"
    playing = "document.getElementById('play').classList.contains('playing')"
    for place, taken in (("reproduce", False), ("videos", True)):
        page.run(f"document.getElementById('{place}').scrollIntoView({{behavior: 'instant'}})")
        page.wait_for(
            f"document.querySelector('.transport').classList.contains('away') !== {str(taken).lower()}"
        )
        assert page.run(f"document.body.dispatchEvent({pressed})") is not taken
        assert page.run(playing) is taken


def test_branches_sort_with_the_anchor_first_and_tabs_switch(page):
    members = "[...document.querySelectorAll('#group-0-members .member')]"
    for key, descending in (("reward", True), ("advantage", True), ("energy", False)):
        sort = key if descending else f"-{key}"
        page.run(
            "(() => { const s = document.querySelector('[data-sort=group-0-members]');"
            f" s.value = '{sort}'; s.dispatchEvent(new Event('change')); }})()"
        )
        assert page.run(f"{members}[0].querySelector('h4').textContent") == "anchor"
        shown = page.run(f"{members}.slice(1).map((m) => m.dataset.{key})")
        found = [float(text) for text in shown if text]
        assert found == sorted(found, reverse=descending) and len(shown) == 4
        assert shown[len(found) :] == [""] * (4 - len(found)), "branches that were not trained on come last"
    assert page.run("document.getElementById('group-1').hidden") is True
    page.run("document.querySelectorAll('[role=tab]')[1].click()")
    assert page.run("document.getElementById('group-1').hidden") is False
    assert page.run("document.getElementById('group-0').hidden") is True


def test_difference_to_the_anchor_and_jump_to_the_fork(page, finished_run):
    branches = load_file(finished_run / "branches" / "branches.safetensors")
    group = json.loads((finished_run / "branches" / "branches.json").read_text())["groups"][0]
    stories = json.loads((finished_run / "gallery" / "gallery.json").read_text())
    page.run("document.querySelector('#group-0 [data-difference]').click()")
    fork = group["fork_frame"]
    assert len(branches["group-0-0"]) == group["num_frames"]
    frame = fork + 2
    seek(page, (frame + 0.5) / max(entry["num_frames"] for entry in stories))
    anchor, branch = (branches[m["video"]][frame].astype(int) for m in group["members"][:2])
    shown = pixels(page, f"branches/{group['members'][1]['video']}", f"{frame} minus anchor")
    assert np.array_equal(shown, np.abs(anchor - branch)) and shown.any()
    page.run("document.querySelector('#group-0 [data-seek]').click()")
    page.wait_for(f"document.getElementById('position').textContent.startsWith('{fork / 8:.1f}')")


def test_charts_answer_the_pointer(page, finished_run):
    last = lines_of(finished_run, "validation")[-1]
    x, y = page.run(
        """(() => {
          const plot = document.querySelector('.plot');
          plot.scrollIntoView({block: 'center', behavior: 'instant'});
          const box = plot.getBoundingClientRect();
          return [box.left + box.width * 0.99, box.top + box.height / 2];
        })()"""
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
    page.wait_for("!document.querySelector('.tip').hidden")
    text = page.run("document.querySelector('.tip').textContent")
    assert f"update {last['update']}" in text and f"base  {compact(last['short']['base_mean'])}" in text


@pytest.mark.parametrize(("width", "phone"), [(1280, False), (390, True), (320, True)])
@pytest.mark.parametrize("dark", [False, True])
def test_the_page_fits_and_follows_the_colour_scheme(page, tmp_path, width, phone, dark):
    page.resize(width, 800, dark=dark, phone=phone)
    assert page.run("document.documentElement.scrollWidth") <= width
    red = int(page.run("getComputedStyle(document.body).backgroundColor").split("(")[1].split(",")[0])
    assert (red < 60) == dark
    page.screenshot(tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.parametrize("width", [768, 390])
def test_long_words_and_numbers_stay_inside_their_cards(browser, finished_run, tmp_path, width):
    run = copy_of(finished_run, tmp_path / "words")
    long = "Donaudampfschifffahrtsgesellschaft" * 4
    edit_json(run / "branches" / "branches.json", lambda b: [g.update(title=long) for g in b["groups"]] and b)
    edit_metrics(run, lambda line: line.update(seconds=0.00125 + 1e-4 * line.get("update", 0)))
    browser.resize(width, 800, phone=width < 700)
    browser.open(write_report(run).as_uri())
    assert browser.run("document.documentElement.scrollWidth") <= width
    beyond = """[...document.querySelectorAll('.small .y')].filter((label) =>
        label.getBoundingClientRect().left < label.closest('.card').getBoundingClientRect().left)"""
    assert browser.run(f"{beyond}.map((label) => label.textContent)") == []
    heights = "[...document.querySelectorAll('#accuracy td')].map((td) => td.getBoundingClientRect().height)"
    assert max(browser.run(heights)) < 40, "no share is broken before its per cent sign"


def test_larger_videos_play_as_h264_in_step(browser, finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "large")
    enlarge(run, 4, 8)
    shutil.rmtree(run / "branches")
    browser.errors.clear()
    browser.resize(1280, 900)
    browser.open(write_report(run).as_uri())
    pause(browser)
    seek(browser, 0.7)
    browser.run("document.getElementById('videos').scrollIntoView({behavior: 'instant'})")
    ready = "[...document.querySelectorAll('#gallery-cards video')].slice(0, 4)"
    browser.wait_for(f"{ready}.every((v) => v.readyState >= 2 && !v.seeking && v.currentTime > 0.3)")
    assert browser.run(f"{ready}.map((v) => [v.videoWidth, v.videoHeight])") == [[4 * FRAME_SIZE] * 2] * 4
    times = browser.run(f"{ready}.map((v) => v.currentTime)")
    assert max(times) - min(times) < 1e-3 and times[0] == pytest.approx(0.7 * 8 / 16, abs=0.5 / 16)
    assert browser.run(f"new Set(({READ})({ready}[0])).size") > 8
    assert browser.errors == []
