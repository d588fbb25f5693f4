"""The page of a study: which arm wins, how certain that is, which raters to trust, and the decisive clips."""

import base64
from collections.abc import Callable, Mapping
from math import isfinite
from pathlib import Path

from kvpo.arena.analysis import LEVEL, POWER, Comparison, Interval, Reliability
from kvpo.arena.result import Answered, Decided, Result
from kvpo.files import write_atomic
from kvpo.report.charts import interval
from kvpo.report.elements import table_card, verdict_box
from kvpo.report.formatting import MINUS, duration, escape, fill_page, fixed, percent, signed

CLIPS_BYTES = 12_000_000
"""Most base64 characters of all clips of a page; pairs that do not fit are left out."""


def write_study_page(path: Path, result: Result, videos: Mapping[str, Path]) -> None:
    """Write the page atomically; ``videos`` (digest -> mp4 file) provides the decisive clips."""
    page = fill_page(
        "study.html",
        "study.js",
        title=escape(result.title),
        verdict=_verdict(result),
        questions="".join(_question(one, result) for one in result.questions),
        raters=_raters(result),
        clips=_clips(result, videos),
    )
    write_atomic(path, page)


def _verdict(result: Result) -> str:
    """One sentence per pair of arms on the first question; for an open study, a note on hidden names."""
    sentences, tone = [], "pending"
    if not result.closed:
        sentences.append("The study is open: arms are called by letters until it is closed.")
    first = result.questions[0] if result.questions else None
    pairings = [one for one in first.pairings if one.counted] if first else []
    if not pairings:
        sentences.append("There are no votes that count yet.")
    for one in pairings:
        assert one.counted is not None
        sentences.append(in_words(one.arm, one.other, one.counted))
        if one.counted.gsb.low > 0 or one.counted.gsb.high < 0:
            tone = "good"
    return verdict_box(tone, sentences[0], sentences[1:])


def in_words(arm: str, other: str, found: Comparison) -> str:
    """Describe a comparison in a sentence; it claims a difference only if the interval excludes zero."""
    votes = (
        f"{found.good} votes for it, {found.bad} against, {found.same} for neither, {found.prompts} prompts"
    )
    low, high = found.gsb.low, found.gsb.high
    if low > 0:
        return f"{arm} is preferred to {other} ({votes})."
    if high < 0:
        return f"{other} is preferred to {arm} (of {arm}: {votes})."
    return f"No difference between {arm} and {other} can be told from chance (of {arm}: {votes})."


def _question(one: Answered, result: Result) -> str:
    rows = [
        (
            f"{escape(pairing.arm)} <span class='soft'>against {escape(pairing.other)}</span>",
            f"{found.good} · {found.same} · {found.bad}",
            _share(found.win_rate),
            _gsb(found.gsb),
            _bar(found.gsb),
            _needed(found),
        )
        for pairing in one.pairings
        if (found := pairing.counted) is not None
    ]
    if not rows:
        return f"<h3 class='group'>{escape(one.question.text)}</h3><p class='missing'>No votes yet.</p>"
    agreed = "" if one.agreement is None else f" Raters agree with α = {fixed(one.agreement, 2)}."
    strengths = [
        (escape(arm), signed(found.value, 2), ends(found, signed), _bar(found, 2.0))
        for arm, found in sorted(one.strengths.items(), key=lambda item: -item[1].value)
    ]
    needed = f"to see {signed(result.effect, 2)}"
    heads = ("", "good · same · bad", "win rate", "(G − B) / (G + S + B)", "", needed)
    tables = table_card(heads, rows, "stacked")
    if strengths:
        tables += table_card(("Bradley-Terry", "strength (log odds)", "95 %", ""), strengths, "stacked")
    return f"<h3 class='group'>{escape(one.question.text)}</h3>{tables}<p class='note'>{agreed}</p>"


def _share(found: Interval) -> str:
    return f"{percent(found.value)} <span class='soft'>{ends(found, percent)}</span>"


def _gsb(found: Interval) -> str:
    return f"{signed(found.value, 2)} <span class='soft'>{ends(found, lambda end: signed(end, 2))}</span>"


