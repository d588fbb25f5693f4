"""Adapters in: every layout gives the same layers with the scale that its files state, or one clear error."""

import json
import math
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import save_file

from kvpo.models.adapter_files import AdapterState, load_adapter_state
from kvpo.models.adapters import adapter_state, load_adapter, merge_adapter
from kvpo.models.checkpoints import load_transformer_state, to_diffusers_name
from kvpo.models.export import save_diffusers_adapter, save_peft_adapter
from tests.models.test_checkpoints import RANK, assert_same, lora_state, prefixed, saved, wan_state
from tests.models.tiny import tiny_model, velocity

Q = "base_model.model.blocks.0.self_attn.q.lora_"
LAYERS = ("blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.ffn.2")


def scales(adapter: AdapterState) -> dict[str, float]:
    return {module: adapter.scale(module) for module in adapter.modules}


ADAPTER_FORMS = {
    "public": lambda name: name,
    "adapter name": lambda name: name.replace(".weight", ".default.weight"),
    "fsdp": lambda name: "_fsdp_wrapped_module." + name.replace("blocks.0", "blocks.0._orig_mod"),
    "moving average": lambda name: "model." + name.replace(".weight", ".default.weight"),
    "bare": lambda name: name.removeprefix("base_model.model."),
    "diffusers": lambda name: "transformer." + diffusers_adapter_name(name),
}


def diffusers_adapter_name(name: str) -> str:
    module, half = name.removeprefix("base_model.model.").split(".lora_")
    return f"{to_diffusers_name(module)}.lora_{half}"


@pytest.mark.parametrize("form", ADAPTER_FORMS)
def test_every_adapter_layout_loads(tmp_path, form):
    state = lora_state()
    renamed = {ADAPTER_FORMS[form](name): value for name, value in state.items()}
    for content, entry in (
        ({"generator_lora": renamed, "step": 1}, None),
        (renamed, None),
        ({"ema": renamed}, "ema"),
    ):
        adapter = load_adapter_state(saved(tmp_path / "lora.pt", content), entry=entry)
        assert_same(adapter.tensors, state)
        assert (adapter.rank, adapter.alpha) == (RANK, float(RANK))
        assert set(adapter.modules) == {"blocks.0.self_attn.q", "blocks.1.ffn.0", "blocks.1.ffn.2"}


def test_a_published_kvpo_checkpoint_offers_adapter_and_average(tmp_path):
    state = lora_state()
    average = {"model." + n.replace(".weight", ".default.weight"): v + 1 for n, v in state.items()}
    content = {
        "step": 4,
        "generator_lora": state,
        "ema": average,
        "initial_generator_lora": state,
        "optimizer": {},
    }
    path = saved(tmp_path / "checkpoint_samples_8.pt", content)
    adapter = load_adapter_state(path)
    assert_same(adapter.tensors, state)
    assert "not used: ema, initial_generator_lora" in adapter.source
    assert_same(load_adapter_state(path, entry="ema").tensors, {n: v + 1 for n, v in state.items()})


def written(directory: Path, config: dict | None = None, header: dict | None = None, **more) -> Path:
    """A PEFT directory with this configuration and safetensors header, and more tensors; its weights."""
    directory.mkdir(exist_ok=True)
    save_file(lora_state() | more, directory / "adapter_model.safetensors", metadata=header)
    if config is not None:
        (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory / "adapter_model.safetensors"


def test_the_configuration_beside_a_file_states_its_alpha(tmp_path):
    file = written(tmp_path / "a", {"lora_alpha": 12, "r": RANK})
    for path in (file, file.parent):
        adapter = load_adapter_state(path)
        assert scales(adapter) == dict.fromkeys(LAYERS, 4.0)
        assert "3 layers of rank 3, alpha 12 (" in adapter.described()
        assert "adapter_config.json)" in adapter.described()
    bare = load_adapter_state(written(tmp_path / "b"))
    assert scales(bare) == dict.fromkeys(LAYERS, 1.0)
    assert "alpha 3 (assumed to be the rank; where it is not, add an entry lora_alpha" in bare.described()


def test_a_link_and_a_name_without_an_ending_lose_no_alpha(tmp_path):
    file = written(tmp_path / "a", {"lora_alpha": 12, "r": RANK})
    (link := tmp_path / "mine.safetensors").symlink_to(file)
    (blob := tmp_path / "0123abcd").write_bytes(written(tmp_path / "b", None, {"alpha": "12"}).read_bytes())
    (tmp_path / "hub").mkdir()
    (seen := tmp_path / "hub" / "adapter_model.safetensors").symlink_to(written(tmp_path / "c"))
    (tmp_path / "hub" / "adapter_config.json").symlink_to(tmp_path / "a" / "adapter_config.json")
    for path in (link, blob, seen, seen.parent):
        assert scales(load_adapter_state(path)) == dict.fromkeys(LAYERS, 4.0), path


def test_alpha_in_an_entry_of_its_own_counts(tmp_path):
    torch.save(
        {"generator_lora": lora_state(), "lora_config": {"rank": RANK, "alpha": 12}}, tmp_path / "x.pt"
    )
    assert scales(load_adapter_state(tmp_path / "x.pt")) == dict.fromkeys(LAYERS, 4.0)
    torch.save({**torch.load(tmp_path / "x.pt"), "lora_alpha": 3}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match="3 according to an entry of .*, but 12 according to entry lora_config"
    ):
        load_adapter_state(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64])
