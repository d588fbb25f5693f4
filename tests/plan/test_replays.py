"""What the planner counts of a method is what the trainer replays and holds."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpo.engine.replay import ReplayRow
from kvpo.method.methods import METHODS
from kvpo.plan.memory import clean_bytes, evidence_bytes, trajectory_bytes
from kvpo.plan.replays import Replays, replays_of
from kvpo.training import collection, gradients
from kvpo.training.collection import explore
from kvpo.training.trainer import Trainer
from tests.tiny_world import tiny_config, toy_setup

SOME = {"objective__keep": (1, 1), "exploration__tail_blocks": 0}
FITS, APART, SINGLE = 0, 4, 1
"""Forward rows per pass: a group at once, one trajectory of two blocks and two steps, one block and step."""


def counted_step(trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """States that one update replays: without gradients, under routed history, and with gradients."""
    found: Counter[str] = Counter()
    plain = gradients.replay_velocities

    def counting(generator: Any, rows: Sequence[ReplayRow], replay: Any, blocks: range) -> Any:
        kind = "gradient" if torch.is_grad_enabled() else "routed" if rows[0].routes else "plain"
        found[kind] += len(rows) * len(blocks) * rows[0].states_PSFCHW.shape[1]
        return plain(generator, rows, replay, blocks)

    monkeypatch.setattr(gradients, "replay_velocities", counting)
    trainer.step()
    return found


@pytest.mark.parametrize("rows", [FITS, APART, SINGLE])
@pytest.mark.parametrize("name", METHODS)
def test_replays_are_those_of_an_update(
    tiny_base: Path, monkeypatch: pytest.MonkeyPatch, name: str, rows: int
) -> None:
    config = tiny_config(tiny_base, method=name, optim__replay_rows=rows, **SOME)
    trainer = Trainer(toy_setup(config))
    found, replays = counted_step(trainer, monkeypatch), replays_of(config)
    groups = config.optim.prompts_per_update
    states = groups * replays.trajectories * replays.blocks * replays.steps
    assert found["gradient"] == states
    assert found["plain"] == states * (1 + replays.apart + replays.old)
    assert found["routed"] == groups * replays.routed * replays.blocks * replays.steps


@pytest.mark.parametrize("name", METHODS)
def test_a_rollout_and_its_lessons_hold_what_is_counted(tiny_base: Path, name: str) -> None:
    config = tiny_config(tiny_base, method=name, **SOME)
    setup = toy_setup(config)
    trainer, replays = Trainer(setup), replays_of(config)
    ((rollout, scores),) = explore(setup, [0])
    credits = collection.credits_of(setup, 0, dict(enumerate(scores)), None)
    lessons = collection.lessons_of(setup, trainer.learner, 0, rollout, credits).values()
    visited = [group.trajectories for group in rollout.groups]
    held = sum(one.states_MPSFCHW.nbytes + one.velocities_MPSFCHW.nbytes for one in visited)
    assert held == trajectory_bytes(config, replays)
    clean = sum(group.clean_MTCHW.nbytes for group in rollout.groups)
    clean += sum(block.nbytes for root in rollout.roots.values() for block in root.latents)
    forks = {group.fork for group in rollout.groups}
    assert len(forks) > 1 or clean == clean_bytes(config, *forks)
    evidence = [lesson.evidence for lesson in lessons]
    held = sum(one.states_QPSFCHW.nbytes + one.targets_NPSFCHW.nbytes for one in evidence)
    assert held == evidence_bytes(config, replays)
    rollout.release()


def test_a_method_is_asked_for_what_its_settings_say(tiny_base: Path) -> None:
    def replays(**settings: Any) -> Replays:
        return replays_of(tiny_config(tiny_base, **settings))

    assert replays().trajectories == 4 and replays().rows == 4  # three branches and the anchor
    assert replays(kvpo__anchor_state_weight=1.0).trajectories == 1  # the anchor serves every branch
    half = replays(kvpo__anchor_state_weight=0.5)
    assert (half.trajectories, half.rows) == (4, 7)
    assert replays(method="latent-distance").trajectories == 1
    assert replays(method="nft", nft__selective_kl=0.5).trajectories == 3
