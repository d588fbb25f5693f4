"""The page as text: what it holds for whole, half-finished and damaged runs."""

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from edits import HOSTILE, copy_of, edit_json, edit_metrics, held_out, lines_of
from pages import page_of, parse
from safetensors.numpy import load_file, save_file

from kvpo.files import counted
from kvpo.method.methods import METHODS as METHODS_OF_TRAINING
from kvpo.report.curves import NOT_METRICS
from kvpo.report.formatting import escape, fixed, percent, signed, title_of
from kvpo.report.page import write_report
from kvpo.report.tables import BRANCHINGS, CHECKS, DIVERSITY


@pytest.fixture(scope="module")
def finished_page(finished_run) -> str:
    return (finished_run / "report.html").read_text()


def test_a_finished_run_shows_every_section_and_misses_nothing(finished_run, finished_page):
    page = parse(finished_page)
    anchors = {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert anchors >= {"headline", "curves", "components", "accuracy", "videos", "branches", "diagnostics"}
    assert anchors >= {"checks", "diversity", "configuration", "reproduce"}
    assert "missing from this page" not in page.text and "not available" not in page.text
    assert "have been saved" not in page.text and "has not been written" not in page.text
    numbers = json.loads((finished_run / "summary.json").read_text())
    short = numbers["held_out"]["short"]
    change = f"{signed(short['paired_gain'])} \u00b1 {fixed(short['paired_se'])} on short videos"
    assert f"{change} (2 distinct prompts, fewer than 16)" in page.text
    assert page.text.count("exact") >= 3 and "not exact" not in page.text
    assert len(finished_page) < 15e6
    assert [path.name for path in finished_run.iterdir() if path.name.startswith(".report")] == []


def test_every_number_that_the_page_explains_is_one_that_runs_write(finished_run):
    """Names are all that joins the run and these tables of the page."""
    numbers = json.loads((finished_run / "summary.json").read_text())
    assert set(BRANCHINGS) == set(numbers["diversity"]) and set(CHECKS) == set(numbers["checks"])
    assert set(DIVERSITY) == {key for method in numbers["diversity"].values() for key in method}


def panels(page_text: str) -> dict[str, str]:
    """Title of every diagnostic -> the sentence under it."""
    section = page_text.split('<section id="diagnostics">', 1)[1].split("</section>", 1)[0]
    figure = r'<figure class="card small"><figcaption><h4>(.*?)</h4>.*?<p class="meaning">(.*?)</p>'
    return dict(re.findall(figure, section, re.DOTALL))


def written(run) -> set[str]:
    """Metrics in the update lines of a run."""
    return {key for line in lines_of(run, "update") for key in line} - NOT_METRICS


@pytest.mark.parametrize("method", ["kvpo", "nft"])
def test_every_metric_that_a_run_writes_has_a_meaning_and_a_panel(request, method):
    """Metrics of KVPO, and of another method, which the page cannot know."""
    run = request.getfixturevalue({"kvpo": "finished_run", "nft": "nft_run"}[method])
    meanings = json.loads((run / "meanings.json").read_text())
    explained = {name: text for metrics in meanings.values() for name, text in metrics.items()}
    assert sum(map(len, meanings.values())) == len(explained), "each under one heading"
    text = (run / "report.html").read_text()
    assert {name for name in written(run) if not explained.get(name)} == set()
    assert panels(text) == {escape(title_of(name)): escape(explained[name]) for name in written(run)}
    assert ">Other</h3>" not in text
    assert set(meanings["Method"]) == set(METHODS_OF_TRAINING[method].metrics) <= written(run)
    assert f"\u00b7 {method} \u00b7 kvpo report</title>" in text


def test_the_explorer_calls_residuals_as_the_method_does(finished_run, nft_run):
    names = {"energy", "distance", "residual"}
    for run, name in ((finished_run, "energy"), (nft_run, "residual")):
        record = json.loads((run / "branches" / "branches.json").read_text())
        found = {key for group in record["groups"] for member in group["members"] for key in member}
        assert found & names == {name}
        page = parse((run / "report.html").read_text())
        options = {a["value"].lstrip("-") for tag, a in page.elements if tag == "option"}
        assert options & names == {name}
        assert ("probability" in options) == (name == "energy"), "NFT defines no branch probabilities"


def test_a_run_without_meanings_still_shows_every_metric(run):
    (run / "meanings.json").unlink()
    text, page = page_of(run)
    assert "meanings.json is missing" in page.text
    assert panels(text) == {escape(title_of(name)): "" for name in written(run)}


def test_what_a_run_cannot_tell_is_no_success(run_and_console, finished_page):
    """Two prompts: headline, summary and console claim nothing, whatever the numbers are."""
    finished_run, console = run_and_console
    said = "These results cannot tell whether alignment changed the held-out reward"
    assert said in parse(finished_page).text
    assert 'class="verdict good"' not in finished_page.split('id="curves"', 1)[0]
    assert json.loads((finished_run / "summary.json").read_text())["verdict"].startswith(said)
    assert [line for line in console if "held-out reward" in line][-1].startswith(said)
    assert "What improved" not in finished_page


def test_what_was_asked_and_shown_is_listed_with_its_number(finished_run, finished_page):
    section = finished_page.split('<section id="accuracy">', 1)[1].split("</section>", 1)[0]
    for name, entry in json.loads((finished_run / "summary.json").read_text())["held_out"].items():
        assert {"colour", "shape", "motion", "count", "scene"} <= entry["accuracy"].keys()
        for found in entry["accuracy"].values():
            assert f"<td>{name}</td><td>{found['n']}</td><td>{percent(found['base'])}</td>" in section


def test_null_runs_stand_beside_the_gain(run, tmp_path):
    held_out(run, paired_gain=0.111, paired_se=0.012, base_mean=0.512)
    assert "There are no null runs of these settings" in page_of(run)[1].text
    gains = [{"seed": seed, "short": 0.01 * seed, "long": 0.2} for seed in range(3)]
    settings = yaml.safe_load((run / "config.yaml").read_text())
    settings["objective"]["advantages"] = "random"
    path = tmp_path / "null.json"
    path.write_text(json.dumps({"settings": settings, "runs": gains}))
    page = parse(write_report(run, null=path).read_text()).text
    assert "(3 null runs: +0.010 \u00b1 0.010 over seeds, the best +0.020)" in page
    assert "on long videos (3 null runs" in page and "(inside the range of the null runs)" not in page
    assert "There are no null runs of these settings" not in page
    path.write_text(json.dumps({"settings": settings | {"method": "nft"}, "runs": gains}))
    with pytest.raises(ValueError, match="have method nft, this one kvpo"):
        write_report(run, null=path)


def test_a_clear_gain_on_enough_prompts_is_one(run):
    held_out(run, paired_gain=0.111, paired_se=0.012, base_mean=0.512)
    text, page = page_of(run)
    assert "Alignment raised the held-out reward: +0.111 \u00b1 0.012 on short videos" in page.text
    assert "9.2 standard errors from zero" in page.text and 'class="verdict good"' in text
    assert "23 % of what was missing to 1" in page.text  # 0.111 / (1 - 0.512)
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("  - world\n", "  - hpsv3\n"))
    assert "of what was missing" not in page_of(run)[1].text, "nothing ends that reward at 1"
    (run / "config.yaml").write_text(config)
    held_out(run, paired_gain=0.001, paired_se=0.001)
    text, page = page_of(run)
    assert "raised the held-out reward" not in page.text and "of what was missing" not in page.text
    assert "1.0 standard errors from zero, fewer than 3" in page.text


