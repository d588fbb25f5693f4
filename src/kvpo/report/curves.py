"""Reward curves, components and training diagnostics."""

from dataclasses import dataclass

from kvpo.report.charts import Series, line_chart, paired_bars
from kvpo.report.formatting import compact, escape, number, numbers, title_of
from kvpo.report.headline import LENGTHS, read_outcome, read_outcomes
from kvpo.report.record import Entry, Run


@dataclass(frozen=True)
class Diagnostic:
    """One metric of a training update and how to read it."""

    key: str
    title: str
    meaning: str
    unit_line: float | None = None
    """A reference value that is always drawn."""


SIGNAL = (
    Diagnostic(
        "reward_mean",
        "Reward of the branches",
        "Training prompts under routed history: noisy, and below deployment. Judge by the validation curve.",
    ),
    Diagnostic(
        "anchor_reward",
        "Reward of the anchor",
        "The same prompts without routing: the baseline of the branches. As noisy as theirs.",
    ),
    Diagnostic(
        "reward_spread",
        "Reward spread in a group",
        "What there is to learn from. Normal: steady, above the noise floor. Alarming: sinking to it.",
    ),
    Diagnostic(
        "above_anchor",
        "Branches above the anchor",
        "Share that beats the unrouted anchor. Normal: 0.3 to 0.6. Alarming: near 0, routing only hurts.",
        0.5,
    ),
    Diagnostic(
        "branch_distance",
        "Distance between branches",
        "Mean latent distance between branches. Normal: steady. At 0 all branches are the same video.",
    ),
    Diagnostic(
        "anchor_distance",
        "Distance to the anchor",
        "Mean latent distance of branches to the anchor. A sudden rise means broken branches.",
    ),
    Diagnostic(
        "advantage_std",
        "Advantage spread",
        "Of the branches that are trained on. Normal: near 1, level. Much less: most of it is noise floor.",
    ),
    Diagnostic(
        "advantage_mean",
        "Mean advantage",
        "0 by construction where centred. With the anchor in the pool: below 0 while branches are worse.",
        0.0,
    ),
    Diagnostic(
        "skipped_fraction",
        "Groups skipped",
        "Share whose reward spread is under the noise floor. Normal: few. Most: the reward cannot tell.",
    ),
    Diagnostic(
        "withheld_fraction",
        "Branches withheld",
        "Positive advantages that selective fusion took away. 0 under any other fusion.",
    ),
)
POLICY = (
    Diagnostic(
        "energy_mean",
        "Energy",
        "Squared velocity gap between a branch and the policy. Normal: slow change. Tenfold growth is drift.",
    ),
    Diagnostic(
        "energy_std",
        "Energy spread in a group",
        "It sets the temperature. Near 0 every branch is equally likely and nothing is learned.",
    ),
    Diagnostic(
        "temperature",
        "Temperature",
        "Fixed, or calibrated to the energies: then it follows their spread.",
    ),
    Diagnostic(
        "anchor_probability",
        "Probability of the anchor",
        "Its share of the policy where it is in the pool; 0 elsewhere.",
    ),
    Diagnostic(
        "entropy",
        "Entropy of the policy",
        "Over branches, 1 is uniform. Normal: 0.6 to 0.98. Near 0 one branch takes all; at 1 no signal.",
    ),
    Diagnostic(
        "ratio_mean",
        "Ratio, mean",
        "New over old branch probability. 1 by construction in the first epoch, which compares with itself.",
        1.0,
    ),
    Diagnostic(
        "ratio_max",
        "Ratio, largest",
        "1 by construction in the first epoch. Later: near the clip range. Far above: steps too large.",
        1.0,
    ),
    Diagnostic(
        "ratio_deviation",
        "Ratio, deviation from 1",
        "0 by construction in the first epoch. Later: how far a step moves the branches' probabilities.",
    ),
    Diagnostic(
        "clip_fraction",
        "Clipped branches",
        "Share outside the clip range. 0 in the first epoch: expected. Above 0.3: steps too large.",
    ),
    Diagnostic(
        "simplex_kl",
        "Simplex KL",
        "To the starting policy, over branches. Exactly 0 at first; blind to drift that all branches share.",
    ),
    Diagnostic(
        "velocity_kl",
        "Velocity KL",
        "Squared velocity change on anchor states: sees shared drift. 0 at first, then slow; no jumps.",
    ),
)
OPTIMISER = (
    Diagnostic("policy_loss", "Policy loss", "The clipped surrogate alone, without the simplex KL."),
    Diagnostic(
        "loss",
        "Loss",
        "The surrogate. At ratio 1 its level says little; only spikes and non-finite values matter.",
    ),
    Diagnostic(
        "gradient_norm",
        "Gradient norm",
        "Before clipping. Noisy but level is normal; at 0 nothing trains, growing spikes are alarming.",
    ),
    Diagnostic(
        "gradient_coverage",
        "Gradient coverage",
        "Share of trained tensors with a gradient. 0.5 in the first update of a fresh adapter, then 1. At 0 "
        "nothing is learned.",
    ),
    Diagnostic("learning_rate", "Learning rate", "Linear warm-up, then constant."),
    Diagnostic(
        "seconds",
        "Seconds per update",
        "Normal: level. A slow climb means something is growing with the run.",
    ),
)
GROUPS = (("Signal", SIGNAL), ("Policy", POLICY), ("Optimiser", OPTIMISER))
NOT_METRICS = {"kind", "update", "time"}


