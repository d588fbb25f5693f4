"""HTML elements that several pages share: tables and verdicts."""

from collections.abc import Iterable, Sequence

from kvpo.report.formatting import SYMBOLS, escape


def table_card(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A scrollable table: a heading (text) per column, and rows of HTML cells, the first naming the row.

    ``kind`` is a CSS class. On phones, a ``stacked`` table shows each row as a list, with the column heading
    before each cell.
    """
    heads = [escape(name) for name in head]
    opening = [f'<td data-head="{name}">' if kind == "stacked" else "<td>" for name in heads[1:]]
    body = "".join(
        f"<tr><th>{first}</th>"
        + "".join(f"{cell}{text}</td>" for cell, text in zip(opening, cells, strict=True))
        + "</tr>"
        for first, *cells in rows
    )
    top = "".join(f"<th>{name}</th>" for name in heads)
    content = f"<thead><tr>{top}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="card scroll"><table class="{kind}">{content}</table></div>'


def explained(name: str, meaning: str) -> str:
    """The first cell of a row: its name and its meaning."""
    return f'{escape(name)}<span class="soft">{escape(meaning)}</span>'


def verdict_box(tone: str, sentence: str, notes: Iterable[str], *, symbol: bool = False) -> str:
    """A plain-text statement and notes, styled by tone; ``symbol`` puts the tone's sign in front."""
    sign = f'<i aria-hidden="true">{SYMBOLS[tone]}</i>' if symbol else ""
    said = f'<p class="sentence">{escape(sentence)}</p>' + "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<div class="verdict {tone}">{sign}<div>{said}</div></div>'
