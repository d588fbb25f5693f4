"""The page as text: what it holds for whole, half-finished and damaged runs."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser

import numpy as np
import pytest
from safetensors.numpy import save_file
from synthetic_run import CONFIG, HOSTILE, summary, write_run

from kvpo.report import write_report

VOID = {"meta", "input", "br", "img", "link", "hr"}
SVG_EMPTY = {"path"}


class Structure(HTMLParser):
    """Checks that elements nest, and collects them and the visible text."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag not in VOID and not (tag in SVG_EMPTY and self.get_starttag_text().endswith("/>")):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] not in ("script", "style"):
            self.text += data


def parse(text: str) -> Structure:
    structure = Structure()
    structure.feed(text)
    assert structure.open == []
    return structure


@pytest.fixture(scope="module")
def finished_page(finished_run) -> str:
    return (finished_run / "report.html").read_text()


@pytest.fixture
def bare_run(tmp_path):
    """The least that is a run: a configuration and no metrics yet."""
    (tmp_path / "config.yaml").write_text("preset: demo\nseed: 3\n")
    (tmp_path / "metrics.jsonl").write_text("")
    return tmp_path


def page_of(directory) -> tuple[str, Structure]:
    text = write_report(directory).read_text()
    return text, parse(text)


def test_a_finished_run_shows_every_section_and_misses_nothing(finished_run, finished_page):
    page = parse(finished_page)
    anchors = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert anchors >= {"headline", "curves", "components", "videos", "branches", "diagnostics"}
    assert anchors >= {"checks", "diversity", "configuration", "reproduce"}
    assert "missing from this page" not in page.text
    assert "Alignment raised the held-out reward: +0.111 \u00b1 0.012 on short videos" in page.text
    assert "9.2 standard errors from zero" in page.text  # 0.111 / 0.012
    assert "23 % of what was missing to 1" in page.text  # 0.111 / (1 - 0.512)
    assert "routing history changes what happens 0.70 times as often" in page.text  # 0.31 / 0.44
    assert page.text.count("exact") >= 3 and "not exact" not in page.text
    assert len(finished_page) < 15e6
    assert [path.name for path in finished_run.iterdir() if path.name.startswith(".report")] == []


def test_the_page_is_self_contained_and_its_policy_admits_only_its_script(finished_page):
    page = parse(finished_page)
    assert not re.search(r"https?://", finished_page)
    for tag, attributes in page.elements:
        assert tag not in ("link", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in attributes), (tag, attributes)
        assert "src" not in attributes
    policy = next(a["content"] for t, a in page.elements if a.get("http-equiv") == "Content-Security-Policy")
    script = finished_page.rsplit("<script>", 1)[1].split("</script>", 1)[0]
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_hostile_text_stays_text(tmp_path):
    run = write_run(tmp_path / "<b>run</b>", frames=6, updates=2)
    numbers = summary()
    numbers["held_out"]["short"]["components"][HOSTILE] = {"base": 0.1, "aligned": 0.2}
    numbers["diversity"][HOSTILE] = {HOSTILE: 0.5}
    numbers["checks"][HOSTILE] = 1.0
    (run / "summary.json").write_text(json.dumps(numbers))
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"kind": "update", "update": 3, HOSTILE: 1.0}) + "\n")
    (run / "config.yaml").write_text(json.dumps(CONFIG | {"preset": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}}))
    text, page = page_of(run)
    assert "<script>document" not in text.lower()
    assert text.count("<script") == 2 and text.count("</script") == 2
    assert sum(tag == "b" and not a for tag, a in page.elements) == text.count("<b>")
    assert "<b>run</b>" not in text and "<b>run</b>" in page.text
    assert page.text.count(HOSTILE) >= 10


def test_a_bare_run_says_what_is_missing(bare_run):
    _, page = page_of(bare_run)
    assert "no held-out result yet" in page.text
    for name in ("summary.json", "gallery/gallery.json", "branches/branches.json"):
        assert f"{name} is missing" in page.text
    assert "No update has been written" in page.text and "No validation has been written" in page.text


def test_an_unfinished_run_shows_validation_and_says_so(tmp_path):
    run = write_run(tmp_path / "run", frames=6, updates=20)
    (run / "summary.json").unlink()
    shutil.rmtree(run / "branches")
    _, page = page_of(run)
    assert "The run has not finished" in page.text and "validation prompts" in page.text
    assert "No branch groups have been saved" in page.text


