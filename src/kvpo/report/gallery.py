"""Before/after videos side by side."""

from kvpo.report.clips import ClipStore, captions, film_data, screen, whole
from kvpo.report.formatting import escape, fixed, mapping, number, numbers, signed, tone_of
from kvpo.report.record import Entry, RunRecord


def gallery_clips(entries: list[Entry]) -> list[str]:
    """Names of the videos that gallery entries refer to."""
    return [str(entry[side]) for entry in entries for side in ("base", "aligned") if entry.get(side)]


def _components(entry: Entry) -> str:
    rows = []
    for name, value in mapping(entry, "components").items():
        pair = numbers(value)
        if {"base", "aligned"} <= pair.keys():
            gain = pair["aligned"] - pair["base"]
            rows.append(
                f"<tr><th>{escape(name)}</th><td>{fixed(pair['base'])}</td><td>{fixed(pair['aligned'])}</td>"
                f'<td class="{tone_of(gain)}">{signed(gain)}</td></tr>'
            )
    if not rows:
        return ""
    return (
        "<details><summary>components</summary><table><thead><tr><th></th><th>base</th><th>aligned</th>"
        f"<th>gain</th></tr></thead><tbody>{''.join(rows)}</tbody></table></details>"
    )


def _card(entry: Entry, store: ClipStore, position: int) -> str:
    base, aligned = number(entry.get("base_reward")), number(entry.get("aligned_reward"))
    gain = aligned - base if base is not None and aligned is not None else None
    title = str(entry.get("title", f"Video {position + 1}"))
    frames = whole(entry.get("num_frames"))
    sides = "".join(
        f"<figure>{screen(store, 'gallery', entry.get(side), f'{side} video: {title}')}"
        f'<figcaption><span class="tag {side}">{side}</span><b>{fixed(reward)}</b></figcaption></figure>'
        for side, reward in (("base", base), ("aligned", aligned))
    )
    return (
        f'<article class="card film" {film_data(entry, frames)} data-order="{position}" '
        f'data-gain="{gain if gain is not None else ""}"><header><h3 dir="auto">{escape(title)}</h3>'
        f'<span class="gain {tone_of(gain)}">{signed(gain)}</span></header><div class="duo">{sides}</div>'
        f"{captions(entry, frames)}{_components(entry)}</article>"
    )


def cards(run: RunRecord, store: ClipStore) -> str:
    """Cards of before/after pairs that play in step, with the current caption."""
    if not run.gallery:
        return '<p class="missing">No before/after videos have been saved (gallery/gallery.json).</p>'
    pairs = "".join(_card(entry, store, position) for position, entry in enumerate(run.gallery))
    return (
        '<div class="toolbar"><label>Order <select data-sort="gallery-cards"><option value="order">as saved'
        '</option><option value="gain">largest gain first</option><option value="-gain">largest loss first'
        "</option></select></label></div>"
        f'<div class="cards" id="gallery-cards">{pairs}</div>'
        '<p class="note">Numbers under the pictures are rewards.</p>'
    )
