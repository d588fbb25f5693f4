"""Files in the layouts of public post-trained generators: they load, and change the base."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from kvpo.app.sources.common import first_block
from kvpo.app.sources.wan_parts import wan_weights
from kvpo.config_checks import ConfigurationError
from kvpo.models.adapter_files import PEFT_PREFIX
from kvpo.models.adapters import LORA_TARGETS
from tests.models.tiny import tiny_model
from tests.tiny_wan import tiny_wan

EXTRA = ("text_embedding.0", "text_embedding.2", "time_embedding.0", "time_embedding.2",
         "time_projection.1", "head.head")  # fmt: skip
"""Layers that RAVEN adapts in addition to those of the blocks."""
Tensors = dict[str, Tensor]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wan")
    tiny_wan("longlive-1.3b", folder)
    return folder


def base_of(files: Path) -> Tensors:
    given = torch.load(files / "base.pt", weights_only=True)["generator"]
    return {name.removeprefix("model."): value for name, value in given.items()}


def adapter_of(files: Path, targets: tuple[str, ...] = LORA_TARGETS) -> Tensors:
    """A random adapter under bare names."""
    config, draws, found = tiny_wan("longlive-1.3b", files), torch.Generator().manual_seed(7), {}
    for name, module in tiny_model(config.model).named_modules():
        if name.endswith(targets):
            for half, size in (("A", (2, module.in_features)), ("B", (module.out_features, 2))):
                found[f"{name}.lora_{half}.weight"] = 0.2 * torch.randn(size, generator=draws)
    return found


def named(tensors: Tensors, prefix: str = PEFT_PREFIX, adapter: str = "") -> Tensors:
    return {prefix + name.replace("weight", adapter + "weight"): value for name, value in tensors.items()}


def raven_bundle(files: Path, out: Path) -> dict[str, str]:
    adapter = adapter_of(files, (*LORA_TARGETS, *EXTRA))
    layers = {name.split(".lora_")[0] for name in adapter}
    base = {}
    for name, value in base_of(files).items():
        module, _, last = name.rpartition(".")
        base[f"{module}.base_layer.{last}" if module in layers else name] = value
    torch.save(named(base | named(adapter, "", "default.")), out / "cmgrpo_raven_full.pt")
    return dict.fromkeys(("checkpoint", "lora"), str(out / "cmgrpo_raven_full.pt"))


def raven_adapter(files: Path, out: Path) -> dict[str, str]:
    torch.save(base_of(files), out / "raven_model.pt")
    save_file(named(adapter_of(files, (*LORA_TARGETS, *EXTRA))), out / "cmgrpo_raven_lora.safetensors")
    return {"checkpoint": str(out / "raven_model.pt"), "lora": str(out / "cmgrpo_raven_lora.safetensors")}


def tempact(files: Path, out: Path) -> dict[str, str]:
    torch.save({"generator_ema": named(base_of(files), "model._fsdp_wrapped_module.")}, out / "sf.pt")
    torch.save(named(adapter_of(files)), out / "lora.pt")
    return {"checkpoint": str(out / "sf.pt"), "lora": str(out / "lora.pt")}


def opsd(files: Path, out: Path) -> dict[str, str]:
    adapter = adapter_of(files)
    average = {name: value + 1 for name, value in adapter.items()}
    torch.save({"generator_lora": named(adapter), "generator_ema": named(average)}, out / "model.pt")
    return {"lora": f"{out / 'model.pt'}#generator_lora"}


def astrolabe(files: Path, out: Path) -> dict[str, str]:
    save_file(named(adapter_of(files)), out / "adapter_model.safetensors")
    (out / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "peft_type": "LORA"}))
    return {"lora": str(out)}


def comfy(files: Path, out: Path) -> dict[str, str]:
    save_file(named(base_of(files), "model.diffusion_model."), out / "wan.safetensors")
    save_file(named(adapter_of(files), "diffusion_model."), out / "lora.safetensors")
    return {"checkpoint": str(out / "wan.safetensors"), "lora": str(out / "lora.safetensors")}


MODELS: dict[str, tuple[Callable[[Path, Path], dict[str, str]], int]] = {
    "CM-GRPO, one file": (raven_bundle, 26),
    "CM-GRPO, base and adapter": (raven_adapter, 26),
    "TempAct": (tempact, 20),
    "OPSD-V": (opsd, 20),
    "Astrolabe": (astrolabe, 20),
    "ComfyUI": (comfy, 20),
}


@pytest.mark.parametrize("model", MODELS)
def test_public_post_trained_models_load_and_say_what_is_bound(
    files: Path, tmp_path: Path, model: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The adapter does the same continued and merged, and changes what the checkpoint generates."""
    caplog.set_level("INFO", logger="kvpo")
    write, bound = MODELS[model]
    given = {f"backbone__{name}": value for name, value in write(files, tmp_path).items()}
    made = []
    for start in ("continue", "merge"):
        config = tiny_wan("longlive-1.3b", files, **given, backbone__lora_start=start)
        made.append(first_block(config, wan_weights(config).model))
        assert f"adapter bound to {bound} layers of rank 2, alpha 2 (" in caplog.text
    assert torch.allclose(*made, atol=1e-4)
    plain = tiny_wan("longlive-1.3b", files)
    bare = wan_weights(plain).model
    assert (first_block(plain, bare) - made[0]).abs().max() > 1e-3


def refused(files: Path, error: type[ValueError], match: str, **changes: Any) -> None:
    with pytest.raises(error, match=match):
        wan_weights(tiny_wan("longlive-1.3b", files, **changes))


def test_a_bundle_alone_an_adapter_for_no_layer_and_one_without_effect_are_refused(
    files: Path, tmp_path: Path
) -> None:
    bundle = raven_bundle(files, tmp_path)["checkpoint"]
    refused(
        files, ConfigurationError, rf"backbone.lora: empty, but .* both: --backbone.lora {bundle}",
        backbone__checkpoint=bundle,
    )  # fmt: skip
    torch.save(named({"blocks.9.ffn.0.lora_A.weight": torch.ones(2, 24),
                      "blocks.9.ffn.0.lora_B.weight": torch.ones(40, 2)}), tmp_path / "none.pt")  # fmt: skip
    refused(
        files, ValueError, r"unexpected \(2\): .*blocks.9.ffn.0", backbone__lora=str(tmp_path / "none.pt")
    )
    faint = {name: value * 1e-30 for name, value in adapter_of(files).items()}
    torch.save(named(faint), tmp_path / "faint.pt")
    for start in ("continue", "merge"):
        refused(
            files, ValueError, r"faint.pt: bound to 20 layers, but .* same latents with and without it",
            backbone__lora=str(tmp_path / "faint.pt"), backbone__lora_start=start,
        )  # fmt: skip
