"""The branch explorer: an anchor and its branches, with the frames routed to each and the result."""

from collections import Counter
from dataclasses import dataclass

from kvpo.files import counted
from kvpo.models.settings import Deployment
from kvpo.report.clips import ClipStore, captions, film_data, screen, segments_of, whole
from kvpo.report.formatting import escape, fixed, mapping, number, numbers, signed, significant, tone_of
from kvpo.report.record import Entry, RunRecord

RESIDUALS = ("energy", "distance", "residual")
"""Names that methods give a branch's residual; a small one means close to the policy."""
SORTS = ("order", "reward", "advantage", *(f"-{name}" for name in RESIDUALS), "probability")
"""Ways to sort the cards; a minus sign puts the smallest first."""


@dataclass(frozen=True)
class Span:
    """Latent frames [start, stop) of one role on the timeline."""

    role: str
    start: int
    stop: int
    title: str


@dataclass(frozen=True)
class GroupFacts:
    """Facts shared by the cards of one group; None if the group lacks them."""

    entry: Entry
    members: list[Entry]
    frames: int | None
    fork: int | None
    window: int
    switches: list[int]
    acts: list[str]
    """The actor of every act before the fork; empty if they were not read."""
    anchor_reward: float | None
    largest_advantage: float

    @property
    def title(self) -> str:
        """The group's title, as text."""
        return str(self.entry.get("title", "Group"))


@dataclass(frozen=True)
class ContextSize:
    """Sizes of the contexts in frames, from the run's configuration."""

    sink: int
    recent: int
    """Most recent past frames that a routed branch keeps."""
    local_past: int
    """Most recent past frames in the deployment context."""
    resident: int
    """History frames kept for routing, counting the sink; 0 keeps all."""


def members_of(group: Entry) -> list[Entry]:
    """The members of a group that are mappings."""
    members = group.get("members")
    return [m for m in members if isinstance(m, dict)] if isinstance(members, list) else []


def branch_clips(groups: list[Entry]) -> list[str]:
    """Names of the videos that groups refer to."""
    return [str(m["video"]) for group in groups for m in members_of(group) if m.get("video")]


DIFFERENCES = {
    "routes": "Branches attend to older frames instead of the latest ones; they differ in nothing else.",
    "fresh": "Branches start from other noise; they differ in nothing else.",
    "neighbour": "Branches start from noise near the anchor's; they differ in nothing else.",
    "sde": "Branches add noise at every solver step; they differ in nothing else.",
    "renoise": "Branches draw other noise at every solver step; they differ in nothing else.",
}
"""Explorer -> the one difference between its branches."""


def difference_of(run: RunRecord) -> str:
    """One sentence on how the branches of a run differ, from its ``exploration.explorer``."""
    explorer = mapping(run.config, "exploration").get("explorer")
    return DIFFERENCES.get(str(explorer), "Branches are alternatives from a fork of one video.")


def is_anchor(member: Entry) -> bool:
    """True for the unrouted anchor of a group."""
    return member.get("name") == "anchor"


def read_group(entry: Entry) -> GroupFacts:
    """Collect the facts about a group."""
    members = members_of(entry)
    advantages = [abs(a) for m in members if (a := number(m.get("advantage"))) is not None]
    return GroupFacts(
        entry=entry,
        members=members,
        frames=whole(entry.get("num_frames")),
        fork=whole(entry.get("fork_frame")),
        window=whole(entry.get("window_frames")) or 0,
        switches=segments_of(entry)[1],
        acts=[str(act) for act in entry.get("acts", ())],
        anchor_reward=next((number(m.get("reward")) for m in members if is_anchor(m)), None),
        largest_advantage=max(advantages, default=0.0),
    )


