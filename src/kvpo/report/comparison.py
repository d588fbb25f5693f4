"""The page and the picture of a comparison, from its ``summary.json``."""

import base64
from collections.abc import Sequence
from pathlib import Path

from kvpo.files import new_file, write_atomic
from kvpo.report.elements import table_card, verdict_box
from kvpo.report.formatting import compact, escape, fill_page, fixed, percent, signed, title_of
from kvpo.report.headline import LENGTHS
from kvpo.report.record import Entry

SETS = LENGTHS | {"beyond": "frames later than any that training scores"}
GAIN_COLUMNS = (
    "",
    "paired gain, ± over seeds",
    "each run",
    "± over prompts",
    "wrong caption",
    "unseen scorer",
    "gap closed",
    "against kvpo",
    "above null",
)
FEWEST_SEEDS = 5
"""Fewest runs per arm with which a difference can have p < .01."""
SURE = 0.01


def write_comparison(out: Path, summary: Entry) -> Path:
    """Write ``report.html`` and ``comparison.png`` into ``out`` and return the page's path."""
    picture, page = out / "comparison.png", out / "report.html"
    with new_file(picture) as file:
        draw_comparison(file, summary)
    write_atomic(page, comparison_page(out.resolve().name, summary, picture.read_bytes()))
    return page


def comparison_page(name: str, summary: Entry, picture: bytes) -> str:
    """The page as HTML text, with the PNG of ``draw_comparison`` in it."""
    sets = [key for key in SETS if key in summary["prompts"]]
    tone = "pending" if len(summary["seeds"]) < FEWEST_SEEDS else "neutral"
    return fill_page(
        "comparison.html",
        "",
        name=escape(name),
        verdict=verdict_box(tone, *verdict(summary)),
        picture=base64.b64encode(picture).decode(),
        tables="".join(_set_section(key, summary) for key in sets),
        components="".join(_components(key, summary) for key in sets),
        costs=_costs(summary),
        settings=_settings(summary),
        facts=_facts(summary),
    )


def verdict(summary: Entry) -> tuple[str, list[str]]:
    """The conclusion of a comparison in one sentence, and notes on its limits."""
    seeds, methods = len(summary["seeds"]), summary["methods"]
    notes = [
        f"{arm}: {len(errors)} of {seeds} runs ended with numbers that are not finite, so no p is given. "
        f"Seed {next(iter(errors))}: {next(iter(errors.values()))}"
        for arm, errors in summary["failed"].items()
    ]
    if seeds < FEWEST_SEEDS:
        word = {1: "One seed decides", 2: "Two seeds decide", 3: "Three seeds decide"}.get(
            seeds, f"{seeds} seeds decide"
        )
        return (
            f"{word} nothing: this is a rehearsal.",
            [
                *notes,
                f"Between arms of {seeds} run{'s' * (seeds > 1)} each no difference can have p below "
                f"{fixed(summary['least_p'], 2)}, however large; {FEWEST_SEEDS} or more seeds can tell. "
                "The numbers below say that everything works, and what it costs.",
            ],
        )
    if "kvpo" in methods:
        places = "; ".join(_place(key, methods) for key in SETS if key in summary["prompts"])
        head = f"Beyond chance (p < {SURE:g}): {places}"
        notes += [_both_errors(key, methods) for key in ("short", "long")
                  if key in methods["kvpo"]]  # fmt: skip
        tests = sum(own[key]["p_against_kvpo"] is not None for own in methods.values()
                    for key in summary["prompts"])  # fmt: skip
        notes.append(
            f"{tests} differences were tested, and no p is corrected for their number: if all of them were "
            f"chance, about {tests * SURE:.2g} would have p < {SURE:g}."
        )
    else:
        why = "has no run that ended" if "kvpo" in summary["failed"] else "is not among the arms"
        head = f"kvpo {why}, so nothing is compared with it"
    return f"{head}.", notes


def _place(key: str, methods: Entry) -> str:
    """The arms that kvpo is significantly above and below on one prompt set."""
    sure = {
        arm: own[key]["difference_to_kvpo"]
        for arm, own in methods.items()
        if (p := own[key]["p_against_kvpo"]) is not None and p < SURE
    }
    above, below = (
        ", ".join(arm for arm, difference in sure.items() if (difference < 0) is lower) or "none"
        for lower in (True, False)
    )
    return f"on {key} videos kvpo is above {above}, below {below}"


