"""Files that cannot be used: one line through the command line, status 1 or 2, and nothing is left behind."""

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from benchmarks.shapes import geometry_file
from kvpo.app.cli import main
from tests.tiny_wan import SHAPE, tiny_flags, tiny_wan


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("wan")
    tiny_wan("longlive-1.3b", directory)
    return directory


class Code:
    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, ("owned",)


def weights(files: Path) -> dict[str, Tensor]:
    return torch.load(files / "base.pt", weights_only=True)["generator"]


def truncated(files: Path, out: Path) -> None:
    data = (files / "base.pt").read_bytes()
    out.write_bytes(data[: len(data) // 2])


def renamed(files: Path, out: Path) -> None:
    state = weights(files)
    state["model.blocks.1.cross_attn.query.weight"] = state.pop("model.blocks.1.cross_attn.q.weight")
    torch.save({"generator": state}, out)


def misshapen(files: Path, out: Path) -> None:
    torch.save({"generator": weights(files) | {"model.head.head.bias": torch.zeros(3)}}, out)


def another_preset(files: Path, out: Path) -> None:
    """As many layers as another model has."""
    state = weights(files)
    more = {n.replace("blocks.1", "blocks.2"): v.clone() for n, v in state.items() if "blocks.1." in n}
    torch.save({"generator": state | more}, out)


def pickled_code(files: Path, out: Path) -> None:
    torch.save({"generator": weights(files), "step": Code()}, out)


def adapter(files: Path, out: Path) -> None:
    out.write_bytes((files / "lora.pt").read_bytes())


def web_page(files: Path, out: Path) -> None:
    out.write_text("<!DOCTYPE html><html><body>Not found</body></html>")


CHECKPOINTS = [
    (truncated, "truncated or damaged torch file"),
    (renamed, "blocks.1.cross_attn.query.weight (did you mean blocks.1.cross_attn.q.weight?)"),
    (misshapen, "misshapen (1): head.head.bias (file [3], model [16])"),
    (another_preset, "the file has num_layers 3; the model has num_layers 2. Choose the preset"),
    (pickled_code, "refused, because the file holds pickled code and not only tensors (it would call"),
    (adapter, "It is an adapter: give it as the adapter, beside the base checkpoint"),
    (web_page, "neither a torch nor a safetensors file"),
]


def refused(capsys: pytest.CaptureFixture[str], directory: Path, command: str, *arguments: str) -> str:
    """The one line that a command in an empty directory ends with, leaving nothing there."""
    before = sorted(directory.rglob("*"))
    status = main([command, *arguments, "--out", str(directory / "out")])
    printed = capsys.readouterr().err
    lines = [line for line in printed.splitlines() if line.startswith("kvpo: error: ")]
    assert status in (1, 2) and len(lines) == 1 and "Traceback" not in printed, printed
    assert sorted(directory.rglob("*")) == before
    return lines[0]


@pytest.mark.parametrize(("damage", "message"), CHECKPOINTS, ids=lambda part: getattr(part, "__name__", ""))
def test_checkpoints(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path, Path], None],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)  # pickled code would act here
    damage(files, tmp_path / "given.pt")
    flags = tiny_flags("longlive-1.3b", files)
    for command in ("align", "generate"):
        line = refused(capsys, tmp_path, command, *flags, f"--backbone.checkpoint={tmp_path / 'given.pt'}")
        assert "given.pt" in line and message in line, line


def halved(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value for name, value in tensors.items() if "lora_B" not in name}


def elsewhere(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.replace("blocks.1.ffn.0", "blocks.7.ffn.0"): value for name, value in tensors.items()}


