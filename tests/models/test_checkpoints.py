"""Checkpoints in: every public layout gives the same tensors; everything else gives one clear error."""

import json
import os
import pickle
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from kvpo.models.adapter_files import load_adapter_state
from kvpo.models.causal_wan import CausalWan, WanShape
from kvpo.models.checkpoints import (
    TransformerState,
    assign_state,
    from_diffusers_name,
    load_transformer_state,
    to_diffusers_name,
)
from tests.models.tiny import SHAPE

RANK = 3


def wan_state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {name: torch.randn_like(value) for name, value in CausalWan(SHAPE).state_dict().items()}


def lora_state() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    layers = {"blocks.0.self_attn.q": (24, 24), "blocks.1.ffn.0": (40, 24), "blocks.1.ffn.2": (24, 40)}
    state = {}
    for name, (out_width, in_width) in layers.items():
        state[f"base_model.model.{name}.lora_A.weight"] = torch.randn(RANK, in_width, generator=generator)
        state[f"base_model.model.{name}.lora_B.weight"] = torch.randn(out_width, RANK, generator=generator)
    return state


def assert_same(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def saved(path: Path, content: object) -> Path:
    torch.save(content, path)
    return path


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize(
    "prefix",
    [
        "",
        "model.",
        "_fsdp_wrapped_module.",
        "model._fsdp_wrapped_module.",
        "_orig_mod.model.",
        "module.model._orig_mod._fsdp_wrapped_module.",
        "module.",
        "model.diffusion_model.",
        "diffusion_model.",
        "pipe.dit.",
        "transformer.",
    ],
)
@pytest.mark.parametrize("entry", ["generator", "generator_ema", "model", "model_state_dict", "state_dict"])
def test_every_pt_layout_loads(tmp_path, entry, prefix):
    state = wan_state()
    path = saved(tmp_path / "x.pt", {entry: prefixed(state, prefix), "step": 3, "critic": {}})
    loaded = load_transformer_state(path)
    assert_same(loaded.tensors, state)
    assert entry in loaded.source


def test_wrappers_inside_names_are_removed(tmp_path):
    state = wan_state()
    wrapped = {
        re.sub(r"(blocks\.\d+\.)", r"\1_checkpoint_wrapped_module._orig_mod.", k): v for k, v in state.items()
    }
    assert wrapped.keys() != state.keys()
    path = saved(tmp_path / "x.pt", {"generator_ema": prefixed(wrapped, "model._fsdp_wrapped_module.")})
    assert_same(load_transformer_state(path).tensors, state)


def test_the_entry_is_the_first_public_one_or_the_one_asked_for(tmp_path):
    state = wan_state()
    other = {name: value + 1 for name, value in state.items()}
    path = saved(tmp_path / "x.pt", {"generator_ema": other, "generator": state, "ema": other})
    default = load_transformer_state(path)
    assert_same(default.tensors, state)
    assert "entry generator " in default.source and "generator_ema" in default.source
    assert_same(load_transformer_state(path, entry="generator_ema").tensors, other)
    assert_same(load_transformer_state(path, entry="ema").tensors, other)
    with pytest.raises(ValueError, match="no entry critic; the file holds generator_ema, generator, ema"):
        load_transformer_state(path, entry="critic")


def test_bare_pt_safetensors_and_legacy_torch_files_load(tmp_path):
    state = wan_state()
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")
    torch.save({"generator": state}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert_same(load_transformer_state(tmp_path / "diffusion_pytorch_model.safetensors").tensors, state)
    assert_same(load_transformer_state(tmp_path / "old.pt").tensors, state)
    assert_same(
        load_transformer_state(saved(tmp_path / "bare.pth", prefixed(state, "model."))).tensors, state
    )


@pytest.mark.parametrize("folder", ["", "transformer"])
@pytest.mark.parametrize("names", ["wan", "diffusers"])
@pytest.mark.parametrize("shards", [1, 3])
def test_directories_load(tmp_path, folder, names, shards):
    state = wan_state()
    stored = {to_diffusers_name(n): v for n, v in state.items()} if names == "diffusers" else state
    directory = tmp_path / folder
    directory.mkdir(exist_ok=True)
    if shards == 1:
        save_file(stored, directory / "diffusion_pytorch_model.safetensors")
    else:
        weight_map = {name: f"part-{i % shards}.safetensors" for i, name in enumerate(stored)}
        for shard in set(weight_map.values()):
            save_file({n: stored[n] for n, s in weight_map.items() if s == shard}, directory / shard)
        index = directory / "diffusion_pytorch_model.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert_same(load_transformer_state(tmp_path).tensors, state)


FOLDERS = {
    "pickles": ["diffusion_pytorch_model.bin"],
    "a variant": ["diffusion_pytorch_model.fp16.safetensors"],
    "transformers' name": ["model.safetensors"],
    "a trainer's": ["model.pt", "optimizer.pt", "config.json"],
    "a variant beside": ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bf16.safetensors"],
    "pickles beside": ["diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin"],
    "in transformer/": ["transformer/diffusion_pytorch_model.fp16.bin"],
}


@pytest.mark.parametrize("folder", FOLDERS)
def test_folders_load_what_they_are_named_for(tmp_path, folder):
    """The first file is the one; the others hold something else."""
    (tmp_path / "transformer").mkdir()
    for n, name in enumerate(FOLDERS[folder]):
        stored = {key: value + n for key, value in wan_state().items()}
        if name.endswith("safetensors"):
            save_file(stored, tmp_path / name)
        else:
            saved(tmp_path / name, {"generator": stored} if name.endswith(".pt") else stored)
    state = load_transformer_state(tmp_path)
    assert_same(state.tensors, wan_state())
    assert state.files == (tmp_path / FOLDERS[folder][0],)


@pytest.mark.parametrize(
    "name",
    ["diffusion_pytorch_model.safetensors.index.json", "pytorch_model.bin.index.json",
     "diffusion_pytorch_model.safetensors.index.fp16.json"],
)  # fmt: skip
def test_an_index_is_read_by_itself_and_in_its_folder(tmp_path, name):
    state, pickled = wan_state(), ".bin." in name
    weight_map = {key: f"part-{n % 2}.{'bin' if pickled else 'safetensors'}" for n, key in enumerate(state)}
    for shard in set(weight_map.values()):
        part = {key: state[key] for key, own in weight_map.items() if own == shard}
        torch.save(part, tmp_path / shard) if pickled else save_file(part, tmp_path / shard)
    (tmp_path / name).write_text(json.dumps({"weight_map": weight_map}))
    for path in (tmp_path / name, tmp_path):
        loaded = load_transformer_state(path)
        assert_same(loaded.tensors, state)
        assert len(loaded.files) == 2
    if ".fp16" in name:  # whole weights of full precision come first
        whole = tmp_path / "diffusion_pytorch_model.safetensors"
        save_file({key: value + 1 for key, value in state.items()}, whole)
        assert load_transformer_state(tmp_path).files == (whole,)
        whole.unlink()
    with pytest.raises(ValueError, match="an index of shards has no entry ema"):
        load_transformer_state(tmp_path, entry="ema")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2])
