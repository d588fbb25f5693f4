"""What the plan counts of a shared run is what ranks hold, do and send."""

import json
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kvpo.app.cli import main
from kvpo.app.configuration import preset
from kvpo.app.plan import Planner
from kvpo.engine.generator import StreamingGenerator
from kvpo.plan.phases import Rates
from kvpo.plan.replays import replays_of
from kvpo.plan.splits import Sharing, splits
from kvpo.training.gradients import accumulate_gradients
from kvpo.training.ranks import Ranks
from kvpo.training.reduction import OrderedSum
from kvpo.training.sharding import local
from kvpo.training.trainer import Trainer
from tests.ranks import on_ranks
from tests.tiny_world import tiny_config, toy_setup

RATES = Rates(250e12, 3e12)


def planned(config: Any, split: Sharing) -> Any:
    return Planner(config, RATES).plan(config, split)


@pytest.mark.parametrize(("rows", "turn"), [(4, 1), (8, 2)])
def test_gradients_wait_for_their_turn_beside_their_sum(
    rows: int, turn: int, tiny_base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes of gradients while the last of four groups is replayed: one or two groups are one turn."""
    config = tiny_config(tiny_base, exploration__rows=rows, optim__prompts_per_update=4)
    trainer = Trainer(toy_setup(config))
    sums: list[OrderedSum] = []
    waiting: list[Any] = []
    most: list[int] = []
    parameters = list(trainer.policy.parameters.values())

    def summed(*given: Any) -> OrderedSum:
        sums.append(OrderedSum(*given))
        return sums[-1]

    def replayed(*given: Any) -> Any:
        found = accumulate_gradients(*given)
        own = [parameter.grad for parameter in parameters]
        alive = [one() for one in waiting]
        held = [*sums[-1].parts, *own, *(one for one in alive if one is not None)]
        most.append(sum(one.nbytes for one in held))
        waiting.extend(map(weakref.ref, own))
        return found

    monkeypatch.setattr("kvpo.training.trainer.OrderedSum", summed)
    monkeypatch.setattr("kvpo.training.trainer.accumulate_gradients", replayed)
    trainer.step()
    (phase,) = (one for one in planned(config, Sharing()).phases if one.name == "replay and backward")
    assert len(most) == 4 and most[-1] == max(most) == (1 + turn) * sum(one.nbytes for one in parameters)
    assert most[-1] == sum(size for name, size in phase.parts.items() if "gradients" in name)


def test_teams_stay_within_a_node() -> None:
    found = [(one.branch_ranks, one.shard, one.teams) for one in splits(4, 2)]
    assert found == [(1, False, 8), (2, False, 4), (2, True, 4), (4, False, 2), (4, True, 2)]
    assert list(splits(1, 1)) == [Sharing()]


def counted(ranks: Ranks, base: Path, settings: dict[str, Any]) -> dict[str, float]:
    """Passes over states, bytes of gradients sent, and bytes of a rank's parts, in one update."""
    config = tiny_config(base, **settings)
    trainer = Trainer(replace(toy_setup(config), ranks=ranks))
    calls = {"velocity": 0, "backward": 0}
    velocity = StreamingGenerator.velocity

    def watched(generator: Any, x: Any, *given: Any) -> Any:
        calls["velocity"] += len(x)
        found = velocity(generator, x, *given)
        calls["backward"] += len(x) * found.requires_grad
        return found

    StreamingGenerator.velocity = watched  # type: ignore[method-assign]
    try:
        trainer.step()
    finally:
        StreamingGenerator.velocity = velocity  # type: ignore[method-assign]
    parts = sum(local(value).nbytes for value in trainer.policy.model.parameters())
    return calls | {"sent": ranks.clock.bytes["reduce"], "weights": parts}


@pytest.mark.parametrize(("count", "size", "shard"), [(2, 1, False), (2, 2, False), (2, 2, True)])
def test_ranks_do_and_send_what_the_plan_says(
    count: int, size: int, shard: bool, tiny_base: Path, tmp_path: Path
) -> None:
    settings = {"exploration__rows": 4, "optim__replay_rows": 4, "optim__prompts_per_update": 3,
                "distributed__branch_ranks": size, "distributed__shard": shard}  # fmt: skip
    config, split = tiny_config(tiny_base, **settings), Sharing(count, size, shard, count)
    plan = planned(config, split)
    every = on_ranks(count, tmp_path / "ranks", counted, tiny_base, settings)
    replays = split.replayed(replays_of(config))
    groups = split.share(config).optim.prompts_per_update
    for found in every:
        assert isinstance(found, dict), found
        if not shard:  # of spread weights FSDP sends the team's
            expected = split.exchanged(split.share(config), plan.parameters, replays)
            assert found["sent"] == pytest.approx(expected, rel=0.02)  # parts are rounded up
        weights = plan.standing["weights"] + plan.standing["adapter"]
        assert found["weights"] == pytest.approx(weights, rel=0.15 if shard else 1e-6)
    busiest = max(found["backward"] for found in every)
    assert busiest == groups * replays.trajectories * replays.blocks * replays.steps


def test_more_ranks_take_less_of_each_and_say_what_they_send() -> None:
    config = preset("wan-14b", {"optim.prompts_per_update": 8, "rewards.scorers": ["flicker"]})
    one, groups, teams, spread = (
        planned(config, split)
        for split in (Sharing(), Sharing(8, 1), Sharing(8, 8), Sharing(8, 8, True, 8))
    )  # fmt: skip
    assert one.seconds > 7 * (groups.seconds - exchange(groups)) > 7 * groups.seconds / 2
    assert teams.seconds < one.seconds / 2
    for name in ("weights", "adapter", "optimiser", "moving average"):
        assert groups.standing[name] == teams.standing[name] == 8 * spread.standing[name]
    every = preset("wan-14b", {"optim.lora_rank": 0, "rewards.scorers": ["flicker"]})
    whole, spread_out = (planned(every, split).standing for split in (Sharing(), Sharing(8, 8, True, 8)))
    assert whole["starting policy"] == 8 * spread_out["starting policy"] > 0
    assert exchange(one) == 0 < exchange(groups) < exchange(spread)
    of_a_layer = (one.standing["weights"] + one.standing["adapter"]) / config.model.num_layers
    assert spread.standing["gathered layers"] == pytest.approx(2 * of_a_layer)  # this one, and the next
    within, across = (planned(config, Sharing(8, 1, False, per_node)) for per_node in (8, 4))
    assert exchange(across) / exchange(within) == pytest.approx(RATES.link / RATES.network)


def exchange(plan: Any) -> float:
    return sum(phase.seconds for phase in plan.phases if phase.name == "exchange")


def test_the_command_recommends_a_split_that_fits(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "plan.json"
    command = ["plan", "--preset", "wan-14b", "--rewards.scorers", "flicker", "--optim.checkpointing", "true",
               "--gpus", "8", "--gpu-memory", "141", "--json", str(file)]  # fmt: skip
    assert main(command) == 0
    numbers, printed = json.loads(file.read_text()), capsys.readouterr().out
    best = numbers["splits"][0]
    assert numbers["seconds_per_update"] == best["seconds_per_update"]
    fitting = [one for one in numbers["splits"] if one["fits"]]
    assert best == min(fitting or numbers["splits"], key=lambda one: one["seconds_per_update"])
    assert len(numbers["splits"]) == 7
    assert f"--distributed.branch_ranks {best['branch_ranks']}" in printed
    assert main(["plan", "--preset", "demo", "--gpus", "0"]) == 2
    assert "--gpus: must be at least 1, got 0" in capsys.readouterr().err


def test_the_advice_for_several_gpus_is_a_split_and_flags_that_fit(tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "plan.json"
    command = ["plan", "--preset", "wan-14b", "--rewards.scorers", "flicker", "--gpus", "8",
               "--gpu-memory", "80", "--json", str(file)]  # fmt: skip
    assert main(command) == 0
    numbers, printed = json.loads(file.read_text()), capsys.readouterr().out
    assert not numbers["fits"] and not any(one["fits"] for one in numbers["splits"])
    assert f"add: {' '.join(numbers['add'])}\n" in printed and "take:" not in printed
    flags = [word for flag in numbers["add"] for word in flag.split()]
    assert main([*command, *flags]) == 0
    named = flags[flags.index("--distributed.branch_ranks") + 1], "--distributed.shard" in flags
    (chosen,) = (
        one
        for one in json.loads(file.read_text())["splits"]
        if (str(one["branch_ranks"]), one["shard"]) == named
    )
    assert chosen["fits"]


def test_a_run_that_cannot_fit_is_refused_unless_told(
    monkeypatch: Any, tiny_base: Path, tmp_path: Path
) -> None:
    from kvpo.app import plan

    config = replace(tiny_config(tiny_base), device="cuda")

    class Card:
        total_memory = 1e6

    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Card)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="device: the run needs .* GB while it does .* --anyway to try"):
        plan.say_what_is_needed(config, 1, anyway=False)
    plan.say_what_is_needed(config, 1, anyway=True)
    Card.total_memory = 1e12
    plan.say_what_is_needed(config, 1, anyway=False)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    Card.total_memory = 48e9
    shared = "add --backbone.offload true --distributed.branch_ranks 2, or --anyway to try"
    with pytest.raises(ValueError, match=shared):
        plan.say_what_is_needed(preset("longlive-1.3b"), 8, anyway=False)
    shared = "of 6 ranks .* add --backbone.offload true --distributed.branch_ranks 3 --distributed.shard true"
    with pytest.raises(ValueError, match=shared):  # six ranks need not fill a node of eight GPUs
        plan.say_what_is_needed(preset("longlive-1.3b"), 6, anyway=False)
