"""Exactness checks, diversity of branching, configuration and reproduction."""

import shlex
from typing import Any

import yaml

from kvpo.files import counted
from kvpo.report.elements import explained, table_card
from kvpo.report.formatting import compact, escape, fixed, mapping, number, numbers, percent, signed, title_of
from kvpo.report.headline import FEWEST_PROMPTS
from kvpo.report.record import RunRecord, method_of

CHECKS = {
    "first_ratio_max_deviation": (
        "First ratio",
        "Largest deviation from 1 of the branch ratio between training's replay in batches and the same "
        "branches streamed one row, block and solver step at a time. Rounding alone may show.",
    ),
    "anchor_energy_at_old": (
        "Anchor energy",
        "Largest difference, at any solver step, between the velocities that the rollout of the unrouted "
        "anchor stored and its replay at the same weights.",
    ),
    "default_route_max_difference": (
        "Default route",
        "Largest pixel or latent difference between the all-recent route and plain generation.",
    ),
}
DIVERSITY = {
    "attribute_diversity": (
        "What happens differs",
        "branch pairs whose detected attributes differ, share",
        1,
    ),
    "pixel_distance": ("Pixels differ", "mean distance between branches in the explored frames", 0),
    "broken_share": ("Broken frames", "detector confidence under the 1st percentile of clean renders", -1),
    "reward_std": ("Reward spread", "standard deviation of the reward over branches", 1),
    "strength": ("Strength of the noise", "1 is fresh noise", 0),
}
BRANCHINGS = {
    "chr": "Routed history (CHR)",
    "noise": "Fresh noise",
    "noise_matched": "Noise at the same pixel distance",
}


def checks(run: RunRecord) -> str:
    """Numbers that must be zero: exactly or, for the first ratio, up to rounding."""
    found, checked = mapping(run.summary, "checks"), mapping(run.summary, "checked")
    if not found:
        return '<p class="missing">Exactness checks are in summary.json, which has not been written yet.</p>'
    tolerance = number(numbers(checked).get("ratio_tolerance")) or 0.0
    precision = mapping(run.config, "optim").get("rollout_precision", "same")
    rows = []
    for key in [*CHECKS, *(key for key in found if key not in CHECKS)]:
        name, meaning = CHECKS.get(key, (title_of(key), ""))
        value = number(found.get(key))
        if value is None:
            tone, word = "neutral", "not measured" if key not in found else "not finite"
        else:
            within = key == "first_ratio_max_deviation" and value <= tolerance
            tone, word = ("good", "exact") if value == 0 else ("bad", "not exact")
            if value and within:
                tone, word = "good", f"exact to {compact(tolerance)}"
            elif value and key == "anchor_energy_at_old" and precision != "same":
                tone, word = "neutral", f"rounding of {escape(precision)}"
        rows.append((explained(name, meaning), compact(value), f'<span class="badge {tone}">{word}</span>'))
    weight = method_of(run) == "kvpo" and numbers(run.config.get("kvpo")).get("anchor_state_weight")
    note = (
        '<p class="note">This run uses the anchor-state energy, which is not zero at the old weights.</p>'
        if weight
        else ""
    )
    if checked:
        place = f"the {checked.get('weights')} weights of update {compact(number(checked.get('update')))}"
        note += f'<p class="note">Measured with {escape(place)}, those of the test results.</p>'
    return table_card(("must be 0", "measured", ""), rows, "checks") + note


def accuracy(run: RunRecord) -> str:
    """Shares of demands met before and after, by kind of demand, with the number of demands."""
    rows = [
        (
            escape(title_of(str(name))),
            escape(kind),
            f"{found['n']:.0f}",
            percent(found["base"]),
            percent(found["aligned"]),
            signed(found["aligned"] - found["base"]),
        )
        for kind, entry in mapping(run.summary, "held_out").items()
        for name, value in mapping(entry, "accuracy").items()
        if {"n", "base", "aligned"} <= (found := numbers(value)).keys()
    ]
    if not rows:
        return '<p class="missing">Only tests in the embedded world say what is right or wrong.</p>'
    return table_card(("", "videos", "demands", "base", "aligned", "change"), rows, "shares") + (
        '<p class="note">A demand of a caption is met if the most likely reading of its segment says so. An '
        "event is met if everything that its caption says about it is: who returns, the scene that is "
        "returned to, the new colour, who stays.</p>"
    )


