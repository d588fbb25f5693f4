"""Checkpoints out: exact round trips, and what diffusers and PEFT compute from the exported files."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import WanTransformer3DModel
from diffusers.loaders import WanLoraLoaderMixin
from peft import PeftModel
from safetensors.torch import load_file, save_file

from kvpo.app.origin import recorded
from kvpo.models.adapter_files import AdapterState, load_adapter_state
from kvpo.models.adapters import (
    adapter_difference,
    adapter_state,
    load_adapter,
    merge_adapter,
    merged_state,
)
from kvpo.models.causal_wan import CausalWan, WanShape
from kvpo.models.checkpoints import (
    assign_state,
    load_transformer_state,
    to_diffusers_name,
)
from kvpo.models.export import (
    save_comfy_adapter,
    save_diffusers_adapter,
    save_diffusers_transformer,
    save_peft_adapter,
    save_public_checkpoint,
)
from tests.models.tiny import SHAPE, inputs, random_adapter, tiny_model, velocity


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name


@torch.no_grad()
def diffusers_velocity(model, shape: WanShape = SHAPE, frames: int = 3) -> torch.Tensor:
    """The bidirectional transformer on one block of frames that starts at frame 0."""
    x, sigma, text = inputs(shape, frames)
    out = model.eval()(x.transpose(1, 2), timestep=1000 * sigma, encoder_hidden_states=text).sample
    return out.transpose(1, 2)


@torch.no_grad()
def assert_agrees(found: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 0.1
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_round_trip_through_every_layout(tmp_path, dtype):
    model = tiny_model()
    load_adapter(model, random_adapter(model))
    weights = {name: value.to(dtype) for name, value in merged_state(model).items()}
    save_public_checkpoint(tmp_path / "merged.pt", weights)
    save_diffusers_transformer(tmp_path / "single", weights, SHAPE)
    save_diffusers_transformer(tmp_path / "sharded", weights, SHAPE, shard_bytes=9000)
    assert_same(load_transformer_state(tmp_path / "merged.pt").tensors, weights)
    assert_same(load_transformer_state(tmp_path / "single").tensors, weights)
    assert_same(load_transformer_state(tmp_path / "sharded").tensors, weights)
    assert list(torch.load(tmp_path / "merged.pt", weights_only=True)["generator"]) == [
        f"model.{name}" for name in weights
    ]
    shards = sorted(p.name for p in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(shards) > 3 and shards[0].startswith("diffusion_pytorch_model-00001-of-")
    limit = max(9000, *(value.nbytes for value in weights.values())) + 4000  # header
    assert all((tmp_path / "sharded" / name).stat().st_size < limit for name in shards)


@pytest.mark.parametrize("shard_bytes", [10**9, 9000])
def test_the_merged_export_loads_in_diffusers_and_agrees(tmp_path, shard_bytes):
    model = tiny_model()
    load_adapter(model, random_adapter(model))
    save_diffusers_transformer(tmp_path / "out", merged_state(model), SHAPE, shard_bytes=shard_bytes)
    theirs, info = WanTransformer3DModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert_agrees(diffusers_velocity(theirs), velocity(model))


def test_golden_shapes_under_mapped_names_are_those_of_diffusers_at_1_3b(golden_file):
    shapes = json.loads(golden_file("wan_1_3B_state_dict_shapes.json").read_text())
    with torch.device("meta"):
        theirs = WanTransformer3DModel(num_attention_heads=12, ffn_dim=8960, num_layers=30, text_dim=4096)
    expected = {name: list(value.shape) for name, value in theirs.state_dict().items()}
    assert {to_diffusers_name(name): list(shape) for name, shape in shapes.items()} == expected
    assert len(expected) == 825


def test_a_block_at_the_real_width_agrees_with_diffusers():
    shape = WanShape(
        dim=1536,
        num_heads=12,
        num_layers=1,
        ffn_dim=8960,
        freq_dim=256,
        text_len=16,
        text_dim=64,
        channels=16,
        patch_size=(1, 2, 2),
        latent_height=6,
        latent_width=8,
    )
    model = tiny_model(shape)
    theirs = WanTransformer3DModel(
        num_attention_heads=12, ffn_dim=shape.ffn_dim, num_layers=1, text_dim=shape.text_dim
    )
    named = {to_diffusers_name(name): value for name, value in merged_state(model).items()}
    theirs.load_state_dict(named, strict=True, assign=True)
    with torch.no_grad():
        assert_agrees(diffusers_velocity(theirs, shape), velocity(model))


def test_the_adapter_round_trips_through_peft_and_its_model_agrees(tmp_path):
    model = tiny_model()
    adapter = random_adapter(model, rank=3, alpha=7.0)
    load_adapter(model, adapter)
    save_peft_adapter(tmp_path / "peft", adapter_state(model), base_model="longlive_base.pt")
    again = load_adapter_state(tmp_path / "peft")
    assert_same(again.tensors, adapter.tensors)
    assert (again.rank, again.alpha) == (3, 7.0)
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (
        3,
        7.0,
        "longlive_base.pt",
    )
    plain = tiny_model()
    theirs = PeftModel.from_pretrained(plain, str(tmp_path / "peft"))  # injects its layers into `plain`
    with torch.no_grad():
        torch.testing.assert_close(velocity(plain), velocity(model))
        theirs.merge_adapter()
        assert torch.equal(velocity(plain), velocity(model))
        merged = tiny_model()
        merged.load_state_dict(merged_state(model))
        assert torch.equal(velocity(merged), velocity(model))


@pytest.mark.parametrize("alpha", [3.0, 6.0, 5.0])
def test_the_diffusers_adapter_loads_in_diffusers_and_agrees(tmp_path, alpha):
    model = tiny_model()
    adapter = random_adapter(model, rank=3, alpha=alpha)
    save_diffusers_transformer(tmp_path / "base", merged_state(model), SHAPE)
    save_diffusers_adapter(tmp_path / "lora", adapter)
    theirs = WanTransformer3DModel.from_pretrained(tmp_path / "base")
    base = diffusers_velocity(theirs)
    theirs.load_lora_adapter(tmp_path / "lora", use_safetensors=True)
    merge_adapter(model, adapter)
    assert_agrees(diffusers_velocity(theirs), velocity(model))
    assert (diffusers_velocity(theirs) - base).abs().max() > 1e-2
    pipeline_state = WanLoraLoaderMixin.lora_state_dict(tmp_path / "lora")
    assert len(pipeline_state) == len(adapter.tensors) and all(
        "transformer." in name for name in pipeline_state
    )
    again = load_adapter_state(tmp_path / "lora")
    merged_again = tiny_model()
    merge_adapter(merged_again, again)
    for name, value in model.state_dict().items():
        assert torch.allclose(merged_again.state_dict()[name], value, atol=1e-6), name
    if alpha == 3.0:
        assert_same(again.tensors, adapter.tensors)


@pytest.mark.parametrize("alpha", [3.0, 6.0, 5.0])
def test_the_comfy_adapter_binds_by_name_with_its_scale_folded_in(tmp_path, alpha):
    """As ComfyUI and Scope bind it: the prefix goes, and `.weight` finds the layer; no alpha is read."""
    model = tiny_model()
    adapter = random_adapter(model, rank=3, alpha=alpha)
    save_comfy_adapter(tmp_path / "mine", adapter)
    halves = load_file(tmp_path / "mine" / "mine.safetensors")
    weights, bound = dict(model.named_parameters()), set()
    with torch.no_grad():
        for name, down in halves.items():
            layer, _, half = name.removeprefix("diffusion_model.").rpartition(".lora_")
            if half == "A.weight":
                weights[f"{layer}.weight"] += halves[name.replace("lora_A", "lora_B")] @ down
                bound |= {name, name.replace("lora_A", "lora_B")}
    assert bound == halves.keys() and len(bound) == len(adapter.tensors)
    expected = tiny_model()
    merge_adapter(expected, adapter)
    again = tiny_model()
    merge_adapter(again, load_adapter_state(tmp_path / "mine"))
    with torch.no_grad():
        for found in (model, again):
            assert (velocity(found) - velocity(expected)).abs().max() < 1e-5
        assert (velocity(expected) - velocity(tiny_model())).abs().max() > 1e-2


def other_adapter(model: CausalWan, rank: int, alpha: float) -> AdapterState:
    adapter, draws = random_adapter(model, rank, alpha), torch.Generator().manual_seed(8)
    tensors = {
        name: 0.2 * torch.randn(value.shape, generator=draws) for name, value in adapter.tensors.items()
    }
    return replace(adapter, tensors=tensors)


def of_rank_1_but(module: str, adapter: AdapterState) -> AdapterState:
    """The adapter with all layers but one cut down to rank 1."""
    tensors = {
        name: value if module in name else value[:1] if "lora_A" in name else value[:, :1]
        for name, value in adapter.tensors.items()
    }
    return replace(adapter, tensors=tensors)


@pytest.mark.parametrize(("rank", "alpha"), [(3, 3.0), (2, 7.0)])
def test_base_given_and_difference_are_base_and_continued(rank, alpha):
    """W + s' B' A' + D = W + s B A to 1e-6, with other ranks and scales too."""
    model, both = tiny_model(), tiny_model()
    given, continued = random_adapter(model, rank=3, alpha=6.0), other_adapter(model, rank, alpha)
    difference, lost = adapter_difference(continued, given)
    assert lost == 0 and difference.pair("blocks.0.self_attn.q")[0].shape[0] == 3 + rank
    merge_adapter(model, continued)
    for adapter in (given, difference):
        merge_adapter(both, adapter)
    for name, value in model.state_dict().items():
        assert (both.state_dict()[name] - value).abs().max() <= 1e-6, name


