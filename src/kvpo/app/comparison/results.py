"""The numbers of a comparison, computed from its pieces' scores by prompt."""

from collections.abc import Collection, Mapping, Sequence
from statistics import mean
from typing import Any

import torch
from torch import Tensor

from kvpo.app.comparison.plan import MethodComparison
from kvpo.app.comparison.statistics import least_p, permutation_p
from kvpo.report.null_runs import over_seeds
from kvpo.training.evaluation import paired_gain

COMPARED_WITH, NULL = "kvpo", "null"
"""The reference that other arms are compared with, and the arm with random advantages."""
Results = Mapping[str, Any]
"""Records by prompt set, as a piece holds them."""


def of_prompts_SN(runs: Sequence[Results], name: str, key: str = "totals") -> Tensor:
    """One number per run and prompt of a set, ``[seeds, prompts]``."""
    return torch.tensor([run[name][key] for run in runs], dtype=torch.float64)


def gains_SN(runs: Sequence[Results], bases: Sequence[Results], name: str, key: str = "totals") -> Tensor:
    """Paired gains ``[seeds, prompts]`` of an arm's runs on one set."""
    return of_prompts_SN(runs, name, key) - of_prompts_SN(bases, name, key)


def summarise(comparison: MethodComparison, floors: Sequence[str]) -> dict[str, Any]:
    """The contents of ``summary.json``. Raises ValueError if every run has failed."""
    seeds = [comparison.start.seed + seed for seed in range(comparison.seeds)]
    every = {
        arm.name: [comparison.result(f"run-{arm.name}-{seed}") for seed in range(comparison.seeds)]
        for arm in comparison.arms
    }
    failed = {
        arm: {str(seed): run["failed"] for seed, run in zip(seeds, own, strict=True) if "failed" in run}
        for arm, own in every.items()
    }
    ended = {arm: [run for run in own if "results" in run] for arm, own in every.items()}
    runs = {arm: own for arm, own in ended.items() if own}
    if not runs:
        one = next(error for own in failed.values() for error in own.values())
        raise ValueError(
            f"no run of {comparison.out} ended with finite numbers, so nothing is compared: {one}"
        )
    names = dict.fromkeys(["base", *(run["base"] for own in runs.values() for run in own)])
    found = {name: comparison.result(f"{name}-{comparison.split}") for name in names}
    bases = {arm: [found[run["base"]]["results"] for run in own] for arm, own in runs.items()}
    results = {arm: [run["results"] for run in own] for arm, own in runs.items()}
    base = found["base"]
    sets = [name for name in base["results"] if name != "diversity"]
    lines = {
        line: {name: _floor_gain(own, base["results"], name) for name in sets}
        for line, own in ((line, comparison.result(line)["results"]) for line in floors)
    }
    gains = {arm: {name: gains_SN(own, bases[arm], name) for name in sets} for arm, own in results.items()}
    rewards = {arm: {name: of_prompts_SN(own, name) for name in sets} for arm, own in results.items()}
    ceiling = next((own for line, own in lines.items() if line.startswith("best-of")), None)
    methods = {}
    for arm, own in runs.items():
        # The ceiling is known for the common base only, not for one with other stream settings.
        above = ceiling if own[0]["base"] == "base" else None
        # Once runs have failed, the remaining ones are not representative.
        tested = {other for other in (COMPARED_WITH, NULL) if not (failed[arm] or failed.get(other))}
        compared = (gains, rewards, results[arm], bases[arm], above, tested)
        methods[arm] = _costs(own) | {name: _on_set(arm, name, *compared) for name in sets}
    return {
        "commit": ", ".join(comparison.commits()),
        "base_sha256": base["base_sha256"],
        "preset": comparison.start.preset,
        "budget_cpu_s": comparison.budget_cpu_s,
        "tuning_trials": comparison.trials,
        "split": comparison.split,
        "trials": {arm.name: _tried(comparison, arm.method) for arm in comparison.arms if arm.tuned},
        "seeds": seeds,
        "least_p": least_p(comparison.seeds),
        "prompts": {name: len(base["results"][name]["totals"]) for name in sets},
        "bases": {
            name: {key: mean(one["results"][key]["totals"]) for key in sets}
            | {"diversity": one["results"].get("diversity", {})}
            for name, one in found.items()
        },
        "floors": lines,
        "failed": {arm: of_seeds for arm, of_seeds in failed.items() if of_seeds},
        "methods": methods,
    }