def test_quantised_adapters_are_refused(tmp_path, dtype):
    torch.save({name: value.to(dtype) for name, value in lora_state().items()}, tmp_path / "x.pt")
    with pytest.raises(
        ValueError, match="A.weight holds .*, not floating-point numbers; give the weights as"
    ):
        load_adapter_state(tmp_path / "x.pt")


@pytest.mark.parametrize(
    "header",
    [
        {"alpha": "12"},
        {"lora_alpha": "12.0"},
        {"network_alpha": "12", "rank": "3"},
        {"ss_network_alpha": "12", "ss_network_dim": "3", "ss_base_model_version": "wan"},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 12, "transformer.r": 3})},
        {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 12, "text_encoder.lora_alpha": 3})},
        {"lora_adapter_metadata": json.dumps({"lora_alpha": 12}), "alpha": "12"},
        {"alpha": "12", "use_dora": "False", "ss_network_dim": "Dynamic"},
    ],
)
@pytest.mark.parametrize(
    "name", ["adapter_model.safetensors", "pytorch_lora_weights.safetensors", "x.safetensors"]
)
def test_a_header_states_alpha(tmp_path, header, name):
    save_file(lora_state(), tmp_path / name, metadata=header)
    assert scales(load_adapter_state(tmp_path / name)) == dict.fromkeys(LAYERS, 4.0)


def test_tensors_and_entries_state_alpha(tmp_path):
    alphas = {"blocks.0.self_attn.q.alpha": 12, "base_model.model.blocks.1.ffn.0.alpha": 1.5}
    tensors = {name: torch.tensor(float(value)) for name, value in alphas.items()}
    adapter = load_adapter_state(written(tmp_path / "a", **tensors))
    assert scales(adapter) == {LAYERS[0]: 4.0, LAYERS[1]: 0.5, LAYERS[2]: 1.0}
    assert (
        "the rank where nothing is stated" in adapter.described() and "alpha 1.5 to 12" in adapter.described()
    )
    for content in (lora_state(), {"generator_lora": lora_state()}):
        path = saved(tmp_path / "x.pt", content | {"lora_alpha": 12})
        assert scales(load_adapter_state(path)) == dict.fromkeys(LAYERS, 4.0)


