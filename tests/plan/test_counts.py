"""Operations, traffic and bytes of the planner against counts of what a small transformer computes."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kvpo.app.configuration import preset
from kvpo.app.plan import Planner
from kvpo.engine.generator import StreamingGenerator
from kvpo.models.adapters import LORA_TARGETS
from kvpo.models.cache import FrameCache, PageShape
from kvpo.models.causal_wan import CausalWan
from kvpo.models.context import PageContext
from kvpo.models.settings import WanShape
from kvpo.plan import phases as planned
from kvpo.plan.cost import (
    Costs,
    Work,
    backward_work,
    blocks_work,
    forward_work,
    members_work,
    replay_work,
)
from kvpo.plan.flops import Call, adapter_flops, attention_flops, encode_flops, velocity_flops
from kvpo.plan.memory import Parameters, answer_bytes, evidence_bytes, parameters_of
from kvpo.plan.phases import Rates, _replay_work
from kvpo.plan.replays import replays_of
from tests.models.tiny import tiny_model

SHAPE = WanShape(
    dim=24, num_heads=2, num_layers=3, ffn_dim=40, freq_dim=16, text_len=6, text_dim=10, channels=4,
    patch_size=(1, 2, 2), latent_height=4, latent_width=6,
)  # fmt: skip
ROWS, BLOCK, CONTEXT = 5, 3, 4
RATES = Rates(150e12, 1e12)


def counted(monkeypatch: pytest.MonkeyPatch, *, encode: bool) -> tuple[float, float]:
    """Multiplications with additions, twice each, of one pass: all of them, and those of attention."""
    model, linear, attention = tiny_model(SHAPE), [0.0], [0.0]

    def of_linear(module: nn.Linear, inputs: object, out: torch.Tensor) -> None:
        linear[0] += 2.0 * out.numel() * module.in_features

    def of_patches(module: nn.Conv3d, inputs: object, out: torch.Tensor) -> None:
        linear[0] += 2.0 * out.numel() * module.in_channels * math.prod(module.kernel_size)

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_hook(of_linear)
        elif isinstance(module, nn.Conv3d):
            module.register_forward_hook(of_patches)
    plain = F.scaled_dot_product_attention

    def watched(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: object) -> torch.Tensor:
        attention[0] += 4.0 * q.numel() * k.shape[2]
        return plain(q, k, v, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    cache = FrameCache(PageShape(3, SHAPE.tokens_per_frame, 2, 12), CONTEXT)
    empty = torch.zeros(3, 1, CONTEXT, SHAPE.tokens_per_frame, 2, 12)
    pages = torch.tensor(cache.write(empty, empty)).expand(ROWS, CONTEXT)
    with torch.no_grad():
        model(
            torch.randn(ROWS, BLOCK, 4, 4, 6),
            torch.full((ROWS,), 0.5),
            torch.randn(1, 6, 10),
            PageContext(cache, pages, torch.full((ROWS,), CONTEXT)),
            text_rows=torch.zeros(ROWS, dtype=torch.long),
            encode=encode,
        )
    return linear[0] + attention[0], attention[0]


def test_operations_of_a_forward_pass_are_those_that_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    call = Call(SHAPE, ROWS, BLOCK, CONTEXT)
    every, attention = counted(monkeypatch, encode=False)
    assert velocity_flops(call) == every and attention_flops(call) == attention


def test_operations_of_a_clean_pass_are_those_that_it_does(monkeypatch: pytest.MonkeyPatch) -> None:
    assert encode_flops(Call(SHAPE, ROWS, BLOCK, CONTEXT)) == counted(monkeypatch, encode=True)[0]


def test_an_adapter_adds_its_rank_times_inputs_and_outputs() -> None:
    modules = dict(tiny_model(SHAPE).named_modules())
    expected = 0.0
    for layer in range(3):
        for target in LORA_TARGETS:
            module = modules[f"blocks.{layer}.{target}"]
            assert isinstance(module, nn.Linear)
            tokens = 6 if target in ("cross_attn.k", "cross_attn.v") else ROWS * BLOCK * 6
            expected += 2 * tokens * 7 * (module.in_features + module.out_features)
    assert adapter_flops(Call(SHAPE, ROWS, BLOCK, CONTEXT), 7) == expected


def test_in_float32_an_adapter_is_added_to_the_weights_once_for_all_passes() -> None:
    narrow, wide = costs_of(), costs_of(**{"optim.autocast": "none"})
    shape, rank = wide.shape, wide.config.optim.lora_rank
    numbers = shape.num_layers * (8 * shape.dim**2 + 2 * shape.dim * shape.ffn_dim)
    assert wide.adapter(1) == wide.adapter(5, 7) == 2 * rank * numbers
    assert narrow.adapter(5, 7) == 7 * narrow.beside(5) == 7 * wide.beside(5) > 0
    with torch.device("meta"):
        model = CausalWan(shape)
    assert parameters_of(wide.config, model, 4).summed == 4 * numbers
    held = parameters_of(narrow.config, model, 2)
    assert held.summed == 0 and held.narrowed == 2 * held.trained == held.adapter / 2
    assert parameters_of(wide.config, model, 4).narrowed == 0


def test_quantised_weights_count_where_they_stand_in_no_other_copys_place() -> None:
    """Numbers of 8 bits, and a scale per output, in the phases that explore or overlap with it."""
    changes = {"optim.rollout_precision": "fp8"}
    narrow, wide = costs_of(**changes), costs_of(**changes, **{"optim.autocast": "none"})
    with torch.device("meta"):
        model = CausalWan(narrow.shape)
    numbers = sum(
        one.weight.numel() + 4 * one.out_features
        for name, one in model.named_modules()
        if isinstance(one, nn.Linear) and name.startswith("blocks.")
    )
    found = parameters_of(narrow.config, model, 2)
    assert found.quantised == numbers and parameters_of(costs_of().config, model, 2).quantised == 0
    assert parameters_of(wide.config, model, 4).quantised == 0, "the sums with the adapter are larger"
    phases = {
        one.name: one.parts.get("quantised weights", 0)
        for one in Planner(narrow.config, RATES).plan(narrow.config).phases
    }
    assert {name for name, size in phases.items() if size == numbers} == {"explore", "decode", "score"}
    assert sum(phases.values()) == 3 * numbers


def costs_of(**changes: object) -> Costs:
    config = preset("longlive-1.3b", changes)
    return Costs(config, config.model, weight_bytes=1000.0, page_bytes=10.0, frames=30)


def test_blocks_read_weights_and_pages_at_every_step_and_write_their_own() -> None:
    costs = costs_of()
    steps, block = len(costs.config.stream.schedule), costs.config.stream.block
    work = blocks_work(costs, 7, ROWS, 5)
    call = Call(costs.shape, ROWS, block, 5)
    assert costs.adapter(ROWS) > 0
    assert work.flops == pytest.approx(
        7 * (steps * velocity_flops(call) + encode_flops(call) + (steps + 1) * costs.adapter(ROWS)), rel=1e-12
    )
    assert work.bytes == 7 * ((steps + 1) * (1000 + ROWS * 5 * 10) + ROWS * block * 10)
    assert blocks_work(costs, 7, ROWS) == blocks_work(costs, 7, ROWS, costs.context)
    last = blocks_work(costs, 7, ROWS, 5, last=True)
    assert work.flops - last.flops == pytest.approx(encode_flops(call) + costs.adapter(ROWS), rel=1e-9)
    assert work.bytes - last.bytes == 1000 + ROWS * (5 + block) * 10


def test_first_blocks_take_their_own_solver_steps() -> None:
    """Four steps in the first block and two in the others, and the plan's roots begin videos."""
    changes = {"stream.schedule": (1.0, 0.5), "stream.schedule_first": (1.0, 0.75, 0.5, 0.25)}
    costs, four = costs_of(**changes), costs_of(**{"stream.schedule": changes["stream.schedule_first"]})
    expected = blocks_work(four, 1, ROWS) + blocks_work(costs, 6, ROWS)
    assert blocks_work(costs, 7, ROWS, first=True) == expected
    assert blocks_work(four, 7, ROWS, first=True) == blocks_work(four, 7, ROWS)
    plans = [
        Planner(c.config, RATES).plan(c.config) for c in (costs, costs_of(**{"stream.schedule": (1.0, 0.5)}))
    ]
    assert plans[0].seconds > plans[1].seconds