@pytest.mark.parametrize("name", ["config.yaml", "metrics.jsonl"])
def test_a_directory_that_is_no_run_is_refused(bare_run, name):
    (bare_run / name).unlink()
    with pytest.raises(ValueError, match=rf"{re.escape(name)} is missing.*--out"):
        write_report(bare_run)
    assert not (bare_run / "report.html").exists()


def test_damaged_files_are_named_and_the_rest_is_shown(tmp_path):
    run = write_run(tmp_path / "run", frames=6, updates=12)
    content = (run / "gallery" / "videos.safetensors").read_bytes()
    (run / "gallery" / "videos.safetensors").write_bytes(content[: len(content) // 2])
    (run / "summary.json").write_text('{"held_out": {"short"')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('["no mapping"]\n{"kind": "update", "upd')
    groups = json.loads((run / "branches" / "branches.json").read_text())
    groups["groups"][0]["members"][2]["video"] = "nowhere"
    groups["groups"][0]["members"][3] = "no member"
    (run / "branches" / "branches.json").write_text(json.dumps(groups))
    _, page = page_of(run)
    assert "gallery/videos.safetensors cannot be read" in page.text
    assert "summary.json cannot be read" in page.text
    assert "metrics.jsonl: 2 unreadable line(s) skipped" in page.text
    assert "branches/branches.safetensors: no video 'nowhere'" in page.text
    assert page.text.count("not available") == 9  # eight gallery videos and one branch
    assert "branch 5" in page.text


def test_videos_of_the_wrong_kind_are_named(tmp_path):
    run = write_run(tmp_path / "run", frames=6, updates=1)
    entry = {"title": "float", "prompt_segments": ["a"], "switches": [], "base": "x", "aligned": "x"}
    (run / "gallery" / "gallery.json").write_text(json.dumps([entry, "no entry"]))
    save_file({"x": np.zeros((2, 8, 8, 3), np.float32)}, run / "gallery" / "videos.safetensors")
    _, page = page_of(run)
    assert "x: expected uint8 [T, H, W, 3]" in page.text and "float32" in page.text


@pytest.mark.parametrize("content", ["[1, 2]", "null", "3", '"text"', '{"held_out": 3, "checks": [1]}', "{}"])
def test_nonsense_of_valid_json_never_breaks_the_page(tmp_path, content):
    run = write_run(tmp_path / "run", frames=6, updates=1)
    for name in ("summary.json", "gallery/gallery.json", "branches/branches.json"):
        (run / name).write_text(content)
    (run / "config.yaml").write_text(content)
    _, page = page_of(run)
    assert "validation prompts" in page.text


def test_unknown_metrics_are_plotted_and_non_finite_ones_flagged(bare_run):
    lines = [
        {
            "kind": "update",
            "update": u,
            "loss": 0.1 * u if u < 3 else math.nan,
            "my_new_number": u,
            "note": "x",
        }
        for u in (1, 2, 3)
    ]
    (bare_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, page = page_of(bare_run)
    other = page.text.split("Other", 1)[1]
    assert "My new number" in other and "Note" not in page.text
    assert "1 not finite" in page.text


def test_after_a_resume_the_last_line_of_an_update_counts(bare_run):
    lines = [
        {"kind": "update", "update": u, "seconds": s} for u, s in ((1, 5.5), (2, 7.5), (3, 8.5), (2, 6.5))
    ]
    (bare_run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    _, page = page_of(bare_run)
    chart = next(
        json.loads(a["data-chart"]) for _, a in page.elements if a.get("aria-label") == "Seconds per update"
    )
    assert chart["x"] == [1, 2, 3]
    assert chart["series"][0]["y"] == [5.5, 6.5, 8.5]


def test_the_timeline_shows_sink_routes_recent_and_window(finished_page):
    page = parse(finished_page)
    titles = [a["title"] for tag, a in page.elements if tag == "i" and a.get("title")]
    assert "sink: frames 0 to 2" in titles
    assert "recent: frames 12 to 17" in titles  # anchor: window 12 - sink 3 - block 3 = 6 past frames
    assert "recent: frames 15 to 17" in titles  # branches keep 3
    assert "window: frames 18 to 23" in titles
    assert "routes are drawn from here: frames 3 to 14" in titles
    assert "routed: frame 4, 2 slot(s)" in titles
    assert any(title.startswith("donor: frame 9 of \u201cA <script>") for title in titles)


def test_a_check_that_is_not_exact_is_called_that(tmp_path):
    run = write_run(tmp_path / "run", frames=6, updates=1)
    numbers = summary(short=(0.01, 0.01))
    numbers["checks"] = {"first_ratio_max_deviation": 1e-7, "anchor_energy_at_old": None}
    (run / "summary.json").write_text(json.dumps(numbers))
    _, page = page_of(run)
    assert "not exact" in page.text and "not finite" in page.text and "not measured" in page.text
    assert "Not significant" in page.text


def test_videos_beyond_the_limit_are_counted(tmp_path, monkeypatch):
    run = write_run(tmp_path / "run", frames=6, updates=1)
    monkeypatch.setattr("kvpo.report.page.VIDEO_BUDGET", 20_000)
    text, page = page_of(run)
    assert re.search(r"\d+ video\(s\) were left out", page.text)
    assert len(text) < 20_000 + 250_000


def test_rewriting_replaces_the_page_and_importing_stays_light(bare_run):
    first = write_report(bare_run)
    (bare_run / "config.yaml").write_text("preset: other\n")
    assert write_report(str(bare_run)) == first and "other" in first.read_text()
    heavy = (
        "import kvpo.report, sys; print([m for m in ('numpy', 'av', 'torch', 'yaml') if m in sys.modules])"
    )
    found = subprocess.run([sys.executable, "-c", heavy], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_the_radar_says_what_rose_and_what_fell(finished_run, finished_page, bare_run):
    page = parse(finished_page)
    assert "radar" in {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert "while held-out fair judge \u22120.080 ± 0.011 since update 10." in page.text
    assert "This run was not allowed to stop for it." in page.text
    assert "The look of the videos has drifted: brightness." in page.text
    charts = [attributes.get("aria-label") for _, attributes in page.elements]
    names = ("Trained reward", "fair judge", HOSTILE, "Unseen scorer", "Brightness", "Motion")
    assert all(f"{name} over updates" in charts for name in names)
    assert "\u22120.52" in page.text  # brightness against the fair judge
    assert "No validation with a radar reading" in page_of(bare_run)[1].text


def test_the_radar_of_a_run_without_its_summary_says_that_it_stops(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "summary.json").unlink()
    with (run / "config.yaml").open("a") as file:
        file.write("evaluation:\n  stop_on_hacking: true\n")
    assert "The run stops here; its best checkpoint is still to be tested." in page_of(run)[1].text


@pytest.mark.parametrize("may_stop", [True, False])
def test_the_radar_says_why_a_checkpoint_was_not_kept(finished_run, tmp_path, may_stop):
    run = shutil.copytree(finished_run, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "validation":
            line["radar"] |= {"alarms": {}, "hacked": False, "fallen": ["fair judge"]}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with (run / "config.yaml").open("a") as file:
        file.write(f"evaluation:\n  stop_on_hacking: {str(may_stop).lower()}\n")
    assert ("has fallen is not kept as the best." in page_of(run)[1].text) == may_stop


def test_the_radar_says_what_was_done(finished_run, tmp_path):
    run = shutil.copytree(finished_run, tmp_path / "run")
    last = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    verdict = {"verdict": "trained up, fair judge down", "stopped_at": 50, "best": 20, "test": {}}
    (run / "summary.json").write_text(json.dumps(summary() | {"radar": verdict}))
    text = page_of(run)[1].text
    assert "Stopped after update 50. The best checkpoint is update 20." in text
    assert "The hacking radar stopped this run after update 50." in text

    for line in last:
        if line["kind"] == "validation":
            line["radar"] |= {"alarms": {}, "hacked": False, "held_out": {}, "verdict": "nothing to see"}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in last))
    (run / "summary.json").write_text(json.dumps(summary()))
    assert "Name some with evaluation.held_out" in page_of(run)[1].text


@pytest.mark.parametrize("damage", [None, [], {"trained": 3}, {"trained": {"gain": math.nan}}, {"drift": []}])
def test_a_damaged_radar_costs_the_page_nothing_else(finished_run, tmp_path, damage):
    run = shutil.copytree(finished_run, tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        if line["kind"] == "validation":
            line["radar"] = {**line["radar"], **damage} if isinstance(damage, dict) else damage
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "Reward while training" in page_of(run)[1].text
