"""Tables of the documents are those that the committed results print."""

import importlib
import json
import re
from collections.abc import Callable, Iterable
from hashlib import sha256
from operator import sub
from pathlib import Path
from statistics import fmean, stdev
from types import ModuleType
from typing import Any

import pytest
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "benchmarks"
RESULTS = "benchmarks/RESULTS.md"


def gains(numbers: Any, arm: str, name: str) -> list[float]:
    return [run["held_out"][name]["paired_gain"] for run in numbers["arms"][arm]]


def missing(numbers: Any, name: str) -> list[float]:
    """Gains of the method's runs in per cent of what was missing, least first."""
    bases = [run["held_out"][name]["base_mean"] for run in numbers["arms"]["paper"]]
    return sorted(100 * g / (1 - b) for g, b in zip(gains(numbers, "paper", name), bases, strict=True))


def chance(numbers: Any) -> list[float]:
    """The null runs' spread as a share of the method's gain, on short and on long videos."""
    return [
        stdev(gains(numbers, "random", name)) / fmean(gains(numbers, "paper", name))
        for name in ("short", "long")
    ]


def accuracies(numbers: Any) -> list[float]:
    return sorted(100 * loop["worth"]["accuracy"]["value"] for loop in numbers["loops"].values())


def over_streams(values: Iterable[float]) -> list[float]:
    """Mean and standard error."""
    found = list(values)
    return [fmean(found), stdev(found) / len(found) ** 0.5]


def two_minutes(numbers: Any, side: str) -> tuple[list[float], list[float]]:
    """The reward of every long stream in its first and in its last two minutes."""
    spans = numbers[side]["reward"]
    first, last = ([fmean(stream) for stream in zip(*own, strict=True)] for own in (spans[:12], spans[-12:]))
    return first, last


def changes(numbers: Any) -> list[float]:
    """What the reward changes by within long streams, base and aligned."""
    ends = (two_minutes(numbers, side) for side in ("base", "aligned"))
    return [value for first, last in ends for value in over_streams(map(sub, last, first))]


def long_gains(numbers: Any) -> list[float]:
    """The reward's gain at the beginning of long streams and at their end."""
    both = zip(two_minutes(numbers, "aligned"), two_minutes(numbers, "base"), strict=True)
    return [value for aligned, base in both for value in over_streams(map(sub, aligned, base))]


def returned(arms: Any) -> list[float]:
    """How often the actor seen last comes back: kvpo's mean, least and most; base's; the best rival's."""
    means = {arm: fmean(run["last"] for run in runs) for arm, runs in arms.items()}
    own = [run["last"] for run in arms["kvpo"]]
    rivals = max(mean for arm, mean in means.items() if arm != "kvpo")
    return [means["kvpo"], min(own), max(own), means["base"], rivals]