def test_members_are_routed_in_the_window_and_deployed_elsewhere() -> None:
    """The last block of each has no clean pass: of the tail or, without one, of the window."""
    for tail in (3, 0):
        costs, groups = costs_of(**{"exploration.tail_blocks": tail}), 4
        exploration = costs.config.exploration
        routed, deployed = blocks_work(costs, 1, ROWS, costs.routed), blocks_work(costs, 1, ROWS)
        last_routed = blocks_work(costs, 1, ROWS, costs.routed, last=True)
        last_deployed = blocks_work(costs, 1, ROWS, last=True)
        branches, blocks = groups * exploration.branches, exploration.blocks
        work = members_work(costs, groups, ROWS)
        for part in ("flops", "bytes"):
            own, other = vars(routed)[part], vars(deployed)[part]
            expected = branches * blocks * own + (groups * blocks + (branches + groups) * tail) * other
            expected += branches * vars(last_deployed if tail else last_routed)[part]
            expected += groups * vars(last_deployed)[part]
            expected -= (branches * (other if tail else own)) + groups * other
            assert vars(work)[part] == pytest.approx(expected / ROWS, rel=1e-12)


def test_context_counts_sink_window_routes_and_bank() -> None:
    costs = costs_of(**{"exploration.routed": 2, "exploration.distinct": 2, "exploration.recent": 3})
    bank = replace(costs.config, stream=replace(costs.config.stream, bank=("memflow",)))
    unlimited = replace(costs.config, stream=replace(costs.config.stream, window=-1))
    assert (costs.context, costs.routed) == (9, 3 + 2 + 3)
    assert (replace(costs, config=bank).context, replace(costs, config=bank).routed) == (12, 11)
    assert replace(costs, config=unlimited).context == 30


