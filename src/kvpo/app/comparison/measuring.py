"""Measurements of a comparison: one policy on the final test prompts, which no run has seen."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from kvpo.app.build import build_setup, source_of
from kvpo.app.comparison.arms import PRETRAINING, TrainingArm
from kvpo.app.report_data import branch_diversity, laboratory, story_places
from kvpo.app.sources.common import FinalSet
from kvpo.config import Config, ExplorationConfig
from kvpo.engine.explorers import fresh_noise
from kvpo.report.headline import FEWEST_PROMPTS
from kvpo.training.checkpoint import BEST
from kvpo.training.evaluation import Evaluation, Judges
from kvpo.training.held_out import evaluate_prompts
from kvpo.training.policy import policy_of
from kvpo.training.ranks import ALONE, Ranks
from kvpo.training.run import Run
from kvpo.training.setup import Setup
from kvpo.training.trainer import Trainer, learning_rate_factor

FLOOR_SHARE = 4
"""Floor lines and the ceiling are measured on the first 1 / FLOOR_SHARE of every final set."""
PromptScores = dict[str, Any]
"""Scores by prompt: ``totals``, ``mismatched``, ``unseen``, and ``components`` by name."""


class PretrainingTrainer(Trainer):
    """Trains the same parameters with the base's pretraining loss, without a reward."""

    def step(self) -> dict[str, Any]:
        """Make one update on one batch of pretraining data."""
        pretraining = source_of(self.setup.config).pretraining
        assert pretraining is not None
        loss = pretraining(self.setup, self.update)
        loss.backward()
        norm, coverage = self._clip_gradient()
        rate = self.setup.config.optim.lr * learning_rate_factor(self.update)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.average.update(self.policy.parameters)
        self.update += 1
        return {"loss": float(loss.detach()), "gradient_norm": norm, "gradient_coverage": coverage}


def trainer_of(arm: TrainingArm, config: Config, ranks: Ranks) -> Trainer:
    """The trainer of an arm's run, without held-out prompts."""
    setup = replace(build_setup(config, ranks), validation={}, test={})
    return PretrainingTrainer(setup) if arm.method == PRETRAINING else Trainer(setup)


def record(found: Evaluation, judges: Judges) -> PromptScores:
    """An evaluation as a JSON record, with one entry per distinct prompt."""
    found = found.by_prompt()
    names = judges.scorer.components
    scores: PromptScores = {
        "totals": judges.totals(found).tolist(),
        "components": dict(zip(names, found.components_KN.tolist(), strict=True)),
    }
    if found.unseen_N is not None:
        scores["unseen"] = found.unseen_N.tolist()
    if found.mismatched_KN is not None:
        scores["mismatched"] = (judges.weights_K @ found.mismatched_KN).tolist()
    return scores


def on_validation_prompts(setup: Setup) -> dict[str, Any]:
    """Records of the current model by validation set."""
    sets = source_of(setup.config).split(setup.config)[1]
    return {
        name: record(evaluate_prompts(setup, own, ALONE, mismatched=True), setup.judges)
        for name, own in sets.items()
    }


def on_final_prompts(setup: Setup) -> dict[str, Any]:
    """Records of the current model by final set, and the ``diversity`` of videos of one prompt."""
    sets = source_of(setup.config).final(setup.config)
    found: dict[str, Any] = {name: final_record(setup, one) for name, one in sets.items()}
    return found | {"diversity": fresh_diversity(setup)}


MEASURED = {"final": on_final_prompts, "validation": on_validation_prompts}
"""Value of ``--split`` -> function that measures a run on it."""


def final_record(setup: Setup, one: FinalSet) -> PromptScores:
    """The record of the current model on one final set."""
    scored = {"mismatched": True, "first": one.first}
    return record(evaluate_prompts(setup, one.prompts, ALONE, setup.final_tape(), **scored), setup.judges)


def shortened(sets: Mapping[str, FinalSet]) -> dict[str, FinalSet]:
    """The first 1 / FLOOR_SHARE of every final set, at least two prompts."""
    return {name: replace(one, prompts=one.prompts[: max(2, len(one.prompts) // FLOOR_SHARE)])
            for name, one in sets.items()}  # fmt: skip


def fresh_diversity(setup: Setup) -> dict[str, float]:
    """Diversity of fresh-noise branches on a tape that all arms share; low if a policy shows few videos."""
    source = source_of(setup.config)
    config = replace(setup.config, exploration=ExplorationConfig())  # the same for all arms
    validation = source.split(config)[1]  # a run's own setup holds none
    if source.read_off is None or "long" not in validation:
        return {}
    weights = replace(setup.backbone.weights, config=config)
    whole = replace(setup, backbone=replace(setup.backbone, weights=weights), validation=validation)
    places = story_places(whole, FEWEST_PROMPTS)
    look = laboratory(whole, [prompt for place in places for prompt in place.prompts], whole.final_tape())
    (found,) = branch_diversity(look, places, ALONE, fresh_noise)
    return found


def best_of(setup: Setup, count: int) -> dict[str, PromptScores]:
    """Test-time selection: records of the best of ``count`` videos per prompt, by the trained reward."""
    found = {}
    for name, one in shortened(source_of(setup.config).final(setup.config)).items():
        tapes = [setup.final_tape(*member) for member in [(), *((n,) for n in range(1, count))]]
        found_of = [evaluate_prompts(setup, one.prompts, ALONE, tape, first=one.first) for tape in tapes]
        videos = [record(evaluation, setup.judges) for evaluation in found_of]
        best_N = torch.tensor([video["totals"] for video in videos]).argmax(0)
        found[name] = _selected(videos, best_N)
    return found


def _selected(videos: list[PromptScores], best_N: Tensor) -> PromptScores:
    def pick(rows: list[list[float]]) -> list[float]:
        return [rows[best][n] for n, best in enumerate(best_N.tolist())]

    parts = {name: pick([v["components"][name] for v in videos]) for name in videos[0]["components"]}
    plain = {key: pick([video[key] for video in videos]) for key in videos[0] if key != "components"}
    return {**plain, "components": parts}


def floor_line(config: Config, kind: str, count: int) -> dict[str, PromptScores]:
    """The base on part of the final sets: ``best-of`` ``count`` videos, or ``count`` solver ``steps``."""
    if kind == "steps":
        schedule = tuple(1 - n / count for n in range(count))
        config = replace(config, stream=replace(config.stream, schedule=schedule))
    setup = build_setup(config)
    with policy_of(setup.model).reference():
        if kind == "best-of":
            return best_of(setup, count)
        sets = shortened(source_of(config).final(config))
        return {name: final_record(setup, one) for name, one in sets.items()}


def trained(run: Run, measure: Any) -> dict[str, Any]:
    """The result of a trained run: the ``measure`` of its averaged weights, and its cost."""
    updates = run.trainer.update
    setup = run.setup
    with run.trainer.sides.aligned():
        found = measure(setup)
    (run.checkpoints / BEST).unlink(missing_ok=True)  # nothing was validated: the last checkpoint counts
    return {
        "results": found,
        "updates": updates,
        "cpu_s": run.cpu_s,
        "cpu_s_per_update": run.cpu_s / updates,
        "base_sha256": setup.backbone.weights.base_sha256,
    }