def reward_curves(run: Run) -> str:
    """Held-out reward over updates, base and aligned, with bands of one and two paired standard errors."""
    charts = []
    for name, meaning in LENGTHS.items():
        points = [
            (number(entry["update"]), outcome)
            for entry in run.validations
            if (outcome := read_outcome(name, entry.get(name))) is not None
        ]
        if not points:
            continue
        updates = [update for update, _ in points if update is not None]
        aligned = Series(
            "aligned",
            [o.aligned_mean for _, o in points],
            "aligned",
            spread=[o.standard_error for _, o in points],
        )
        base = Series("base", [o.base_mean for _, o in points], "base", dashed=True)
        chart = line_chart(updates, [aligned, base], label=f"held-out reward on {name} videos over updates")
        charts.append(
            f'<figure class="card"><figcaption><h3>{name.capitalize()} videos '
            f'<span class="soft">{meaning}</span></h3><span class="legend"><i class="aligned"></i>aligned '
            f'<i class="base"></i>base</span></figcaption><div class="tall">{chart}</div>'
            '<p class="axis">updates</p></figure>'
        )
    if not charts:
        return '<p class="missing">No validation has been written to metrics.jsonl yet.</p>'
    return (
        f'<div class="pair">{"".join(charts)}</div><p class="note">Bands: one and two standard errors of the '
        "paired gain. Validation prompts also choose the checkpoint; the headline uses test prompts.</p>"
    )


def components(run: Run) -> str:
    """Reward components before and after, sorted by gain."""
    outcomes, source = read_outcomes(run)
    cards = [
        f'<figure class="card"><figcaption><h3>{outcome.name.capitalize()} videos</h3><span class="legend">'
        '<i class="base"></i>base <i class="aligned"></i>aligned</span></figcaption>'
        + paired_bars(
            [(key, pair["base"], pair["aligned"], pair.get("se")) for key, pair in outcome.components.items()]
        )
        + "</figure>"
        for outcome in outcomes
        if outcome.components
    ]
    if not cards:
        return '<p class="missing">No components have been reported yet.</p>'
    note = "Validation prompts, last evaluation." if source == "validation" else "Held-out test prompts."
    return f'<div class="pair">{"".join(cards)}</div><p class="note">{note} Sorted by gain.</p>'


def _panel(diagnostic: Diagnostic, updates: list[Entry], references: list[tuple[str, float]]) -> str:
    x = [float(entry["update"]) for entry in updates]
    values = [number(entry.get(diagnostic.key)) for entry in updates]
    present = [value for value in values if value is not None]
    broken = sum(diagnostic.key in entry for entry in updates) - len(present)
    alarm = f'<span class="alarm">{broken} not finite</span>' if broken else ""
    latest = f'<span class="latest">{compact(present[-1])}</span>' if present else ""
    if diagnostic.unit_line is not None:
        references = [*references, ("", diagnostic.unit_line)]
    chart = line_chart(
        x,
        [Series(diagnostic.title, values, "plain")],
        label=diagnostic.title,
        references=references,
        y_ticks=3,
    )
    return (
        f'<figure class="card small"><figcaption><h4>{escape(diagnostic.title)}</h4>{alarm}{latest}'
        f'</figcaption>{chart}<p class="meaning">{escape(diagnostic.meaning)}</p></figure>'
    )


def _clip_range(run: Run) -> list[tuple[str, float]]:
    objective = numbers(run.config.get("objective"))
    if not {"clip_low", "clip_high"} <= objective.keys():
        return []
    return [("clip", 1 - objective["clip_low"]), ("clip", 1 + objective["clip_high"])]


def diagnostics(run: Run) -> str:
    """Small multiples of every number in the update lines; keys nobody described come last, under 'Other'."""
    if not run.updates:
        return '<p class="missing">No update has been written to metrics.jsonl yet.</p>'
    known = {diagnostic.key for _, group in GROUPS for diagnostic in group}
    keys = {key: None for entry in run.updates for key in entry if key not in NOT_METRICS}
    other = [
        Diagnostic(key, title_of(key), "")
        for key in keys
        if key not in known and any(number(entry.get(key)) is not None for entry in run.updates)
    ]
    blocks = []
    for name, group in (*GROUPS, ("Other", other)):
        panels = [
            _panel(diagnostic, run.updates, _clip_range(run) if diagnostic.key.startswith("ratio_") else [])
            for diagnostic in group
            if diagnostic.key in keys
        ]
        if panels:
            blocks.append(f'<h3 class="group">{name}</h3><div class="multiples">{"".join(panels)}</div>')
    return "".join(blocks)