@pytest.mark.parametrize("root", [False, True])
@pytest.mark.parametrize("naming", ["wan", "diffusers"])
def test_patterns_and_rank_stabilised_scales_are_those_of_peft(tmp_path, root, naming):
    """PEFT builds and names an adapter with mixed ranks and scales; what it computes is what is loaded."""
    torch.manual_seed(0)
    model, plain = tiny_model(), tiny_model()
    config = LoraConfig(
        r=3, lora_alpha=6, use_rslora=root, target_modules=["self_attn.q", "ffn.0", "cross_attn.v"],
        rank_pattern={"ffn.0": 5}, alpha_pattern={"blocks.1.self_attn.q": 10, "ffn.0": 1},
    )  # fmt: skip
    inject_adapter_in_model(config, model)
    for name, value in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    tensors = {
        f"base_model.model.{name}": v.contiguous() for name, v in get_peft_model_state_dict(model).items()
    }
    fields = {"r": 3, "lora_alpha": 6, "use_rslora": root, "rank_pattern": config.rank_pattern,
              "alpha_pattern": config.alpha_pattern, "peft_type": "LORA"}  # fmt: skip
    if naming == "diffusers":
        named = {f"transformer.{diffusers_adapter_name(n)}": value for n, value in tensors.items()}
        fields["alpha_pattern"] = {"blocks.1.attn1.to_q": 10, "ffn.net.0.proj": 1}
        fields["rank_pattern"] = {"ffn.net.0.proj": 5}
        header = json.dumps({f"transformer.{name}": value for name, value in fields.items()})
        path = tmp_path / "pytorch_lora_weights.safetensors"
        save_file(named, path, metadata={"lora_adapter_metadata": header})
    else:
        path = tmp_path / "adapter_model.safetensors"
        save_file(tensors, path)
        (tmp_path / "adapter_config.json").write_text(json.dumps(fields))
    adapter = load_adapter_state(path)
    root_of = math.sqrt if root else float
    assert adapter.scale("blocks.1.self_attn.q") == pytest.approx(10 / root_of(3))
    assert adapter.scale("blocks.0.ffn.0") == pytest.approx(1 / root_of(5))
    assert adapter.scale("blocks.0.self_attn.q") == pytest.approx(6 / root_of(3))
    load_adapter(plain, adapter)
    merged = tiny_model()
    merge_adapter(merged, adapter)
    save_peft_adapter(tmp_path / "peft", adapter_state(plain))
    save_diffusers_adapter(tmp_path / "diffusers", adapter_state(plain))
    with torch.no_grad():
        expected = velocity(model)
        assert (velocity(tiny_model()) - expected).abs().max() > 1e-2
        for again in (
            tmp_path / "peft",
            tmp_path / "peft" / "adapter_model.safetensors",
            tmp_path / "diffusers",
        ):
            fresh = tiny_model()
            merge_adapter(fresh, load_adapter_state(again))
            assert (velocity(fresh) - expected).abs().max() < 1e-5
        assert (velocity(plain) - expected).abs().max() < 1e-5
        assert (velocity(merged) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("config", "header", "message"),
    [
        (
            {"lora_alpha": 12},
            {"alpha": "6"},
            "6 according to the header .*, but 12 according to .*config",
        ),
        (None, {"alpha": "6", "lora_alpha": "3"}, "lora_alpha 3 but alpha 6"),
        (None, {"rank": "4"}, "has rank 3, but the header of .* states 4"),
        ({"lora_alpha": 6, "r": 8}, None, "has rank 3, but .*adapter_config.json states 8"),
        ({"lora_alpha": 6, "rank_pattern": {"ffn.0": 4}}, None, "ffn.0 has rank 3, but .* states 4"),
        (
            {"lora_alpha": 6, "alpha_pattern": {"ffn.9": 4}},
            None,
            "layers that the adapter does not have: ffn.9",
        ),
        ({"lora_alpha": 6, "alpha_pattern": {"ffn(": 4}}, None, "is not a pattern of layer names"),
        ({"lora_alpha": 6, "alpha_pattern": [4]}, None, "alpha_pattern must map names"),
        ({"lora_alpha": 0}, None, "lora_alpha must be a positive number, got 0"),
        ({"lora_alpha": True}, None, "lora_alpha must be a positive number, got True"),
        ({"lora_alpha": [1]}, None, "lora_alpha must be a positive number"),
        (None, {"alpha": "1e999"}, "alpha must be a positive number, got '1e999'"),
        (None, {"alpha": "four"}, "alpha must be a positive number, got 'four'"),
        (None, {"lora_adapter_metadata": "["}, "lora_adapter_metadata in the header of .*: not JSON"),
        (None, {"lora_adapter_metadata": "[" * 9999}, "nested too deeply"),
        (None, {"lora_adapter_metadata": "[]"}, "not a JSON object"),
        ({"lora_alpha": 12, "use_dora": True}, None, "not supported: use_dora"),
        ({"lora_alpha": 12, "peft_type": "LOHA"}, None, "not supported: peft_type"),
        (
            {"lora_alpha": 12, "init_lora_weights": "pissa_niter_4"},
            None,
            "supported: init_lora_weights",
        ),
        ({}, None, "not a PEFT adapter configuration with lora_alpha"),
        ([], None, "not a PEFT adapter configuration with lora_alpha"),
    ],
)
def test_contradictions_and_values_that_are_none_are_errors(tmp_path, config, header, message):
    with pytest.raises(ValueError, match=message) as caught:
        load_adapter_state(written(tmp_path, config, header))
    assert "\n" not in str(caught.value)