QUOTES: dict[tuple[str, str, str], Callable[[Any], list[Any]]] = {
    ("docs/world.md", "causality.json", "in {:.2f} of the branches routed to act 1, act 2's in {:.2f} of"):
        lambda n: [n["act1_when_routed_to_act1"], n["act2_when_routed_to_act2"]],
    (RESULTS, "causality.json", "whose acts look different ({} of {})"):
        lambda n: [n["stories"], n["stories_shown"]],
    (RESULTS, "causality.json", "{:.2f} of the branches routed to act 1 (target: 0.50), act 2's in {:.2f}"
    ):
        lambda n: [n["act1_when_routed_to_act1"], n["act2_when_routed_to_act2"]],
    (RESULTS, "causality.json", "and {:.2f} of the branches routed to another story show"):
        lambda n: [n["donor_when_routed_to_donor"]],
    (RESULTS, "causality.json", "Without a route, act 2's actor comes back in {:.2f}"):
        lambda n: [n["act2_when_not_routed"]],
    (RESULTS, "seeds.json", "each gains {0:.0f} to {4:.0f} % on short videos"): lambda n: missing(n, "short"),
    (RESULTS, "seeds.json", "and {0:.0f} to {4:.0f} % on long ones"): lambda n: missing(n, "long"),
    (RESULTS, "seeds.json", "null runs is {:.2f} of the method's gain on short videos, {:.2f} on"): chance,
    (RESULTS, "drift.json", "{:,} latent frames, measured every ten seconds"): lambda n: [n["latent_frames"]],
    (RESULTS, "drift.json", "changes by {:.4f} ± {:.4f} (base) and {:.4f} ± {:.4f} (aligned)"): changes,
    (RESULTS, "drift.json", "is {:.3f} ± {:.3f} at first and {:.3f} ± {:.3f} at last"): long_gains,
    (RESULTS, "methods-rehearsal.json", "--out DIR` at commit {:.7}"): lambda n: [n["commit"]],
    (RESULTS, "methods-rehearsal.json", "on {} short, {} long and {} longer stories"):
        lambda n: list(n["prompts"].values()),
    (RESULTS, "methods-rehearsal.json", "(no p below {:.2f})"): lambda n: [n["least_p"]],
    (RESULTS, "preference.json", "right on {0:.0f} to {2:.0f} % of held-out pairs"): accuracies,
    (RESULTS, "methods-story.json", "(p = {:.4f} at most; each of five p, not"):
        lambda n: [max(own["long"]["p_against_kvpo"] or 0 for own in n["methods"].values())],
    (RESULTS, "methods-story.json", "by {:.3f} ({:.3f} to {:.3f} by seed), and"):
        lambda n: [-f(n["methods"]["kvpo"]["long"]["unseen"]) for f in (fmean, max, min)],
    (RESULTS, "storylines.json", "stories ({1:.2f} to {2:.2f} by seed), {3:.2f} before and {4:.2f} at"):
        lambda n: returned(n["arms"]),
    (RESULTS, "methods-story-tuned.json", "method gains more than {:.3f}, and no rival can"):
        lambda n: [max(own["long"]["mean"] for own in n["methods"].values())],
    (RESULTS, "methods-story-tuned.json", "(no p below {:.2f})"):
        lambda n: [min(n["methods"][arm]["long"]["p_against_kvpo"] for arm in n["methods"] if arm != "kvpo")],
    (RESULTS, "storylines-tuned.json", "(in {:.2f}"):
        lambda n: [fmean(run["last"] for run in n["arms"]["latent-distance"])],
    (RESULTS, "storylines-tuned.json", "but {:.2f} and {:.2f} of the open acts are broken, the"):
        lambda n: [
            fmean(run["broken"] for run in n["arms"][arm]) for arm in ("latent-distance", "flow-grpo")
        ],
    (RESULTS, "live.json", "give {:.0f} frames a second"): lambda n: [n["frames a second, all arms"]],
}  # fmt: skip
"""(document, file of results, sentence) -> its numbers: prose that quotes what was measured."""


@pytest.fixture
def printed() -> ModuleType:
    """The script, which imports what it shares with others by plain name."""
    return importlib.import_module("printed")


def test_tables_of_documents_are_printed_from_results(printed: ModuleType) -> None:
    marked = 0
    for path in printed.documents():
        text = path.read_text(encoding="utf-8")
        assert printed.printed(text) == text, f"python benchmarks/printed.py writes {path} anew"
        marked += len(printed.MARKED.findall(text))
        assert text.count("<!-- printed:") == len(printed.MARKED.findall(text)), path
    assert marked > 5


def test_a_number_that_was_changed_by_hand_is_printed_over(printed: ModuleType) -> None:
    text = "<!-- printed: causality.json by_routed_frames -->\nby hand\n<!-- /printed -->\n"
    again = printed.printed(text)
    assert "by hand" not in again and again.count("|") > 10 and printed.printed(again) == again


@pytest.mark.parametrize(("document", "name", "sentence"), QUOTES)
def test_sentences_quote_the_results(document: str, name: str, sentence: str) -> None:
    numbers = json.loads((SCRIPTS / "results" / name).read_text(encoding="utf-8"))
    said = sentence.format(*QUOTES[document, name, sentence](numbers))
    assert said in " ".join((ROOT / document).read_text(encoding="utf-8").split())


def test_the_networks_of_the_package_are_those_that_results_name() -> None:
    text = (ROOT / RESULTS).read_text(encoding="utf-8").split("## The embedded base generator")[1]
    for path in (ROOT / "src/kvpo/world/assets").glob("*.safetensors"):
        assert sha256(path.read_bytes()).hexdigest() in text, f"{RESULTS} names another {path.name}"
    base = load_file(ROOT / "src/kvpo/world/assets/generator.safetensors")
    assert f"({sum(value.numel() for value in base.values()):,} parameters" in text


def test_every_file_of_results_stands_in_a_section_with_its_command() -> None:
    sections = re.split(r"\n(?=##+ )", (ROOT / RESULTS).read_text(encoding="utf-8"))
    told = [part for part in sections if re.search(r"`(python benchmarks/|kvpo |make )", part)]
    for path in (SCRIPTS / "results").glob("*.json"):
        assert any(path.name in part for part in told), f"{RESULTS} does not say what wrote {path.name}"
