"""The training loop: rollout, credit, gradient, step; validation and checkpoints at update boundaries."""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from kvpo.engine.background import Submit, in_background
from kvpo.engine.forks import draw_forks, fork_numbers, plan_forks, shrunk
from kvpo.engine.noise import keyed_generator
from kvpo.engine.pages import PlannedRollout, cache_pages
from kvpo.engine.rollout import Group, Rollout, collect
from kvpo.engine.scoring import Scores, score_group
from kvpo.engine.stream import TextTable
from kvpo.method.diagnostics import (
    GroupDiagnostics,
    ObjectiveDiagnostics,
    group_diagnostics,
    update_diagnostics,
)
from kvpo.models.cache import FrameCache
from kvpo.models.finite import NonFiniteError, first_non_finite, magnitudes, require_finite
from kvpo.prompts import VideoPrompt
from kvpo.training.credit import assign_credit
from kvpo.training.gradients import (
    Replayer,
    Trained,
    accumulate_gradients,
    energies_of,
    members_together,
)
from kvpo.training.learning import PATIENCE, why_nothing_is_learned
from kvpo.training.policy import MovingAverage, policy_of
from kvpo.training.setup import Setup, Weights
from kvpo.training.state import (
    flatten_state,
    load_optimizer_state,
    optimizer_state,
    unflatten_state,
)

logger = logging.getLogger(__name__)


def learning_rate_factor(update: int, warmup_updates: int) -> float:
    """Linear warm-up whose first update already trains: (update + 1) / warmup, at most 1."""
    return min(1.0, (update + 1) / max(1, warmup_updates))


@dataclass(frozen=True)
class Explored:
    """A rollout whose scores may still be on their way."""

    rollout: Rollout
    texts: TextTable
    pending: list[Future[Scores]]
    """Of every group."""

    def scores(self) -> list[Scores]:
        """Scores of every group, waited for. Raises ValueError when the reward fails."""
        return [future.result() for future in self.pending]


@dataclass(frozen=True)
class Collected:
    """A scored rollout that waits for its update."""

    rollout: Rollout
    texts: TextTable
    trained: list[Trained]
    """Groups worth training on."""
    found: list[GroupDiagnostics]
    """What exploration found in all groups."""
    old_energies: list[Tensor]
    """Of the trained groups under the rollout policy; empty where no later step needs them."""
    fresh: bool
    """Its update comes first after the collection, so the rollout policy is the current one."""


