"""Public generators, shrunk: from files in the public layouts to updates, videos and held-out numbers."""

import gc
import hashlib
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from kvpo.app.build import build_setup, source_of
from kvpo.app.prompt_sets import FilePrompts
from kvpo.app.sources import wan_parts
from kvpo.app.sources.wan_parts import WanCodec, open_weights, wan_weights
from kvpo.config_checks import ConfigurationError
from kvpo.engine.scoring import Clip, in_pixels
from kvpo.engine.stream import stream_latents
from kvpo.models.adapter_files import load_adapter_state
from kvpo.models.adapters import adapter_state, base_state
from kvpo.models.checkpoints import load_transformer_state
from kvpo.models.export import save_peft_adapter
from kvpo.models.offload import on_device
from kvpo.models.wan_vae import DecodeState, WanVAE
from kvpo.prompts import ClipPrompt
from kvpo.rewards.reward import CombinedScorer, Reward, networks_of
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

        texts, tape = setup.backbone.texts(prompt), setup.backbone.tape("test")
        trained = stream_latents(setup.generator, prompt, texts, tape)
        with policy_of(setup.model).reference():
            assert torch.equal(stream_latents(setup.generator, prompt, texts, tape), trained)
        outputs.append(trained)
        assert adapter_state(setup.model).rank == 2
        numbers = Trainer(setup).step()
        assert numbers["simplex_kl"] == numbers["velocity_kl"] == numbers["ratio_deviation"] == 0.0
    assert torch.allclose(*outputs, atol=1e-3)
    plain = build_setup(tiny_wan("longlive-1.3b", files))
    prompt = plain.training_prompts(0)
    bare = stream_latents(plain.generator, prompt, plain.backbone.texts(prompt), plain.backbone.tape("test"))
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
    training, validation, test = source_of(config).split(config)
    sets = [training, validation["long"], test["long"]]
    texts = [prompt.segments for own in sets for prompt in own]
    assert [len(own) for own in sets] == [2, 2, 2] and len(set(texts)) == 6
    draw = FilePrompts(tuple(training), seed=0, count=2)
    assert {p.segments for p in draw(0)} == {p.segments for p in training}
    assert [p.id for p in draw(3)] == [6, 7] and draw(3) == draw(3)


@pytest.mark.parametrize("name", ["checkpoint", "encoders"])
def test_an_empty_path_names_the_setting_and_the_way_out(files: Path, name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"backbone\.{name}: empty.*--"):
        build_setup(tiny_wan("longlive-1.3b", files, **{f"backbone__{name}": ""}))


def test_too_few_prompts_and_a_wrong_rank_are_refused(files: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"prompts\.file.*leave none"):
        build_setup(tiny_wan("longlive-1.3b", files, evaluation__test_prompts=4))
    lora = str(files / "lora.pt")
    with pytest.raises(ConfigurationError, match=r"optim\.lora_rank: 4.*set it to 2"):
        build_setup(tiny_wan("longlive-1.3b", files, backbone__lora=lora, optim__lora_rank=4))


def test_branches_share_what_was_decoded_before_the_fork(monkeypatch: pytest.MonkeyPatch) -> None:
    vae, decoded = WanVAE(tiny_vae()), []
    decode = vae.decode_stream

    def counted(latents: Tensor, state: DecodeState) -> tuple[Tensor, DecodeState]:
        decoded.append(latents.shape[0] * latents.shape[1])
        return decode(latents, state)

    monkeypatch.setattr(vae, "decode_stream", counted)
    draws = torch.Generator().manual_seed(1)
    past, own = torch.randn(5, 4, 2, 2, generator=draws), torch.randn(3, 2, 4, 2, 2, generator=draws)
    WanCodec(vae, "cpu").decode(own, past)
    assert sum(decoded) == 5 + 3 * 2