def test_work_adds_up() -> None:
    assert Work(1.0, 2.0) + Work(3.0, 5.0).times(2) == Work(7.0, 12.0)


def test_the_old_policy_is_replayed_once_more() -> None:
    config = preset("longlive-1.3b", {"optim.rollouts_per_refresh": 2, "optim.inner_epochs": 1})
    replays, costs = replays_of(config), costs_of()
    assert not replays.old
    more = _replay_work(config, replace(replays, old=True), costs)
    plain = _replay_work(config, replays, costs)
    once = replay_work(costs, 1, replays.together, replays.states, replays.steps)
    trained = config.optim.prompts_per_update * replays.trajectories
    assert more.flops - plain.flops == pytest.approx(trained * once.flops, rel=1e-9)
    assert more.bytes - plain.bytes == pytest.approx(trained * once.bytes, rel=1e-9)
    assert forward_work(costs, 2).bytes == 1000 + 2 * 9 * 10


def test_a_teacher_with_routed_history_is_asked_once_per_row() -> None:
    config, costs = (
        preset("longlive-1.3b", {"optim.rollouts_per_refresh": 1, "optim.inner_epochs": 2}),
        costs_of(),
    )
    replays = replace(replays_of(config), routed=0)
    once = replay_work(costs, 1, replays.together, replays.states, replays.steps)
    more = _replay_work(config, replace(replays, routed=3), costs).flops
    expected = 2 * 3 * config.optim.prompts_per_update * once.flops
    assert more - _replay_work(config, replays, costs).flops == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_prompts_are_embedded_before_anything_else_is_loaded(device: str) -> None:
    config = preset("longlive-1.3b", {"device": device})
    plan = Planner(config, RATES).plan(config)
    (phase,) = (one for one in plan.phases if one.name == "embed prompts")
    assert plan.total(phase) == phase.bytes + (planned.CONTEXT if device == "cuda" else 0)


def test_held_out_videos_are_planned_for_whichever_prompts_are_more() -> None:
    pages = []
    for validation, test in ((2, 8), (8, 2), (8, 8)):
        own = {"evaluation.validation_prompts": validation, "evaluation.test_prompts": test}
        config = preset("longlive-1.3b", {"exploration.rows": 0, **own})
        phases = {one.name: one.parts for one in Planner(config, RATES).plan(config).phases}
        pages.append(phases["stream held-out videos"]["pages"])
    assert pages[0] == pages[1] == pages[2]


