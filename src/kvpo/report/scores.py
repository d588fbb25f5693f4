"""A page of scored videos, best first, in one file that makes no request."""

import base64
import hashlib
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.resources import files
from pathlib import Path
from string import Template
from urllib.parse import quote

from kvpo import __version__
from kvpo.files import write_atomic
from kvpo.report.formatting import escape, significant


@dataclass(frozen=True)
class Entry:
    """One video on the page."""

    name: str
    link: str
    """Path of the file, relative to the page."""
    prompt: str
    scores: Mapping[str, float]
    problems: Mapping[str, str]
    """Reward -> why there is no score."""


def _card(entry: Entry, columns: Sequence[str], video: bytes | None, position: int) -> str:
    data = "".join(
        f' data-score-{i}="{entry.scores[column]!r}"'
        for i, column in enumerate(columns)
        if column in entry.scores
    )
    if video is None:
        screen = '<div class="screen absent">no preview</div>'
    else:
        source = base64.b64encode(video).decode("ascii")
        screen = (
            f'<video class="screen" muted loop playsinline controls preload="metadata" '
            f'aria-label="{escape(entry.name)}" src="data:video/mp4;base64,{source}"></video>'
        )
    rows = "".join(
        f"<tr><th>{escape(column)}</th><td>{significant(entry.scores.get(column))}</td></tr>"
        for column in columns
    )
    reasons = "".join(
        f'<p class="note">{escape(reward)}: {escape(reason)}</p>' for reward, reason in entry.problems.items()
    )
    prompt = f'<p class="note">{escape(entry.prompt)}</p>' if entry.prompt else ""
    return (
        f'<article class="card" data-order="{position}"{data}><header><h3>'
        f'<a href="{escape(quote(os.fsencode(entry.link)))}">{escape(entry.name)}</a></h3></header>'
        f"{screen}<table><tbody>{rows}</tbody></table>{prompt}{reasons}</article>"
    )


def render(title: str, columns: Sequence[str], entries: Sequence[Entry], videos: Mapping[str, bytes]) -> str:
    """The page as HTML text; entries come in the order in which they are shown first."""
    assets = files("kvpo.report") / "assets"
    template, style, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("scores.html", "report.css", "scores.js")
    )
    options = "".join(f'<option value="{i}">{escape(column)}</option>' for i, column in enumerate(columns))
    scored = sum(bool(entry.scores) for entry in entries)
    return Template(template).substitute(
        title=escape(title),
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=__version__,
        style=style,
        script=script,
        script_digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        summary=f"{scored} of {len(entries)} videos scored, highest {escape(columns[0])} first.",
        options=options,
        cards="\n".join(
            _card(entry, columns, videos.get(entry.name), position) for position, entry in enumerate(entries)
        ),
    )


def write_page(
    path: Path,
    title: str,
    columns: Sequence[str],
    entries: Sequence[Entry],
    videos: Mapping[str, bytes],
) -> None:
    """Write the page in one step; ``videos`` are mp4 files by entry name, for those that have one."""
    write_atomic(path, render(title, columns, entries, videos))
