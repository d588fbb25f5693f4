"""Print the tables of the documents from the measurements, so that no number is copied by hand.

A table lies between ``<!-- printed: NAME -->`` and ``<!-- /printed -->``. NAME is a file below
benchmarks/results and one of the tables that TABLES makes from it. To rewrite all tables:

    python benchmarks/printed.py
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import fmean, median
from typing import Any

import bases
import exploration
import kills
import mutants
import preference_loop
import public
import quantised
import scaling
import seeds
import storylines
from measuring import spread, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results"
FIRST, LAST = slice(12), slice(-12, None)
"""First and last two minutes of a stream that is measured every ten seconds."""
MARKED = re.compile(r"(<!-- printed: (\S+) (\S+) -->\n).*?(<!-- /printed -->)", re.DOTALL)


def learned(numbers: Any) -> str:
    """The method and its null control, on short and on long videos."""
    method, null = (numbers["arms"][arm] for arm in ("paper", "random"))
    rows = []
    for name, words in (("short", "short, one prompt"), ("long", "long, three prompts")):
        gain, control, unseen = (
            spread(seeds.of(runs, name, key), 3)
            for runs, key in (
                (method, "paired_gain"), (null, "paired_gain"), (method, "unseen_scorer_gain")
            )
        )  # fmt: skip
        base, improved = (fmean(seeds.of(method, name, key)) for key in ("base_mean", "improved_fraction"))
        missing = fmean(seeds.of(method, name, "paired_gain")) / (1 - base)
        wrong = fmean(seeds.of(method, name, "wrong_caption_gain")) / fmean(
            seeds.of(method, name, "paired_gain")
        )
        shares = (f"{missing:.0%}", f"{wrong:.2f}", control, f"{improved:.0%}", unseen)
        rows.append((words, f"{base:.3f}", gain, *shares))
    columns = (
        "", "base", "paired gain", "of what was missing", "kept under wrong captions",
        "advantages permuted (control)", "videos improved", "unseen scorer",
    )  # fmt: skip
    return table(columns, rows)


def who_comes_back(numbers: Mapping[str, Any]) -> str:
    """Shares of branches in which an act's actor returns, by the routed history."""

    def share(name: str) -> str:
        return f"{numbers[name]:.2f} ({numbers[f'{name}_se']:.2f})" if name in numbers else ""

    rows = [
        (branches, *(share(f"{actor}_when_{routed}") for actor in ("act1", "act2", "donor")))
        for branches, routed in (
            ("anchor (the deployment window holds acts 1 and 3)", "not_routed"),
            ("routed to act 1 only", "routed_to_act1"),
            ("routed to act 2 only", "routed_to_act2"),
            ("routed to another story's act 2", "routed_to_donor"),
        )
    ]
    return table(("branches", "act 1's actor (SE)", "act 2's actor (SE)", "that story's actor (SE)"), rows)


def by_routed_frames(numbers: Mapping[str, Any]) -> str:
    """Share of branches in which act 2's actor returns, by the number of routed frames of act 2."""
    shares, errors = (numbers[f"act2_by_routed_frames{end}"] for end in ("", "_se"))
    cells = [f"{share:.2f} ({error:.2f})" for share, error in zip(shares, errors, strict=True)]
    return table(("frames of act 2 routed", *map(str, range(len(cells)))), [("act 2's actor (SE)", *cells)])


def threads(numbers: Mapping[str, Any]) -> str:
    """Seconds per update, on a quiet machine and beside busy processes."""
    rows = [
        (one["busy"], one["threads"], one["waiting"], f"{one['wall_s']:.2f}", f"{one['cpu_s']:.2f}")
        for one in numbers["results"]
    ]
    return table(("busy neighbours", "threads", "`OMP_WAIT_POLICY`", "wall (s)", "CPU (s)"), rows)


def rooms(numbers: Mapping[str, Any]) -> str:
    """Mutants by room of the source: their fates, and those that no test can tell from the source."""
    found, reasons, rows = numbers["mutants"], mutants.reviewed(), []
    for room in ("method", "engine", "models", "training", "plan", ""):
        own = [one for one in found if one["file"].startswith(f"src/kvpo/{room}")]
        same = [(one["file"], one["function"], one["change"]) in reasons for one in own]
        how = Counter("equivalent" if s else o["outcome"] for s, o in zip(same, own, strict=True))
        caught = sum(how[way] for way in ("assertion", "error", "time"))
        of = len(own) - how["equivalent"]
        share = f"{caught} ({caught / of:.0%} of {of})" if not room else caught
        rows.append((f"`{room}/`" if room else "all", len(own), share, how["equivalent"], how["survived"]))
    return table(("part", "mutants", "caught", "equivalent", "survive"), rows)


def structure(numbers: Mapping[str, Any]) -> str:
    """Operations and bytes of a block and of a replay, for every configuration."""
    rows = [
        (f"{name}: {what}", *found.values())
        for name, parts in numbers.items()
        if name != "compiled"
        for what, found in parts.items()
    ]
    parts = next(iter(numbers.values()))
    return table(("one row", *next(iter(parts.values()))), rows)


