"""Formatting, charts and the verdict: what the page says of a number."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvpo.report.charts import Series, line_chart, paired_bars, ticks, value_range
from kvpo.report.formatting import (
    attribute_json,
    compact,
    duration,
    embed_json,
    escape,
    fixed,
    number,
    percent,
    signed,
    significant,
)
from kvpo.report.headline import NO_NULL, Outcome, headline_on, read_outcome
from kvpo.report.null_runs import read_null

FINITE = st.floats(-1e6, 1e6, allow_nan=False)


@settings(max_examples=40)
@given(st.recursive(st.none() | st.booleans() | st.text() | FINITE, lambda s: st.lists(s), max_leaves=8))
def test_embedded_json_cannot_leave_its_element_and_reads_back(value):
    text = embed_json(value)
    assert "<" not in text
    assert json.loads(text) == value
    assert not set('<>"') & set(attribute_json(value))


def test_numbers_are_words_a_reader_expects():
    assert (signed(0.1234), signed(-0.1234), signed(-0.00001)) == ("+0.123", "\u22120.123", "0.000")
    assert (fixed(-0.00001), fixed(None), fixed(1.0, 1)) == ("0.000", "n/a", "1.0")
    assert (compact(0.0), compact(0.0123), compact(1e-7), compact(-2.5e9)) == (
        "0",
        "0.0123",
        "1e-7",
        "\u22122.5e9",
    )
    assert (significant(0.02), significant(123.4), significant(0.0)) == ("0.0200", "123", "0")
    assert [percent(v) for v in (0.75, 0.031, -0.2, None)] == ["75 %", "3.1 %", "\u221220 %", "n/a"]
    assert (duration(4.25), duration(312.4), duration(11045)) == ("4.2 s", "5 min 12 s", "3 h 04 min")
    assert embed_json({"a": [math.nan, 1.5, -math.inf]}) == '{"a":[null,1.5,null]}'
    assert [number(v) for v in (True, "1", None, math.nan, 3)] == [None, None, None, None, 3.0]
    assert escape('<a href="x">&\'') == "&lt;a href=&quot;x&quot;&gt;&amp;&#x27;"


@given(FINITE, st.floats(1e-6, 1e6))
def test_ticks_are_round_few_and_inside(low, width):
    high = low + width
    found = ticks(low, high)
    slack = 1e-6 * max(abs(low), abs(high), width)
    assert 1 <= len(found) <= 6
    assert all(low - slack <= tick <= high + slack for tick in found)
    assert found == sorted(set(found))


@given(st.lists(FINITE, min_size=1, max_size=20))
@example([5e-324])
def test_value_range_holds_every_value_and_has_a_height(values):
    low, high = value_range(values)
    assert low < high
    assert low <= min(values) and max(values) <= high


def test_line_chart_draws_gaps_lone_points_and_bands():
    series = Series("aligned", [0.1, None, 0.3, 0.4], "aligned", spread=[0.01, None, 0.02, None])
    chart = line_chart([0, 10, 20, 30], [series], label="reward", references=[("clip", 0.9)])
    assert chart.count('class="line aligned"') == 1  # only 20 to 30 are neighbours
    assert chart.count('class="dot aligned"') == 3
    assert chart.count('class="band aligned"') == 2
    assert "clip" in chart and 'class="reference"' in chart
    coordinates = [
        float(v) for path in re.findall(r'd="([^"]*)"', chart) for v in re.findall(r"[\d.]+", path)
    ]
    assert all(-1e-6 <= value <= 100 + 1e-6 for value in coordinates)
    short = line_chart([1, 2], [Series("x", [0.1, 0.2], "plain")], label="x")
    assert re.findall(r'class="x"[^>]*>([^<]+)', short) == ["1", "2"], "there is no update 1.5"
    assert "no finite values" in line_chart([1, 2], [Series("x", [None, None], "plain")], label="x")


def test_components_are_sorted_by_gain_with_escaped_names():
    bars = paired_bars([("worse", 0.5, 0.4, None), ("<best>", 0.2, 0.6, 0.01), ("same", 0.3, 0.3, None)])
    names = re.findall(r'class="name">([^<]*)<', bars)
    assert names == ["&lt;best&gt;", "same", "worse"]
    assert "+0.400" in bars and "\u22120.100" in bars and "\u00b1 0.010" in bars


def outcome(gain: float, error: float | None = 0.01, *, name: str = "short", unseen: float = 0.0) -> Outcome:
    return Outcome(name, 128, 0.5, 0.5 + gain, gain, error, 0.7, unseen, 0.01, None, None, {})


def test_a_clear_gain_is_called_one():
    verdict = headline_on([outcome(0.1), outcome(0.05, name="long")])
    assert verdict.tone == "good" and verdict.notes == (NO_NULL,)
    assert verdict.sentence == (
        "Alignment raised the held-out reward: +0.100 \u00b1 0.010 on short videos and "
        "+0.050 \u00b1 0.010 on long videos."
    )


@pytest.mark.parametrize("gain", [0.0299, 0.0, -0.0299])
def test_a_change_under_three_standard_errors_is_never_called_one(gain):
    verdict = headline_on([outcome(gain)])
    assert verdict.tone == "neutral"
    assert "These results cannot tell whether" in verdict.sentence and "fewer than 3)" in verdict.sentence
    assert "raised" not in verdict.sentence and "lowered" not in verdict.sentence


@pytest.mark.parametrize("prompts", [2, 15, None])
def test_a_change_on_few_prompts_is_never_called_one(prompts):
    for gain in (0.1, -0.1):
        verdict = headline_on([replace(outcome(gain), prompts=prompts)])
        assert verdict.tone == "neutral" and "distinct prompts, fewer than 16" in verdict.sentence
        assert "raised" not in verdict.sentence and "lowered" not in verdict.sentence
    assert headline_on([replace(outcome(0.1), prompts=16)]).tone == "good"


def test_mixed_worse_and_unknown_results_are_said_plainly():
    mixed = headline_on([outcome(0.1), outcome(0.01, name="long")])
    assert mixed.tone == "neutral"
    assert (
        "raised" in mixed.sentence
        and "cannot tell whether alignment changed the held-out reward: +0.010" in mixed.sentence
    )
    worse = headline_on([outcome(0.1), outcome(-0.05, name="long")])
    assert worse.tone == "bad" and "lowered the held-out reward: \u22120.050" in worse.sentence
    for error in (None, 0.0):
        unknown = headline_on([outcome(0.1, error)])
        assert unknown.tone == "neutral" and "no standard error" in unknown.sentence
    assert headline_on([]).tone == "pending"


def test_reservations_follow_the_verdict():
    control = headline_on([outcome(0.1)], null_control=True)
    assert control.tone == "neutral" and "null control" in control.notes[0]
    unfinished = headline_on([outcome(0.1)], validation=True)
    assert unfinished.tone == "pending" and "not finished" in unfinished.notes[0]
    hacked = headline_on([outcome(0.1, unseen=-0.05)])
    assert "unseen scorer fell by 0.050" in hacked.notes[1]
    assert headline_on([outcome(0.1, unseen=-0.029)]).notes == (NO_NULL,), "under three standard errors"
    assert headline_on([replace(outcome(0.1, unseen=-0.05), prompts=8)]).notes == (NO_NULL,)


def test_a_gain_says_its_place_among_null_runs_and_both_errors():
    above = headline_on([replace(outcome(0.1), null=(-0.01, 0.0, 0.04))])
    assert above.tone == "good" and not above.notes
    assert above.sentence == (
        "Alignment raised the held-out reward: +0.100 \u00b1 0.010 on short videos (3 null runs: "
        "+0.010 \u00b1 0.026 over seeds, the best +0.040)."
    )
    inside = headline_on([replace(outcome(0.1), null=(-0.01, 0.11))])
    assert inside.tone == "neutral" and "inside the range of the null runs" in inside.sentence
    below = headline_on([replace(outcome(-0.1), null=(-0.05, 0.11))])
    assert below.tone == "bad"
    less = headline_on([replace(outcome(0.1), null=(0.2, 0.3))])
    assert less.tone == "neutral" and "below every null run" in less.sentence
    more = headline_on([replace(outcome(-0.1), null=(-0.3, -0.2))])
    assert more.tone == "neutral" and "above every null run" in more.sentence
    mixed = headline_on([replace(outcome(0.1), null=(0.0,)), outcome(0.1, name="long")])
    assert mixed.notes == (NO_NULL,), "of one set none are known"


def null_file(path: Path, **settings: object) -> Path:
    """Two null runs of a configuration of two settings."""
    own = {"preset": "demo", "seed": 7, "optim": {"updates": 40, "lr": 0.001}, **settings}
    own = {"objective": {"advantages": "random"}, **own}
    runs = [{"seed": n, "short": n / 100, "long": -n / 100} for n in range(2)]
    path.write_text(json.dumps({"commit": "abc", "settings": own, "runs": runs}))
    return path


def test_null_runs_of_other_settings_are_refused(tmp_path):
    config = {"preset": "mine", "seed": 0, "optim": {"updates": 40, "lr": 0.001}}
    path = null_file(tmp_path / "null.json")
    assert read_null(path, config) == {"short": [0.0, 0.01], "long": [0.0, -0.01]}
    newer = config | {"optim": {**config["optim"], "autocast": "none"}}  # a setting that those runs had not
    assert read_null(path, newer) == read_null(path, config)
    batched = {
        "exploration": {"rows": 1},
        "optim": {**config["optim"], "replay_rows": 4},
    }  # of rounding alone
    assert read_null(path, config | batched) == read_null(path, config)
    newer["optim"]["autocast"] = "bfloat16"
    with pytest.raises(ValueError, match="have optim.autocast none, this one bfloat16"):
        read_null(path, newer)
    with pytest.raises(ValueError, match=r"null.json have optim.updates 40, this one 20: gains of other"):
        read_null(path, config | {"optim": {"updates": 20, "lr": 0.001}})
    with pytest.raises(ValueError, match=r"have method nft, this one kvpo"):
        read_null(null_file(path, method="nft"), config)
    with pytest.raises(ValueError, match="were not dealt at random: they may have learned"):
        read_null(null_file(path, objective={"advantages": "group"}), config)
    for broken in ({}, {"runs": []}, {"settings": {}, "runs": [{"short": 0.1}, {"long": 0.1}]}, []):
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match="holds no gains of null runs"):
            read_null(path, config)


def test_outcomes_survive_nonsense():
    entry = {
        "paired_gain": 0.1,
        "paired_se": math.nan,
        "unseen_scorer_gain": 0.2,
        "components": {"a": {"base": 1}},
    }
    found = read_outcome("short", entry)
    assert found is not None
    assert (found.unseen_gain, found.standard_error, found.components) == (0.2, None, {})
    assert read_outcome("short", {"base_mean": 0.4}) is None
    assert read_outcome("short", "text") is None
