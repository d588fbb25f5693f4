"""Causal History Routing: the past frames that a block may attend to (docs/method.md has the section).

Deployment:   sink ++ the `local_past` most recent frames
Exploration:  sink ++ `routed` frames of older history ++ the `recent` most recent frames

All counts are *past* frames; the block being denoised also attends to itself. With
routed + recent = local_past both contexts are equally long, and routing the most recent frames is deployment.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def visible_frames(start: int, sink: Sequence[int], recent: int | None) -> tuple[list[int], list[int]]:
    """Past frames visible to the block that starts at frame `start`, ascending: (sink frames, local frames).

    Local frames are the `recent` most recent ones (None: all) that fill no sink slot; in deployment, `recent`
    is `local_past`. A routed block sees its routed frames between the two.
    """
    oldest = 0 if recent is None else max(0, start - recent)
    local = [frame for frame in range(oldest, start) if frame not in sink]
    return [frame for frame in sink if frame < start], local


def route_pool(fork: int, *, sink: Sequence[int], recent: int, resident: int) -> tuple[int, ...]:
    """Routable frames at a fork: [fork - (resident - |sink|), fork - recent) except the sink's.

    `sink` holds the frames in the sink slots, which a prompt switch may have moved; `resident` history frames
    are kept, counting the sink (0: all). The result may be empty.
    """
    oldest = max(0, fork - (resident - len(sink))) if resident else 0
    return tuple(frame for frame in range(oldest, fork - recent) if frame not in sink)


def dispersed_routes(
    pool: Sequence[int], *, branches: int, routed: int, distinct: int, generator: torch.Generator
) -> Tensor:
    """Routes of G branches with the least possible overlap, int64 [G, routed], each ascending.

    Every branch gets its own set of `distinct` pool frames, repeated as evenly as possible to fill `routed`
    slots. If n_f branches use frame f, the overlap summed over pairs of branches is sum_f n_f (n_f - 1) / 2,
    which is least when no two n_f differ by more than one. Every pool frame is equally likely. Raises
    ValueError if the pool has fewer than G different sets, or `distinct` is not in 1..routed.
    """
    check_routes(len(pool), branches, routed, distinct)
    sets: list[frozenset[int]] = []
    while len(sets) < branches:
        drawn = frozenset(torch.randperm(len(pool), generator=generator)[:distinct].tolist())
        if drawn not in sets:
            sets.append(drawn)
    _balance(sets, len(pool))
    # Mapping labels to frames at random, after balancing, makes every frame equally likely.
    frames = torch.tensor(pool)[torch.randperm(len(pool), generator=generator)]
    distinct_GD = frames[torch.tensor([sorted(members) for members in sets])]
    return distinct_GD[:, torch.arange(routed) % distinct].sort(dim=1).values


def check_routes(pool_size: int, branches: int, routed: int, distinct: int) -> None:
    """Raise ValueError unless every branch can have its own set of frames."""
    if not 1 <= distinct <= routed:
        raise ValueError(f"distinct = {distinct}: must be between 1 and routed = {routed}")
    sets = math.comb(pool_size, distinct)
    if sets < branches:
        raise ValueError(
            f"branches = {branches}: a pool of {pool_size} frames has only {sets} different sets of "
            f"{distinct}; fork later, keep more resident frames, or lower branches, recent or distinct"
        )


def _balance(sets: list[frozenset[int]], pool_size: int) -> None:
    """Swap frames, in place, until the usage of any two differs by at most one; sets stay different.

    More sets contain the most used frame u than the least used v, so some set with u and without v becomes a
    new set when v takes the place of u. The loop swaps in that set.
    """
    usage = [sum(frame in members for members in sets) for frame in range(pool_size)]
    while max(usage) - min(usage) > 1:
        most, least = usage.index(max(usage)), usage.index(min(usage))
        exchanged = ((g, s - {most} | {least}) for g, s in enumerate(sets) if most in s and least not in s)
        branch, members = next((g, s) for g, s in exchanged if s not in sets)
        sets[branch] = members
        usage[most] -= 1
        usage[least] += 1