def test_weights_of_every_float_type_are_widened(tmp_path, dtype):
    state = {name: value.to(dtype) for name, value in wan_state().items()}
    save_file(state, tmp_path / "x.safetensors")
    model = meta_model()
    loaded = load_transformer_state(tmp_path / "x.safetensors")
    assign_state(model, loaded, device="cpu", dtype=torch.float32)
    assert_same(model.state_dict(), {name: value.float() for name, value in state.items()})


def test_absent_shards_and_lost_keys_are_named(tmp_path):
    state = wan_state()
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    save_file({"a": torch.zeros(1)}, tmp_path / "one.safetensors")
    index.write_text(json.dumps({"weight_map": {name: "two.safetensors" for name in state}}))
    with pytest.raises(ValueError, match="two.safetensors; download the rest"):
        load_transformer_state(tmp_path)
    index.write_text(json.dumps({"weight_map": {"head.head.bias": "one.safetensors"}}))
    with pytest.raises(ValueError, match=r"head.head.bias \(one.safetensors\)"):
        load_transformer_state(tmp_path)
    index.write_text(json.dumps({"weight_map": {"head.head.bias": "../outside.safetensors"}}))
    with pytest.raises(ValueError, match="not beside it"):
        load_transformer_state(tmp_path)
    index.write_text("[]")
    with pytest.raises(ValueError, match="not a safetensors index"):
        load_transformer_state(tmp_path)