def read_context_size(run: RunRecord) -> ContextSize:
    """Context sizes of a run. A window of -1 sees the whole past; missing settings count as 0."""
    stream, exploration = numbers(run.config.get("stream")), numbers(run.config.get("exploration"))
    sink, window = int(stream.get("sink", 0)), int(stream.get("window", 0))
    past = Deployment(int(stream.get("block", 0)), window, sink).local_past
    return ContextSize(
        sink=sink,
        recent=int(exploration.get("recent", 0)),
        local_past=10**9 if past is None else max(0, past),
        resident=int(exploration.get("resident_frames", 0)),
    )


def routes_of(member: Entry) -> tuple[Counter[int], Counter[tuple[int, str]]]:
    """Count the routed slots filled by each own frame, and by each (frame, prompt) from another history."""
    own: Counter[int] = Counter()
    donors: Counter[tuple[int, str]] = Counter()
    routed = member.get("routed_frames")
    for entry in routed if isinstance(routed, list) else ():
        if isinstance(entry, dict) and (frame := whole(entry.get("frame"))) is not None:
            donors[frame, str(entry.get("prompt", "another prompt"))] += 1
        elif (frame := whole(entry)) is not None:
            own[frame] += 1
    return own, donors


def _range(role: str, start: int, stop: int, meaning: str = "") -> list[Span]:
    """One span, or none if it would be empty."""
    return (
        [Span(role, start, stop, f"{meaning or role}: frames {start} to {stop - 1}")] if stop > start else []
    )


def spans_of(group: GroupFacts, member: Entry, size: ContextSize) -> list[Span]:
    """The frames that the first routed block of ``member`` attends to, and those explored from there."""
    if group.fork is None:
        return []
    sink = min(size.sink, group.fork)
    recent = max(sink, group.fork - (size.local_past if is_anchor(member) else size.recent))
    own, donors = routes_of(member)
    spans = _range("sink", 0, sink) + _range("recent", recent, group.fork)
    spans += _range("explored", group.fork, group.fork + group.window)
    spans += [
        Span("routed", f, f + 1, f"routed: frame {f}, {counted(n, 'slot')}") for f, n in sorted(own.items())
    ]
    spans += [
        Span("donor", f, f + 1, f"donor: frame {f} of \u201c{prompt}\u201d, {counted(n, 'slot')}")
        for (f, prompt), n in sorted(donors.items())
    ]
    return spans


def slot_spans(group: GroupFacts, size: ContextSize) -> list[Span]:
    """The spans of the whole group: sink, pool that routes are drawn from, recent, explored, after it."""
    if group.fork is None or group.frames is None:
        return []
    fork, end = group.fork, min(group.frames, group.fork + group.window)
    sink = min(size.sink, fork)
    recent = max(sink, fork - size.recent)
    kept = number(group.entry.get("resident_frames"))
    resident = size.resident if kept is None else int(kept)
    pool = max(sink, fork - (resident - size.sink)) if resident else sink
    return (
        _range("sink", 0, sink)
        + _range("pool", pool, recent, "routes are drawn from here")
        + _range("recent", recent, fork)
        + _range("explored", fork, end)
        + _range("after", end, group.frames, "deployment context again")
    )


def strip(spans: list[Span], switches: list[int], frames: int, *, labelled: bool = False) -> str:
    """A timeline: frames from left to right coloured by role, prompt switches and a playhead."""
    marks = "".join(
        f'<i class="{span.role}" title="{escape(span.title)}" style="left:{100 * span.start / frames:.3f}%;'
        f'width:{100 * (min(span.stop, frames) - span.start) / frames:.3f}%">'
        f"{span.role if labelled else ''}</i>"
        for span in spans
        if span.start < frames
    )
    cuts = "".join(f'<i class="cut" style="left:{100 * switch / frames:.3f}%"></i>' for switch in switches)
    kind = "strip labelled" if labelled else "strip"
    return f'<div class="{kind}" style="--frames:{frames}">{marks}{cuts}<i class="playhead"></i></div>'