def test_the_text_encoder_is_loaded_once_and_let_go(files: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded: list[weakref.ref[Any]] = []
    load = wan_parts.load_text_encoder

    def counted(*arguments: Any, **options: Any) -> Any:
        encoder = load(*arguments, **options)
        loaded.append(weakref.ref(encoder.model))
        return encoder

    monkeypatch.setattr(wan_parts, "load_text_encoder", counted)
    config = tiny_wan("longlive-1.3b", files, segments=2)
    trainer = Trainer(build_setup(config))
    gc.collect()
    assert len(loaded) == 1 and loaded[0]() is None
    trainer.step()
    trainer.step()
    for prompts in (*trainer.setup.validation.values(), *trainer.setup.test.values()):
        trainer.setup.backbone.texts(prompts)
    assert len(loaded) == 1


def published(files: Path) -> Path:
    """A checkpoint as the public KVPO trainer writes it for an adapter."""
    adapter = torch.load(files / "lora.pt", weights_only=True)["generator_lora"]
    average = {"model." + n.replace(".weight", ".default.weight"): v + 0.01 for n, v in adapter.items()}
    content = {
        "step": 3,
        "samples_seen": 8,
        "generator_lora": adapter,
        "optimizer": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-5}]},
        "lr_scheduler": {"last_epoch": 3},
        "ema": average,
        "initial_generator_lora": {name: value - 0.01 for name, value in adapter.items()},
    }
    torch.save(content, files / "checkpoint_samples_8.pt")
    return files / "checkpoint_samples_8.pt"


@pytest.mark.parametrize(("entry", "shift"), [("", 0.0), ("#ema", 0.01), ("#initial_generator_lora", -0.01)])
def test_published_adapters_and_their_averages(files: Path, entry: str, shift: float) -> None:
    tiny_wan("longlive-1.3b", files)
    given = torch.load(files / "lora.pt", weights_only=True)["generator_lora"]
    changes = {"backbone__lora": f"{published(files)}{entry}"}
    weights = wan_weights(tiny_wan("longlive-1.3b", files, **changes))
    found = adapter_state(weights.model).tensors
    assert found.keys() == given.keys()
    assert all(torch.equal(found[name], value + shift) for name, value in given.items())
    plain = wan_weights(tiny_wan("longlive-1.3b", files, backbone__lora=str(published(files))))
    assert (plain.base_sha256 == weights.base_sha256) == (entry == "")


@pytest.mark.parametrize(("entry", "shift"), [("", 0.0), ("#ema", 1.0)])
def test_published_weights_without_prefix_and_their_average(files: Path, entry: str, shift: float) -> None:
    tiny_wan("longlive-1.3b", files)
    given = torch.load(files / "base.pt", weights_only=True)["generator"]
    bare = {name.removeprefix("model."): value for name, value in given.items()}
    average = {f"model._fsdp_wrapped_module.{name}": value + 1 for name, value in bare.items()}
    torch.save({"generator": bare, "ema": average, "step": 3}, files / "full.pt")
    changes = {"backbone__checkpoint": f"{files / 'full.pt'}{entry}"}
    state = wan_weights(tiny_wan("longlive-1.3b", files, optim__lora_rank=0, **changes)).model.state_dict()
    assert all(torch.equal(state[name], value + shift) for name, value in bare.items())


def test_the_digest_is_of_the_weights_not_of_their_name_or_neighbours(files: Path, tmp_path: Path) -> None:
    tiny_wan("longlive-1.3b", files)
    state = load_transformer_state(files / "base.pt").tensors
    save_file(state, tmp_path / "diffusion_pytorch_model.safetensors")

    def digest(path: Path) -> str:
        return wan_weights(tiny_wan("longlive-1.3b", files, backbone__checkpoint=str(path))).base_sha256

    before = digest(tmp_path)
    (tmp_path / "Wan2.1_VAE.pth").write_bytes(b"fetched later")
    assert digest(tmp_path) == before
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "renamed.safetensors")
    assert digest(tmp_path / "renamed.safetensors") == before
    state["head.head.bias"] += 1
    save_file(state, tmp_path / "changed.safetensors")
    assert digest(tmp_path / "changed.safetensors") != before


def test_merging_rounds_once(files: Path) -> None:
    """W + B A in float32, then bfloat16: not the sum of a rounded W."""
    tiny_wan("longlive-1.3b", files)
    lora = {"backbone__lora": str(files / "lora.pt"), "backbone__lora_start": "merge"}
    low = wan_weights(tiny_wan("longlive-1.3b", files, optim__autocast="bfloat16", **lora)).model
    base, adapter = load_transformer_state(files / "base.pt").tensors, load_adapter_state(files / "lora.pt")
    for module in adapter.modules:
        a, b = adapter.pair(module)
        expected = (base[f"{module}.weight"] + b @ a).to(torch.bfloat16)
        assert torch.equal(base_state(low)[f"{module}.weight"], expected)
    assert len(adapter.modules) == 20