def test_malformed_adapters_are_named(tmp_path):
    state = lora_state()
    half = {name: value for name, value in state.items() if name != Q + "B.weight"}
    with pytest.raises(ValueError, match=r"blocks.0.self_attn.q \(only A\)"):
        load_adapter_state(saved(tmp_path / "half.pt", half))
    ranks = state | {Q + "A.weight": torch.zeros(5, 24), Q + "B.weight": torch.zeros(24, 4)}
    with pytest.raises(ValueError, match=r"no common rank: blocks.0.self_attn.q \(A 5, B 4\)"):
        load_adapter_state(saved(tmp_path / "ranks.pt", ranks))
    with pytest.raises(ValueError, match="not halves of a LoRA layer: blocks.0.magnitude"):
        load_adapter_state(saved(tmp_path / "more.pt", state | {"blocks.0.magnitude": torch.zeros(2)}))
    with pytest.raises(ValueError, match="not halves of a LoRA layer: blocks.7.alpha"):
        load_adapter_state(saved(tmp_path / "alpha.pt", state | {"blocks.7.alpha": torch.ones(())}))
    with pytest.raises(ValueError, match="is it a base model"):
        load_adapter_state(saved(tmp_path / "base.pt", wan_state()))
    with pytest.raises(ValueError, match="entry generator: holds no adapter .*; is it a base model"):
        load_adapter_state(saved(tmp_path / "gen.pt", {"generator": wan_state()}))
    with pytest.raises(ValueError, match="no entry generator_lora or .*; the file holds critic"):
        load_adapter_state(saved(tmp_path / "critic.pt", {"critic": wan_state()}))
    two = state | {Q + "A.other.weight": torch.ones(3, 24)}
    with pytest.raises(ValueError, match="blocks.0.self_attn.q has A of several adapters; save one"):
        load_adapter_state(saved(tmp_path / "two.pt", two))
    convolution = state | {
        f"base_model.model.patch_embedding.lora_{half}.weight": torch.ones(size)
        for half, size in {"A": (3, 4, 1, 2, 2), "B": (24, 3, 1, 1, 1)}.items()
    }
    with pytest.raises(ValueError, match="not halves of a LoRA layer: patch_embedding.lora_A"):
        load_adapter_state(saved(tmp_path / "convolution.pt", convolution))
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no adapter"):
        load_adapter_state(tmp_path / "empty")


def test_prefixes_that_are_removed_are_named(tmp_path, caplog):
    caplog.set_level("INFO", logger="kvpo")
    tensors = {
        f"pipe.dit.{Q.removeprefix('base_model.model.')}{half}.weight": torch.ones(2, 2) for half in "AB"
    }
    load_adapter_state(saved(tmp_path / "leftover.pt", tensors))
    assert "leftover.pt: prefix 'pipe.dit.' removed from the names of its layers" in caplog.text
    caplog.clear()
    load_adapter_state(tmp_path / "leftover.pt", quiet=True)
    assert "prefix" not in caplog.text


def test_an_adapter_that_cannot_change_anything_is_refused(tmp_path):
    zeros = {name: torch.zeros_like(value) for name, value in lora_state().items()}
    fresh = {name: value if "lora_A" in name else zeros[name] for name, value in lora_state().items()}
    for nothing in (zeros, fresh):  # the second as PEFT draws it, before it has learned anything
        with pytest.raises(ValueError, match="A or B of every layer is zero, so that the adapter changes"):
            load_adapter_state(saved(tmp_path / "x.pt", {"generator_lora": nothing}))
    for nothing in ({}, {"generator_lora": {}}):
        with pytest.raises(ValueError, match="holds no adapter|no entry generator_lora"):
            load_adapter_state(saved(tmp_path / "x.pt", nothing))