@pytest.mark.parametrize("mixed", [False, True])
def test_a_difference_of_lower_rank_is_the_best_one_and_says_what_it_loses(mixed):
    """With ``mixed`` ranks some layers are kept exactly, and are a part of the whole all the same."""
    model = tiny_model()
    given, continued = random_adapter(model, rank=3, alpha=6.0), other_adapter(model, 2, 2.0)
    if mixed:
        given, continued = (of_rank_1_but(given.modules[0], one) for one in (given, continued))

    def product(adapter, module):
        a, b = adapter.pair(module)
        return adapter.scale(module) * (b.double() @ a.double())

    whole = {m: product(continued, m) - product(given, m) for m in continued.modules}
    norm = sum(float(value.square().sum()) for value in whole.values())
    losses = []
    for rank in range(1, 6):
        part, lost = adapter_difference(continued, given, rank)
        error = sum(float((product(part, m) - value).square().sum()) for m, value in whole.items())
        tails = sum(float(torch.linalg.svdvals(value)[rank:].square().sum()) for value in whole.values())
        assert lost == pytest.approx((tails / norm) ** 0.5, abs=1e-6)
        assert error == pytest.approx(tails, abs=1e-6 * norm)
        losses.append(lost)
    assert losses == sorted(losses, reverse=True) and losses[-1] == 0 and losses[0] > (0.01 if mixed else 0.1)