def _still(member: Entry, store: ClipStore, frame: int, frames: int | None) -> str:
    """A thumbnail of one history frame; empty unless the video is small enough for a sprite sheet."""
    clip = store.get("branches", member.get("video"))
    if clip is None or clip["kind"] != "sprite" or not frames or frame >= frames:
        return ""
    name = escape(f"branches/{member.get('video')}")
    return (
        f'<canvas class="still" width="{clip["width"]}" height="{clip["height"]}" data-clip="{name}" '
        f'data-still="{frame * clip["frames"] // frames}" aria-hidden="true"></canvas>'
    )


def _route_line(member: Entry, store: ClipStore, frames: int | None) -> str:
    """The routed frames as thumbnails and numbers; donors with the prompt that they come from."""
    own, donors = routes_of(member)
    if not own and not donors:
        return '<p class="route">deployment context</p>'

    def times(count: int) -> str:
        return f" \u00d7{count}" if count > 1 else ""

    slots = [
        f'<span class="slot">{_still(member, store, frame, frames)}{frame}{times(count)}</span>'
        for frame, count in sorted(own.items())
    ]
    slots += [
        f'<span class="slot donor">donor {frame}{times(count)}</span>'
        f'<span class="soft donor-prompt" dir="auto" title="{escape(prompt)}">'
        f"\u201c{escape(prompt)}\u201d</span>"
        for (frame, prompt), count in sorted(donors.items())
    ]
    return f'<p class="route"><span class="soft">routed</span> {"".join(slots)}</p>'


def _rows(group: GroupFacts, member: Entry) -> list[tuple[str, str]]:
    """(name, value as HTML) of a member's numbers."""
    values = numbers(member)
    difference = ""
    if not is_anchor(member) and "reward" in values and group.anchor_reward is not None:
        change = values["reward"] - group.anchor_reward
        difference = f' <span class="{tone_of(change)}">{signed(change)}</span>'
    rows = [("reward", f"<b>{fixed(values.get('reward'))}</b>{difference}")]
    rows += [(key, fixed(values[key])) for key in ("local", "global") if key in values]
    rows += [(key, significant(values[key])) for key in RESIDUALS if key in values]
    if "advantage" in values:
        value, bar = values["advantage"], ""
        if group.largest_advantage:
            half = 50 * abs(value) / group.largest_advantage
            place = f"left:{50 if value >= 0 else 50 - half:.1f}%;width:{half:.1f}%"
            bar = f'<i class="diverging"><i class="{"up" if value >= 0 else "down"}" style="{place}"></i></i>'
        rows.append(("advantage", signed(value, 2) + bar))
    if "probability" in values:
        share = min(100.0, max(0.0, 100 * values["probability"]))
        bar = f'<i class="share"><i style="width:{share:.1f}%"></i></i>'
        rows.append(("probability", fixed(values["probability"]) + bar))
    return rows


def _who_is_back(group: GroupFacts, member: Entry) -> str:
    if (look := member.get("shows")) is None:
        return ""
    whose = f"act {group.acts.index(look) + 1}'s" if look in group.acts else "of no act before:"
    return f'<p class="back">{whose} <b>{escape(look)}</b></p>'


def _member(group: GroupFacts, member: Entry, position: int, store: ClipStore, size: ContextSize) -> str:
    name, values = str(member.get("name", "branch")), numbers(member) | {"order": position}
    table = "".join(f"<div><dt>{key}</dt><dd>{value}</dd></div>" for key, value in _rows(group, member))
    timeline = strip(spans_of(group, member, size), group.switches, group.frames) if group.frames else ""
    data = "".join(f' data-{key}="{values.get(key, "")}"' for key in (sort.lstrip("-") for sort in SORTS))
    picture = screen(store, "branches", member.get("video"), f"{name} of {group.title}")
    return (
        f'<article class="member{" anchor" if is_anchor(member) else ""}"{data}><h4>{escape(name)}</h4>'
        f"{_who_is_back(group, member)}{picture}{timeline}{_route_line(member, store, group.frames)}"
        f"<dl>{table}</dl></article>"
    )


