"""The hacking radar on the page: what rose, what fell, and what was done about it."""

import math

import pytest
import yaml
from edits import edit_json, edit_metrics, lines_of
from pages import page_of

from kvpo.report.formatting import signed

HELD_OUT = "motion_smoothness"
WORDS = (
    "trained reward +0.090 \u00b1 0.010 while watcher motion_smoothness -0.080 \u00b1 0.011 since update 1"
)


def hack(run, **radar):
    """Make the radar of every validation say that the run is being hacked, or something else."""
    hacked = {
        "verdict": WORDS,
        "alarms": {HELD_OUT: {"since": 1}},
        "in_a_row": 3,
        "hacked": True,
        "drifted": ["brightness"],
    }
    edit_metrics(run, lambda line: "radar" in line and line["radar"].update(hacked | radar))
    edit_json(run / "summary.json", lambda s: s["radar"].update(verdict="", test={}, stopped_at=None))


def let_stop(run, may_stop):
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["evaluation"]["stop_on_hacking"] = may_stop
    (run / "config.yaml").write_text(yaml.safe_dump(config))


def test_the_radar_says_what_rose_and_what_fell(run, bare_run):
    hack(run)
    let_stop(run, False)
    page = page_of(run)[1]
    assert "radar" in {attributes.get("id") for tag, attributes in page.elements if tag == "section"}
    assert "while watcher motion_smoothness \u22120.080 \u00b1 0.011 since update 1." in page.text
    assert "This run was not allowed to stop for it." in page.text
    assert "The look of the videos has drifted: brightness." in page.text
    charts = [attributes.get("aria-label") for _, attributes in page.elements]
    names = ("Trained reward", HELD_OUT, "Unseen scorer", "Brightness", "Motion")
    assert all(f"{name} over updates" in charts for name in names)
    agreement = lines_of(run, "validation")[-1]["radar"]["agreement"]["colour"][HELD_OUT]
    assert agreement is None or f">{signed(agreement, 2)}<" in page_of(run)[0]
    assert "No validation with a radar reading" in page_of(bare_run)[1].text


def test_no_alarm_on_few_prompts_is_no_tick(run):
    def section():
        return page_of(run)[0].split('<section id="radar">', 1)[1].split("<section", 1)[0]

    hack(run, alarms={}, hacked=False, fallen=[])
    assert "No alarm, which means little on 4 prompts, fewer than 16." in section()
    assert 'class="verdict neutral"' in section()
    edit_metrics(run, lambda line: line["kind"] == "validation" and line["long"].update(prompts=14))
    assert 'class="verdict good"' in section() and "means little" not in section()


def test_the_radar_of_a_run_without_its_summary_says_that_it_stops(run):
    hack(run)
    let_stop(run, True)
    (run / "summary.json").unlink()
    assert "The run stops here; its best checkpoint is still to be tested." in page_of(run)[1].text


@pytest.mark.parametrize("may_stop", [True, False])
def test_the_radar_says_why_a_checkpoint_was_not_kept(run, may_stop):
    hack(run, alarms={}, hacked=False, fallen=[HELD_OUT])
    let_stop(run, may_stop)
    assert ("has fallen is not kept as the best." in page_of(run)[1].text) == may_stop


def test_the_radar_says_what_was_done(run):
    hack(run)
    verdict = {"verdict": "trained up, fair judge down", "stopped_at": 50, "best": 20, "test": {}}
    edit_json(run / "summary.json", lambda numbers: numbers.update(radar=verdict))
    text = page_of(run)[1].text
    assert "Stopped after update 50. The best checkpoint is update 20." in text
    assert "The hacking radar stopped this run after update 50." in text

    hack(run, alarms={}, hacked=False, watchers={}, verdict="nothing to see")
    assert "Name some with evaluation.watchers" in page_of(run)[1].text


@pytest.mark.parametrize("damage", [None, [], {"trained": 3}, {"trained": {"gain": math.nan}}, {"drift": []}])
def test_a_damaged_radar_costs_the_page_nothing_else(run, damage):
    def spoil(line):
        if line["kind"] == "validation":
            line["radar"] = {**line["radar"], **damage} if isinstance(damage, dict) else damage

    edit_metrics(run, spoil)
    assert "Reward while training" in page_of(run)[1].text
