"""One update: collect a rollout, learn from it, take a step; and everything a resumed run needs."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from kvpo.engine.forks import fork_numbers, plan_forks, shrunk_fields
from kvpo.method.diagnostics import advantage_metrics, update_metrics
from kvpo.method.evidence import Metrics
from kvpo.method.methods import METHODS
from kvpo.models.adapters import LORA_TARGETS
from kvpo.models.finite import NonFiniteError, first_non_finite, magnitudes, require_finite
from kvpo.training.backbone import Weights
from kvpo.training.collection import Collected, collect
from kvpo.training.gradients import Learner, accumulate_gradients
from kvpo.training.learning import IDLE_UPDATES, why_nothing_is_learned
from kvpo.training.policy import MovingAverage, Sides, policy_of
from kvpo.training.ranks import Ranks, teams_of
from kvpo.training.reduction import Gradients, OrderedSum, digest, taken
from kvpo.training.setup import Setup
from kvpo.training.sharding import local, shard, spread_like
from kvpo.training.state import load_moments, moment_of, moments_of

logger = logging.getLogger(__name__)
T = TypeVar("T")

BETAS, WEIGHT_DECAY = (0.9, 0.999), 0.01
"""AdamW's settings as KVPO was published, which are torch's defaults."""
WARMUP_UPDATES = 5
"""Updates over which the learning rate rises, as published: AdamW's first steps follow single gradients."""
GRADIENT_NORM = 1.0
"""Gradients are clipped to this norm, as published, so that no single group decides an update."""


def learning_rate_factor(update: int) -> float:
    """Linear warm-up whose first update already trains: (update + 1) / WARMUP_UPDATES, at most 1."""
    return min(1.0, (update + 1) / WARMUP_UPDATES)


