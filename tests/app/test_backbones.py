"""Public generators, shrunk: from files in the public layouts to updates, videos and held-out numbers."""

import hashlib
from pathlib import Path

import pytest
import torch

from kvpo.app.backbones import FilePrompts, WanCodec, split_prompts
from kvpo.app.build import build_setup
from kvpo.config_checks import ConfigurationError
from kvpo.engine.scoring import Clip, in_pixels
from kvpo.engine.stream import stream_latents
from kvpo.models.adapters import adapter_state
from kvpo.models.wan_vae import WanVAE
from kvpo.prompts import ClipPrompt
from kvpo.training.policy import policy_of
from kvpo.training.trainer import Trainer
from tests.models.test_wan_vae import tiny_model as tiny_vae
from tests.tiny_wan import tiny_wan


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("wan")


@pytest.mark.parametrize(
    ("name", "segments"),
    [("longlive-1.3b", 3), ("memflow-1.3b", 2), ("self-forcing-1.3b", 1), ("wan-14b", 1)],
)
def test_every_preset_collects_trains_and_moves(files: Path, name: str, segments: int) -> None:
    setup = build_setup(tiny_wan(name, files, segments=segments))
    trainer = Trainer(setup)
    before = {key: value.detach().clone() for key, value in trainer.policy.parameters.items()}
    numbers = trainer.step()
    assert numbers["gradient_norm"] > 0
    assert any(not torch.equal(before[key], value) for key, value in trainer.policy.parameters.items())
    assert set(setup.test) == {"short" if segments == 1 else "long"}


def test_the_starting_policy_with_a_given_adapter(files: Path) -> None:
    tiny_wan("longlive-1.3b", files)
    lora = str(files / "lora.pt")
    before = hashlib.sha256((files / "base.pt").read_bytes()).hexdigest()
    outputs = []
    for start in ("continue", "merge"):
        config = tiny_wan("longlive-1.3b", files, backbone__lora=lora, backbone__lora_start=start)
        setup = build_setup(config)

        prompt = setup.training_prompts(0)

        texts, tape = setup.texts(prompt), setup.tape("test")
        trained = stream_latents(setup.generator, prompt, texts, tape)
        with policy_of(setup.model, adapted=True).reference():
            assert torch.equal(stream_latents(setup.generator, prompt, texts, tape), trained)
        outputs.append(trained)
        assert adapter_state(setup.model).rank == 2
    assert torch.allclose(*outputs, atol=1e-3)
    plain = build_setup(tiny_wan("longlive-1.3b", files))
    prompt = plain.training_prompts(0)
    bare = stream_latents(plain.generator, prompt, plain.texts(prompt), plain.tape("test"))
    assert not torch.allclose(bare, outputs[0], atol=1e-3)
    assert hashlib.sha256((files / "base.pt").read_bytes()).hexdigest() == before


def test_branches_decode_as_whole_videos_do() -> None:
    codec = WanCodec(WanVAE(tiny_vae()), "cpu")
    draws = torch.Generator().manual_seed(1)
    past, own = torch.randn(3, 4, 2, 2, generator=draws), torch.randn(2, 2, 4, 2, 2, generator=draws)
    whole = codec.decode(torch.cat([past.expand(2, *past.shape), own], 1))
    after = codec.decode(own, past)
    assert whole.shape[1] == 17 and after.shape[1] == 8
    assert (whole[:, 9:] - after).abs().max() <= 1e-5


def test_clips_are_counted_in_pixel_frames() -> None:
    clip = in_pixels(Clip(6, 12, ClipPrompt("b", "a", 3)), 4)
    assert (clip.start, clip.stop, clip.prompt.switch, clip.prompt) == (21, 45, 12, "b")
    first = in_pixels(Clip(0, 3, ClipPrompt("a")), 4)
    assert (first.start, first.stop) == (0, 9)
    assert in_pixels(Clip(6, 12, ClipPrompt("b", "a", 3)), 1) == Clip(6, 12, ClipPrompt("b", "a", 3))


def test_a_prompt_file_is_split_once_and_used_up_in_passes(files: Path) -> None:
    config = tiny_wan("longlive-1.3b", files, segments=2)
    training, validation, test = split_prompts(config)
    sets = [training, validation["long"], test["long"]]
    texts = [prompt.segments for own in sets for prompt in own]
    assert [len(own) for own in sets] == [2, 2, 2] and len(set(texts)) == 6
    draw = FilePrompts(tuple(training), seed=0, count=2)
    assert {p.segments for p in draw(0)} == {p.segments for p in training}
    assert [p.id for p in draw(3)] == [6, 7] and draw(3) == draw(3)


@pytest.mark.parametrize("name", ["checkpoint", "vae", "text_encoder"])
def test_an_empty_path_names_the_setting_and_the_way_out(files: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"backbone\.{name}: empty.*--"):
        build_setup(tiny_wan("longlive-1.3b", files, **{f"backbone__{name}": ""}))


def test_too_few_prompts_and_a_wrong_rank_are_refused(files: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"prompts\.file.*leave none"):
        build_setup(tiny_wan("longlive-1.3b", files, evaluation__test_prompts=4))
    lora = str(files / "lora.pt")
    with pytest.raises(ConfigurationError, match=r"optim\.lora_rank: 4.*set it to 2"):
        build_setup(tiny_wan("longlive-1.3b", files, backbone__lora=lora, optim__lora_rank=4))