def test_offloading_changes_no_number_and_leaves_networks_where_they_were(files: Path) -> None:
    results = []
    for offload in (False, True):
        changes = {"backbone__offload": offload, "rewards__scorers": ["tests.tiny_wan:network"]}
        trainer = Trainer(build_setup(tiny_wan("longlive-1.3b", files, segments=2, **changes)))
        results.append(trainer.step())
        scorer = trainer.setup.judges.scorer
        assert isinstance(scorer, Reward) and scorer.cache is not None
        assert (scorer.device is not None) == offload
    assert results[0] == results[1]


def test_networks_visit_the_device_and_return_without_a_copy() -> None:
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    network[0].bias = network[1].bias  # tied
    other, last = nn.Linear(1, 1), nn.Linear(1, 1)
    scorer = CombinedScorer((Wrapped(network), Wrapped(partial(max, [other], key=last), "other")))
    assert list(networks_of(scorer)) == [network, other, last]
    before = {name: value for name, value in (*network.named_parameters(), *network.named_buffers())}
    with on_device([network], "meta"):
        assert all(value.is_meta for value in (*network.parameters(), *network.buffers()))
        assert network[0].bias is network[1].bias
    after = {name: value for name, value in (*network.named_parameters(), *network.named_buffers())}
    assert all(after[name] is value for name, value in before.items())


@dataclass(frozen=True)
class Wrapped:
    network: object
    name: str = "wrapped"

    @property
    def components(self) -> tuple[str, ...]:
        return (self.name,)

    def __call__(self, video_BTCHW: Tensor, prompts: Sequence[ClipPrompt]) -> dict[str, Tensor]:
        return {self.name: video_BTCHW.mean((1, 2, 3, 4))}


def test_the_vae_may_decode_in_bfloat16(files: Path) -> None:
    found = {}
    for precision in ("float32", "bfloat16"):
        config = tiny_wan("longlive-1.3b", files, segments=1, backbone__vae_precision=precision)
        shape = (1, 3, config.model.channels, config.model.latent_height, config.model.latent_width)
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            found[precision] = wan_parts.codec(config).decode(latents)
    assert found["bfloat16"].dtype == torch.float32
    difference = (found["bfloat16"] - found["float32"]).abs()
    assert 0 < float(difference.max()) and float(difference.mean()) < 0.02


def stated(files: Path, alpha: float) -> str:
    """The adapter of the tiny generator in a file that states its alpha."""
    path = files / f"lora-{alpha:g}.pt"
    torch.save({**torch.load(files / "lora.pt", weights_only=True), "lora_alpha": alpha}, path)
    return str(path)


def test_what_is_known_of_the_scale_is_printed_and_files_may_state_it(
    files: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tiny_wan("longlive-1.3b", files)
    caplog.set_level("INFO", logger="kvpo")
    bare = open_weights(tiny_wan("longlive-1.3b", files, backbone__lora=str(files / "lora.pt"))).adapter
    assert bare is not None and bare.scale(bare.modules[0]) == 1.0
    assert "alpha 2 (assumed to be the rank; where it is not, add an entry lora_alpha" in caplog.text
    given = open_weights(tiny_wan("longlive-1.3b", files, backbone__lora=stated(files, 8.0))).adapter
    assert given is not None and given.scale(given.modules[0]) == 4.0
    assert "layers of rank 2, alpha 8 (an entry of " in caplog.text
    save_peft_adapter(tmp_path / "peft", given)
    file = str(tmp_path / "peft" / "adapter_model.safetensors")
    again = open_weights(tiny_wan("longlive-1.3b", files, backbone__lora=file)).adapter
    assert again is not None and again.scale(again.modules[0]) == 4.0
    assert "alpha 8 (" + str(tmp_path / "peft" / "adapter_config.json") in caplog.text
    with pytest.raises(ConfigurationError, match=r"optim.lora_rank: 4, but .* has rank 2; set it to 2, or"):
        open_weights(tiny_wan("longlive-1.3b", files, backbone__lora=file, optim__lora_rank=4))


def test_merged_weights_of_another_scale_are_other_weights(files: Path) -> None:
    tiny_wan("longlive-1.3b", files)
    plain, strong = (
        wan_weights(tiny_wan("longlive-1.3b", files, backbone__lora=lora, backbone__lora_start="merge"))
        for lora in (str(files / "lora.pt"), stated(files, 8.0))
    )
    assert strong.base_sha256 != plain.base_sha256
    base, one, four = (
        weights["blocks.0.ffn.0.weight"]
        for weights in (
            load_transformer_state(files / "base.pt").tensors,
            base_state(plain.model),
            base_state(strong.model),
        )
    )
    assert torch.allclose(four - base, 4 * (one - base), atol=1e-5) and not torch.equal(one, base)
