"""What `kvpo plan` counts is what a run allocates."""

import json
import math
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import geometry_file, with_shape
from kvpo.app.build import build_setup
from kvpo.app.cli import main
from kvpo.app.configuration import preset
from kvpo.app.plan import Planner, advise, fits
from kvpo.app.presets import PRESETS
from kvpo.app.sources.common import streaming_generator
from kvpo.engine.generator import StreamingGenerator, TextRows
from kvpo.engine.pages import cache_pages
from kvpo.engine.stream import stream_latents
from kvpo.models.adapters import add_adapter
from kvpo.models.causal_wan import CausalWan
from kvpo.models.context import PageContext
from kvpo.models.geometry import GEOMETRIES
from kvpo.plan.cost import Costs, backward_work, forward_work
from kvpo.plan.flops import encode_flops
from kvpo.plan.memory import KEPT, Activations
from kvpo.plan.phases import Rates
from kvpo.training import collection
from kvpo.training.checkpoint import save_checkpoint
from kvpo.training.device import GB
from kvpo.training.trainer import Trainer, architecture
from tests.tiny_wan import tiny_wan

RATES = Rates(150e12, 1e12)


def plan_of(config):
    return Planner(config, RATES).plan(config)


def test_the_numbers_of_longlive():
    config = preset("longlive-1.3b")
    planner = Planner(config, RATES)
    plan = planner.plan(config)
    assert all(parameter.is_meta for parameter in planner.model.parameters())
    assert plan.parameters.all == 1_418_996_800
    assert plan.parameters.trained == 349_962_240
    assert plan.page == 287_539_200
    assert 33 * plan.page == pytest.approx(9.49e9, rel=1e-3)
    assert plan.standing["weights"] == 2 * plan.parameters.all


def test_the_cpu_by_another_name_is_the_cpu():
    plain, numbered = (plan_of(preset("demo", {"device": device})) for device in ("cpu", "cpu:0"))
    assert (plain.standing, plain.phases, plain.host) == (numbered.standing, numbered.phases, numbered.host)


@pytest.mark.parametrize("name", ["longlive-1.3b", "memflow-1.3b", "self-forcing-1.3b", "demo"])
def test_pages_parameters_and_checkpoints_are_what_a_run_allocates(tmp_path, name):
    if name == "demo":
        config = preset("demo", {"optim.prompts_per_update": 2, "evaluation.test_prompts": 2,
                                 "evaluation.validation_prompts": 2})  # fmt: skip
    else:
        config = tiny_wan(name, tmp_path, segments=2, optim__lora_rank=32)
    plan, trainer = plan_of(config), Trainer(build_setup(config))
    generator = trainer.setup.generator
    caches = [
        generator.new_cache(cache_pages(generator, [collection.plan_rollout(trainer.setup, update)]))
        for update in range(12)
    ]
    latest = max(caches, key=lambda cache: cache.num_pages)
    assert latest.page_bytes == plan.page
    allocated = latest.keys_LQTND.nbytes + latest.values_LQTND.nbytes
    assert allocated == pytest.approx(plan.pages * plan.page, rel=0.05)

    trained = trainer.policy.parameters
    frozen = [value for value in trainer.setup.model.parameters() if not value.requires_grad]
    assert sum(value.numel() for value in trained.values()) == plan.parameters.trained
    assert sum(value.nbytes for value in frozen) == plan.standing["weights"]
    for value in trained.values():
        value.grad = torch.zeros_like(value)
    trainer.optimizer.step()
    moments = sum(
        value.nbytes for state in trainer.optimizer.state.values() for value in state.values() if value.dim()
    )
    average = sum(value.nbytes for value in trainer.average.values.values())
    assert (moments, average) == (plan.standing["optimiser"], plan.standing["moving average"])
    tensors, state = trainer.tensors_and_state()
    path = save_checkpoint(
        tmp_path / "saved", 1, tensors, state, architecture=architecture(trainer.setup.backbone.weights)
    )
    assert (path / "state.safetensors").stat().st_size == pytest.approx(plan.checkpoint, rel=0.05)


@pytest.fixture
def cuda_autocast(monkeypatch):
    """Layer normalisation in float32 under autocast, as on a CUDA device; a CPU leaves it in bfloat16."""
    plain = F.layer_norm

    def wide(x, shape, weight=None, bias=None, eps=1e-5):
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (None if value is None else value.float() for value in (x, weight, bias))
        return plain(x, shape, weight, bias, eps)

    monkeypatch.setattr(F, "layer_norm", wide)


