"""Elements that several pages hold: tables and statements."""

from collections.abc import Iterable, Sequence

from kvpo.report.formatting import SYMBOLS, escape


def table_card(head: Sequence[str], rows: Iterable[Sequence[str]], kind: str = "") -> str:
    """A table that may scroll: a text per column, and rows of HTML whose first cell names them.

    ``kind`` is a class of the style sheet. On a phone every row of a ``stacked`` one is a list, whose cells
    are named by their heads.
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
    """The first cell of a row: its name and what it means."""
    return f'{escape(name)}<span class="soft">{escape(meaning)}</span>'


def verdict_box(tone: str, sentence: str, notes: Iterable[str], *, symbol: bool = False) -> str:
    """A statement of a tone and notes below it, all text; ``symbol`` puts the sign of the tone in front."""
    sign = f'<i aria-hidden="true">{SYMBOLS[tone]}</i>' if symbol else ""
    said = f'<p class="sentence">{escape(sentence)}</p>' + "".join(f"<p>{escape(note)}</p>" for note in notes)
    return f'<div class="verdict {tone}">{sign}<div>{said}</div></div>'