def _both_errors(key: str, methods: Entry) -> str:
    """kvpo's gain with its errors over seeds and prompts, compared with the gains of any null runs."""
    own = methods["kvpo"][key]
    errors = own["standard_errors"]
    text = (
        f"kvpo, {key} videos: {signed(own['mean'])} ± {fixed(own['std'])} over seeds, "
        f"± {fixed(sum(errors) / len(errors))} over the prompts of a run"
    )
    if "null" not in methods:
        return text + "."
    null = methods["null"][key]
    p = own["p_against_null"]
    return (
        f"{text}; {len(null['gains'])} runs with advantages dealt at random gain {signed(null['mean'])} ± "
        f"{fixed(null['std'])}, and {own['above_every_null']} of {len(own['gains'])} runs lie above all of "
        f"them{'' if p is None else f' ({_p(p)})'}."
    )


def _p(value: float) -> str:
    """A p-value with two significant digits."""
    return f"p = {compact(float(f'{value:.2g}'))}"


def _ranked(key: str, methods: Entry) -> list[tuple[str, Entry]]:
    return sorted(((arm, own[key]) for arm, own in methods.items()), key=lambda row: -row[1]["mean"])


def _set_section(key: str, summary: Entry) -> str:
    rows = [
        _arm_row(arm, summary["methods"][arm]["base"], own) for arm, own in _ranked(key, summary["methods"])
    ]
    rows += [_floor_row(line, own[key]) for line, own in summary["floors"].items()]
    bases = ", ".join(f"{name} {fixed(base[key])}" for name, base in summary["bases"].items())
    facts = f"{summary['prompts'][key]} prompts, {bases}"
    title = f'<h3 class="group">{title_of(key)} videos <span class="soft">{SETS[key]} · {facts}</span></h3>'
    return title + table_card(GAIN_COLUMNS, rows, "gains")


def _arm_row(arm: str, base: str, own: Entry) -> tuple[str, ...]:
    errors, gains = own["standard_errors"], own["gains"]
    difference, p = own["difference_to_kvpo"], own["p_against_kvpo"]
    against = "" if p is None else f'{signed(difference)} <span class="soft">{_p(p)}</span>'
    above = own.get("above_every_null")
    about = "" if base == "base" else f' <small class="soft">on {escape(base)}</small>'
    return (
        escape(arm) + about,
        f'<b>{signed(own["mean"])}</b> <span class="soft">± {fixed(own["std"])}</span>',
        f'<span class="soft">{", ".join(signed(gain) for gain in gains)}</span>',
        fixed(sum(errors) / len(errors)),
        _average(own.get("mismatched")),
        _average(own.get("unseen")),
        percent(own["gap_closed"]),
        against,
        "" if above is None else f"{above} of {len(gains)}",
    )


def _floor_row(line: str, own: Entry) -> tuple[str, ...]:
    return (
        f'<span class="soft">{escape(line)}</span>',
        signed(own["gain"]),
        f'<span class="soft">base, {own["prompts"]} prompts</span>',
        fixed(own["standard_error"]),
        "",
        signed(own.get("unseen")),
        "",
        "",
        "",
    )


def _average(values: Sequence[float] | None) -> str:
    return signed(sum(values) / len(values)) if values else ""


def _components(key: str, summary: Entry) -> str:
    ranked = _ranked(key, summary["methods"])
    parts = list(ranked[0][1]["components"])
    rows = [[escape(arm), *(signed(own["components"][part]) for part in parts)] for arm, own in ranked]
    return f'<h3 class="group">{title_of(key)} videos</h3>' + table_card(["", *map(title_of, parts)], rows)


def _costs(summary: Entry) -> str:
    shown = list(summary["bases"]["base"]["diversity"])
    rows = [
        [escape(name), "", "", "", *(fixed(base["diversity"][key]) for key in shown)]
        for name, base in summary["bases"].items()
    ]
    for arm, own in summary["methods"].items():
        updates = ", ".join(map(str, own["updates"]))
        total = fixed(sum(own["cpu_s"]) / len(own["cpu_s"]), 1)
        rows.append([escape(arm), total, updates, fixed(own["cpu_s_per_update"], 2),
                     *(fixed(own["diversity"].get(key)) for key in shown)])  # fmt: skip
    head = ["", "CPU-s a run", "updates of each run", "CPU-s an update", *map(title_of, shown)]
    return table_card(head, rows)