class Trainer:
    """Owns the trained parameters, the optimiser and the moving average of one run."""

    def __init__(self, setup: Setup) -> None:
        config, spread = setup.config.optim, setup.config.distributed
        self.setup = setup
        self.teams = teams_of(setup.ranks, spread.branch_ranks)
        self.sharded = spread.shard and self.teams.team.count > 1
        if self.sharded:  # afterwards, mismatched parts could not be detected
            weights = list(setup.model.parameters())
            setup.ranks.demand_equal(lambda: {"weights": digest(weights)}, "loading the generator")
            shard(setup.model, self.teams.team, setup.generator.device)
        self.policy = policy_of(setup.model)
        self.average = MovingAverage(self.policy.parameters, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            list(self.policy.parameters.values()), betas=BETAS, weight_decay=WEIGHT_DECAY
        )  # every update sets its learning rate
        self.learner = Learner(
            generator=setup.generator,
            policy=self.policy,
            average=self.average.values,
            method=METHODS[setup.config.method],
            settings=setup.config.method_settings,
            velocity_kl=setup.config.objective.velocity_kl,
            rows=config.replay_rows,
            teams=self.teams,
        )
        self.update = 0
        self.collected: list[Collected] = []
        """Rollouts that wait for their updates."""
        self.warned_of: set[str] = set()
        self.idle_updates = 0
        """Updates in a row, up to the last one, in which nothing was learned."""

    def step(self) -> dict[str, Any]:
        """Make one update on the next collected rollout and return its metrics.

        Weights do not change if the rollout has no group worth training on. Raises ValueError when a reward
        fails and NonFiniteError when a number is not finite. After any exception, parameters, average,
        optimiser and the number of updates are as they were before.
        """
        optim = self.setup.config.optim
        rate = optim.lr * learning_rate_factor(self.update)
        found: list[Metrics] = []
        numbers = {"velocity_kl": math.nan, "gradient_norm": 0.0, "gradient_coverage": 0.0}
        try:
            self.collect()
            item = self.collected[0]
            if item.credits:
                with self._all_or_nothing():
                    found, numbers = self._learn(item, rate)
                    self.update += 1  # here, so that parameters and count are never saved apart
            else:
                self.update += 1
        except NonFiniteError as error:
            raise NonFiniteError(f"update {self.update + 1}: {error}") from error
        self.collected.pop(0)
        item.rollout.release()
        self._say_what_is_not_learned(item, numbers["gradient_coverage"])
        summary = update_metrics(self.learner.method.metrics, found, item.found) | numbers
        summary |= advantage_metrics(list(item.credits.values()))
        asked, planned = self.setup.config.exploration, item.rollout.planned
        forks = fork_numbers(planned.prompts, planned.forks, asked, block=self.setup.generator.block)
        return summary | forks | {"learning_rate": rate, "idle_updates": float(self.idle_updates)}

    def collect(self) -> None:
        """Collect the rollouts of the next ``rollouts_per_refresh`` updates, unless one is already waiting.

        Raises the same errors as ``step``, and then leaves the trainer as it was.
        """
        optim = self.setup.config.optim
        if self.collected:
            return
        updates = range(self.update, min(self.update + optim.rollouts_per_refresh, optim.updates))
        for update in updates:
            self._say_what_shrank(update)
        self.collected = collect(self.setup, self.learner, updates)

    def _learn(self, item: Collected, rate: float) -> tuple[list[Metrics], dict[str, float]]:
        """Make all passes over a rollout; return the method's metrics and the numbers of the last pass."""
        optim = self.setup.config.optim
        for epoch in range(optim.inner_epochs):
            found, drift = self._differentiate(item, on_policy=item.fresh and epoch == 0)
            with self.setup.ranks.together("taking the step"):
                for group in self.optimizer.param_groups:
                    group["lr"] = rate
                norm, coverage = self._clip_gradient()
                self.optimizer.step()
                self.optimizer.zero_grad(set_to_none=True)
                way_out = f"lower optim.lr = {optim.lr}"
                values = {name: local(value.detach()) for name, value in self.policy.parameters.items()}
                require_finite(values, "parameters after the step", way_out)
                moments = moments_of(self.optimizer, self.policy.parameters)
                moments = {name: local(one) for name, one in moments.items() if not name.endswith(".step")}
                require_finite(moments, "optimiser's state after the step", way_out)
        self.average.update(self.policy.parameters)
        return found, {"velocity_kl": drift, "gradient_norm": norm, "gradient_coverage": coverage}

    def _differentiate(self, item: Collected, *, on_policy: bool) -> tuple[list[Metrics], float]:
        """Store the gradient of the mean loss over all ranks' lessons in the parameters' ``.grad``.

        Returns the lessons' metrics, in order, and the mean velocity KL of the lessons that have one, or nan.
        """
        ranks, teams, parameters = self.setup.ranks, self.teams, list(self.policy.parameters.values())
        # With sharded weights, the team's gradients are added up as they are computed.
        adding, team = (teams.peers, 1) if self.sharded else (ranks, teams.team.count)
        total, found, doing = OrderedSum(adding, parameters, team), {}, "computing gradients"
        planned, lessons = item.rollout.planned, len(item.credits)
        turns = planned.turns(teams.count)
        for at in range(0, len(turns), teams.count):
            turn = turns[at : at + teams.count]
            if not any(group in item.credits for groups in turn for group in groups):
                continue
            gradients: list[list[Gradients]] = []
            with ranks.together(doing), teams.team.together(doing), ranks.clock("replay"):
                for group in (group for groups in teams.peers.share(turn) for group in groups):
                    parts: list[Gradients] = []
                    if group in item.lessons:
                        old, lesson = None if on_policy else item.old_tables[group], item.lessons[group]
                        apart = parts if team > 1 else None
                        found[group] = accumulate_gradients(self.learner, lesson, old, lessons, apart)
                    gradients.append(parts if team > 1 else [taken(parameters)])
            cells = max(ranks.gather(max(map(len, gradients), default=0), doing)) if team > 1 else 1
            with ranks.clock("reduce"):
                total.add(gradients, slots=len(turns[0]), cells=cells)
        with ranks.clock("reduce"):
            total.store()
        every = {group: one for own in ranks.gather(found, doing) for group, one in own.items()}
        in_order = [every[group] for group in item.credits]
        drifts = [drift for _, drift in in_order if not math.isnan(drift)]
        return [metrics for metrics, _ in in_order], sum(drifts) / len(drifts) if drifts else math.nan

    def _clip_gradient(self) -> tuple[float, float]:
        """Clip the gradient; return its norm before, and the share of trained tensors where it is nonzero."""
        config, parameters = self.setup.config.optim, self.policy.parameters
        gradients = {name: local(p.grad) for name, p in parameters.items() if p.grad is not None}
        bad, sizes = first_non_finite(gradients), magnitudes(gradients.values())
        if self.sharded:
            sizes = torch.stack(self.teams.team.gather(sizes, "taking the step")).amax(0)
        whole = nn.utils.clip_grad_norm_(list(parameters.values()), GRADIENT_NORM)
        norm = float(whole.full_tensor() if isinstance(whole, DTensor) else whole)
        if bad or not math.isfinite(norm):
            where = f" ({bad[0]} holds {bad[1]})" if bad else ""
            raise NonFiniteError(f"the gradient is not finite; lower optim.lr = {config.lr}{where}")
        return norm, int((sizes > 0).sum()) / len(parameters)

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """If the block raises, restore parameters, average, optimiser and the number of updates.

        The copy that this needs is in host memory, like a checkpoint's while it is written. The average needs
        no copy, since its tensors are replaced and never modified in place.
        """
        tensors, state = self.tensors_and_state()
        before = {
            name: local(value).to("cpu", copy=True)
            if name.startswith(("parameters.", "optimizer."))
            else value
            for name, value in tensors.items()
        }
        try:
            yield
        except BaseException:  # Ctrl-C too: the state before the update is then saved
            self.optimizer.zero_grad(set_to_none=True)
            self.restore(before, state)
            raise

    def _say_what_is_not_learned(self, item: Collected, coverage: float) -> None:
        """Warn once several updates in a row taught nothing, and say why."""
        self.idle_updates = 0 if coverage else self.idle_updates + 1
        if self.idle_updates == IDLE_UPDATES:
            why = why_nothing_is_learned(
                item.credits.values(), item.found, self.policy.parameters, self.setup.config
            )
            logger.warning(
                "nothing was learned in %d updates up to update %d: %s", IDLE_UPDATES, self.update, why
            )

    def _say_what_shrank(self, update: int) -> None:
        """Warn once about each setting that shrinks at every fork of a video; metrics cover every group."""
        asked, deployment = self.setup.config.exploration, self.setup.generator.deployment
        for prompt in self.setup.training_prompts(update):
            most = plan_forks([prompt], asked, deployment).roomiest[-1].exploration
            for name, (wanted, fits) in shrunk_fields(asked, most).items():
                if name not in self.warned_of:
                    self.warned_of.add(name)
                    logger.warning(
                        "exploration.%s = %d is more than fits the videos of update %d, "
                        "which goes on with %d; the metrics say where else it shrinks",
                        name,
                        wanted,
                        update + 1,
                        fits,
                    )

    def demand_equal_ranks(self) -> None:
        """Raise RankError unless all ranks are at the same update of the same run with the same weights."""
        config, tensors = self.setup.config, self.tensors_and_state()[0]
        weights: object = digest([tensors[name] for name in sorted(tensors)])
        if self.sharded:
            weights = self.teams.team.gather(weights, f"update {self.update}")
        self.setup.ranks.demand_equal(
            lambda: {
                "update": self.update,
                **{f"settings of {name}": repr(value) for name, value in vars(config).items()},
                "base": self.setup.backbone.weights.base_sha256,
                "weights": weights,
            },
            f"update {self.update}",
        )

    def at_boundary(self) -> bool:
        """True unless a refresh is partly used up: only at a boundary can a run be resumed exactly."""
        return not self.collected or self.collected[0].fresh

    def tensors_and_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: parameters, moving average, optimiser, update."""
        moments = moments_of(self.optimizer, self.policy.parameters)
        tensors = self._values() | {f"optimizer.{name}": value for name, value in moments.items()}
        counts = {"averaged": self.average.updates, "idle": self.idle_updates}
        return tensors, {"update": self.update, **counts}

    def _values(self) -> dict[str, Tensor]:
        """Parameters, their moving average and their starting values, sharing memory."""
        kinds = {
            "parameters": self.policy.parameters,
            "average": self.average.values,
            "starting": self.policy.starting_values or {},
        }
        return {f"{kind}.{name}": one.detach() for kind, own in kinds.items() for name, one in own.items()}

    @property
    def sides(self) -> Sides:
        """The current base and aligned policy; the moving average is what is judged and exported."""
        return Sides(self.policy, self.average.values)

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Restore ``tensors_and_state`` bit for bit; for sharded tensors, this rank's parts suffice."""
        for name, value in self._values().items():
            local(value).copy_(local(tensors[name]))
        moments = {
            name.removeprefix("optimizer."): spread_like(self._like(name), value) if value.dim() else value
            for name, value in tensors.items()
            if name.startswith("optimizer.")
        }
        load_moments(self.optimizer, self.policy.parameters, moments)
        self.update = int(state["update"])
        self.average.updates = int(state["averaged"])
        self.idle_updates = int(state.get("idle", 0))  # earlier versions did not count them

    @property
    def sharing(self) -> Ranks:
        """Ranks that may run different work: with sharded weights, only ranks of different teams."""
        return self.teams.peers if self.sharded else self.setup.ranks

    def solo(self, doing: str, action: Callable[[], T]) -> T:
        """Run ``action`` on rank 0 only, or on every rank if weights are sharded."""
        if not self.sharded:
            return self.setup.ranks.once(doing, action)
        with self.setup.ranks.together(doing):
            return action()

    def spread_tensors(self, file: Path) -> dict[str, Tensor]:
        """The sharded tensors of a checkpoint, by name, each with a tensor that is sharded alike."""
        with safe_open(file, "pt") as header:
            moments = [name for name in header.keys() if name.startswith("optimizer.")]
            spread = [name for name in moments if header.get_slice(name).get_shape()]
        return self._values() | {name: self._like(name) for name in spread}

    def _like(self, name: str) -> Tensor:
        """The parameter that a moment of the optimiser belongs to."""
        return self.policy.parameters[moment_of(name.removeprefix("optimizer."))]


def architecture(weights: Weights) -> dict[str, Any]:
    """The settings that must match for a checkpoint's tensors to fit."""
    optim = weights.config.optim
    return {
        "model": asdict(weights.config.model),
        "base": weights.base_sha256,
        "adapter": {"rank": optim.lora_rank, "targets": list(LORA_TARGETS)} if optim.lora_rank else None,
    }