def _diversity_sentence(methods: dict[str, dict[str, float]], forks: float) -> str:
    """Compare routed branches with noise that changes the pixels as much, if there are enough forks."""
    routed, noise = methods.get("chr", {}), methods.get("noise_matched", {})
    parts = []
    if noise.get("attribute_diversity") and "attribute_diversity" in routed:
        ratio = routed["attribute_diversity"] / noise["attribute_diversity"]
        parts.append(f"routing history changes what happens {ratio:.2f} times as often as such noise does")
    if {"broken_share"} <= routed.keys() & noise.keys():
        difference = routed["broken_share"] - noise["broken_share"]
        word = "fewer" if difference < 0 else "more" if difference > 0 else "equally many"
        parts.append(f"with {word} broken frames")
    if not parts:
        return ""
    tried = counted(round(forks), "fork")
    if forks < FEWEST_PROMPTS:
        return f'<p class="reading">{tried}: too few to draw a conclusion, which takes {FEWEST_PROMPTS}.</p>'
    return f'<p class="reading">On {tried} of this run, {", ".join(parts)}.</p>'


def diversity(run: RunRecord) -> str:
    """Compare branching by routed history with branching by noise."""
    found = mapping(run.summary, "diversity")
    methods = {str(key): own for key, value in found.items() if (own := numbers(value))}
    if not methods:
        return '<p class="missing">Branch diversity is in summary.json, which has not been written yet.</p>'
    # A run measures diversity on at most as many long validation prompts as a sentence needs.
    forks = min(numbers(run.config.get("evaluation")).get("validation_prompts", 0.0), FEWEST_PROMPTS)
    keys = [*DIVERSITY, *dict.fromkeys(k for m in methods.values() for k in m if k not in DIVERSITY)]
    rows = []
    for key in keys:
        values = [methods[name].get(key) for name in methods]
        if all(value is None for value in values):
            continue
        name, meaning, sign = DIVERSITY.get(key, (title_of(key), "", 0))
        present = [value for value in values if value is not None]
        best = None
        if sign and len(present) > 1 and len(set(present)) > 1:
            best = max(present) if sign > 0 else min(present)
        cells = (f"<b>{fixed(v)}</b>" if best is not None and v == best else fixed(v) for v in values)
        rows.append((explained(name, meaning), *cells))
    head = ("", *(BRANCHINGS.get(name, title_of(name)) for name in methods))
    return (
        _diversity_sentence(methods, forks)
        + table_card(head, rows, "diversity")
        + '<p class="note">Bold: the better one, where there is a better. Broken frames can look diverse, so '
        "read the first row together with the third.</p>"
    )


def _value(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "empty"
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or "empty"
    return str(value)


def settings_tables(run: RunRecord) -> str:
    """The resolved configuration: one table per section, and the file itself."""
    if not run.config:
        return '<p class="missing">config.yaml could not be read.</p>'
    plain = {key: value for key, value in run.config.items() if not isinstance(value, dict)}
    sections = {"run": plain} | {key: v for key, v in run.config.items() if isinstance(v, dict) and v}
    tables = "".join(
        f'<details class="card" {"open" if name == "run" else ""}><summary>{escape(title_of(str(name)))}'
        f'<span class="soft">{len(section)}</span></summary><table class="settings"><tbody>'
        + "".join(
            f"<tr><th>{escape(key)}</th><td>{escape(_value(value))}</td></tr>"
            for key, value in section.items()
        )
        + "</tbody></table></details>"
        for name, section in sections.items()
    )
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    return (
        f'<div class="settings-grid">{tables}</div><details class="card raw"><summary>config.yaml</summary>'
        f'<pre id="config-text">{escape(text)}</pre></details>'
    )


def _command(identity: str, text: str) -> str:
    return (
        f'<div class="command"><pre id="{identity}">{escape(text)}</pre>'
        f'<button type="button" data-copy="{identity}">Copy</button></div>'
    )


def reproduction(run: RunRecord) -> str:
    """The commands that repeat this run and rebuild this page."""
    directory = shlex.quote(str(run.directory))
    command = f"kvpo align --config {shlex.quote(str(run.directory / 'config.yaml'))} --out {directory}-again"
    preset = run.config.get("preset")
    note = (
        f"<p>The saved configuration holds every value (preset <code>{escape(preset)}</code>, seed "
        f"<code>{escape(run.config.get('seed', 'n/a'))}</code>), so nothing else needs to be passed.</p>"
        if preset is not None
        else ""
    )
    rebuild = _command("page", f"kvpo report {directory}")
    return f"{note}{_command('again', command)}<p>Rebuild this page:</p>{rebuild}"