def _costs(runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    diversity = [run["results"].get("diversity", {}) for run in runs]
    return {
        "settings": runs[0]["settings"],
        "base": runs[0]["base"],
        "cpu_s": [run["cpu_s"] for run in runs],
        "updates": [run["updates"] for run in runs],
        "cpu_s_per_update": mean(run["cpu_s_per_update"] for run in runs),
        "diversity": {key: mean(one[key] for one in diversity) for key in diversity[0]},
    }


def _on_set(
    arm: str,
    name: str,
    gains: Mapping[str, Mapping[str, Tensor]],
    rewards: Mapping[str, Mapping[str, Tensor]],
    results: Sequence[Results],
    bases: Sequence[Results],
    ceiling: Mapping[str, Mapping[str, float]] | None,
    tested: Collection[str],
) -> dict[str, Any]:
    """The numbers of one arm on one prompt set, with p-values against the arms in ``tested``."""
    own = gains[arm][name]
    of_runs: list[float] = own.mean(1).tolist()
    numbers: dict[str, Any] = {
        "gains": of_runs,
        "mean": mean(of_runs),
        "std": over_seeds(of_runs),
        "standard_errors": [paired_gain(torch.zeros(own.shape[1]), row).standard_error for row in own],
        "components": {
            part: mean(_component_gain(*pair, name, part) for pair in zip(results, bases, strict=True))
            for part in results[0][name]["components"]
        },
    }
    for key in ("unseen", "mismatched"):
        if key in results[0][name]:
            numbers[key] = gains_SN(results, bases, name, key).mean(1).tolist()
    possible = 0.0 if ceiling is None else ceiling[name]["gain"]
    # Averaged over the prompts that the ceiling was measured on.
    closed = None if ceiling is None else float(own[:, : int(ceiling[name]["prompts"])].mean())
    numbers["gap_closed"] = None if closed is None or possible <= 0 else closed / possible
    # Compare rewards, not gains: an arm on its own base starts from another reward.
    reference = rewards.get(COMPARED_WITH, {}).get(name)
    compared = reference is not None and arm != COMPARED_WITH
    reached = rewards[arm][name]
    numbers["difference_to_kvpo"] = float(reached.mean() - reference.mean()) if compared else None
    numbers["p_against_kvpo"] = (
        permutation_p(reached, reference) if compared and COMPARED_WITH in tested else None
    )
    if NULL in gains and arm != NULL:  # compare gains: null runs start from the common base
        by_chance = gains[NULL][name].mean(1).tolist()
        numbers["p_against_null"] = permutation_p(own, gains[NULL][name]) if NULL in tested else None
        numbers["above_every_null"] = sum(gain > max(by_chance) for gain in of_runs)
    return numbers


def _component_gain(run: Results, base: Results, name: str, part: str) -> float:
    return mean(run[name]["components"][part]) - mean(base[name]["components"][part])


def _floor_gain(line: Results, base: Results, name: str) -> dict[str, float]:
    """Paired gain of a floor line on the prompts that it was measured on."""
    found = torch.tensor(line[name]["totals"])
    gain = paired_gain(torch.tensor(base[name]["totals"][: len(found)]), found)
    numbers = {"gain": gain.mean, "standard_error": gain.standard_error, "prompts": len(found)}
    if "unseen" in line[name]:
        numbers["unseen"] = mean(line[name]["unseen"]) - mean(base[name]["unseen"][: len(found)])
    return numbers


def _tried(comparison: MethodComparison, method: str) -> list[dict[str, Any]]:
    """Settings, validation gain and cost of every trial of a method."""
    every = [comparison.result(f"trial-{method}-{n}") for n in range(len(comparison.trials_of(method)))]
    return [{key: one[key] for key in ("settings", "gain", "updates", "cpu_s")} for one in every]
