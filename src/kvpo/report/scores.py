"""A page of scored videos, best first."""

import base64
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from kvpo.files import write_atomic
from kvpo.report.formatting import escape, fill_page, significant


@dataclass
class ScoredVideo:
    """A video file, its scores, and the reasons why others are missing."""

    path: Path
    name: str
    """Displayed path, relative to the scored folder."""
    prompt: str
    scores: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)
    """Reward -> why it could not be scored."""


def _card(entry: ScoredVideo, link: str, columns: Sequence[str], video: bytes | None, position: int) -> str:
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
    prompt = f'<p class="note" dir="auto">{escape(entry.prompt)}</p>' if entry.prompt else ""
    return (
        f'<article class="card" data-order="{position}"{data}><header><h3>'
        f'<a href="{escape(quote(os.fsencode(link)))}">{escape(entry.name)}</a></h3></header>'
        f"{screen}<table><tbody>{rows}</tbody></table>{prompt}{reasons}</article>"
    )


def write_scores_page(
    path: Path,
    title: str,
    columns: Sequence[str],
    entries: Sequence[ScoredVideo],
    videos: Mapping[str, bytes],
) -> None:
    """Write the page atomically; the order of ``entries`` is the initial order on the page.

    ``videos`` maps the names of entries to mp4 contents, for those that have a preview.
    """
    options = "".join(f'<option value="{i}">{escape(column)}</option>' for i, column in enumerate(columns))
    scored = sum(bool(entry.scores) for entry in entries)
    folder = path.resolve().parent
    links = [os.path.relpath(entry.path.resolve(), folder) for entry in entries]
    page = fill_page(
        "scores.html",
        "scores.js",
        title=escape(title),
        summary=f"{scored} of {len(entries)} videos scored, highest {escape(columns[0])} first.",
        options=options,
        cards="\n".join(
            _card(entry, link, columns, videos.get(entry.name), position)
            for position, (entry, link) in enumerate(zip(entries, links, strict=True))
        ),
    )
    write_atomic(path, page)