def _settings(summary: Entry) -> str:
    rows = [[escape(arm), _listed(own["settings"])] for arm, own in summary["methods"].items()]
    blocks = [table_card(["", "settings that differ from the comparison's own"], rows, "words")]
    for method, tried in summary["trials"].items():
        if tried:
            best = max((one["gain"] for one in tried if one["gain"] is not None), default=None)
            rows = [_trial_row(f"{escape(method)} {n}", one, best) for n, one in enumerate(tried)]
            blocks.append(
                f'<h3 class="group">Trials of {escape(method)}</h3>'
                + table_card(
                    ["", "gain on validation prompts", "updates", "CPU-s", "settings"], rows, "words"
                )
            )
    return "".join(blocks)


def _trial_row(name: str, one: Entry, best: float | None) -> list[str]:
    """The row of a trial, marked if its gain is the best; a trial that was not finite has no gain."""
    if one["gain"] is None:
        return [name, "not finite", "", "", _listed(one["settings"])]
    chosen = " (chosen)" if one["gain"] == best else ""
    return [
        name + chosen,
        signed(one["gain"]),
        str(one["updates"]),
        fixed(one["cpu_s"], 1),
        _listed(one["settings"]),
    ]


def _listed(settings: Entry) -> str:
    return escape(", ".join(f"{path} {value}" for path, value in settings.items()) or "none")


def _facts(summary: Entry) -> str:
    count, one = summary["tuning_trials"], len(summary["seeds"]) == 1
    seeds = f"{'seed' if one else 'seeds'} {', '.join(map(str, summary['seeds']))}"
    tuned = (
        f"Each method had up to {count} trials on validation prompts, at half that budget and under a seed "
        "that no run shown here has; the best one's settings were used, also by the other arms that train by "
        "that method."
    )
    tested = {
        "final": "prompts and a tape that nothing else uses",
        "validation": "validation prompts, to choose among arms",
    }[summary["split"]]
    facts = (
        f"Every run trains for {summary['budget_cpu_s']:g} CPU-seconds of its process with one thread; "
        f"evaluation does not count. {tuned if count else 'No method was tuned.'} Then every arm was trained "
        f"afresh under {seeds}, with the same prompts, forks and noise, and tested once as it stood "
        f"at the end, on {tested}. p compares the rewards that two arms reached, whatever base they started "
        "from, and is the larger of two: of relabelled runs, and of flipped signs of prompts' differences."
    )
    return (
        f"<p>{escape(facts)}</p><p class='note'>commit {escape(summary['commit'])} · base sha256 "
        f"{escape(summary['base_sha256'])} · preset {escape(summary['preset'])}</p>"
    )


def _lowest_drawn(key: str, summary: Entry) -> tuple[float, float]:
    """The gain below which runs are drawn as arrows, and the lowest gain.

    Without arrows, one collapsed run would hide the differences between the others.
    """
    gains = [gain for own in summary["methods"].values() for gain in own[key]["gains"]]
    best = max(*gains, *(line[key]["gain"] for line in summary["floors"].values()), 0.01)
    return -1.2 * best, min(gains)


def draw_comparison(path: Path, summary: Entry) -> None:
    """Draw every arm's gains, run by run with their spread, and the base with more computation, as a PNG."""
    from matplotlib.figure import Figure

    sets = [key for key in SETS if key in summary["prompts"]]
    arms = [arm for arm, _ in _ranked(sets[-1], summary["methods"])]
    floors = list(summary["floors"])
    names = [*arms, *floors]
    figure = Figure(figsize=(4.2 * len(sets), 1.4 + 0.32 * len(names)), layout="constrained")
    for axes, key in zip(figure.subplots(1, len(sets), squeeze=False, sharey=True)[0], sets, strict=True):
        low, lowest = _lowest_drawn(key, summary)
        for row, arm in enumerate(arms):
            own = summary["methods"][arm][key]
            axes.errorbar(own["mean"], row, xerr=own["std"] or 0, fmt="|", color="#17365d", ms=14, capsize=3)
            near, far = (
                [gain for gain in own["gains"] if (gain < low) is beyond] for beyond in (False, True)
            )
            axes.plot(near, [row] * len(near), "o", color="#3b6fb6", alpha=0.6, ms=5)
            axes.plot([low] * len(far), [row] * len(far), "<", color="#b63b3b", ms=6)
        for row, line in enumerate(floors, len(arms)):
            own = summary["floors"][line][key]
            axes.errorbar(own["gain"], row, xerr=own["standard_error"], fmt="D", color="#999999", ms=4)
        axes.axvline(0, color="black", lw=0.8)
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="paired gain")
        if lowest < low:
            axes.set_xlim(left=1.1 * low)
        axes.locator_params(axis="x", nbins=5)
        axes.set_title(f"{key} videos", fontsize=10)
    axes.invert_yaxis()
    figure.savefig(path, format="png", dpi=150)