def test_routing_is_compared_with_noise_of_the_same_pixel_distance_on_enough_forks(run):
    def measured(summary):
        for name, value in (("chr", 0.31), ("noise", 0.9), ("noise_matched", 0.44)):
            summary["diversity"][name]["attribute_diversity"] = value

    edit_json(run / "summary.json", measured)
    assert "2 forks: too few to draw a conclusion, which takes 16." in page_of(run)[1].text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluation"]["validation_prompts"] = 16
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    assert "routing history changes what happens 0.70 times as often" in page_of(run)[1].text  # 0.31 / 0.44
    assert "Noise at the same pixel distance" in page_of(run)[1].text


def test_the_explorer_says_where_advantages_need_not_follow_the_reward(run):
    assert "need not follow the reward" in page_of(run)[0]
    config = run / "config.yaml"
    config.write_text(config.read_text().replace("fusion: advantages", "fusion: rewards"))
    assert "need not follow the reward" not in page_of(run)[0]


def test_the_explorer_shows_the_policy_that_trained(finished_run):
    """Temperature 0.01 over the best and the worst branch alone: softmax(-E / 0.01)."""
    record = json.loads((finished_run / "branches" / "branches.json").read_text())
    for group in record["groups"]:
        anchor, *branches = group["members"]
        assert anchor["name"] == "anchor" and "probability" not in anchor
        chosen = [m for m in branches if "probability" in m]
        advantages = [m["advantage"] for m in branches]
        assert sorted(m["advantage"] for m in chosen) == [min(advantages), max(advantages)]
        weights = [math.exp(-m["energy"] / 0.01) for m in chosen]
        for member, weight in zip(chosen, weights, strict=True):
            assert member["probability"] == pytest.approx(weight / sum(weights), rel=1e-4)


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