def test_a_directory_without_weights_says_what_it_holds(tmp_path):
    (tmp_path / "readme.md").write_text("x")
    with pytest.raises(ValueError, match="readme.md"):
        load_transformer_state(tmp_path)


def test_golden_name_map_is_exact(golden_file):
    table = json.loads(golden_file("wan_to_diffusers_keys.json").read_text())
    assert {name: to_diffusers_name(name) for name in table} == table
    assert all(from_diffusers_name(theirs) == name for name, theirs in table.items())


def test_golden_tiny_checkpoints_load(golden_file):
    base = load_transformer_state(golden_file("tiny_base.pt"))
    adapter = load_adapter_state(golden_file("tiny_lora.pt"))
    assert base.tensors["patch_embedding.weight"].shape == (96, 16, 1, 2, 2)
    assert (adapter.rank, adapter.alpha, len(adapter.modules)) == (8, 8.0, 30)


class Evil:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("zipped", [True, False])
def test_pickled_code_is_refused_and_not_run(tmp_path, zipped):
    torch.save(
        {"generator": Evil(tmp_path / "owned")}, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped
    )
    with pytest.raises(ValueError, match=r"refused, because the file holds pickled code .*mkdir") as error:
        load_transformer_state(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()
    assert "weights_only" not in str(error.value)


def test_a_plain_pickle_is_refused(tmp_path):
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"generator": Evil(tmp_path / "owned")}))
    with pytest.raises(ValueError, match="x.pt"):
        load_transformer_state(tmp_path / "x.pt")
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize("keep", [0.05, 0.5, 0.999])
@pytest.mark.parametrize("kind", ["pt", "legacy", "safetensors"])
def test_truncated_files_give_one_clear_error(tmp_path, kind, keep):
    path = tmp_path / f"x.{kind}"
    if kind == "safetensors":
        save_file(wan_state(), path)
    else:
        torch.save({"generator": wan_state()}, path, _use_new_zipfile_serialization=kind == "pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ValueError, match="truncated or damaged"):
        load_transformer_state(path)


def test_a_legacy_file_cut_anywhere_in_its_pickle_is_a_clear_error(tmp_path):
    """The unpickler runs off its end in many ways."""
    path = tmp_path / "x.pt"
    torch.save({"generator": wan_state()}, path, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    for length in range(1, 3000, 3):
        path.write_bytes(data[:length])
        with pytest.raises(ValueError, match="x.pt"):
            load_transformer_state(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"<!DOCTYPE html><html>404 and some more text to fill</html>", "neither a torch nor a safetensors"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "git lfs pull"),
    ],
)
def test_files_that_are_no_checkpoints(tmp_path, content, message):
    (tmp_path / "x.pt").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_transformer_state(tmp_path / "x.pt")


def test_a_missing_file_a_list_and_mixed_entries(tmp_path):
    with pytest.raises(ValueError, match="no such file"):
        load_transformer_state(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match="holds a list"):
        load_transformer_state(saved(tmp_path / "list.pt", [torch.zeros(1)]))
    with pytest.raises(ValueError, match="not tensors: lr"):
        load_transformer_state(saved(tmp_path / "mixed.pt", {"generator": {"a": torch.zeros(1), "lr": 0.1}}))
    with pytest.raises(ValueError, match="several names .* head.head.bias"):
        twice = {"head.head.bias": torch.zeros(1), "model.head.head.bias": torch.zeros(1)}
        load_transformer_state(saved(tmp_path / "twice.pt", {"generator": twice}))


def test_an_adapter_given_as_weights_is_recognised(tmp_path):
    path = saved(tmp_path / "lora.pt", {"generator_lora": lora_state(), "step": 1})
    with pytest.raises(ValueError, match="give it as the adapter"):
        load_transformer_state(path)
    with pytest.raises(ValueError, match="give it as the adapter"):
        load_transformer_state(saved(tmp_path / "flat.pt", lora_state()))