def builds(numbers: Mapping[str, Any]) -> str:
    """CPU-seconds of two builds, run by turns."""
    rows = []
    for phase, seconds in numbers["cpu_seconds"].items():
        before, now = (median(seconds[name]) for name in ("other", "this"))
        rows.append((phase, f"{before:.2f}", f"{now:.2f}", f"{before / now:.2f}x"))
    return table(("phase", "before (CPU-s)", "now (CPU-s)", "faster"), rows)


def drift(numbers: Mapping[str, Any]) -> str:
    """Measures of long streams in their first and their last two minutes, base and aligned."""

    def part(side: str, measure: str, spans: slice) -> str:
        return f"{fmean(map(fmean, numbers[side][measure][spans])):.3f}"

    rows = [
        (name, *(part(side, name, spans) for side in ("base", "aligned") for spans in (FIRST, LAST)))
        for name in numbers["base"]
    ]
    return table(("measure", "base, first", "base, last", "aligned, first", "aligned, last"), rows)


def chance_of(p: float | None) -> str:
    """A p to three digits, empty for None."""
    return "" if p is None else "< 0.001" if p < 5e-4 else f"{p:.3f}"


def methods(numbers: Mapping[str, Any]) -> str:
    """Gains of arms under one budget, as a share of the best-of-8 gain too, and floor lines."""
    names, rows = list(numbers["prompts"]), []
    for arm, found in numbers["methods"].items():
        sets = [found[name] for name in names]
        gains = [spread(own["gains"], 3) for own in sets]
        against = [chance_of(own["p_against_kvpo"]) for own in sets]
        unseen = " / ".join(f"{fmean(own['unseen']):+.3f}" for own in sets)
        shares = [own.get("gap_closed") for own in sets[:2]]
        closed = "" if None in shares else " / ".join(f"{share:.0%}" for share in shares)
        apart = [cell for pair in zip(gains, against, strict=True) for cell in pair]
        name = arm if found.get("base", "base") == "base" else f"{arm} (a base of its own)"
        rows.append((name, round(fmean(found["updates"])), *apart, unseen, closed))
    for line, floor in numbers["floors"].items():
        apart = [cell for name in names for cell in (f"{floor[name]['gain']:+.3f}", "")]
        unseen = " / ".join(f"{floor[name]['unseen']:+.3f}" for name in names)
        rows.append((f"base, {line}", "", *apart, unseen, ""))
    columns = [cell for name in names for cell in (name, "p")]
    return table(("arm", "updates", *columns, "unseen scorer on each", "gap closed, short / long"), rows)


def varied(numbers: Mapping[str, Any]) -> str:
    """Diversity of fresh-noise branches, for the bases and after training with each arm."""
    bases = {name: found["diversity"] for name, found in numbers["bases"].items()}
    columns = list(bases["base"])
    after = {arm: found["diversity"] for arm, found in numbers["methods"].items()}
    rows = [(name, *(f"{own[key]:.3f}" for key in columns)) for name, own in (bases | after).items() if own]
    return table(("branches of", *(name.replace("_", " ") for name in columns)), rows)


TABLES: Mapping[str, Callable[[Any], str]] = {
    "learned": learned,
    "gains": lambda numbers: seeds.gains(numbers["arms"]),
    "by_seed": lambda numbers: seeds.by_seed(numbers["arms"]),
    "components": lambda numbers: seeds.inside(numbers["arms"], "components", "gain"),
    "accuracy": lambda numbers: seeds.inside(numbers["arms"], "accuracy", "change"),
    "diversity": lambda numbers: seeds.diversity(numbers["arms"]),
    "explored": lambda numbers: exploration.compared(numbers["routes"]),
    "who_comes_back": who_comes_back,
    "by_routed_frames": by_routed_frames,
    "bases": lambda numbers: bases.compared(numbers["bases"]),
    "threads": threads,
    "methods": methods,
    "varied": varied,
    "drift": drift,
    "listed": lambda numbers: table(("measured", "value"), list(numbers.items())),
    "structure": structure,
    "builds": builds,
    "ratios": public.ratios,
    "memory": public.memory,
    "rooms": rooms,
    "loops": preference_loop.loops,
    "rolled": quantised.rolled,
    "runs": quantised.runs,
    "storylines": lambda numbers: storylines.counted(numbers),
    "kills": lambda numbers: kills.counted(numbers, 2),
    "model": lambda numbers: scaling.model_table(numbers["model"]),
    "measured": lambda numbers: scaling.measured_table(numbers["measured"]),
}


def printed(text: str) -> str:
    """A document's text with its tables rewritten."""

    def again(marked: re.Match[str]) -> str:
        numbers = json.loads((RESULTS / marked[2]).read_text(encoding="utf-8"))
        return f"{marked[1]}{TABLES[marked[3]](numbers)}\n{marked[4]}"

    return MARKED.sub(again, text)


def documents() -> list[Path]:
    """Documents that may hold tables."""
    return [
        ROOT / "README.md",
        *sorted((ROOT / "benchmarks").glob("*.md")),
        *sorted((ROOT / "docs").glob("*.md")),
    ]


if __name__ == "__main__":
    for path in documents():
        path.write_text(printed(path.read_text(encoding="utf-8")), encoding="utf-8")