def half_names(prefix: str, ends: tuple[str, str], diffusers: bool = False) -> dict[str, torch.Tensor]:
    """The adapter of `lora_state` under other names of layers and halves."""
    found = {}
    for name, value in lora_state().items():
        module, half = name.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        module = to_diffusers_name(module) if diffusers else module
        module = module.replace(".", "_") if prefix.endswith("_") else module
        found[f"{prefix}{module}.{ends['AB'.index(half)]}"] = value
    return found


DOWN_UP = ("lora_down.weight", "lora_up.weight")
A_B = ("lora_A.weight", "lora_B.weight")
TRAINERS = {
    "kohya and musubi": half_names("lora_unet_", DOWN_UP),
    "kohya on diffusers": half_names("lora_unet_", DOWN_UP, diffusers=True),
    "LyCORIS": half_names("lycoris_", DOWN_UP),
    "diffusion-pipe and ComfyUI": half_names("diffusion_model.", A_B),
    "older ComfyUI": half_names("diffusion_model.", DOWN_UP),
    "diffusers": half_names("transformer.", A_B, diffusers=True),
    "older diffusers": half_names("transformer.", ("lora.down.weight", "lora.up.weight"), diffusers=True),
    "DiffSynth": half_names("", ("lora_A.default.weight", "lora_B.default.weight")),
    "DiffSynth, its prefix left": half_names("pipe.dit.", ("lora_A.default.weight", "lora_B.default.weight")),
    "DDP": half_names("module.model.", A_B),
}


@pytest.mark.parametrize("trainer", TRAINERS)
@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_adapters_of_every_trainer_are_read_with_their_alpha(tmp_path, trainer, ending):
    halves = {name: value.clone() for name, value in TRAINERS[trainer].items()}
    stated = {f"{name.split('.lora')[0]}.alpha": torch.tensor(12.0) for name in halves}
    whole = {name: value.long() for name, value in stated.items()}  # as some converters write them
    for alphas, scale in (({}, 1.0), (stated, 4.0), (whole, 4.0)):
        path = tmp_path / f"x.{ending}"
        torch.save(halves | alphas, path) if ending == "pt" else save_file(halves | alphas, path)
        adapter = load_adapter_state(path)
        assert_same(adapter.tensors, lora_state())
        assert scales(adapter) == dict.fromkeys(LAYERS, scale)


EXTRA = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
         "time_projection.1", "head.head")  # fmt: skip


@pytest.mark.parametrize("form", ["peft", "kohya", "comfy", "diffusers"])
def test_adapters_of_embeddings_and_head_bind_with_ranks_of_their_own(tmp_path, form):
    model, draws = tiny_model(), torch.Generator().manual_seed(2)
    names = {
        "peft": lambda module, half: f"base_model.model.{module}.lora_{half}.default.weight",
        "kohya": lambda module, half: f"lora_unet_{module.replace('.', '_')}.{DOWN_UP['AB'.index(half)]}",
        "comfy": lambda module, half: f"diffusion_model.{module}.lora_{half}.weight",
        "diffusers": lambda module, half: f"transformer.{to_diffusers_name(module)}.lora_{half}.weight",
    }
    tensors = {}
    for rank, module in enumerate((*EXTRA, "blocks.1.cross_attn.o"), 1):
        out, inner = model.get_submodule(module).weight.shape
        for half, size in (("A", (rank, inner)), ("B", (out, rank))):
            tensors[names[form](module, half)] = 0.3 * torch.randn(size, generator=draws)
    adapter = load_adapter_state(saved(tmp_path / "x.pt", tensors))
    assert set(adapter.modules) == {*EXTRA, "blocks.1.cross_attn.o"}
    with torch.no_grad():
        before = velocity(model)
        load_adapter(model, adapter)
        assert (velocity(model) - before).abs().max() > 1e-3
    velocity(model).sum().backward()
    learning = [name for name, value in model.named_parameters() if value.requires_grad]
    assert len(learning) == 14 and all(model.get_parameter(name).grad.any() for name in learning)