def test_the_evidence_of_every_rollout_of_a_refresh_is_held_at_once() -> None:
    config = preset("longlive-1.3b", {"optim.rollouts_per_refresh": 3})
    phases = {one.name: one.parts for one in Planner(config, RATES).plan(config).phases}
    assert phases["replay and backward"]["evidence"] == 3 * evidence_bytes(config, replays_of(config))


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("train", ["lora", "full"])
def test_a_backward_pass_computes_input_gradients_and_those_of_what_is_trained(
    train: str, checkpointing: bool
) -> None:
    costs = costs_of(
        **{"optim.lora_rank": 0 if train == "full" else 16, "optim.checkpointing": checkpointing}
    )
    call, forward = costs.call(ROWS), forward_work(costs, ROWS)
    attention = attention_flops(call)
    linear = velocity_flops(call) - attention
    adapter = 0.0 if train == "full" else costs.adapter(ROWS)
    trained = linear if train == "full" else adapter
    backward = 2 * attention + linear + adapter + trained
    assert forward.flops == pytest.approx(attention + linear + adapter, rel=1e-12)
    work = backward_work(costs, ROWS)
    assert work.flops == pytest.approx(backward + checkpointing * forward.flops, rel=1e-12)
    assert work.bytes == (1 + checkpointing) * forward.bytes


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_the_host_holds_a_checkpoint_or_on_a_cpu_the_state_before_an_update(device: str) -> None:
    config = preset("longlive-1.3b", {"device": device})
    plan = Planner(config, RATES).plan(config)
    parameters = plan.parameters
    own = {name: size for name, size in plan.host.items() if name not in ("process", "pixels and clips")}
    if device == "cpu":
        assert own["state before the update"] == 12 * parameters.trained
        assert "checkpoint being written" not in own
    else:
        assert own["checkpoint being written"] == parameters.checkpoint
        assert "state before the update" not in own


@pytest.mark.parametrize("rows", [1, 3])
def test_roots_and_members_are_explored_a_few_rows_at_a_time(rows: int) -> None:
    config = preset("longlive-1.3b", {"optim.prompts_per_update": 6, "exploration.rows": rows})
    plan = Planner(config, RATES).plan(config)
    weights = plan.parameters.weights + plan.parameters.adapter
    costs = Costs(config, config.model, weights, plan.page, plan.fork)
    (phase,) = (one for one in plan.phases if one.name == "explore")
    roots = blocks_work(costs, plan.fork // 3, rows).times(6 / rows)
    expected = RATES.seconds(roots) + RATES.seconds(members_work(costs, 6, rows))
    assert phase.seconds == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("groups", "refresh", "beside"), [(1, 1, False), (2, 1, True), (1, 2, True)])
def test_scoring_meets_exploration_where_there_is_more_than_one_group(
    groups: int, refresh: int, beside: bool
) -> None:
    changes = {"optim.prompts_per_update": groups, "optim.rollouts_per_refresh": refresh}
    config = preset("longlive-1.3b", changes)
    phases = {one.name: one.parts for one in Planner(config, RATES).plan(config).phases}
    expected = phases["explore"]["activations"] if beside else 0.0
    for name in ("decode", "score"):
        assert phases[name].get("exploring at the same time", 0.0) == expected


@pytest.mark.parametrize(("together", "groups"), [(3, 1), (5, 1), (6, 2), (10, 2)])
def test_answers_are_a_target_per_row_and_velocities_of_two_policies_per_trajectory(
    together: int, groups: int
) -> None:
    config = preset("longlive-1.3b")
    replays = replace(replays_of(config), trajectories=5, rows=7, blocks=3, steps=2, together=together)
    block = 4 * config.stream.block * 16 * 60 * 104
    assert answer_bytes(config, replays) == groups * (7 + 2 * 5) * 3 * 2 * block


def test_bytes_of_parameters() -> None:
    adapter = Parameters(all=100, trained=10, frozen_size=2, adapted=True, second_copy=True)
    assert (adapter.weights, adapter.adapter, adapter.reference) == (200, 40, 40)
    assert (adapter.moments, adapter.average, adapter.checkpoint) == (80, 40, 40 + 40 + 80)
    assert replace(adapter, second_copy=False).reference == 0
    every = Parameters(all=100, trained=100, frozen_size=2, adapted=False, second_copy=True)
    assert (every.weights, every.adapter, every.reference) == (400, 0, 400)
    assert every.checkpoint == 400 + 400 + 800 + 400


def test_pages_that_a_block_keeps_gathered_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, for every row that explores together; on a GPU each call gathers them anew."""
    config = preset("longlive-1.3b", {"device": "cpu", "prompts.frames": [60]})  # re-encoding takes more
    planner, explored = Planner(config, RATES), []
    for keeps in (True, False):
        monkeypatch.setattr(StreamingGenerator, "keeps_contexts", keeps)
        plan = planner.plan(config)
        explored.append(next(one.parts["activations"] for one in plan.phases if one.name == "explore"))
    members = config.optim.prompts_per_update * (config.exploration.branches + 1)
    rows = min(config.exploration.rows or members, members)
    stream, exploration = config.stream.deployment, config.exploration
    assert stream.local_past is not None
    seen = stream.sink + max(stream.local_past, exploration.routed + exploration.recent)
    assert explored[0] - explored[1] == pytest.approx(rows * seen * plan.page, rel=1e-6)
