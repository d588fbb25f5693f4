"""Files as they come from half a clone or half a disk: whoever opens them says so in one line."""

import io
import json
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from kvpo.app.cli import main
from kvpo.app.configuration import resolve
from kvpo.app.noise_files import read_floor
from kvpo.app.sources.world import load_base
from kvpo.app.video_folder import file_prompts
from kvpo.config_checks import ConfigurationError
from kvpo.models.adapter_files import load_adapter_state
from kvpo.models.checkpoints import load_transformer_state
from kvpo.models.export import save_diffusers_adapter, save_peft_adapter, save_public_checkpoint
from kvpo.models.pretrained import read_tokenizer, strict_pretrained
from kvpo.models.tensor_files import read_shards, read_tensors
from kvpo.models.umt5 import PromptCache, load_text_encoder
from kvpo.models.wan_vae import load_wan_vae
from kvpo.prompt_files import read_prompts
from kvpo.report.record import read_run
from kvpo.rewards.pretrained import read_template
from kvpo.rewards.video_files import probe
from kvpo.serving import read_token
from kvpo.training.checkpoint import best_checkpoint, checkpoints, load_checkpoint, save_checkpoint
from tests.tiny_wan import write_text_and_pixels
from tests.tiny_world import tiny_config

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
ADAPTER = {f"base_model.model.blocks.0.ffn.0.lora_{half}.weight": torch.ones(2, 2) for half in "AB"}
INDEX = {"metadata": {}, "weight_map": {"a": "h.safetensors", "b": "h.safetensors"}}
CONFIG = {
    "r": 2,
    "lora_alpha": 4,
    "rank_pattern": {"ffn.0": 2},
    "alpha_pattern": {"ffn.0": 4},
    "bias": "none",
}
SETTINGS = {
    "seed": 1,
    "optim": {"lr": 1e-4},
    "objective": {"clip": [0.1, 0.2]},
    "rewards": {"weights": {"redness": 1.0}, "scorers": ["world"]},
}


def read_all_prompts(path: Path) -> None:
    for prompt in read_prompts(path, num_frames=18, switches=(9,)):
        " ".join(prompt.segments).encode()


def score_map(path: Path) -> None:
    file_prompts(path, path.parent, [path.parent / "a.mp4", path.parent / "b.mp4"])


def encoder(directory: Path) -> None:
    load_text_encoder(directory / "text_encoder", directory / "tokenizer")


POINTERS: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "prompts": ("p.txt", lambda d: read_all_prompts(d / "p.txt")),
    "prompts with switches": ("p.jsonl", lambda d: read_all_prompts(d / "p.jsonl")),
    "prompts to score": ("p.json", lambda d: file_prompts(d / "p.json", d, [d / "a.mp4"])),
    "settings": ("c.yaml", lambda d: resolve(None, d / "c.yaml", {})),
    "noise floors": ("n.json", lambda d: read_floor(d / "n.json", "a")),
    "token": ("token", lambda d: read_token(d / "token", {}, "TOKEN")),
    "video": ("v.mp4", lambda d: probe(d / "v.mp4")),
    "torch weights": ("w.pt", lambda d: load_transformer_state(d / "w.pt")),
    "weights": ("w.safetensors", lambda d: load_transformer_state(d / "w.safetensors")),
    "index": ("w.index.json", lambda d: read_shards(d / "w.index.json")),
    "shard": ("h.safetensors", lambda d: read_shards(d / "good.index.json")),
    "adapter": ("a.pt", lambda d: load_adapter_state(d / "a.pt")),
    "adapter's settings": (
        "adapter_config.json",
        lambda d: load_adapter_state(d / "adapter_model.safetensors"),
    ),
    "base": ("base.safetensors", lambda d: load_base(tiny_config(d / "base.safetensors"))),
    "VAE": ("vae/diffusion_pytorch_model.safetensors", load_wan_vae),
    "VAE's settings": ("vae/config.json", load_wan_vae),
    "text encoder": ("text_encoder/model.safetensors", encoder),
    "vocabulary": ("tokenizer/tokenizer.json", encoder),
    "reward's vocabulary": ("tokenizer/tokenizer.json", lambda d: read_tokenizer(d / "tokenizer")),
    "reward": ("vae/config.json", lambda d: strict_pretrained(None, d / "vae")),
    "template": ("t.py", lambda d: read_template(d / "t.py", "0")),
    "checkpoint": ("update-000001/state.safetensors", lambda d: load_checkpoint(d / "update-000001")),
    "checkpoint's state": ("update-000001/state.json", lambda d: load_checkpoint(d / "update-000001")),
}


