"""The time that a run's updates take: phases, ranks, bytes and waiting."""

from collections.abc import Mapping, Sequence
from typing import Any

from kvpo.files import counted
from kvpo.report.elements import explained, table_card
from kvpo.report.formatting import compact, number, title_of
from kvpo.report.record import RunRecord

MEANINGS = {
    "rollout": "roots, branches and anchors",
    "decode": "latents to pixels, beside the next rollout",
    "score": "rewards, beside the next rollout",
    "replay": "evidence, tables and backward passes",
    "reduce": "gradients over ranks",
    "save": "the checkpoint before",
    "wait": "for other ranks, within any phase",
}


def phases(run: RunRecord) -> str:
    """Seconds per update in every phase (mean over ranks, and slowest rank), and the megabytes sent."""
    found = [entry["phases"] for entry in run.updates if isinstance(entry.get("phases"), dict)]
    if not found:
        return '<p class="missing">No update has recorded the times of its phases.</p>'
    seconds, sent = (_by_phase(found, kind) for kind in ("seconds", "bytes"))
    rows = []
    for name, ranks in seconds.items():
        bytes_sent = sum(sent[name]) / len(sent[name]) / 1e6 if name in sent else None
        rows.append(
            (
                explained(title_of(name), MEANINGS.get(name, "")),
                compact(sum(ranks) / len(ranks)),
                compact(max(ranks)),
                "" if bytes_sent is None else compact(bytes_sent),
            )
        )
    ranks = max((len(values) for values in seconds.values()), default=1)
    idle, samples = (_mean(found, name) for name in ("idle", "samples_per_second_and_rank"))
    note = f"{counted(ranks, 'rank')}, {compact(idle)} of their time spent waiting for others"
    note += f", {compact(samples)} samples per second and rank."
    return (
        table_card(("", "s per update", "slowest rank", "MB"), rows, "checks") + f'<p class="note">{note}</p>'
    )


def _by_phase(found: Sequence[Mapping[str, Any]], kind: str) -> dict[str, list[float]]:
    """Phase -> mean over updates for every rank; an update with fewer ranks counts only for those it had."""
    values: dict[str, list[list[float]]] = {}
    for entry in found:
        for name, ranks in (entry.get(kind) or {}).items():
            columns = values.setdefault(str(name), [])
            for rank, value in enumerate(ranks if isinstance(ranks, list) else []):
                columns += [[]] if rank == len(columns) else []
                columns[rank].append(number(value) or 0.0)
    return {name: [sum(own) / len(own) for own in columns] for name, columns in values.items() if columns}


def _mean(found: Sequence[Mapping[str, Any]], name: str) -> float | None:
    values = [value for entry in found if (value := number(entry.get(name))) is not None]
    return sum(values) / len(values) if values else None