def meta_model(shape: WanShape = SHAPE) -> CausalWan:
    with torch.device("meta"):
        return CausalWan(shape)


def assign(tensors: dict[str, torch.Tensor], model: CausalWan, dtype: torch.dtype = torch.float32) -> None:
    assign_state(model, TransformerState(tensors, "file.pt"), device="cpu", dtype=dtype)


def test_assigned_weights_are_the_mapped_file_or_cast(tmp_path):
    state = wan_state()
    loaded = load_transformer_state(saved(tmp_path / "x.pt", {"generator": state}))
    model = meta_model()
    assign_state(model, loaded, device="cpu", dtype=torch.float32)
    assert_same(model.state_dict(), state)
    # torch.save aligns its records, so the parameters are the mapped file itself: no second copy.
    weight = model.blocks[1].ffn[0].weight
    assert weight.data_ptr() == loaded.tensors["blocks.1.ffn.0.weight"].data_ptr()
    assert weight.requires_grad
    half = meta_model()
    assign_state(half, loaded, device="cpu", dtype=torch.bfloat16)
    assert_same(half.state_dict(), {name: value.bfloat16() for name, value in state.items()})


@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.bool, torch.complex64])
def test_quantised_weights_are_refused(dtype):
    name = "blocks.0.ffn.0.weight"
    with pytest.raises(
        ValueError, match=f"file.pt: {name} holds {str(dtype)[6:]}, not floating-point numbers"
    ):
        assign(wan_state() | {name: wan_state()[name].to(dtype)}, meta_model())


def test_unaligned_mapped_weights_get_memory_of_their_own(tmp_path):
    state = wan_state()
    save_file(state, tmp_path / "x.safetensors")
    loaded = load_transformer_state(tmp_path / "x.safetensors")
    assert any(value.data_ptr() % 64 for value in loaded.tensors.values())
    model = meta_model()
    assign_state(model, loaded, device="cpu", dtype=torch.float32)
    assert all(value.data_ptr() % 64 == 0 for value in model.parameters())
    assert_same(model.state_dict(), state)


def test_training_in_place_does_not_write_into_the_checkpoint(tmp_path):
    path = saved(tmp_path / "x.pt", {"generator": wan_state()})
    model = meta_model()
    assign_state(model, load_transformer_state(path), device="cpu", dtype=torch.float32)
    with torch.no_grad():
        for value in model.parameters():
            value.zero_()
    assert_same(load_transformer_state(path).tensors, wan_state())


def test_renamed_missing_unexpected_and_misshapen_keys_are_named():
    state = wan_state()
    state["blocks.0.self_attn.query.weight"] = state.pop("blocks.0.self_attn.q.weight")
    state["head.head.bias"] = torch.zeros(7)
    del state["blocks.1.norm3.bias"]
    with pytest.raises(ValueError) as error:
        assign(state, meta_model())
    lines = str(error.value).splitlines()
    assert lines[0] == "file.pt: the weights do not fit the model"
    assert lines[1] == "  missing (2): blocks.0.self_attn.q.weight, blocks.1.norm3.bias"
    assert lines[2] == (
        "  unexpected (1): blocks.0.self_attn.query.weight (did you mean blocks.0.self_attn.q.weight?)"
    )
    assert lines[3] == "  misshapen (1): head.head.bias (file [7], model [16])"


def test_many_keys_are_counted():
    state = wan_state()
    gone = [name for name in state if name.startswith("blocks.1.")]
    for name in gone[:20]:
        del state[name]
    with pytest.raises(ValueError, match=r"missing \(20\): .* and 8 more"):
        assign(state, meta_model())


def test_another_architecture_names_the_sizes_that_differ():
    with torch.device("meta"):
        larger = WanShape(**{**vars(SHAPE), "dim": 48, "num_layers": 3, "ffn_dim": 64})
        state = CausalWan(larger).state_dict()
    with pytest.raises(ValueError) as error:
        assign(state, meta_model())
    line = str(error.value).splitlines()[1]
    assert (
        "the file has dim 48, ffn_dim 64, num_layers 3; the model has dim 24, ffn_dim 40, num_layers 2"
        in line
    )
