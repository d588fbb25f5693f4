"""Metrics of every update, with their meanings and their aggregation from groups to an update.

Names, meanings and values of metrics come from here and from the method's own ``metrics``. The report reads
the meanings that the run wrote.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from kvpo.method.advantage import reward_spread
from kvpo.method.evidence import Credit, Metric, Metrics

GROUP_METRICS = {
    "reward_mean": Metric("Mean reward of the branches; it follows the prompts, so read the held-out curve."),
    "anchor_reward": Metric("Mean reward of the unrouted anchors."),
    "reward_spread": Metric(
        "Spread of the rewards within a group (ddof 1), which the noise floor is compared with."
    ),
    "above_anchor": Metric("Share of branches that score above their anchor."),
    "branch_distance": Metric("Distance between the latents of two branches; 0 would mean no exploration."),
    "anchor_distance": Metric("Distance between the latents of a branch and its anchor."),
}
"""Reported for every group, including skipped ones."""

UPDATE_METRICS = {
    "skipped_fraction": Metric("Share of groups whose reward spread is noise; they are not trained on."),
    "velocity_kl": Metric(
        "Squared distance of the velocities from the starting policy's, over the groups that measure it."
    ),
    "gradient_norm": Metric("Gradient norm before clipping."),
    "gradient_coverage": Metric(
        "Share of the trained tensors with a gradient: 0.5 in the first update of a fresh adapter, then 1."
    ),
    "advantage_mean": Metric("Mean advantage of the trained branches; 0 where they are centred."),
    "advantage_std": Metric("Spread of the advantages of the trained branches within a group (ddof 0)."),
    "withheld_fraction": Metric("Share of branches whose positive advantage selective fusion took away."),
    "rollout_gap": Metric(
        "Squared difference of the anchors' velocities between quantised rollout and replay, as a share of "
        "that between branches and anchor; only where rollouts are quantised."
    ),
    "learning_rate": Metric("Learning rate of the update, constant after its warm-up."),
    "idle_updates": Metric("Updates in a row in which nothing was learned."),
    "forks": Metric("How many groups forked at which frame."),
    "switch_forks": Metric("Share of groups that forked at a prompt switch."),
    "blocks": Metric("Routed blocks, where fewer fit than were asked for."),
    "tail_blocks": Metric("Blocks after the routed ones, where fewer fit than were asked for."),
    "routed": Metric("Routed slots, where fewer fit than were asked for."),
    "distinct": Metric("Distinct routed frames, where fewer fit than were asked for."),
    "seconds": Metric("Wall-clock seconds of the update."),
    "cpu_s": Metric("CPU-seconds that this process spent on the update."),
    "phases": Metric(
        "Seconds and bytes that each rank spent on rollout, decode, score, replay, reduce and save since the "
        "update before; the share of all time that ranks waited for others; samples per second and rank."
    ),
    "reward_cache_hits": Metric("Clips whose scores were read from the cache on disk."),
    "reward_cache_repeats": Metric("Clips that equal another clip of the same call."),
    "reward_cache_misses": Metric("Clips that were scored."),
    "device_peak_gb": Metric("Most device memory that tensors took during the update, in GB."),
}
"""Reported for an update as a whole."""


def group_metrics(rewards_M: Tensor, latents_M: Tensor, *, relative_to_anchor: bool = True) -> Metrics:
    """``GROUP_METRICS`` of one group from rewards [M] and latents of the window [M, ...], anchor last."""
    rewards_G, anchor = rewards_M[:-1], rewards_M[-1]
    return {
        "reward_mean": float(rewards_G.mean()),
        "anchor_reward": float(anchor),
        "reward_spread": float(reward_spread(rewards_G, anchor if relative_to_anchor else None)),
        "above_anchor": float((rewards_G > anchor).double().mean()),
        "branch_distance": mean_pairwise_distance(latents_M[:-1]),
        "anchor_distance": mean_distance(latents_M[:-1], latents_M[-1]),
    }


def advantage_metrics(credits: Sequence[Credit]) -> Metrics:
    """Mean and spread of trained advantages, averaged over groups, and the share of withheld branches."""
    branches = sum(len(credit.all_advantages_G) for credit in credits)
    return {
        "advantage_mean": _mean([float(credit.advantages_G.mean()) for credit in credits]),
        "advantage_std": _mean([float(credit.advantages_G.std(correction=0)) for credit in credits]),
        "withheld_fraction": sum(credit.withheld for credit in credits) / branches if branches else 0.0,
    }


def update_metrics(
    of_method: Mapping[str, Metric], trained: Sequence[Metrics], groups: Sequence[Metrics]
) -> Metrics:
    """Summarise an update from the metrics of all ``groups`` and of the ``trained`` ones (nan if none)."""
    numbers = {name: _mean([group[name] for group in groups]) for name in groups[0]}
    for name, metric in of_method.items():
        values = [found[name] for found in trained]
        numbers[name] = max(values, default=float("nan")) if metric.largest else _mean(values)
    return numbers | {"skipped_fraction": 1 - len(trained) / len(groups)}


def meanings(of_method: Mapping[str, Metric]) -> dict[str, dict[str, str]]:
    """Heading -> metric -> meaning, for every update metric that a run of a method writes.

    The headings separate the groups, the measurements of the method, and the update itself.
    """
    headings = {"Groups": GROUP_METRICS, "Method": of_method, "Update": UPDATE_METRICS}
    return {
        heading: {name: metric.meaning for name, metric in metrics.items()}
        for heading, metrics in headings.items()
    }


def mean_pairwise_distance(latents: Tensor) -> float:
    """sqrt(mean (x_g - x_h)^2) over the elements of [G, ...], averaged over pairs g < h."""
    rows = latents.flatten(1)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return float(torch.pdist(rows).mean()) / rows.shape[1] ** 0.5


def mean_distance(latents: Tensor, anchor: Tensor) -> float:
    """sqrt(mean (x_g - x_anchor)^2) over the elements of [G, ...] and [...], averaged over branches."""
    difference = (latents - anchor).flatten(1)
    difference = difference.to(torch.promote_types(difference.dtype, torch.float32))
    return float(difference.square().mean(dim=1).sqrt().mean())


def _mean(values: Sequence[float]) -> float:
    """Mean; nan if there are no values."""
    return sum(values) / len(values) if values else float("nan")
