"""What a run of a public generator trained: exported, loaded again, it generates the identical latents."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from kvpo.app.align import align
from kvpo.app.backbones import split_prompts, wan_backbone
from kvpo.app.export import export
from kvpo.app.generate import generate
from kvpo.config import Config
from kvpo.engine.stream import stream_latents
from tests.tiny_wan import tiny_wan


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Config, Tensor]:
    """Files, a finished run, its configuration, and the aligned latents that `kvpo generate` made."""
    files = tmp_path_factory.mktemp("files")
    config = tiny_wan("longlive-1.3b", files)
    run = tmp_path_factory.mktemp("runs") / "run"
    align(config, run)
    generate(config, run / "videos", run=run)
    return files, run, config, load_file(run / "videos/latents.safetensors")["000-aligned"]


def first_video(config: Config) -> Tensor:
    """The latents of the first test prompt, as `kvpo generate` numbers and draws them."""
    backbone = wan_backbone(config)
    prompt = [type(p)(0, p.segments, p.switches, p.num_frames) for p in split_prompts(config)[2]["short"][:1]]
    with torch.no_grad():
        return stream_latents(
            backbone.generator, prompt, backbone.texts(prompt), backbone.tape("generation")
        )[0]


@pytest.mark.parametrize("layout", ["peft", "diffusers-lora"])
def test_an_exported_adapter_continues_bit_for_bit(
    aligned: tuple[Path, Path, Config, Tensor], tmp_path: Path, layout: str
) -> None:
    files, run, _, expected = aligned
    written = export(run, tmp_path / "adapter", layout=layout)  # type: ignore[arg-type]
    config = tiny_wan("longlive-1.3b", files, backbone__lora=str(written))
    assert (first_video(config) - expected).abs().max() <= 1e-6


@pytest.mark.parametrize(("layout", "name"), [("pt", "merged.pt"), ("diffusers", "merged")])
def test_exported_weights_make_the_same_video(
    aligned: tuple[Path, Path, Config, Tensor], tmp_path: Path, layout: str, name: str
) -> None:
    files, run, _, expected = aligned
    written = export(run, tmp_path / name, layout=layout)  # type: ignore[arg-type]
    config = tiny_wan("longlive-1.3b", files, backbone__checkpoint=str(written))
    assert (first_video(config) - expected).abs().max() <= 1e-3


def test_an_existing_target_is_not_overwritten(
    aligned: tuple[Path, Path, Config, Tensor], tmp_path: Path
) -> None:
    (tmp_path / "taken.pt").write_text("mine")
    with pytest.raises(ValueError, match=r"taken\.pt: already exists"):
        export(aligned[1], tmp_path / "taken.pt", layout="pt")
    assert (tmp_path / "taken.pt").read_text() == "mine"