def test_an_export_whose_proof_fails_leaves_nothing_and_records_are_kept(tmp_path):
    model = tiny_model()
    adapter, weights = random_adapter(model), merged_state(model)
    writers = {
        "peft": lambda out, **how: save_peft_adapter(out, adapter, **how),
        "diffusers": lambda out, **how: save_diffusers_adapter(out, adapter, **how),
        "comfy": lambda out, **how: save_comfy_adapter(out, adapter, **how),
        "transformer": lambda out, **how: save_diffusers_transformer(
            out, weights, SHAPE, shard_bytes=9000, **how
        ),
        "pt": lambda out, **how: save_public_checkpoint(out, weights, **how),
    }

    def fail(written):
        assert written.exists() and written != tmp_path / "out"
        raise ValueError("no proof")

    for name, write in writers.items():
        with pytest.raises(ValueError, match="no proof"):
            write(tmp_path / "out", finish=fail)
        assert not list(tmp_path.iterdir()), name
    for name, write in writers.items():
        write(tmp_path / name, record={"settings": {"stream.window": 9}})
        files = [tmp_path / name] if name == "pt" else list((tmp_path / name).glob("*.safetensors"))
        assert files and all(recorded(file) == {"settings": {"stream.window": 9}} for file in files)


def test_what_is_exported_generates_identical_values_after_reloading(tmp_path):
    model = tiny_model()
    load_adapter(model, random_adapter(model))
    merged = CausalWan(SHAPE)
    merged.load_state_dict(merged_state(model))
    save_public_checkpoint(tmp_path / "a.pt", merged_state(model))
    save_diffusers_transformer(tmp_path / "b", merged_state(model), SHAPE)
    for path in (tmp_path / "a.pt", tmp_path / "b"):
        with torch.device("meta"):
            again = CausalWan(SHAPE)
        assign_state(again, load_transformer_state(path), device="cpu", dtype=torch.float32)
        with torch.no_grad():
            assert torch.equal(velocity(again), velocity(merged))


def test_weights_mapped_from_one_file_are_exported_without_the_rest_of_it(tmp_path):
    state = {name: value for name, value in tiny_model().state_dict().items()}
    save_file(state | {"unused": torch.zeros(500_000)}, tmp_path / "in.safetensors")
    mapped = load_transformer_state(tmp_path / "in.safetensors").tensors
    del mapped["unused"]
    save_public_checkpoint(tmp_path / "out.pt", mapped)
    assert (tmp_path / "out.pt").stat().st_size < 500_000
    save_diffusers_transformer(tmp_path / "out", mapped, SHAPE, shard_bytes=9000)
    assert_same(load_transformer_state(tmp_path / "out").tensors, state)


def test_nothing_is_overwritten_or_left_half_written(tmp_path):
    model = tiny_model()
    weights = merged_state(model)
    with pytest.raises(ValueError, match=r"export for diffusers: .*\n.*missing \(1\): proj_out.bias"):
        save_diffusers_transformer(
            tmp_path / "out", {n: v for n, v in weights.items() if n != "head.head.bias"}, SHAPE
        )
    with pytest.raises(ValueError, match="choose the preset|Choose the preset|misshapen"):
        save_diffusers_transformer(tmp_path / "out", weights, replace(SHAPE, ffn_dim=48))
    unwritable = AdapterState({"a.lora_A.weight": torch.empty(1, device="meta")}, 1, 1.0, "x")
    with pytest.raises((KeyError, NotImplementedError)):
        save_peft_adapter(tmp_path / "out", unwritable)
    assert not list(tmp_path.iterdir())
    save_public_checkpoint(tmp_path / "x.pt", weights)
    save_diffusers_transformer(tmp_path / "out", weights, SHAPE)
    with pytest.raises(ValueError, match="already exists"):
        save_public_checkpoint(tmp_path / "x.pt", weights)
    for name in ("NAME", ".pt", "ü 1."):
        save_public_checkpoint(tmp_path / name, weights)
        assert_same(load_transformer_state(tmp_path / name).tensors, weights)
    with pytest.raises(ValueError, match="already exists"):
        save_diffusers_transformer(tmp_path / "out", weights, SHAPE)