def ends(found: Interval, text: Callable[[float], str]) -> str:
    """The ends of an interval, each formatted by ``text``, or a remark if they are infinite."""
    if not isfinite(found.low) or not isfinite(found.high):
        return "too few prompts"
    return f"{text(found.low)} to {text(found.high)}"


def _needed(found: Comparison) -> str:
    if found.prompts_needed is None or found.votes_needed is None:
        return "<span class='soft'>not known yet</span>"
    missing = found.prompts_needed - found.prompts
    if missing <= 0:
        return "enough prompts"
    return f"{missing} more prompts <span class='soft'>({found.votes_needed} votes in all)</span>"


def _bar(found: Interval, reach: float = 1.0) -> str:
    """An interval on [-reach, reach] with zero in the middle."""
    label = f"{signed(found.value)}, {ends(found, signed)}"
    return interval(found.value, [(found.low, found.high)], (-reach, reach), label=label)


def _raters(result: Result) -> str:
    if not result.raters:
        return "<p class='missing'>Nobody has voted yet.</p>"
    heads = ("rater", "pairs", "left side", "same answer on repeats", "same on equal videos", "median time")
    return (
        f"{table_card(heads, map(_rater, result.raters), 'stacked')}<p class='note'>First question only. "
        "Flagged raters are not counted above; side bias means a share of left answers that a fair coin "
        "would give with a probability below 0.1 %. Intervals are at "
        f"{percent(LEVEL)}, by resampling whole prompts; numbers of prompts needed are for a power of "
        f"{percent(POWER)}.</p>"
    )


def _rater(one: Reliability) -> tuple[str, ...]:
    flags = "".join(f"<br><span class='badge bad'>{escape(flag)}</span>" for flag in one.flags)
    shares = (percent(share) for share in (one.left_share, one.consistent, one.attentive))
    return f"{escape(one.rater)}{flags}", str(one.votes), *shares, duration(one.seconds)


def _clips(result: Result, videos: Mapping[str, Path]) -> str:
    """The decided pairs of the first question whose clips fit into the page."""
    cards, left = [], CLIPS_BYTES
    for one in result.questions[0].decided if result.questions else ():
        if one.better not in videos or one.worse not in videos:
            continue
        clips = [base64.b64encode(videos[digest].read_bytes()).decode() for digest in (one.better, one.worse)]
        if (size := sum(map(len, clips))) <= left:
            left -= size
            cards.append(_card(one, clips))
    if not cards:
        return "<p class='missing'>No pair has a lead of votes yet, or the clips are not at hand.</p>"
    return f"<div class='cards decided'>{''.join(cards)}</div>"


def _card(one: Decided, clips: list[str]) -> str:
    figures = "".join(
        f"<figure><video class='screen' muted loop playsinline preload='metadata' aria-label='{escape(arm)}' "
        f"src='data:video/mp4;base64,{clip}'></video><figcaption><b>{escape(arm)}</b></figcaption></figure>"
        for arm, clip in zip((one.winner, one.loser), clips, strict=True)
    )
    ahead, same, behind = one.votes
    return (
        f"<article class='card'><header><h3>{ahead} : {behind} for {escape(one.winner)}</h3>"
        f"<span class='soft'>{same} neither</span></header><div class='duo'>{figures}</div>"
        f"<p class='note' dir='auto'>{escape(one.prompt)}</p></article>"
    )


def text_table(result: Result) -> str:
    """The comparisons as lines of text."""
    lines = []
    for answered in result.questions:
        for one in answered.pairings:
            if (found := one.counted) is not None:
                bounds = ends(found.gsb, lambda end: signed(end, 2))
                lines.append(
                    f"{answered.question.name}: {one.arm} against {one.other}: {found.good} good, "
                    f"{found.same} same, {found.bad} bad; {signed(found.gsb.value, 2)} ({bounds})"
                )
    lines += [f"{one.rater} {flag}: not counted" for one in result.raters for flag in one.flags]
    return "\n".join(lines or ["no votes yet"]).replace(MINUS, "-")