def kept_bytes(config, layers, rows):
    """Bytes of all tensors that torch keeps for the backward pass of ``rows`` states, parameters left out."""
    config = with_shape(config, num_layers=layers)
    model, optim = CausalWan(config.model), config.optim
    if optim.lora_rank:
        model.to(torch.bfloat16 if optim.autocast == "bfloat16" else torch.float32)
        draws = torch.Generator().manual_seed(0)
        add_adapter(model, optim.lora_rank, generator=draws)
    model.checkpointing = optim.checkpointing
    generator = streaming_generator(config, model)
    context = config.stream.window - config.stream.block
    cache = generator.new_cache(context)
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # held, or its address would be given away
        return tensor

    text = torch.zeros(1, config.model.text_len, config.model.text_dim)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        generator.velocity(
            torch.randn(rows, *generator.block_shape),
            torch.ones(rows),
            TextRows(text, torch.zeros(rows, dtype=torch.int64)),
            PageContext(cache, torch.zeros(rows, context, dtype=torch.int64), torch.full((rows,), context)),
        )
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("train", ["lora", "full"])
@pytest.mark.parametrize("autocast", ["none", "bfloat16"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_activations_are_those_that_torch_keeps(cuda_autocast, train, autocast, checkpointing):
    """Within ten percent, for each layer, at widths that the coefficients were not fitted to."""
    wide = replace(GEOMETRIES["1.3b"], dim=192, num_heads=3, ffn_dim=704, text_len=8, text_dim=16)
    config = preset("longlive-1.3b", {
        "device": "cpu", "backbone.geometry": geometry_file(wide), "stream.size": (8, 16),
        "optim.lora_rank": 24 if train == "lora" else 0, "optim.autocast": autocast,
        "optim.checkpointing": checkpointing,
    })  # fmt: skip
    layer = (kept_bytes(config, 3, 2) - kept_bytes(config, 1, 2)) / 2
    planned = with_shape(config, num_layers=1)
    assert Activations(planned, 9).held(2) == pytest.approx(layer, rel=0.1)


def test_the_advice_is_flags_that_fit(capsys, tmp_path):
    config = preset("longlive-1.3b", {"rewards.scorers": ["flicker"]})
    found = advise(Planner(config, RATES), config, 48 * GB)
    assert found is not None and found.changes_the_run and fits(found.plan, 48 * GB)
    assert not fits(plan_of(config), 48 * GB)
    flags = [word for flag in found.flags for word in shlex.split(flag)]
    out = tmp_path / "plan.json"
    command = ["plan", "--preset", "longlive-1.3b", "--rewards.scorers", "flicker", "--gpu-memory", "48"]
    assert main([*command, *flags, "--json", str(out)]) == 0
    assert "fits 48.00 GB" in capsys.readouterr().out
    numbers = json.loads(out.read_text())
    assert numbers["fits"] and numbers["peak"]["bytes"] == found.plan.total(found.plan.peak)


def test_no_lower_rank_is_advised_for_an_adapter_that_is_continued() -> None:
    served = {"device": "cpu", "rewards.scorers": ["hpsv3@http://127.0.0.1:8787"]}
    given = served | {"backbone.lora": "lora.pt"}
    merged = given | {"backbone.lora_start": "merge"}
    for changes, lowered in ((served, True), (given, False), (merged, True)):
        config = preset("longlive-1.3b", changes)
        found = advise(Planner(config, RATES), config, 24 * GB)
        assert any("optim.lora_rank" in flag for flag in (found.flags if found else ())) is lowered


def test_what_does_not_fit_at_all_says_so(capsys):
    assert main(["plan", "--preset", "wan-14b", "--gpu-memory", "8"]) == 0
    assert "does not fit 8.00 GB; move rewards to a reward server" in capsys.readouterr().out
    for reward in ("hpsv3@http://127.0.0.1:8787", "flicker"):  # there is nothing to move
        assert main(["plan", "--preset", "wan-14b", "--gpu-memory", "8", "--rewards.scorers", reward]) == 0
        assert "does not fit 8.00 GB; shrink the run" in capsys.readouterr().out


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_has_a_plan(name):
    config = preset(name)
    plan = plan_of(config)
    assert plan.total(plan.peak) > sum(plan.standing.values()) > 0
    assert plan.seconds > 0 and plan.pages > 0


def test_slower_devices_take_longer():
    config = preset("longlive-1.3b")
    fast, slow = (Planner(config, Rates(flops, 1e12)).plan(config).seconds for flops in (2e14, 1e14))
    assert slow == pytest.approx(2 * fast, rel=0.05)


@pytest.mark.parametrize("flag", ["--gpu-memory", "--tflops", "--bandwidth"])
def test_quantities_must_be_positive(capsys, flag):
    assert main(["plan", flag, "0"]) == 2
    assert f"{flag}: must be positive" in capsys.readouterr().err
    for value in ("nan", "inf"):
        assert main(["plan", flag, value]) == 2
        assert f"{flag}: must be positive and finite" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["", "meta", "meta:0"])
def test_a_plan_is_for_a_device_that_holds_data(capsys, device):
    assert main(["plan", "--device", device]) == 2
    assert f"device: {device!r} holds no data; give cpu" in capsys.readouterr().err


def test_streaming_needs_what_the_plan_says(monkeypatch, tmp_path):
    """A held-out stream's cache has the pages of the plan."""
    config = tiny_wan("longlive-1.3b", tmp_path)
    setup, made = build_setup(config), []
    plain = StreamingGenerator.new_cache

    def watched(generator, pages):
        made.append(pages)
        return plain(generator, pages)

    monkeypatch.setattr(StreamingGenerator, "new_cache", watched)
    prompts = setup.validation["short"][:1]
    stream_latents(setup.generator, prompts, setup.backbone.texts(prompts), setup.evaluation_tape())
    (phase,) = (p for p in plan_of(config).phases if p.name == "stream held-out videos")
    assert phase.parts["pages"] == made[0] * setup.generator.page_bytes


RECIPES = re.findall(
    r"^\$ kvpo (plan .*)\n((?:(?!```).*\n)+)",
    (Path(__file__).resolve().parents[2] / "docs" / "memory.md").read_text(encoding="utf-8"),
    re.MULTILINE,
)


@pytest.mark.parametrize(("command", "printed"), RECIPES, ids=lambda text: text.strip()[-24:])
def test_the_recipes_are_what_the_plan_prints(command: str, printed: str, capsys: Any) -> None:
    assert main(command.split()) == 0
    assert capsys.readouterr().out.endswith(printed)


def test_there_is_a_recipe_for_every_usual_card() -> None:
    assert {command.split()[-1] for command, _ in RECIPES} == {"24", "48", "80"}


@pytest.mark.parametrize("name", ["longlive-1.3b", "memflow-1.3b"])
def test_the_plan_counts_the_keys_that_routed_and_deployed_blocks_see(monkeypatch, tmp_path, name):
    """Six routed and three recent frames are three more than the window's own six."""
    config = tiny_wan(name, tmp_path, segments=1, exploration__routed=6, exploration__distinct=2,
                      exploration__recent=3, prompts__frames=[45])  # fmt: skip
    trainer, seen = Trainer(build_setup(config)), {}
    velocity = StreamingGenerator.velocity

    def watched(generator, x, sigma, text, context):
        for start in context.start_R.tolist():
            seen.setdefault(start, set()).add(context.pages.shape[-1])
        return velocity(generator, x, sigma, text, context)

    monkeypatch.setattr(StreamingGenerator, "velocity", watched)
    # Late enough for a memory bank to be full.
    update = next(
        n
        for n in range(100)
        if min(fork.frame for fork in collection.plan_rollout(trainer.setup, n).forks) >= 24
    )
    planned = collection.plan_rollout(trainer.setup, update)
    collection.explore(trainer.setup, [update])
    costs = Costs(config, trainer.setup.model.shape, 0.0, 0.0)
    assert all(seen[fork.frame] == {costs.context, costs.routed} for fork in planned.forks)
    assert costs.routed == costs.context + 3


def test_more_routed_frames_take_longer_and_more_memory():
    """Against the arithmetic of the keys alone: nothing else of the plan changes."""
    plans = []
    for routed in (3, 9):
        config = preset("longlive-1.3b", {"exploration.routed": routed, "exploration.distinct": 3})
        (phase,) = (p for p in plan_of(config).phases if p.name == "explore")
        plans.append(phase)
    few, many = plans
    model, exploration, groups = config.model, config.exploration, config.optim.prompts_per_update
    tokens = model.latent_height * model.latent_width // 4
    passes = groups * exploration.branches * exploration.blocks * len(config.stream.schedule)
    layers = passes * model.num_layers + groups * exploration.branches * exploration.blocks * (
        model.num_layers - 1
    )
    flops = layers * 4.0 * (3 * tokens) * (6 * tokens) * model.dim
    assert many.seconds - few.seconds == pytest.approx(flops / RATES.flops, rel=1e-6)
    assert many.parts["activations"] > few.parts["activations"]


def replay_of(config, rates):
    plan = Planner(config, rates).plan(config)
    (phase,) = (p for p in plan.phases if p.name == "replay and backward")
    shape, weights = config.model, plan.parameters.weights + plan.parameters.adapter
    return phase.seconds, Costs(config, shape, weights, plan.page, plan.fork)


@pytest.mark.parametrize(
    ("changes", "passes", "stored"),
    [
        ({"optim.replay_rows": 0}, 2, 0.0),  # of the starting policy, and the current one with its gradient
        ({"optim.replay_rows": 80}, 3, 0.0),  # a few members at a time: all energies come first
        ({"optim.replay_rows": 1}, 3, 0.0),  # a state at a time
        ({"optim.replay_rows": 0, "optim.rollouts_per_refresh": 4}, 2, 0.75),
        ({"optim.replay_rows": 0, "optim.inner_epochs": 2}, 2, 1.0),
    ],
)
def test_replays_are_as_many_as_the_trainer_makes(changes, passes, stored):
    """Operations counted state by state: every member's window forward, its blocks anew, and backward."""
    config = preset("longlive-1.3b", {"optim.rollouts_per_refresh": 1, **changes})
    flops, costs = replay_of(config, Rates(1.0, math.inf))
    exploration, objective, optim = config.exploration, config.objective, config.optim
    members = optim.prompts_per_update * ((sum(objective.keep) or exploration.branches) + 1)
    states = exploration.blocks * objective.grad_steps
    encoding = encode_flops(costs.call(1)) + costs.adapter(1)
    once = states * forward_work(costs, 1).flops + (exploration.blocks - 1) * encoding
    every = optim.inner_epochs * (passes * once + states * backward_work(costs, 1).flops)
    # Keys of texts are shared by the states of a pass: half a percent. A pass is a tenth.
    assert flops == pytest.approx(members * (every + stored * once), rel=0.01)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_replay_reads_the_weights_once_per_pass_and_pages_once_per_state(checkpointing):
    changes = {"optim.replay_rows": 0, "optim.rollouts_per_refresh": 1, "optim.checkpointing": checkpointing}
    config = preset("longlive-1.3b", changes)
    read, costs = replay_of(config, Rates(math.inf, 1.0))
    exploration, objective = config.exploration, config.objective
    kept = sum(objective.keep) or exploration.branches
    groups, members = config.optim.prompts_per_update, kept + 1  # each group is replayed by itself
    window = members * exploration.blocks * objective.grad_steps

    def traffic(rows):
        return costs.weight_bytes + rows * costs.context * costs.page_bytes

    again = (exploration.blocks - 1) * traffic(members)
    passes = 2 * (again + traffic(window)) + (1 + checkpointing) * traffic(window)
    assert read == pytest.approx(groups * passes)


def test_the_host_holds_a_groups_pixels_twice_and_the_step_a_copy_of_the_gradients():
    config = preset("longlive-1.3b")
    plan, exploration = plan_of(config), config.exploration
    latents = (
        (exploration.branches + 1) * (exploration.blocks + exploration.tail_blocks) * config.stream.block
    )
    frame = 4 * (4 * 3 * 480 * 832)  # four frames of pixels per latent one, float32
    assert plan.host["pixels and clips"] == 2 * latents * frame
    (step,) = (p for p in plan.phases if p.name == "optimiser step")
    assert step.parts["gradients"] == step.parts["its temporaries"] == 4 * plan.parameters.trained


def test_tokens_are_counted_by_both_sides_of_a_patch():
    """Twice the patch is half the tokens, whichever side is longer."""
    sides = [(2, 2), (2, 4), (4, 2), (4, 4)]
    configs = [with_shape(preset("longlive-1.3b"), patch_size=(1, *side)) for side in sides]
    square, wide, high, large = (Activations(config, 9).held(1) for config in configs)
    assert square / 2 == wide == high == 2 * large


@pytest.mark.parametrize("train", ["lora", "full"])
def test_in_float32_every_width_costs_a_token_what_torch_keeps(train):
    """Each coefficient by itself, as the slope in its width; what does not grow with tokens cancels."""

    def per_token(dim=192, ffn=704, rank=24, window=12):
        wide = replace(GEOMETRIES["1.3b"], dim=dim, num_heads=dim // 64, ffn_dim=ffn, text_len=8, text_dim=16)
        config = preset("longlive-1.3b", {
            "device": "cpu", "backbone.geometry": geometry_file(wide), "stream.size": (8, 16),
            "stream.window": window, "optim.lora_rank": rank if train == "lora" else 0,
            "optim.autocast": "none", "optim.checkpointing": False,
        })  # fmt: skip
        four, two = (kept_bytes(config, 2, rows) - kept_bytes(config, 1, rows) for rows in (4, 2))
        return (four - two) / (2 * config.model.tokens_per_frame)

    kept, one = KEPT[train, "none"], per_token()
    assert per_token(ffn=960) - one == kept.ffn * 3 * 256
    assert per_token(window=15) - one == kept.keys * 3 * 192
    if train == "lora":
        assert per_token(rank=48) - one == pytest.approx(kept.rank * 3 * 24, rel=0.015)
    keys = kept.keys * 12 * 192
    assert per_token(dim=384) - one - keys == pytest.approx(kept.width * 3 * 192, rel=0.005)