def test_hostile_text_stays_text(finished_run, tmp_path):
    run = copy_of(finished_run, tmp_path / "<b>run</b>")

    def in_summary(numbers):
        numbers["held_out"]["short"]["components"][HOSTILE] = {"base": 0.1, "aligned": 0.2}
        numbers["diversity"][HOSTILE] = {HOSTILE: 0.5}
        numbers["checks"][HOSTILE] = 1.0

    def in_branches(record):
        record["groups"][0] |= {"title": HOSTILE, "prompt_segments": [HOSTILE], "switches": []}
        member = record["groups"][0]["members"][1]
        member |= {"name": HOSTILE, "routed_frames": [{"frame": 9, "prompt": HOSTILE}]}

    edit_json(run / "summary.json", in_summary)
    edit_json(run / "branches" / "branches.json", in_branches)
    edit_json(
        run / "gallery" / "gallery.json",
        lambda entries: entries[0].update(title=HOSTILE, prompt_segments=[HOSTILE], switches=[]),
    )
    edit_metrics(run, lambda line: line.update({HOSTILE: 1.0}))
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(json.dumps(config | {"preset": HOSTILE, HOSTILE: {HOSTILE: HOSTILE}}))
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


def test_an_unfinished_run_shows_validation_and_says_so(run):
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