def _group(run: RunRecord, store: ClipStore, entry: Entry, identity: str, *, hidden: bool) -> str:
    group, size = read_group(entry), read_context_size(run)
    cards = "".join(_member(group, m, i, store, size) for i, m in enumerate(group.members))
    shown = {"order", *(key for member in group.members for key in numbers(member))}
    options = "".join(
        f'<option value="{sort}">{"as saved" if key == "order" else key}</option>'
        for sort in SORTS
        if (key := sort.lstrip("-")) in shown
    )
    sizes, slots, jump = "", "", ""
    acts = ", ".join(f"act {n} <b>{escape(act)}</b>" for n, act in enumerate(group.acts, start=1))
    if group.fork is not None and group.frames:
        sizes = f"fork at frame {group.fork}, then {group.window} explored frames"
        slots = strip(slot_spans(group, size), group.switches, group.frames, labelled=True)
        jump = f'<button type="button" data-seek="{group.fork / group.frames:.5f}">Go to the fork</button>'
    return (
        f'<div class="group-panel film" id="{identity}" {film_data(entry, group.frames)}'
        f'{" hidden" if hidden else ""}><div class="card lead"><header><h3>{escape(group.title)}</h3>'
        f'<span class="soft">{sizes}</span></header>{captions(entry, group.frames)}{slots}'
        f"{f'<p>Shown so far: {acts}</p>' if acts else ''}"
        f'<div class="toolbar"><label>Sort <select data-sort="{identity}-members">{options}</select></label>'
        f'{jump}<label class="check"><input type="checkbox" data-difference> difference to the anchor</label>'
        f'</div></div><div class="members" id="{identity}-members">{cards}</div></div>'
    )


LEGEND = (
    '<p class="note strip-legend"><span><i class="sink"></i>sink</span>'
    '<span><i class="routed"></i>routed</span><span><i class="donor"></i>from another prompt</span>'
    '<span><i class="recent"></i>recent</span>'
    '<span><i class="explored"></i>explored: the frames generated with them</span></p>'
    '<p class="note">The strip under a video shows what the first block after the fork attends to. '
    "Up to the fork all members are the same.</p>"
)


APART = (
    '<p class="note">Advantages are of components one by one, each in units of its own spread in the group '
    "(rewards.fusion), so they need not follow the reward.</p>"
)


LEFT_OPEN = (
    " The last caption leaves open who returns, and the anchor sees only act 1 (the sink) and the act before "
    "the fork. Who is back is read off the pixels after the explored frames, and so is who played in the "
    "acts before."
)


def explorer(run: RunRecord, store: ClipStore) -> str:
    """Groups of branches in tabs, then the causality groups, whose branches were routed to acts 1 and 2."""
    if not run.groups and not run.causality:
        return '<p class="missing">No branch groups have been saved (branches/branches.json).</p>'
    fusion = mapping(run.config, "rewards").get("fusion", "rewards")
    parts = [LEGEND] if fusion == "rewards" else [LEGEND, APART]
    if len(run.groups) > 1:
        tabs = "".join(
            f'<button type="button" role="tab" aria-selected="{"true" if i == 0 else "false"}" '
            f'aria-controls="group-{i}">{escape(group.get("title", "Group"))}</button>'
            for i, group in enumerate(run.groups)
        )
        parts.append(f'<div class="tabs" role="tablist">{tabs}</div>')
    parts += [_group(run, store, group, f"group-{i}", hidden=i > 0) for i, group in enumerate(run.groups)]
    if run.causality:
        open_ended = any("acts" in group for group in run.causality)
        heading = "Who comes back?" if open_ended else "Does the routed history cause the difference?"
        parts.append(
            f'<h3 class="group" id="causality">{heading}</h3><p class="note">Same prompt and same noise; '
            f"only the acts that the routed frames come from differ.{LEFT_OPEN if open_ended else ''}</p>"
        )
        parts += [
            _group(run, store, group, f"causality-{i}", hidden=False) for i, group in enumerate(run.causality)
        ]
    return "".join(parts)