class Trainer:
    """Owns the trained parameters, the optimiser and the moving average of one run."""

    def __init__(self, setup: Setup) -> None:
        config = setup.config.optim
        self.setup = setup
        self.policy = policy_of(setup.model, adapted=config.train == "lora")
        self.average = MovingAverage(self.policy.parameters, config.ema_decay)
        self.optimizer = torch.optim.AdamW(
            list(self.policy.parameters.values()),
            lr=config.lr,
            betas=config.betas,
            weight_decay=config.weight_decay,
        )
        self.update = 0
        self.pending: list[Collected] = []
        self.warned_of: set[str] = set()
        self.idle_updates = 0
        """Updates in a row, up to the last one, in which nothing was learned."""
        self.blend = setup.blend()

    def planned(self, update: int) -> PlannedRollout:
        """What the rollout of an update explores, shrunk to what fits its videos."""
        prompts, config = self.setup.training_prompts(update), self.setup.config
        deployment = self.setup.generator.deployment
        forks = draw_forks(prompts, config.exploration, deployment, (config.seed, update))
        self._say_what_shrank(update, prompts)
        blocks = min(fork.exploration.blocks for fork in forks)
        replayed = members_together(config.optim.replay_rows, blocks, config.objective.grad_steps)
        return PlannedRollout(prompts, forks, replayed)

    def new_cache(self, rollouts: Sequence[PlannedRollout]) -> FrameCache:
        """A page cache for rollouts that all wait for their replays in it."""
        return self.setup.generator.new_cache(cache_pages(self.setup.generator, rollouts))

    def explore(self, update: int) -> tuple[Rollout, list[Scores], TextTable]:
        """Collect and score the rollout of one update."""
        planned = self.planned(update)
        with in_background() as submit:
            explored = self.generate(update, planned, submit, self.new_cache([planned]))
            return explored.rollout, explored.scores(), explored.texts

    def generate(self, update: int, planned: PlannedRollout, submit: Submit, cache: FrameCache) -> Explored:
        """Collect the rollout of one update; finished groups are scored while the next ones are generated."""
        setup, config = self.setup, self.setup.config
        texts = setup.texts(planned.prompts)
        pending: list[Future[Scores]] = []

        def score(group: Group) -> None:
            judges, block = setup.judges, setup.generator.block
            plan = setup.clip_plan()
            pending.append(
                submit(partial(score_group, group, judges.codec, judges.scorer, block=block, plan=plan))
            )

        rollout = collect(
            setup.generator,
            planned.prompts,
            planned.forks,
            texts,
            setup.tape("training"),
            (config.seed, update),
            cache=cache,
            steps=config.objective.grad_steps,
            finished=score,
        )
        return Explored(rollout, texts, pending)

    def _say_what_shrank(self, update: int, prompts: Sequence[VideoPrompt]) -> None:
        """Warn once of each kind of shrinking that no fork of a video avoids; metrics have every group's."""
        asked, deployment = self.setup.config.exploration, self.setup.generator.deployment
        for prompt in prompts:
            most = plan_forks([prompt], asked, deployment).roomiest[-1].exploration
            for name, (wanted, fits) in shrunk(asked, most).items():
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

    def credit(
        self, update: int, rollout: Rollout, scores: Sequence[Scores]
    ) -> tuple[list[Trained], list[GroupDiagnostics]]:
        """Groups worth training on, and what exploration found in all of them."""
        config = self.setup.config
        trained, diagnostics = [], []
        for index, (group, score) in enumerate(zip(rollout.groups, scores, strict=True)):
            generator = keyed_generator("advantages", config.seed, update, index)
            credit = assign_credit(score, self.blend, config.objective, generator)
            totals = score.totals(self.blend.weights_K, config.objective.global_weight)
            window = group.clean_MTCHW[:, : group.window_frames]
            diagnostics.append(
                group_diagnostics(
                    totals[:-1],
                    totals[-1],
                    window[:-1],
                    window[-1],
                    relative_to_anchor=config.objective.advantages == "anchor",
                )
            )
            if credit is not None:
                trained.append(Trained(group, credit))
        return trained, diagnostics

    def replayer(self, texts: TextTable) -> Replayer:
        """Replays under the current policy."""
        return Replayer(
            generator=self.setup.generator,
            policy=self.policy,
            texts=texts,
            tape=self.setup.tape("training"),
            config=self.setup.config.objective,
            rows=self.setup.config.optim.replay_rows,
        )

    def collect(self) -> None:
        """Where no rollout is waiting, collect those of the next ``rollouts_per_refresh`` updates.

        Raises ValueError when a reward fails and NonFiniteError when latents, pixels or energies are not
        finite; the trainer is then as it was before.
        """
        config = self.setup.config.optim
        if self.pending:
            return
        updates = range(self.update, min(self.update + config.rollouts_per_refresh, config.updates))
        planned = [self.planned(update) for update in updates]
        cache = self.new_cache(planned)
        with in_background() as submit:
            explored = [
                self.generate(update, rollout, submit, cache)
                for update, rollout in zip(updates, planned, strict=True)
            ]
            scores = [item.scores() for item in explored]
        collected = []
        for update, item, score in zip(updates, explored, scores, strict=True):
            trained, found = self.credit(update, item.rollout, score)
            fresh = update == self.update
            needed = trained and (config.inner_epochs > 1 or not fresh)
            old = energies_of(self.replayer(item.texts), trained) if needed else []
            collected.append(Collected(item.rollout, item.texts, trained, found, old, fresh))
        self.pending = collected

    def step(self) -> dict[str, Any]:
        """One update on the next collected rollout; one without a group worth training on changes nothing.

        Raises ValueError when a reward fails and NonFiniteError when a number is not finite. Parameters,
        average, optimiser and the count of updates are then what they were before, whatever it raises.
        """
        config = self.setup.config.optim
        rate = config.lr * learning_rate_factor(self.update, config.warmup_updates)
        objectives, drift, norm, coverage = [], 0.0, 0.0, 0.0
        try:
            self.collect()
            item = self.pending[0]
            if item.trained:
                with self._all_or_nothing():
                    objectives, drift, norm, coverage = self._train(item, rate)
        except NonFiniteError as error:
            raise NonFiniteError(f"update {self.update + 1}: {error}") from error
        self.pending.pop(0)
        item.rollout.release()
        self.update += 1
        self._say_what_is_not_learned(item, coverage)
        numbers = update_diagnostics(objectives, item.found, velocity_kl=drift, gradient_norm=norm).to_dict()
        branches = sum(trained.group.branches for trained in item.trained)
        withheld = sum(trained.credit.withheld for trained in item.trained) / branches if branches else 0.0
        prompts = [group.root.prompt for group in item.rollout.groups]
        block = self.setup.generator.block
        forks = fork_numbers(prompts, item.rollout.forks, self.setup.config.exploration, block=block)
        found = {"learning_rate": rate, "withheld_fraction": withheld, "gradient_coverage": coverage}
        return numbers | forks | found | {"idle_updates": float(self.idle_updates)}

    @contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Undo what a block that raises has done to parameters and optimiser.

        The copy that this needs lies in host memory, as a checkpoint's does while it is written.
        """
        tensors, state = self.tensors_and_state()
        before = {
            name: value.to("cpu", copy=True) if name.startswith(("parameters.", "optimizer.")) else value
            for name, value in tensors.items()
        }
        try:
            yield
        except Exception:
            self.optimizer.zero_grad(set_to_none=True)
            self.restore(before, state)
            raise

    def _train(self, item: Collected, rate: float) -> tuple[list[ObjectiveDiagnostics], float, float, float]:
        """All passes over a rollout; diagnostics, velocity KL, gradient norm and coverage of the last one."""
        config, replayer = self.setup.config.optim, self.replayer(item.texts)
        for epoch in range(config.inner_epochs):
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            old = None if item.fresh and epoch == 0 else item.old_energies
            objectives, drift = accumulate_gradients(replayer, item.trained, old)
            norm, coverage = self._clip_gradient()
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            way_out = f"lower optim.lr = {config.lr}"
            require_finite(self.policy.parameters, "parameters after the step", way_out)
        self.average.update(self.policy.parameters)
        return objectives, drift, norm, coverage

    def _clip_gradient(self) -> tuple[float, float]:
        """Clip the gradient; its norm before, and the share of trained tensors of which it is not zero."""
        config, parameters = self.setup.config.optim, self.policy.parameters
        gradients = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        bad, sizes = first_non_finite(gradients), magnitudes(gradients.values())
        norm = float(nn.utils.clip_grad_norm_(list(parameters.values()), config.grad_clip))
        if bad or not math.isfinite(norm):
            where = f" ({bad[0]} holds {bad[1]})" if bad else ""
            raise NonFiniteError(f"the gradient is not finite; lower optim.lr = {config.lr}{where}")
        return norm, int((sizes > 0).sum()) / len(parameters)

    def _say_what_is_not_learned(self, item: Collected, coverage: float) -> None:
        """Warn once several updates in a row taught nothing, and say why."""
        self.idle_updates = 0 if coverage else self.idle_updates + 1
        if self.idle_updates == PATIENCE:
            why = why_nothing_is_learned(item.trained, item.found, self.policy.parameters, self.setup.config)
            logger.warning(
                "nothing was learned in %d updates up to update %d: %s", PATIENCE, self.update, why
            )

    def at_boundary(self) -> bool:
        """Whether no collected rollout is waiting: only then can the run be saved and resumed exactly."""
        return not self.pending

    def tensors_and_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Everything a resumed run needs: parameters, moving average, optimiser, update."""
        parameters = {f"parameters.{name}": p.detach() for name, p in self.policy.parameters.items()}
        average = {f"average.{name}": value for name, value in self.average.values.items()}
        moments, skeleton = flatten_state(optimizer_state(self.optimizer, self.policy.parameters))
        tensors = parameters | average | {f"optimizer.{name}": value for name, value in moments.items()}
        starting = self.policy.starting_values or {}
        tensors |= {f"starting.{name}": value for name, value in starting.items()}
        counts = {"averaged": self.average.updates, "idle": self.idle_updates}
        return tensors, {"update": self.update, **counts, "optimizer": skeleton}

    @property
    def aligned(self) -> Mapping[str, Tensor]:
        """The trained values that are judged and exported (``evaluation.weights``), for ``exchanged``."""
        if self.setup.config.evaluation.weights == "raw":
            return {name: p.data for name, p in self.policy.parameters.items()}
        return self.average.values

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Continue from ``tensors_and_state``, to the bit."""
        with torch.no_grad():
            for name, parameter in self.policy.parameters.items():
                parameter.copy_(tensors[f"parameters.{name}"])
            for name, value in self.average.values.items():
                value.copy_(tensors[f"average.{name}"])
            for name, value in (self.policy.starting_values or {}).items():
                value.copy_(tensors[f"starting.{name}"])
        moments = {
            name.removeprefix("optimizer."): value
            for name, value in tensors.items()
            if name.startswith("optimizer.")
        }
        saved = unflatten_state(moments, state["optimizer"])
        load_optimizer_state(self.optimizer, self.policy.parameters, saved)
        self.update = int(state["update"])
        self.average.updates = int(state.get("averaged", self.update))  # 0.1.0 did not count them
        self.idle_updates = int(state.get("idle", 0))


def architecture(weights: Weights) -> dict[str, Any]:
    """What must agree for a checkpoint's tensors to fit."""
    optim = weights.config.optim
    adapter = {"rank": optim.lora_rank, "alpha": optim.lora_alpha, "targets": list(optim.lora_targets)}
    return {
        "model": asdict(weights.config.model),
        "base": weights.base_sha256,
        "train": optim.train,
        "adapter": adapter if optim.train == "lora" else None,
    }