def wider(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.cat([v, v], -1) if "q.lora_A" in name else v for name, v in tensors.items()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (halved, "layers with one half of an adapter: blocks.0.self_attn.q (only A)"),
        (elsewhere, "unexpected (2): base_model.model.blocks.7.ffn.0.lora_A.weight"),
        (wider, "misshapen (4): base_model.model.blocks.0.self_attn.q.lora_A.weight (file [2, 48], model"),
    ],
)
def test_adapters(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    tensors = torch.load(files / "lora.pt", weights_only=True)["generator_lora"]
    torch.save({"generator_lora": change(tensors)}, tmp_path / "given.pt")
    flags = tiny_flags("longlive-1.3b", files, backbone__lora=str(tmp_path / "given.pt"))
    line = refused(capsys, tmp_path, "align", *flags)
    assert "given.pt" in line and message in line, line


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backbone__checkpoint": ""}, "backbone.checkpoint: empty"),
        ({"backbone__checkpoint": "nowhere.pt"}, "backbone.checkpoint: nowhere.pt: no such file"),
        (
            {"prompts__file": "nowhere.txt"},
            "prompts.file: nowhere.txt: no such prompt file (nowhere.txt: no such file or directory",
        ),
        ({"backbone__lora": "nowhere.pt"}, "backbone.lora: nowhere.pt: no such file"),
        ({"backbone__encoders": "nowhere/"}, "backbone.encoders: nowhere/: no such file"),
        ({"backbone__checkpoint": "nowhere.pt#ema"}, "backbone.checkpoint: nowhere.pt: no such file"),
        (
            {"backbone__geometry": geometry_file(replace(SHAPE, freq_dim=32))},
            "misshapen (1): time_embedding.0.weight (file [24, 16], model [24, 32])",
        ),
        (
            {"backbone__geometry": geometry_file(replace(SHAPE, channels=8))},
            "backbone.encoders: latents of 4 channels, backbone.geometry has 8",
        ),
        ({"device": "cuda:9"}, "device: 'cuda:9' cannot be used here"),
    ],
)
def test_settings(
    files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    settings: dict[str, object],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    line = refused(capsys, tmp_path, "align", *tiny_flags("longlive-1.3b", files, **settings))
    assert message in line, line


def test_an_encoder_of_another_width(files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = weights(files)
    state["model.text_embedding.0.weight"] = torch.zeros(24, 16)
    torch.save({"generator": state}, tmp_path / "wide.pt")
    changes = {
        "backbone__checkpoint": str(tmp_path / "wide.pt"),
        "backbone__geometry": geometry_file(replace(SHAPE, text_dim=16)),
    }
    line = refused(capsys, tmp_path, "generate", *tiny_flags("longlive-1.3b", files, **changes))
    assert "backbone.encoders: embeddings of width 12, backbone.geometry has 16" in line


def test_sharded_directories_with_a_part_missing(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {name.removeprefix("model."): value for name, value in weights(files).items()}
    half = dict(list(state.items())[::2])
    save_file(half, tmp_path / "one.safetensors")
    index = {name: "one.safetensors" if name in half else "two.safetensors" for name in state}
    (tmp_path / "diffusion_pytorch_model.safetensors.index.json").write_text(
        json.dumps({"weight_map": index})
    )
    line = refused(
        capsys, tmp_path, "align", *tiny_flags("longlive-1.3b", files, backbone__checkpoint=str(tmp_path))
    )
    assert "shards that are not beside it: two.safetensors; download the rest" in line


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", "a dog\n\na ball\n", "p.txt, line 2: blank"),
        ("p.jsonl", '{"prompts": ["a dog", "a ball"]}\n{"prompts": ["a dog"', "p.jsonl, line 2: not JSON"),
        ("p.jsonl", '{"prompts": ["a", "b"]}\n{"prompts": ["a"]}\n', "p.jsonl, line 2: 1 segments, but"),
        ("p.jsonl", '{"segments": ["a", "b"], "switches": [18]}\n', "p.jsonl, line 1: "),
        ("p.csv", "a dog\n", "p.csv, line 1: no column is called prompt"),
    ],
)
def test_prompt_files(
    files: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    for command, setting in (("align", "--prompts.file"), ("generate", "--prompts")):
        flags = tiny_flags("longlive-1.3b", files, segments=2)
        line = refused(capsys, tmp_path, command, *flags, f"{setting}={tmp_path / name}")
        assert message in line, line
