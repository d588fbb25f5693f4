"""Assembles the page of a run from its sections and videos."""

from dataclasses import replace
from pathlib import Path

from kvpo.files import counted, write_atomic
from kvpo.report import branches, gallery
from kvpo.report.clips import ClipStore
from kvpo.report.curves import components, diagnostics, reward_curves
from kvpo.report.formatting import embed_json, escape, fill_page
from kvpo.report.headline import headline
from kvpo.report.null_runs import read_null
from kvpo.report.phases import phases
from kvpo.report.radar import hacking_radar
from kvpo.report.record import RunRecord, method_of, read_run, read_videos
from kvpo.report.tables import accuracy, checks, diversity, reproduction, settings_tables

VIDEO_BUDGET = 13_000_000
"""Characters of base64 video in a page; with text, styles and charts it stays under 15 MB."""


def _embed_videos(run: RunRecord) -> ClipStore:
    """Encode the videos of groups first, then those of the gallery, as far as they fit."""
    sources = (
        ("branches", "branches.safetensors", branches.branch_clips(run.groups + run.causality)),
        ("gallery", "videos.safetensors", gallery.gallery_clips(run.gallery)),
    )
    count = sum(len(set(keys)) for *_, keys in sources)
    store = ClipStore(VIDEO_BUDGET)
    for folder, name, keys in sources:
        videos = read_videos(run.directory / folder / name, keys, run.problems)
        store.add_all(folder, videos, share=VIDEO_BUDGET // max(1, count))
    if store.left_out:
        limit = f"{VIDEO_BUDGET / 1e6:.0f} MB"
        run.problems.append(f"{counted(store.left_out, 'video')} left out: a page holds {limit} of them")
    return store


def _sections(run: RunRecord, store: ClipStore) -> list[tuple[str, str, str, str]]:
    """(anchor, title, introduction, content) of every section, in page order."""
    explorer_intro = f"{branches.difference_of(run)} Each group shows the anchor, which is plain generation."
    return [
        ("curves", "Reward while training", "Held-out videos, fixed prompts and noise.", reward_curves(run)),
        ("radar", "Hacking radar", "Is the reward improving, or the videos?", hacking_radar(run)),
        ("components", "Components", "The reward's components before and after.", components(run)),
        ("accuracy", "Right or wrong", "Of what was asked for, the share that is shown.", accuracy(run)),
        (
            "videos",
            "Before and after",
            "Same prompt and same noise on both sides.",
            gallery.cards(run, store),
        ),
        ("branches", "Branch explorer", explorer_intro, branches.explorer(run, store)),
        ("diversity", "Routing and noise", "Two ways to branch, from the same forks.", diversity(run)),
        ("diagnostics", "Training diagnostics", "Each update, and how to read it.", diagnostics(run)),
        ("phases", "Where time goes", "Phases of an update, and ranks.", phases(run)),
        ("checks", "Exactness", "Identities that hold for any weights, measured in this run.", checks(run)),
        ("configuration", "Configuration", "The resolved settings.", settings_tables(run)),
        ("reproduce", "Reproduce", "", reproduction(run)),
    ]


def _problems(run: RunRecord) -> str:
    if not run.problems:
        return ""
    count = "One thing" if len(run.problems) == 1 else f"{len(run.problems)} things"
    items = "".join(f"<li>{escape(problem)}</li>" for problem in run.problems)
    return (
        f'<details class="problems" open><summary>{count} missing from this page</summary>'
        f"<ul>{items}</ul></details>"
    )


def _section(anchor: str, title: str, intro: str, content: str) -> str:
    introduction = f'<p class="intro">{escape(intro)}</p>' if intro else ""
    return f'<section id="{anchor}"><h2>{title}</h2>{introduction}{content}</section>'


def build_page(run: RunRecord) -> str:
    """The page of ``run`` as HTML text."""
    store = _embed_videos(run)
    sections = _sections(run, store)
    return fill_page(
        "page.html",
        "report.js",
        method=escape(method_of(run) or "run"),
        name=escape(run.directory.resolve().name),
        links="".join(f'<a href="#{anchor}">{title}</a>' for anchor, title, *_ in sections),
        headline=headline(run) + _problems(run),
        sections="\n".join(_section(*section) for section in sections),
        clips=embed_json(store.clips),
    )


def write_report(run_dir: Path | str, *, null: Path | str | None = None) -> Path:
    """Write ``run_dir/report.html`` from the files that the run has written so far, and return its path.

    ``null`` names a file with the gains of null runs (``kvpo.report.null_runs``); by default, those in the
    run's summary are used.

    Only ``config.yaml`` and ``metrics.jsonl`` must exist; the page lists other files that are missing or
    unreadable. Raises ValueError if ``run_dir`` is not a run directory, or the null runs have other settings.
    """
    directory = Path(run_dir)
    target, run = directory / "report.html", read_run(directory)
    if null is not None:
        run = replace(run, summary=(run.summary or {}) | {"null": read_null(Path(null), run.config)})
    write_atomic(target, build_page(run))
    return target
