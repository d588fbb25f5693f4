"""Exports: every layout loads again, says what it was made with, brings its card, and goes to a hub."""

import base64
import json
import logging
import re
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from torch import Tensor

from kvpo.app import export as export_module
from kvpo.app.build import build_setup
from kvpo.app.cli import main
from kvpo.app.configuration import preset
from kvpo.app.export import export
from kvpo.app.model_card import licence_of, model_card
from kvpo.app.origin import record_of, recorded, warn_of_other_values
from kvpo.app.sources.common import first_block
from kvpo.app.sources.wan_parts import wan_weights
from kvpo.config_checks import ConfigurationError
from kvpo.models.adapter_files import load_adapter_state
from kvpo.models.adapters import merge_adapter
from kvpo.models.export import save_public_checkpoint
from kvpo.training.run import Run
from kvpo.training.run_directory import RunDirectory
from kvpo.training.trainer import Trainer
from tests.tiny_wan import tiny_wan

ADAPTERS = ("peft", "diffusers-lora", "comfy")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of two runs of one update, ``fresh`` and ``continued`` from lora.pt, beside their files."""
    folder = tmp_path_factory.mktemp("exports")
    tiny_wan("longlive-1.3b", folder)
    lora = {"backbone__lora": str(folder / "lora.pt")}
    for name, changes in (("fresh", {}), ("continued", lora)):
        config = tiny_wan("longlive-1.3b", folder, **changes)
        with RunDirectory(folder / name, config) as directory:
            directory.begun = True
            trainer = Trainer(build_setup(config))
            trainer.step()
            run = Run(trainer.setup, trainer, directory.checkpoints, None, lambda *_: None, best=(1, 1.0))
            run.save()
    return folder


def block(folder: Path, **given: Any) -> Tensor:
    config = tiny_wan("longlive-1.3b", folder, **{f"backbone__{name}": str(v) for name, v in given.items()})
    return first_block(config, wan_weights(config).model)


def test_every_layout_loads_again_and_generates_the_same_block(runs: Path, tmp_path: Path) -> None:
    made: dict[str, Tensor] = {}
    for layout in (*ADAPTERS, "diffusers", "pt"):
        out = export(runs / "continued", tmp_path / layout, layout=layout)
        if layout in ADAPTERS:
            made[layout] = block(runs, lora=out)
            assert recorded(load_adapter_state(out).files[0])["settings"]["stream.window"] == 12
        else:
            made[layout] = block(runs, checkpoint=out)
        card = out / "README.md" if layout != "pt" else tmp_path / "pt.md"
        assert "lora.pt` and takes its place" in card.read_text()
    for layout, latents in made.items():
        assert (latents - made["peft"]).abs().max() <= 1e-5, layout
    assert (made["peft"] - block(runs, lora=runs / "lora.pt")).abs().max() > 1e-4


def test_the_comfy_layout_has_every_name_of_the_model_and_no_alpha(runs: Path, tmp_path: Path) -> None:
    out = export(runs / "fresh", tmp_path / "mine", layout="comfy")
    names = load_file(out / "mine.safetensors")
    weights = set(wan_weights(tiny_wan("longlive-1.3b", runs)).model.state_dict())
    layers = {name.removeprefix("diffusion_model.").rpartition(".lora_")[0] for name in names}
    assert len(names) == 40 and all(name.startswith("diffusion_model.blocks.") for name in names)
    assert {f"{layer}.base_layer.weight" for layer in layers} <= weights
    assert all(name.endswith(("lora_A.weight", "lora_B.weight")) for name in names)


@pytest.mark.parametrize(("layout", "rank"), [("comfy", 0), ("diffusers-lora", 0), ("peft", 1)])
def test_given_and_difference_add_up_to_the_continued_adapter(
    runs: Path, tmp_path: Path, layout: Any, rank: int, caplog: pytest.LogCaptureFixture
) -> None:
    whole = load_adapter_state(export(runs / "continued", tmp_path / "whole", layout=layout))
    words = [str(runs / "continued"), "--layout", layout, "--out", str(tmp_path / "part")]
    assert main(["export", *words, "--difference", *([str(rank)] if rank else [])]) == 0
    part, given = load_adapter_state(tmp_path / "part"), load_adapter_state(runs / "lora.pt")
    assert {part.pair(module)[0].shape[0] for module in part.modules} == {rank or 4}
    config = tiny_wan("longlive-1.3b", runs, optim__lora_rank=0, optim__lr=1e-3)
    continued, both = wan_weights(config).model, wan_weights(config).model
    merge_adapter(continued, whole)
    for adapter in (given, part):
        merge_adapter(both, adapter)
    worst = max(float((a - b).detach().abs().max())
                for a, b in zip(continued.parameters(), both.parameters(), strict=True))  # fmt: skip
    record = recorded(part.files[0])
    assert record["added_to"] == str(runs / "lora.pt") and (worst <= 1e-6) == (rank == 0)
    assert (record["lost"] == 0) == (rank == 0) and record["rank"] == (rank or 4)
    caplog.clear()
    block(runs, lora=tmp_path / "part", **({"lora_start": "merge"}))
    assert "is to be added to the adapter" in caplog.text
    caplog.clear()
    together = f"{runs / 'lora.pt'},{tmp_path / 'part'}"
    latents = block(runs, lora=together, lora_start="merge")
    expected = block(runs, lora=tmp_path / "whole", lora_start="merge")
    assert ((latents - expected).abs().max() <= 1e-5) == (rank == 0)
    assert "is to be added to the adapter" not in caplog.text
    assert (
        f"--backbone.lora {together.split(',')[0]},part --backbone.lora_start merge"
        in (tmp_path / "part" / "README.md").read_text()
    )
    if rank == 0:
        config = tiny_wan("longlive-1.3b", runs, backbone__lora=together, optim__lora_rank=6)
        assert (first_block(config, wan_weights(config).model) - expected).abs().max() <= 1e-5


def test_differences_to_nothing_and_pushes_of_a_file_are_refused(runs: Path, tmp_path: Path) -> None:
    for run, layout, given, match in (
        ("fresh", "peft", {"difference": 0}, "--difference: must be left out, since .* continued no adapter"),
        ("continued", "pt", {"difference": 0}, "since layout pt holds all weights"),
        ("continued", "peft", {"difference": -1}, "must be a rank, or 0 for an exact one, got -1"),
        ("continued", "peft", {"push": "it"}, "--push it: must be a repository of the hub, owner/name"),
    ):
        with pytest.raises(ConfigurationError, match=match):
            export(runs / run, tmp_path / "out", layout=layout, **given)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="update-000000: its adapter changes nothing of what is generated"):
        begin = tiny_wan("longlive-1.3b", runs)
        with RunDirectory(tmp_path / "begin", begin) as directory:
            directory.begun = True
            trainer = Trainer(build_setup(begin))
            Run(trainer.setup, trainer, directory.checkpoints, None, lambda *_: None, best=(0, 1.0)).save()
        export(tmp_path / "begin", tmp_path / "out", layout="peft", checkpoint="latest")
    assert not (tmp_path / "out").exists()


def test_a_file_that_does_something_else_is_not_put_in_place(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def twice(directory: Path, adapter: Any, **how: Any) -> None:
        halves = {name: 2 * value for name, value in adapter.tensors.items()}
        export_module.save_peft_adapter(
            directory, type(adapter)(halves, adapter.rank, adapter.alpha, "x"), **how
        )

    monkeypatch.setattr(export_module, "save_comfy_adapter", twice)
    with pytest.raises(ValueError, match="--layout comfy: loaded again, its first block is .* nothing was"):
        export(runs / "fresh", tmp_path / "out", layout="comfy")
    assert not list(tmp_path.iterdir())


def test_a_file_of_all_weights_that_is_not_put_in_place_leaves_no_card(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which would bar the same command."""

    def killed(path: Path, tensors: Any, *, finish: Any, **how: Any) -> None:
        def last(written: Path) -> None:
            finish(written)
            raise KeyboardInterrupt

        save_public_checkpoint(path, tensors, finish=last, **how)

    with monkeypatch.context() as once:
        once.setattr(export_module, "save_public_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            export(runs / "fresh", tmp_path / "all.pt", layout="pt")
    assert not list(tmp_path.iterdir())
    export(runs / "fresh", tmp_path / "all.pt", layout="pt")
    assert {path.name for path in tmp_path.iterdir()} == {"all.pt", "all.pt.md"}


def test_loading_under_other_values_warns_by_name(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    out = export(runs / "fresh", tmp_path / "mine", layout="comfy")
    merged = export(runs / "fresh", tmp_path / "merged.pt", layout="pt")
    record = recorded(out / "mine.safetensors")
    assert record["rewards"] == ["tests.tiny_wan:brightness"] and record["checkpoint"] == "update-000001"
    assert len(record["backbone"]) == len(record["run"]) == 64 and record["kvpo"]
    caplog.set_level(logging.WARNING)
    caplog.clear()
    wan_weights(tiny_wan("longlive-1.3b", runs, backbone__lora=str(out)))
    wan_weights(tiny_wan("longlive-1.3b", runs, backbone__checkpoint=str(merged)))
    assert not caplog.text
    changes: dict[str, Any] = {"stream__window": 9, "stream__schedule": (1.0, 0.5)}
    wan_weights(tiny_wan("longlive-1.3b", runs, backbone__lora=str(out), **changes))
    assert (
        "mine.safetensors was made with stream.window 12 (here 9), stream.schedule [1.0, 0.75" in caplog.text
    )
    assert "(here [1.0, 0.5]): it may not do here what it did there" in caplog.text
    wan_weights(tiny_wan("longlive-1.3b", runs, backbone__lora=str(out), stream__size=(4, 2)))
    assert "was made with stream.size [2, 2] (here [4, 2])" in caplog.text
    caplog.clear()
    wan_weights(tiny_wan("longlive-1.3b", runs, backbone__checkpoint=str(merged), **changes))
    assert "merged.pt was made with stream.window 12 (here 9)" in caplog.text
    caplog.clear()
    wan_weights(tiny_wan("longlive-1.3b", runs, backbone__lora=str(out), backbone__checkpoint=str(merged)))
    assert f"other base weights (digest {record['backbone'][:12]}, here " in caplog.text
    for layout in ("bfloat16", "diffusers"):  # the digest is of the weights, not of their file
        stored = torch.load(runs / "base.pt", weights_only=True)["generator"]
        path = runs / f"{layout}.safetensors"
        save_file({n: v.bfloat16() if layout == "bfloat16" else v.clone() for n, v in stored.items()}, path)
        caplog.clear()
        wan_weights(tiny_wan("longlive-1.3b", runs, backbone__lora=str(out), backbone__checkpoint=str(path)))
        assert not caplog.text


def test_the_card_says_what_it_is_how_it_loads_and_what_was_measured(
    runs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = shutil.copytree(runs / "continued", tmp_path / "run")
    numbers = {
        "prompts": 16,
        "base_mean": 0.5,
        "aligned_mean": 0.75,
        "paired_gain": 0.25,
        "paired_se": 0.03125,
    }
    summary = {
        "checked": {"update": 1, "weights": "average"},
        "held_out": {"long": numbers},
        "verdict": "Up.",
    }
    (run / "summary.json").write_text(json.dumps(summary))
    (runs / "README.md").write_text("---\nlicense: cc-by-nc-4.0\n---\n# A base\n")
    read = {
        "peft": "PeftModel.from_pretrained",
        "diffusers-lora": 'load_lora_adapter("mine"',
        "comfy": "Put `mine.safetensors` into `models/loras`",
        "diffusers": '.from_pretrained("mine")',
    }
    for layout, words in read.items():
        out = export(run, tmp_path / layout / "mine", layout=layout)  # type: ignore[arg-type]
        text = (out / "README.md").read_text()
        fields = yaml.safe_load(text.split("---")[1])
        assert fields["license"] == "cc-by-nc-4.0" and fields["pipeline_tag"] == "text-to-video"
        assert words in text and "kvpo generate --preset longlive-1.3b" in text
        assert " --stream.size 2,2 --optim.autocast none --prompts prompts.txt" in text, "not the preset's"
        assert "| long | 16 | 0.5000 | 0.7500 | +0.2500 | 0.0312 |" in text and "Up." in text
        assert text.count("`kvpo export RUN --layout") == 2 and "| stream.window | `12` |" in text
        assert "`tests.tiny_wan:brightness`" in text and str(runs / "base.pt") in text
        continued = f"It continues the adapter `{runs / 'lora.pt'}` and takes its place."
        assert continued in text and "base_model" not in fields
    part = export(run, tmp_path / "part", layout="comfy", difference=0)
    text = (part / "README.md").read_text()
    assert f"to be added to the adapter `{runs / 'lora.pt'}`" in text and "| long | 16 |" in text
    assert "`kvpo export RUN --layout peft --difference`" in text and "the best difference" not in text
    caplog.set_level("INFO", logger="kvpo")
    text = (export(run, tmp_path / "less", layout="comfy", difference=1) / "README.md").read_text()
    assert re.search(r"It is the best difference of rank 1, without [0-9.]+ % of the whole\.", text)
    assert "were not tested on held-out prompts" in text, "the run's numbers are those of the whole"
    assert "loaded again, its first block is that of the difference at this rank to" in caplog.text
    assert not re.search(r"incomplete.*prefix", caplog.text)
    raw = export(run, tmp_path / "raw", layout="peft", weights="raw")
    assert "were not tested on held-out prompts" in (raw / "README.md").read_text()
    (runs / "README.md").unlink()
    assert licence_of(runs / "base.pt") == "other"
    assert "license: other" in (export(run, tmp_path / "o", layout="comfy") / "README.md").read_text()


def test_a_geometry_of_relative_positions_is_recorded(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """No shape tells it from the preset's, so that only the record can."""
    own = preset("longlive-1.3b", {"device": "cpu", "backbone.geometry": "1.3b-relative"})
    record = record_of(own, "digest", tmp_path, "average") | {"base": "base.pt"}
    save_file({}, tmp_path / "mine.safetensors", {"kvpo": json.dumps(record)})
    warn_of_other_values(tmp_path / "mine.safetensors", own)
    assert not caplog.text
    warn_of_other_values(tmp_path / "mine.safetensors", preset("longlive-1.3b", {"device": "cpu"}))
    assert "was made with backbone.geometry 1.3b-relative (here 1.3b)" in caplog.text
    text = model_card("comfy", tmp_path / "mine", record, "apache-2.0", tmp_path)
    assert " --backbone.geometry 1.3b-relative " in text


def test_the_card_of_the_embedded_generator_names_no_command_that_is_refused(tmp_path: Path) -> None:
    record = {
        "base": "", "lora": "", "rewards": ["world"], "method": "kvpo", "kvpo": "0.1.0", "weights": "average",
        "checkpoint": "update-000040", "settings": {"preset": "demo"},
    }  # fmt: skip
    text = model_card("peft", tmp_path / "mine", record, "apache-2.0", tmp_path)
    assert "PeftModel.from_pretrained" in text and "kvpo generate" not in text


def test_the_card_has_what_evaluate_measured_where_the_run_tested_other_weights(tmp_path: Path) -> None:
    record = {
        "base": "", "lora": "", "rewards": ["world"], "method": "kvpo", "kvpo": "0.1.0", "weights": "raw",
        "checkpoint": "update-000040", "settings": {"preset": "demo"},
    }  # fmt: skip
    own = {"prompts": 9, "base_mean": 0.5, "aligned_mean": 0.625, "paired_gain": 0.125, "paired_se": 0.01}
    checked = {"checked": {"update": 40, "weights": "average"}, "held_out": {}, "verdict": "Another's."}
    (tmp_path / "summary.json").write_text(json.dumps(checked))
    evaluation = {"checkpoint": "update-000040", "split": "test", "held_out": {"long": own}, "verdict": "Up."}
    for extra, there in (({"weights": "raw"}, True), ({"weights": "average"}, False),
                         ({"weights": "raw", "frames": "a.png"}, False)):  # fmt: skip
        (tmp_path / "evaluation.json").write_text(json.dumps(evaluation | extra))
        text = model_card("peft", tmp_path / "mine", record, "apache-2.0", tmp_path)
        assert ("| long | 9 | 0.5000 | 0.6250 | +0.1250 | 0.0100 |\n\nUp." in text) is there
        assert ("were not tested" in text) is not there


class Hub(BaseHTTPRequestHandler):
    """The four requests of an upload, as the hub answers them."""

    received: dict[str, Any] = {}
    refused = False

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        answer: dict[str, Any] = {}
        if self.refused:
            self._answer(403, {"error": "this token may not write"})
            return
        if self.path == "/api/repos/create":
            self.received["created"] = json.loads(body)
            answer = {"url": "http://127.0.0.1/me/mine", "name": "me/mine", "id": "1"}
        elif self.path.endswith("validate-yaml"):
            self.received["card"] = json.loads(body)["content"]
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            answer = {"files": [{"path": one["path"], "uploadMode": "regular", "shouldIgnore": False}
                                for one in files]}  # fmt: skip
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines()]
            self.received["files"] = {
                line["value"]["path"]: base64.b64decode(line["value"]["content"])
                for line in lines if line["key"] == "file"
            }  # fmt: skip
            answer = {"success": True, "commitUrl": "http://127.0.0.1/me/mine/commit/0", "commitOid": "0"}
        self._answer(200, answer)

    def _answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Says nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(Hub, "received", {})
    yield Hub
    server.shutdown()
    server.server_close()


def test_a_push_uploads_the_directory_and_its_failure_leaves_the_export(
    runs: Path, tmp_path: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = ["export", str(runs / "fresh"), "--layout", "comfy", "--push", "me/mine"]
    assert main([*words, "--out", str(tmp_path / "mine")]) == 0
    created = hub.received["created"]
    # Its two spellings in versions of the client.
    assert created["name"] == "mine" and (created.get("private") or created.get("visibility") == "private")
    sent = hub.received["files"]
    assert sent == {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert set(sent) == {"README.md", "mine.safetensors"}
    monkeypatch.setattr(Hub, "refused", True)
    capsys.readouterr()
    assert main([*words, "--out", str(tmp_path / "again")]) == 1
    assert f"`hf upload me/mine {tmp_path / 'again'}` uploads it" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "again").iterdir()} == {"README.md", "again.safetensors"}


def test_a_file_of_all_weights_is_pushed_with_its_card(
    runs: Path, tmp_path: Path, hub: type[Hub], capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["export", str(runs / "fresh"), "--layout", "pt", "--push", "me/mine"]
    assert main([*words, "--out", str(tmp_path / "all.pt")]) == 0
    card = (tmp_path / "all.pt.md").read_text()
    assert hub.received["files"] == {"README.md": card.encode(), "all.pt": (tmp_path / "all.pt").read_bytes()}
    assert "a whole transformer in the public layout" in card and "--backbone.checkpoint all.pt" in card
    (tmp_path / "other.pt.md").touch()
    assert main([*words, "--out", str(tmp_path / "other.pt")]) == 1
    assert not (tmp_path / "other.pt").exists() and "other.pt.md" in capsys.readouterr().err