@pytest.mark.parametrize("what", POINTERS)
def test_a_git_lfs_pointer_is_named_wherever_it_lies(what: str, tmp_path: Path) -> None:
    name, read = POINTERS[what]
    if "/" in name:
        write_text_and_pixels(tmp_path)
        save_checkpoint(tmp_path, 1, {"x": torch.ones(3)}, {"seed": 1}, architecture={"dim": 3})
        assert (tmp_path / name).exists()
    save_file(ADAPTER, tmp_path / "adapter_model.safetensors")
    (tmp_path / "good.index.json").write_text(json.dumps(INDEX))
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(ValueError, match="Git LFS pointer, not the file itself; run `git lfs") as caught:
        read(tmp_path)
    assert Path(name).name in str(caught.value) and "\n" not in str(caught.value)


def test_a_pointer_of_prompts_generates_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "p.txt").write_text(POINTER)
    assert main(["generate", "--prompts", str(tmp_path / "p.txt"), "--out", str(tmp_path / "out")]) == 1
    assert "p.txt: a Git LFS pointer" in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("[" * 30_000, "nested too deeply"),
        ('prompts: {file: "\\ud800"}', "half of a character"),
        ("2001-99-99", "month must be in"),
        ("&a [*a]", "Circular reference"),
        ("seed: &a {x: *a}", "Circular reference"),
        ("? [a]\n: b", "line 1"),
        ("optim: {lr: !!float x}", "could not convert"),
    ],
)
def test_yaml_that_cannot_be_used_is_one_line(tmp_path: Path, content: str, reason: str) -> None:
    (tmp_path / "settings.yaml").write_text(content)
    with pytest.raises(ConfigurationError, match=reason) as caught:
        resolve(None, tmp_path / "settings.yaml", {})
    assert "settings.yaml" in str(caught.value)
    str(caught.value).encode()


def test_a_number_as_the_name_of_a_shard(tmp_path: Path) -> None:
    for name in (3, None, ["h"], {"a": 1}):
        (tmp_path / "i.json").write_text(json.dumps({"weight_map": {"a.weight": name}}))
        with pytest.raises(ValueError, match="keys whose shard is not a file name: a.weight"):
            read_shards(tmp_path / "i.json")


VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e308,
    float("nan"),
    "x",
    "",
    [],
    {},
    [[[1]]],
    {"a": {"b": 1}},
    10**30,
    "\ud800",
]


def changed(value: Any, draws: random.Random) -> Any:
    """A JSON value with one part replaced, removed or moved to another name."""
    places: list[tuple[Any, Any]] = []

    def visit(part: Any) -> None:
        for key in (
            list(part) if isinstance(part, dict) else range(len(part)) if isinstance(part, list) else []
        ):
            places.append((part, key))
            visit(part[key])

    copy = json.loads(json.dumps(value))
    visit(copy)
    part, key = draws.choice(places)
    kind = draws.randrange(4)
    if kind == 0:
        del part[key]
    elif kind == 1 and isinstance(part, dict):
        part[draws.choice(["", "a.b", "__metadata__", "\udc00"])] = part.pop(key)
    else:
        part[key] = draws.choice(VALUES)
    return copy


def mangled(content: bytes, draws: random.Random) -> bytes:
    """Bytes with a few overwritten, removed or inserted, mostly at the front, where the headers are."""
    data = bytearray(content)
    for _ in range(draws.choice([1, 1, 3, 9])):
        place = draws.randrange(max(1, min(len(data), draws.choice([16, 400, len(data)]))))
        kind = draws.randrange(4)
        if kind == 0:
            data[place:] = data[place : place + draws.randrange(len(data) + 1)]
        else:
            data[place : place + (kind < 3)] = draws.randbytes(draws.choice([0, 1, 1, 4]))
    return bytes(data)


def with_header(header: Any) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


def torch_file(content: object, zipped: bool) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer, _use_new_zipfile_serialization=zipped)
    return buffer.getvalue()