def test_a_file_of_an_adapter_and_its_average_offers_both(tmp_path):
    average = {name: value + 1 for name, value in lora_state().items()}
    path = saved(tmp_path / "x.pt", {"generator_ema": average, "generator_lora": lora_state(), "step": 9})
    assert_same(load_adapter_state(path).tensors, lora_state())
    assert_same(load_adapter_state(path, entry="generator_ema").tensors, average)
    with pytest.raises(ValueError, match="give it as the adapter"):
        load_transformer_state(path)
    for entry in ("generator_ema_lora", "generator_ema", "state_dict", "model_state_dict"):
        assert_same(load_adapter_state(saved(path, {entry: average, "epoch": 3})).tensors, average)


def peft_model(prefix: str = "base_model.model.") -> dict[str, torch.Tensor]:
    """Base weights and adapter in one, as PEFT's wrapped model has them."""
    adapted = {name.split(".lora_")[0].removeprefix("base_model.model.") for name in lora_state()}
    base = {}
    for name, value in wan_state().items():
        module, _, last = name.rpartition(".")
        base[f"{prefix}{module}.base_layer.{last}" if module in adapted else prefix + name] = value
    halves = {
        name.replace("base_model.model.", prefix).replace(".weight", ".default.weight"): value
        for name, value in lora_state().items()
    }
    return base | halves


@pytest.mark.parametrize("prefix", ["base_model.model.", "model.base_model.model.", "module."])
def test_a_whole_peft_model_gives_its_base_and_its_adapter(tmp_path, prefix):
    for content in (peft_model(prefix), {"generator": peft_model(prefix)}):
        path = saved(tmp_path / "full.pt", content)
        state = load_transformer_state(path)
        assert_same(dict(sorted(state.tensors.items())), dict(sorted(wan_state().items())))
        assert state.adapted and not load_transformer_state(saved(tmp_path / "x.pt", wan_state())).adapted
        assert_same(load_adapter_state(path).tensors, lora_state())


LAYOUTS = {
    "LoKr": ({"diffusion_model.blocks.0.ffn.0.lokr_w1": torch.ones(2, 2)}, "a LoKr adapter"),
    "LoHa": ({"lycoris_blocks_0_ffn_0.hada_w1_a": torch.ones(2, 2)}, "a LoHa adapter"),
    "DoRA": (lora_state() | {Q + "magnitude_vector": torch.ones(24)}, "a DoRA adapter"),
    "DoRA of LyCORIS": (
        lora_state() | {"blocks.0.self_attn.q.dora_scale": torch.ones(24, 1)},
        "a DoRA adapter",
    ),
    "differences": (
        {"diffusion_model.blocks.0.ffn.0.diff": torch.ones(2, 2)},
        "differences of whole weights",
    ),
    "norms beside LoRA": (
        half_names("diffusion_model.", A_B) | {"diffusion_model.blocks.0.norm3.diff": torch.ones(24)},
        r"differences of whole weights.* \(key diffusion_model.blocks.0.norm3.diff\)",
    ),
    "biases beside LoRA": (
        half_names("diffusion_model.", A_B) | {"diffusion_model.blocks.0.ffn.0.diff_b": torch.ones(40)},
        "differences of whole weights.*diff_b",
    ),
    "scaled fp8": (
        wan_state() | {"blocks.0.ffn.0.scale_weight": torch.ones(())},
        r"scaled fp8 weights, numbers without meaning until .*\(key blocks.0.ffn.0.scale_weight\)",
    ),
    "scaled fp8, marked": (wan_state() | {"scaled_fp8": torch.ones(2)}, "scaled fp8 weights"),
    "foreign prefix": (prefixed(wan_state(), "student.net."), "layers have student.net. before their names"),
    "text encoder": ({"token_embedding.weight": torch.ones(2, 2)}, "a T5 text encoder"),
    "VAE": ({"decoder.middle.0.residual.0.gamma": torch.ones(2, 2)}, "a VAE"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_that_are_not_read_are_named(tmp_path, layout):
    tensors, words = LAYOUTS[layout]
    for path in (saved(tmp_path / "x.pt", tensors), tmp_path / "x.safetensors"):
        save_file({name: value.clone() for name, value in tensors.items()}, tmp_path / "x.safetensors")
        for load in (load_adapter_state, load_transformer_state):
            with pytest.raises(ValueError, match=words) as caught:
                load(path)
            assert "base model" not in str(caught.value) and "num_layers" not in str(caught.value)