def test_damaged_files_are_named_and_the_rest_is_shown(run):
    pairs = len(json.loads((run / "gallery" / "gallery.json").read_text()))
    content = (run / "gallery" / "videos.safetensors").read_bytes()
    (run / "gallery" / "videos.safetensors").write_bytes(content[: len(content) // 2])
    (run / "summary.json").write_text('{"held_out": {"short"')
    with (run / "metrics.jsonl").open("a") as file:
        file.write('["no mapping"]\n{"kind": "update", "upd')

    def damage(record):
        record["groups"][0]["members"][2]["video"] = "nowhere"
        record["groups"][0]["members"][3] = "no member"

    edit_json(run / "branches" / "branches.json", damage)
    _, page = page_of(run)
    assert "gallery/videos.safetensors cannot be read" in page.text
    assert "summary.json cannot be read" in page.text
    assert "metrics.jsonl: 2 unreadable lines skipped" in page.text
    assert "branches/branches.safetensors: no video 'nowhere'" in page.text
    assert page.text.count("not available") == 2 * pairs + 1  # the gallery's videos and one branch
    assert "branch 4" in page.text


def test_videos_of_the_wrong_kind_are_named(run):
    edit_json(
        run / "gallery" / "gallery.json",
        lambda entries: [entries[0] | {"base": "x", "aligned": "x"}, "no entry"],
    )
    save_file({"x": np.zeros((2, 8, 8, 3), np.float32)}, run / "gallery" / "videos.safetensors")
    _, page = page_of(run)
    assert "x: expected uint8 [T, H, W, 3]" in page.text and "float32" in page.text


@pytest.mark.parametrize("content", ["[1, 2]", "null", "3", '"text"', '{"held_out": 3, "checks": [1]}', "{}"])
def test_nonsense_of_valid_json_never_breaks_the_page(run, content):
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
    chart = next(json.loads(a["data-chart"]) for _, a in page.elements if a.get("aria-label") == "Seconds")
    assert chart["x"] == [1, 2, 3]
    assert chart["series"][0]["y"] == [5.5, 6.5, 8.5]


def test_the_timeline_shows_sink_routes_recent_and_explored_frames(finished_run, finished_page):
    page = parse(finished_page)
    titles = [a["title"] for tag, a in page.elements if tag == "i" and a.get("title")]
    group = json.loads((finished_run / "branches" / "branches.json").read_text())["groups"][0]
    fork = group["fork_frame"]
    assert "sink: frames 0 to 2" in titles
    assert f"recent: frames {fork - 6} to {fork - 1}" in titles  # anchor: window 12 - sink 3 - block 3
    assert f"recent: frames {fork - 3} to {fork - 1}" in titles  # branches keep 3
    assert f"explored: frames {fork} to {fork + 5}" in titles
    assert f"routes are drawn from here: frames {max(3, fork - 30)} to {fork - 4}" in titles
    routed = group["members"][1]["routed_frames"]
    (own, *_), (donor, *_) = ([r for r in routed if isinstance(r, kind)] for kind in (int, dict))
    assert f"routed: frame {own}, {counted(routed.count(own), 'slot')}" in titles
    assert any(t.startswith(f"donor: frame {donor['frame']} of \u201c{donor['prompt']}") for t in titles)
    assert " " in donor["prompt"], "the donor's prompt, not its number"


def test_a_group_says_how_long_its_videos_are_and_no_more_than_they_show(finished_run):
    """One pixel frame per latent frame here: members may end before their prompt's video does."""
    record = json.loads((finished_run / "branches" / "branches.json").read_text())
    videos = load_file(finished_run / "branches" / "branches.safetensors")
    for group in record["groups"] + record["causality"]:
        assert {len(videos[member["video"]]) for member in group["members"]} == {group["num_frames"]}
        assert all(switch < group["num_frames"] for switch in group["switches"])
        assert len(group["prompt_segments"]) == len(group["switches"]) + 1


def test_the_page_says_who_is_back(run):
    """Beside who played in the acts before; without either it asks whether routing causes a difference."""

    def told(record):
        group = record["groups"].pop()
        group |= {"acts": ["red ring", "blue <cross>", "pink square"], "resident_frames": 0}
        for member, look in zip(group["members"], ["red ring", "blue <cross>", "red cross"], strict=False):
            member["shows"] = look
        record["causality"] = [group]

    edit_json(run / "branches" / "branches.json", told)
    text, page = page_of(run)
    assert "Who comes back?" in page.text and "blue <cross>" not in text
    assert "act 1 red ring, act 2 blue <cross>, act 3 pink square" in page.text
    for line in ("act 1's red ring", "act 2's blue <cross>", "of no act before: red cross"):
        assert line in page.text

    def not_told(record):
        del record["causality"][0]["acts"]

    edit_json(run / "branches" / "branches.json", not_told)
    assert "Does the routed history cause the difference?" in page_of(run)[1].text


def test_a_check_that_is_not_exact_is_called_that(run):
    checks = {"first_ratio_max_deviation": 1e-2, "anchor_energy_at_old": None}
    edit_json(run / "summary.json", lambda numbers: numbers.update(checks=checks))
    _, page = page_of(run)
    assert "not exact" in page.text and "not finite" in page.text and "not measured" in page.text


def test_an_anchor_energy_of_quantised_rollouts_is_called_their_rounding(run):
    checks = {
        "first_ratio_max_deviation": 0.0,
        "anchor_energy_at_old": 1e-4,
        "default_route_max_difference": 0,
    }
    edit_json(run / "summary.json", lambda numbers: numbers.update(checks=checks))
    assert "not exact" in page_of(run)[1].text
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["optim"]["rollout_precision"] = "int8"
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    text = page_of(run)[1].text
    assert "rounding of int8" in text and "not exact" not in text


def test_videos_beyond_the_limit_are_counted(run, monkeypatch):
    monkeypatch.setattr("kvpo.report.page.VIDEO_BUDGET", 20_000)
    text, page = page_of(run)
    assert re.search(r"\d+ videos? left out", page.text)
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