HEADER = {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}, "__metadata__": {"alpha": "3"}}
READERS: dict[str, tuple[Any, Callable[[Path], Any]]] = {
    "index": (INDEX, read_shards),
    "noise floors": ({"components": {"a": {"noise_floor": 0.1}}}, lambda path: read_floor(path, "a")),
    "prompts to score": ({"a.mp4": "x", "b.mp4": "y"}, score_map),
    "settings": (SETTINGS, lambda path: resolve(None, path, {})),
    "adapter's settings": (CONFIG, lambda path: load_adapter_state(path.parent)),
    "best": ({"checkpoint": "update-000001", "value": 1.0}, lambda path: best_checkpoint(path.parent)),
    "segments": ({"segments": ["a", "b"], "switches": [9], "num_frames": 18}, read_all_prompts),
    "prompts": ({"prompts": ["a", "b"]}, read_all_prompts),
    "header": (HEADER, read_tensors),
    "header of an adapter": (HEADER, load_adapter_state),
    "torch": (torch_file({"generator_lora": ADAPTER, "step": 1}, True), load_adapter_state),
    "legacy torch": (torch_file({"generator": ADAPTER}, False), load_transformer_state),
    "state": ({"kind": "update", "update": 1, "components": {"a": 1}}, lambda path: read_run(path.parent)),
}
NAMES = {
    "adapter's settings": "adapter_config.json", "best": "best.json", "settings": "c.yaml",
    "segments": "p.jsonl", "prompts": "p.jsonl", "state": "metrics.jsonl", "prompts to score": "p.json",
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_damaged_files_are_read_or_refused_in_one_line(reader: str, tmp_path: Path) -> None:
    """Whatever has become of a file: what it says still, or a ValueError that can be printed."""
    content, read = READERS[reader]
    draws, refused = random.Random(7), 0
    save_file(ADAPTER, tmp_path / "adapter_model.safetensors")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "h.safetensors")
    (tmp_path / "config.yaml").write_text("seed: 1\n")
    path = tmp_path / NAMES.get(reader, "x.safetensors" if "header" in reader else "x.pt")
    for turn in range(200):
        if isinstance(content, bytes):
            data = mangled(content, draws)
        else:
            value = changed(content, draws) if turn % 2 else content
            data = with_header(value) if "header" in reader else json.dumps(value).encode()
            data = data if turn % 2 else mangled(data, draws)
        path.write_bytes(data)
        try:
            read(path)
        except ValueError as error:
            assert not isinstance(error, UnicodeError)
            str(error).encode()
            refused += 1
    assert refused > 20 or reader == "state"


def test_damaged_checkpoints_and_embeddings(tmp_path: Path) -> None:
    draws = random.Random(7)
    path = save_checkpoint(tmp_path, 1, {"x": torch.ones(3)}, {"seed": 1}, architecture={"dim": 3})
    for name in ("state.json", "state.safetensors"):
        good = (path / name).read_bytes()
        for _ in range(100):
            (path / name).write_bytes(mangled(good, draws))
            checkpoints(tmp_path)
            try:
                load_checkpoint(path, architecture={"dim": 3})
            except ValueError as error:
                str(error).encode()
        (path / name).write_bytes(good)
    cache = PromptCache(tmp_path, "encoder", 8)
    cache.write("a", torch.ones(8, 4), 3)
    good = cache.path("a").read_bytes()
    for _ in range(200):
        cache.path("a").write_bytes(mangled(good, draws))
        found = cache.read("a")
        assert found is None or found.shape[0] == 8


def test_what_is_written_can_be_read_by_others(tmp_path: Path) -> None:
    """Exports, checkpoints and embeddings have the permissions of any new file."""
    adapter = load_adapter_state(write_file(tmp_path / "in.safetensors"))
    save_peft_adapter(tmp_path / "peft", adapter)
    save_diffusers_adapter(tmp_path / "lora", adapter)
    save_public_checkpoint(tmp_path / "x.pt", ADAPTER)
    save_checkpoint(tmp_path, 1, {"x": torch.ones(3)}, {"seed": 1}, architecture={"dim": 3})
    PromptCache(tmp_path / "embeddings", "encoder", 8).write("a", torch.ones(8, 4), 3)
    (tmp_path / "plain").touch()
    written = [path for path in tmp_path.rglob("*") if path.is_file() and path.name != "in.safetensors"]
    assert len(written) == 8
    assert {path.stat().st_mode for path in written} == {(tmp_path / "plain").stat().st_mode}


def write_file(path: Path) -> Path:
    save_file(ADAPTER, path)
    return path
